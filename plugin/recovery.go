// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// This file is the supervisor: what happens between the death of a host and the moment when its successor serves, for
// all devices of one handler. Each handler has one goroutine that does it, supervise.
//
// The order is what the block contract rests on. (1) The old process is dead: its exit has been seen, so nobody writes
// to the old channel any more. (2) Its posted completions are taken, and the requests still in flight are parked. (3) A
// new host with a new channel loads the handler and reopens the devices. (4) The retained changes are sent again, then
// (5) the parked requests. (6) Only then new requests are let through; those that came meanwhile have waited in
// service.

const (
	// DefaultDeathBudget is how many deaths in a row, with no request completed between them, a handler may die.
	DefaultDeathBudget = 5
	// suspectDeaths in flight make a request a suspect, which is sent alone; poisonDeaths alone condemn it.
	suspectDeaths = 2
	poisonDeaths  = 3
	// firstBackoff is the pause after the second death in a row; it doubles with each further one, up to maxBackoff.
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
	// recoverTimeout bounds each load and each reopen.
	recoverTimeout = 60 * time.Second
)

// service returns the channel of the host that serves the device now, and waits while there is none. EIO: there will be
// none, or the device has failed. ETIMEDOUT: the context has ended.
func (h *handler) service(ctx context.Context, d *Device) (*shared.Channel, error) {
	for {
		h.mu.Lock()
		state, resumed, host := h.state, h.resumed, h.host
		h.mu.Unlock()
		if err := d.failure(); err != nil {
			return nil, err
		}
		switch state {
		case HandlerRunning:
			return host.channel, nil
		case HandlerFailed:
			return nil, control.Failf(syscall.EIO, "handler %s has failed: %v", h.subtype, h.failure())
		}
		select {
		case <-resumed:
		case <-d.hasFailed:
		case <-ctx.Done():
			return nil, control.Failf(syscall.ETIMEDOUT, "handler %s is being restarted", h.subtype)
		}
	}
}

// suspend stops new requests; those in flight are not touched. It is called when a host has died, before its requests
// end, and for a planned replacement.
func (h *handler) suspend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == HandlerRunning {
		h.setState(HandlerRecovering)
		h.resumed = make(chan struct{})
	}
}

// resume lets requests through again, or, with err not nil, to their end. h.mu is held.
func (h *handler) resume(err error) {
	h.lastError = err
	if err != nil {
		h.setState(HandlerFailed)
	} else {
		h.setState(HandlerRunning)
	}
	close(h.resumed)
}

// setState publishes a change; h.mu is held.
func (h *handler) setState(s HandlerState) {
	if h.state != s {
		h.log.Debug("handler state", "handler", h.subtype, "was", string(h.state), "is", string(s))
	}
	h.state = s
}

func (h *handler) failure() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lastError
}

// park takes over an op whose channel was abandoned.
func (h *handler) park(o *op) {
	if o.req.Sent && o.d.opts.FailFast {
		o.end(errDied)
		return
	}
	h.mu.Lock()
	err := o.d.failure()
	switch {
	case err != nil:
	case h.state == HandlerFailed:
		err = h.lastError
	case h.state == HandlerRunning && h.host.channel.Owns(o.req):
		// Only stop abandons a channel in service; there are no devices then.
		err = errDied
	case h.state == HandlerRunning:
		// It was on its way to the old host when the new one took over.
		c := h.host.channel
		h.mu.Unlock()
		go h.resend(o, c)
		return
	default:
		h.parked = append(h.parked, o)
		if o.ended != nil {
			close(o.ended)
			o.ended = nil
		}
	}
	h.mu.Unlock()
	if err != nil {
		o.end(err)
	}
}

// resend sends a parked op to a channel, or parks it again.
func (h *handler) resend(o *op, c *shared.Channel) {
	if err := o.move(c); err != nil {
		o.req.Sent = false
		h.park(o)
		return
	}
	o.send()
	c.Kick(0)
}

// noteProgress records that a request has completed.
func (h *handler) noteProgress() {
	if !h.progress.Load() {
		h.progress.Store(true)
	}
}

