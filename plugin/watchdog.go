// SPDX-License-Identifier: Apache-2.0

package plugin

import "time"

const (
	// DefaultTimeout is how long a request may take where DeviceOptions do not say.
	DefaultTimeout = 30 * time.Second
	// tick is the resolution of timeouts.
	tick = 250 * time.Millisecond
)

// ticks is a timeout as channels count it: at least one, 0 for none.
func ticks(timeout time.Duration) int64 {
	if timeout < 0 {
		return 0
	}
	return max(1, int64((timeout+tick-1)/tick))
}

// watchdog kills the hosts whose handlers have had a request for too long. It runs until stop is closed.
func (l *Library) watchdog(stop <-chan struct{}) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		l.settleComplaints()
		for _, h := range l.loaded() {
			for _, in := range []*host{h.successor.Load(), h.current()} {
				if in != nil && in.channel.Tick() {
					if in.killFor(killedForHang) {
						h.log.Error("handler hangs: killing its process", "handler", h.subtype, "pid", in.pid())
					}
				}
			}
		}
	}
}
