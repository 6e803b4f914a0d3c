// SPDX-License-Identifier: Apache-2.0

package plugin

import "time"

const (
	// DefaultTimeout is how long a request may take where DeviceOptions do not say.
	DefaultTimeout = 30 * time.Second
	// tick is the resolution of timeouts.
	tick = 250 * time.Millisecond
	// watchfulTicks is how often nothing must have been in flight until the watchdog sleeps.
	watchfulTicks = 4
)

// ticks is a timeout as channels count it: at least one, 0 for none.
func ticks(timeout time.Duration) int64 {
	if timeout < 0 {
		return 0
	}
	return max(1, int64((timeout+tick-1)/tick))
}

// watchdog kills the hosts whose handlers have had a request for too long. It runs until stop is closed, and sleeps
// while nothing is in flight.
func (l *Library) watchdog(stop <-chan struct{}) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for idle := 0; ; {
		select {
		case <-stop:
			return
		case <-l.busy:
			idle = 0
			l.asleep.Store(false)
			ticker.Reset(tick)
		case <-ticker.C:
			if idle++; l.tick() {
				idle = 0
			}
			if idle >= watchfulTicks && l.rest() {
				ticker.Stop()
				l.asleep.Store(true)
			}
		}
	}
}

// tick is what the watchdog does each time. It reports whether anything is in flight.
func (l *Library) tick() (busy bool) {
	for _, h := range l.loaded() {
		for _, in := range h.instances() {
			if in != nil && in.channel.Tick() {
				if in.killFor(killedForHang) {
					h.log.Error("handler hangs: killing its process", "handler", h.subtype, "pid", in.pid())
				}
			}
			busy = busy || in != nil && !in.channel.Idle()
		}
	}
	return busy
}

// rest reports whether still nothing is in flight. The next request that is sent wakes the watchdog.
func (l *Library) rest() bool {
	for _, h := range l.loaded() {
		for _, in := range h.instances() {
			if in != nil && !in.channel.Rest() {
				return false
			}
		}
	}
	return true
}

// wakeWatchdog is called as a request is sent.
func (l *Library) wakeWatchdog() {
	select {
	case l.busy <- struct{}{}:
	default: // it has yet to take notice of another one
	}
}

// instances are the processes that may have requests in flight, nil where there is none.
func (h *handler) instances() [2]*host { return [2]*host{h.successor.Load(), h.current()} }