// supervise waits for the death of each host of the handler and replaces it, until stop or until that is of no use.
func (h *handler) supervise() {
	defer close(h.supervised)
	for {
		h.mu.Lock()
		host := h.host
		h.mu.Unlock()
		select {
		case <-host.abandoned:
		case <-h.replaced: // by reload: look again
			continue
		case <-h.stopped:
			return
		}
		h.mu.Lock()
		current := h.host == host
		h.mu.Unlock()
		if !current {
			continue
		}
		if h.isStopped() {
			return
		}
		if err := h.recover(host); err != nil {
			h.giveUp(err)
			return
		}
	}
}

func (h *handler) isStopped() bool {
	select {
	case <-h.stopped:
		return true
	default:
		return false
	}
}

// recover replaces a dead host. Its error is why that is given up.
func (h *handler) recover(dead *host) error {
	began := time.Now()
	h.suspend()
	graves := []*host{dead} // their channels hold the payloads of parked requests
	defer func() {
		h.successor.Store(nil)
		for _, g := range graves {
			go g.stop()
		}
	}()
	var lastErr error
	for {
		if dead != nil {
			h.judge(dead)
		}
		if h.progress.Swap(false) {
			h.deathsInRow = 0
		}
		h.deathsInRow++
		if h.deathsInRow > h.lib.cfg.DeathBudget {
			return fmt.Errorf("died %d times in a row without completing a request (last: %w)", h.deathsInRow, lastErr)
		}
		if !h.backOff() {
			return errors.New("it is being unloaded")
		}
		next, err := h.startSuccessor()
		if err == nil {
			graves = append(graves, next)
			if err = h.takeOver(next); err == nil {
				graves = graves[:len(graves)-1]
				h.log.Warn("handler recovered", "handler", h.subtype, "pid", next.pid(), "after",
					time.Since(began).Round(time.Millisecond).String(), "restarts", h.restarts.Add(1))
				return nil
			}
		}
		lastErr = err
		h.log.Error("recovery failed, trying again", "handler", h.subtype, "error", err)
		dead = next
		if dead != nil {
			dead.kill()
		}
	}
}

// backOff waits before a restart; false when the handler is being unloaded.
func (h *handler) backOff() bool {
	var pause time.Duration
	if h.deathsInRow > 1 {
		pause = min(firstBackoff<<(h.deathsInRow-2), maxBackoff)
	}
	select {
	case <-h.stopped:
		return false
	case <-time.After(pause):
		return true
	}
}

// startSuccessor starts a host with the handler loaded. On error the host is returned too, if there is one.
func (h *handler) startSuccessor() (*host, error) {
	next, err := h.lib.takeHost()
	if err != nil {
		return nil, err
	}
	h.successor.Store(next)
	if h.isStopped() { // stop may have looked too early
		next.killFor(killedForRemoval)
	}
	ctx, cancel := context.WithTimeout(context.Background(), recoverTimeout)
	defer cancel()
	reply, err := h.loadInto(ctx, next)
	if err != nil {
		next.stop()
		return nil, err
	}
	h.mu.Lock()
	h.reply = reply
	h.mu.Unlock()
	return next, nil
}

// takeOver makes next the handler's host: it reopens the devices, replays, sends the parked requests, and resumes. On
// error next does not serve.
func (h *handler) takeOver(next *host) error {
	// From here on a death of next parks what it had, and is noticed by whoever waits below.
	for _, d := range h.lib.devicesServedBy(h) {
		if err := h.bringBack(d, next); err != nil {
			return err
		}
	}
	if err := h.sendParked(next); err != nil {
		return err
	}
	var late []*op // those that were on their way to the old host until now
	serve := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late, h.parked = h.parked, nil
		h.host = next
		h.direct.Store(next.channel)
		h.resume(nil)
	}
	if !next.enlist(serve, h.suspend) {
		return shared.ErrPeerGone
	}
	for _, o := range late {
		h.resend(o, next.channel)
	}
	return nil
}

// bringBack reopens one device and replays its retained changes. A device that its handler refuses fails alone; the
// error is only for the death of the host.
func (h *handler) bringBack(d *Device, next *host) error {
	if d.failure() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), recoverTimeout)
	defer cancel()
	err := d.open(ctx, next, true)
	if err == nil {
		err = d.replay(next.channel)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, shared.ErrPeerGone) || !next.alive():
		return fmt.Errorf("%s: %w", d.name, err)
	}
	d.fail(fmt.Errorf("cannot be recovered: %w", err))
	return nil
}

