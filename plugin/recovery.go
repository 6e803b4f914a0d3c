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
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
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

// service returns the host that serves the device now, and waits while there is none. EIO: there will be none, or the
// device has failed. ETIMEDOUT: the context has ended first.
func (h *handler) service(ctx context.Context, d *Device) (*host, error) {
	for {
		h.mu.Lock()
		state, resumed, host := h.state, h.resumed, h.host
		h.mu.Unlock()
		if err := d.failure(); err != nil {
			return nil, err
		}
		switch state {
		case HandlerRunning:
			return host, nil
		case HandlerFailed:
			return nil, control.Failf(syscall.EIO, "handler %s has failed: %v", h.subtype, h.failure())
		}
		select {
		case <-resumed:
		case <-d.hasFailed:
		case <-ctx.Done():
			return nil, control.Failf(syscall.ETIMEDOUT, "the process of handler %s is still being replaced", h.subtype)
		}
	}
}

// suspend stops new requests; those in flight are not touched.
func (h *handler) suspend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.suspendLocked()
}

// died is called when a host has died that was put into service, before its requests end. The exit of one that has been
// replaced since then is nobody's concern.
func (h *handler) died(in *host) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.host == in {
		h.suspendLocked()
	}
}

// suspendLocked needs h.mu.
func (h *handler) suspendLocked() {
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

// failure is why the handler fails for good, nil while it does not.
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
	case h.state == HandlerRunning && h.host.channel.Owns(o.req) && o.req.Sent:
		// Only stop abandons a channel in service; there are no devices then.
		err = errDied
	case h.state == HandlerRunning:
		// It was on its way to the old host when the new one took over, or when that was put off.
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

// supervise replaces each host of the handler that dies, and any host on request, until stop or until that is of no
// use.
func (h *handler) supervise() {
	defer close(h.supervised)
	defer h.bury()
	for {
		host := h.current()
		select {
		case <-host.abandoned:
			if err := h.recover(host); err != nil {
				h.giveUp(err)
				return
			}
			h.bury()
		case call := <-h.reloads:
			call.done <- h.replace(call, host)
			if h.current().alive() {
				h.bury()
			}
		case <-h.life.Done():
			h.giveUp(nil)
			return
		}
	}
}

func (h *handler) isStopped() bool { return h.life.Err() != nil }

// bury frees hosts that are of no use any more.
func (h *handler) bury() {
	for _, g := range h.graves {
		h.lib.background.Go(g.stop)
	}
	h.graves = nil
}

// recover replaces a dead host. Its error is why that is given up.
func (h *handler) recover(dead *host) error {
	began := time.Now()
	h.suspend()
	h.graves = append(h.graves, dead)
	var lastErr error
	for {
		if dead != nil {
			h.judge(dead)
		}
		if h.progress.Swap(false) {
			h.deathsInRow = 0
		}
		if dead == nil || dead.killedFor.Load() != killedForRemoval {
			h.deathsInRow++
		}
		if h.deathsInRow > h.lib.cfg.DeathBudget {
			return fmt.Errorf("died %d times in a row without completing a request (last: %w)", h.deathsInRow, lastErr)
		}
		if !h.backOff() {
			return errors.New("it is being unloaded")
		}
		next, err := h.startSuccessor()
		if err == nil {
			if err = h.takeOver(next); err == nil {
				h.log.Warn("handler recovered", "handler", h.subtype, "pid", next.pid(), "after",
					time.Since(began).Round(time.Millisecond).String(), "restarts", h.restarts.Add(1))
				return nil
			}
		}
		lastErr = err
		h.log.Error("recovery failed, trying again", "handler", h.subtype, "error", err)
		if dead = next; dead != nil {
			dead.kill()
			h.graves = append(h.graves, dead)
		}
		h.successor.Store(nil)
	}
}

// backOff waits before a restart; false when the handler is being unloaded.
func (h *handler) backOff() bool {
	var pause time.Duration
	if h.deathsInRow > 1 {
		pause = min(firstBackoff<<(h.deathsInRow-2), maxBackoff)
	}
	select {
	case <-h.life.Done():
		return false
	case <-time.After(pause):
		return true
	}
}

// startSuccessor starts a host with the handler loaded, which is the successor then. On error there is none.
func (h *handler) startSuccessor() (*host, error) {
	h.mu.Lock()
	path := h.path
	h.mu.Unlock()
	next, reply, err := h.prepare(h.life, path)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.reply = reply
	h.mu.Unlock()
	return next, nil
}

// prepare starts a host and has it load a shared object; the host is the successor then. On error there is none.
func (h *handler) prepare(ctx context.Context, path string) (*host, *hostpb.LoadReply, error) {
	next, err := h.lib.takeHost()
	if err != nil {
		return nil, nil, err
	}
	h.announce(next)
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	reply, err := h.loadInto(ctx, next, path)
	if err != nil {
		h.successor.Store(nil)
		if ctx.Err() != nil {
			next.killFor(killedForHang) // it would not listen
		}
		next.stop()
		return nil, nil, err
	}
	return next, reply, nil
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
	return h.enterService(next)
}

// enterService sends the parked requests to a host that has all devices open, puts it into service and resumes.
func (h *handler) enterService(next *host) error {
	if err := h.sendParked(next); err != nil {
		return err
	}
	return h.serveFrom(next)
}

// serveFrom puts a host into service, which may be the one that was, resumes, and sends what is still parked.
// shared.ErrPeerGone: it is dead.
func (h *handler) serveFrom(next *host) error {
	var late []*op // those that were on their way to the old host until now
	serve := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late, h.parked = h.parked, nil
		h.host = next
		h.successor.Store(nil)
		h.direct.Store(next.channel)
		next.channel.Resume() // if it was suspended: nothing was to overtake what has been replayed
		h.resume(nil)
	}
	if !next.enlist(serve, func() { h.died(next) }) {
		return shared.ErrPeerGone
	}
	for _, o := range late {
		h.resend(o, next.channel)
	}
	return nil
}

// bringBack reopens one device and replays its retained changes. A device that its handler refuses fails alone, and so
// does one whose open hangs. The error is only for the death of the host.
func (h *handler) bringBack(d *Device, next *host) error {
	if d.failure() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(h.life, recoverTimeout)
	defer cancel()
	err := d.comeBack(ctx, next)
	switch {
	case err == nil:
		return nil
	case h.isStopped():
		return err
	case next.alive() && ctx.Err() != nil:
		// No other device can be opened in this process any more.
		next.killFor(killedForHang)
		d.fail(errors.New("cannot be recovered: its handler does not return from open"))
		h.noteProgress() // the next host is spared this device
		return err
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

// judge looks at a host's death: which requests were in flight, what it says against them, and whether one is poison.
func (h *handler) judge(dead *host) {
	if dead.judged {
		return
	}
	dead.judged = true
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

// giveUp ends the handler's service for good: all its requests fail, and later ones too. err is not looked at when the
// handler is being unloaded.
func (h *handler) giveUp(err error) {
	if h.isStopped() {
		err = control.Failf(syscall.ENODEV, "handler %s was unloaded", h.subtype)
	} else {
		h.log.Error("handler has failed; remove its devices, unload it and load it again", "handler", h.subtype,
			"reason", err)
		err = control.Failf(syscall.EIO, "%v", err) // whatever errno the last attempt ended with
	}
	h.suspend()
	h.mu.Lock()
	parked := h.parked
	h.parked = nil
	h.resume(err)
	h.mu.Unlock()
	for _, o := range parked {
		o.end(err)
	}
}