// sendParked sends the parked requests to next: suspects one at a time, then all others. ErrPeerGone when it died.
func (h *handler) sendParked(next *host) error {
	h.mu.Lock()
	all := h.parked
	h.parked = nil
	h.mu.Unlock()
	var suspects, others []*op
	for _, o := range all {
		switch {
		case o.d.failure() != nil:
			o.end(o.d.failure())
		case o.deaths >= suspectDeaths:
			suspects = append(suspects, o)
		default:
			others = append(others, o)
		}
	}
	for i, o := range suspects {
		ended := make(chan struct{})
		o.ended = ended
		if err := o.move(next.channel); err != nil {
			o.ended = nil
			h.parkAgain(append(suspects[i:], others...))
			return err
		}
		o.send()
		next.channel.Kick(0)
		<-ended
		if !next.alive() {
			h.parkAgain(append(suspects[i+1:], others...))
			return shared.ErrPeerGone
		}
	}
	for i, o := range others {
		if err := o.move(next.channel); err != nil {
			h.parkAgain(others[i:])
			return err
		}
		o.send()
		next.channel.Kick(0)
	}
	return nil
}

// parkAgain puts back what was not sent.
func (h *handler) parkAgain(list []*op) {
	h.mu.Lock()
	for _, o := range list {
		o.req.Sent = false
		h.parked = append(h.parked, o)
	}
	h.mu.Unlock()
	h.endParked()
}

// endParked ends the parked requests of devices that have failed meanwhile.
func (h *handler) endParked() {
	var ended []*op
	h.mu.Lock()
	h.parked = slices.DeleteFunc(h.parked, func(o *op) bool {
		failed := o.d.failure() != nil
		if failed {
			ended = append(ended, o)
		}
		return failed
	})
	h.mu.Unlock()
	for _, o := range ended {
		o.end(o.d.failure())
	}
}

// abort kills the hosts that may hold a request or a call of a device that is given up, and ends its requests that no
// host holds. The successor first: a recovery that ends meanwhile makes it the current one.
func (h *handler) abort() {
	if next := h.successor.Load(); next != nil {
		next.killFor(killedForRemoval)
	}
	h.current().killFor(killedForRemoval)
	h.endParked()
}

// recovering reports whether there is no host in service.
func (h *handler) recovering() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == HandlerRecovering
}

// judge looks at a host's death: which requests were in flight, what it says against them, and whether one is poison.
func (h *handler) judge(dead *host) {
	var inFlight, condemned []*op
	h.mu.Lock()
	for _, o := range h.parked {
		if o.req.Sent && dead.channel.Owns(o.req) {
			inFlight = append(inFlight, o)
		}
	}
	h.mu.Unlock()
	hung := dead.killedFor.Load() == killedForHang
	var outside bool
	switch dead.killedFor.Load() {
	case killedForNothing, killedForRemoval:
		outside = dead.process.killedFromOutside()
	}
	if hung {
		inFlight = overdue(inFlight)
	}
	if !outside {
		for _, o := range inFlight {
			o.deaths++
			if len(inFlight) == 1 {
				o.alone++
			} else {
				o.alone = 0
			}
			if o.alone >= poisonDeaths {
				condemned = append(condemned, o)
			}
		}
	}
	h.report(dead, inFlight, outside, len(condemned) > 0)
	for _, o := range condemned {
		h.unpark(o)
		o.end(control.Failf(syscall.EIO, "the handler's process died with this request %d times", o.deaths))
		h.noteProgress()
	}
}

func overdue(list []*op) []*op {
	var late []*op
	for _, o := range list {
		if o.req.Overdue() {
			late = append(late, o)
		}
	}
	return late
}

func (h *handler) unpark(o *op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.parked {
		if h.parked[i] == o {
			h.parked = append(h.parked[:i], h.parked[i+1:]...)
			return
		}
	}
}

// giveUp ends the handler's service for good: all its requests fail, and later ones too.
func (h *handler) giveUp(err error) {
	if h.isStopped() {
		err = control.Failf(syscall.ENODEV, "handler %s was unloaded", h.subtype)
	} else {
		h.log.Error("handler has failed; remove its devices, unload it and load it again", "handler", h.subtype,
			"reason", err)
		err = control.Failf(syscall.EIO, "%v", err) // whatever errno the last attempt ended with
	}
	h.mu.Lock()
	parked := h.parked
	h.parked = nil
	h.resume(err)
	h.mu.Unlock()
	for _, o := range parked {
		o.end(err)
	}
}
