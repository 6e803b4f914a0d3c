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
//
// A device in whose reopen or replay a host has died, or which takes long to be reopened, is put off: the next time it
// is reopened last, when the others are in service again. (3) to (5) happen then for it alone.

const (
	// DefaultDeathBudget is how many deaths in a row, with no request completed between them, a handler may die.
	DefaultDeathBudget = 5
	// suspectDeaths in flight make a request a suspect, which is sent alone; poisonDeaths alone condemn it.
	suspectDeaths = 2
	poisonDeaths  = 3
	// firstBackoff is the pause after the second death in a row; it doubles with each further one, up to maxBackoff.
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
	// reopenDeaths of hosts in a row, in the reopen or the replay of one device, make it fail.
	reopenDeaths = 3
	// recoverTimeout bounds each load, and each reopen of a device without a timeout.
	recoverTimeout = 60 * time.Second
	// patientShare is which part of the time for its reopen a device may keep others waiting; leastPatience at least.
	patientShare  = 6
	leastPatience = 250 * time.Millisecond
)

// service returns the host that serves the device now, and waits while there is none. EIO: there will be none, or the
// device has failed. ETIMEDOUT: the context has ended first.
func (h *handler) service(ctx context.Context, d *Device) (*host, error) {
	for {
		h.mu.Lock()
		state, resumed, host := h.state, h.resumed, h.host
		if state == HandlerRunning && d.putOff != nil {
			state, resumed = HandlerRecovering, d.putOff
		}
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
		h.noteLost(o)
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
	case h.state == HandlerRunning && o.d.putOff == nil:
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
	c.Kick(nil)
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
		h.lib.refill()
		h.bringBackLate(host)
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
	lastErr := fmt.Errorf("the process %s", dead.process.exitReason())
	for {
		var culprit *Device
		if dead != nil {
			culprit = h.judge(dead)
		}
		if h.progress.Swap(false) {
			h.deathsInRow = 0
		}
		if culprit == nil && (dead == nil || dead.killedFor.Load() != killedForRemoval) {
			h.deathsInRow++
		}
		if h.deathsInRow > h.lib.cfg.DeathBudget {
			return fmt.Errorf("died %d times in a row without completing a request (last: %w)", h.deathsInRow, lastErr)
		}
		if !h.backOff(culprit) {
			return errors.New("it is being unloaded")
		}
		next, err := h.startSuccessor()
		if err == nil {
			ready := time.Now()
			next.restart = true
			if err = h.takeOver(next); err == nil {
				h.log.Warn("handler recovered", "handler", h.subtype, "pid", next.pid(), "after",
					time.Since(began).Round(time.Millisecond).String(), "restarts", h.restarts.Load())
				h.log.Debug("handler recovered: where the time went", "handler", h.subtype, "process", next.prepared.process,
					"load", next.prepared.load, "devices", time.Since(ready))
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
		h.lib.refill()
	}
}

// backOff waits before a restart; false when the handler is being unloaded. The deaths of a culprit have a count of
// their own.
func (h *handler) backOff(culprit *Device) bool {
	deaths := h.deathsInRow
	if culprit != nil {
		deaths = culprit.reopenDeaths
	}
	if deaths <= 1 {
		return !h.isStopped()
	}
	pause := min(firstBackoff<<(deaths-2), maxBackoff)
	select {
	case <-h.life.Done():
		return false
	case <-time.After(pause):
		return true
	}
}

// startSuccessor starts a host with the handler loaded, which is the successor then. On error there is none.
func (h *handler) startSuccessor() (*host, error) {
	next, reply, err := h.prepare(h.life, h.object) // which only reload, on this goroutine, changes
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.reply = reply
	h.mu.Unlock()
	return next, nil
}

// prepare starts a host and has it load a shared object; the host is the successor then. On error there is none.
func (h *handler) prepare(ctx context.Context, from *object) (*host, *hostpb.LoadReply, error) {
	began := time.Now()
	next, err := h.lib.takeHost()
	if err != nil {
		return nil, nil, err
	}
	next.prepared.process = time.Since(began)
	h.announce(next)
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	reply, err := h.loadInto(ctx, next, from)
	if err != nil {
		h.successor.Store(nil)
		if timeIsUp(ctx) {
			next.killFor(killedForHang) // it would not listen
		}
		next.stop()
		return nil, nil, err
	}
	next.prepared.load = time.Since(began) - next.prepared.process
	return next, reply, nil
}

// takeOver makes next the handler's host: it reopens the devices, replays, sends the parked requests, and resumes. On
// error next does not serve.
func (h *handler) takeOver(next *host) error {
	// From here on a death of next parks what it had, and is noticed by whoever waits below.
	first, late := h.inOrder()
	for _, d := range first {
		patience := d.reopenPatience()
		if len(first)+len(late) > 1 {
			patience = min(patience, max(patience/patientShare, leastPatience))
		}
		if err := h.bringBack(d, next, patience); err != nil {
			return err
		}
	}
	h.mu.Lock()
	for _, d := range late {
		if d.putOff == nil {
			d.putOff = make(chan struct{})
		}
	}
	h.mu.Unlock()
	return h.enterService(next)
}

// inOrder returns the devices to reopen before the host serves, and those that are put off until then. Without others
// to serve none is put off.
func (h *handler) inOrder() (first, late []*Device) {
	for _, d := range h.lib.devicesServedBy(h) {
		switch {
		case d.failure() != nil:
		case d.reopenDeaths > 0 || d.reopensSlow:
			late = append(late, d)
		default:
			first = append(first, d)
		}
	}
	if len(first) == 0 {
		for _, d := range late {
			h.noLongerPutOff(d)
		}
		return late, nil
	}
	return first, late
}

// bringBackLate reopens the devices that were put off, one after the other, in the host that serves the others. Its
// death ends that.
func (h *handler) bringBackLate(in *host) {
	for _, d := range h.lib.devicesServedBy(h) {
		h.mu.Lock()
		late := d.putOff != nil && h.state == HandlerRunning
		h.mu.Unlock()
		if !late {
			continue
		}
		if h.bringBack(d, in, d.reopenPatience()) != nil {
			return
		}
		if d.failure() == nil {
			if h.sendParked(in, d) != nil {
				return
			}
			d.direct.Store(in.channel)
			h.log.Warn("device recovered after the others", "device", d.name)
		}
		h.noLongerPutOff(d)
		h.endParked()
		h.mu.Lock()
		late = h.state == HandlerRunning // the host has not died since: then its successor gets them
		var rest []*op
		if late {
			rest = h.takeParked(func(o *op) bool { return o.d == d })
		}
		h.mu.Unlock()
		for _, o := range rest {
			h.resend(o, in.channel)
		}
	}
}

// noLongerPutOff lets those go on who wait for the device.
func (h *handler) noLongerPutOff(d *Device) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.putOff != nil {
		close(d.putOff)
		d.putOff = nil
	}
}

// takeParked takes ops out of those that are parked; h.mu is held.
func (h *handler) takeParked(which func(*op) bool) []*op {
	var taken []*op
	h.parked = slices.DeleteFunc(h.parked, func(o *op) bool {
		if which(o) {
			taken = append(taken, o)
			return true
		}
		return false
	})
	return taken
}

// reopenPatience is how long the device may take to be reopened: as long as one of its requests.
func (d *Device) reopenPatience() time.Duration {
	if d.opts.Timeout > 0 {
		return d.opts.Timeout
	}
	return recoverTimeout
}

// enterService sends the parked requests to a host that has all devices open, puts it into service and resumes.
func (h *handler) enterService(next *host) error {
	if err := h.sendParked(next, nil); err != nil {
		return err
	}
	return h.serveFrom(next)
}

// serveFrom puts a host into service, which may be the one that was, resumes, and sends what is still parked.
// shared.ErrPeerGone: it is dead.
func (h *handler) serveFrom(next *host) error {
	var late []*op // those that were on their way to the old host until now
	devices := h.lib.devicesServedBy(h)
	serve := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late = h.takeParked(func(o *op) bool { return o.d.putOff == nil })
		h.host = next
		if next.restart {
			next.restart = false // it may have to resume after a reload that fails
			h.restarts.Add(1)
		}
		h.successor.Store(nil)
		for _, d := range devices {
			if d.putOff == nil {
				d.direct.Store(next.channel)
			}
		}
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
// does one whose open takes longer than a request may; after less patience it is put off. The error is only for the
// death of the host.
func (h *handler) bringBack(d *Device, next *host, patience time.Duration) error {
	if d.failure() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(h.life, patience)
	defer cancel()
	next.reopening = d
	began := time.Now()
	err := d.comeBack(ctx, next)
	switch {
	case err == nil:
		next.reopening = nil
		d.reopenDeaths = 0
		d.reopensSlow = time.Since(began) > max(d.reopenPatience()/patientShare, leastPatience)
		return nil
	case h.isStopped():
		return err
	case next.alive() && timeIsUp(ctx):
		// No other device can be opened in this process any more.
		next.killFor(killedForHang)
		if d.reopensSlow = patience < d.reopenPatience(); !d.reopensSlow {
			d.fail(fmt.Errorf("cannot be recovered: its handler does not return from open within %v", patience))
		}
		<-next.abandoned
		return err
	case errors.Is(err, shared.ErrPeerGone) || !next.alive():
		<-next.abandoned // no goroutine that waits for a dying process is in the way of its judgement
		return fmt.Errorf("%s: %w", d.name, err)
	}
	next.reopening = nil
	d.fail(fmt.Errorf("cannot be recovered: %w", err))
	return nil
}

// sendParked sends the parked requests to next, those of one device or, with d nil, of all that are not put off:
// suspects one at a time, then all others. ErrPeerGone when it died.
func (h *handler) sendParked(next *host, d *Device) error {
	h.mu.Lock()
	all := h.takeParked(func(o *op) bool { return o.d == d || d == nil && o.d.putOff == nil })
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
		next.channel.Kick(nil)
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
		next.channel.Kick(nil)
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
// Whoever is to blame when the host was reopening a device is that device, which is returned, and no request.
func (h *handler) judge(dead *host) (culprit *Device) {
	if dead.judged {
		return nil
	}
	dead.judged = true
	var inFlight, condemned []*op
	h.mu.Lock()
	for _, o := range h.parked {
		if o.req.Sent && dead.channel.Owns(o.req) {
			inFlight = append(inFlight, o)
		}
	}
	lost := h.lost
	h.lost = nil
	h.mu.Unlock()
	hung := dead.killedFor.Load() == killedForHang
	var outside bool
	switch dead.killedFor.Load() {
	case killedForNothing, killedForRemoval:
		outside = dead.process.killedFromOutside()
	}
	if hung {
		inFlight = overdue(inFlight)
		lost = slices.DeleteFunc(lost, func(r lostRequest) bool { return !r.overdue })
	}
	if !outside && !(hung && len(inFlight)+len(lost) > 0) {
		culprit = dead.reopening
	}
	if !outside && culprit == nil {
		for _, o := range inFlight {
			o.deaths++
			if len(inFlight)+len(lost) == 1 {
				o.alone++
			} else {
				o.alone = 0
			}
			if o.alone >= poisonDeaths {
				condemned = append(condemned, o)
			}
		}
	}
	h.report(dead, culprit, inFlight, lost, outside, len(condemned) > 0)
	if culprit != nil {
		if culprit.reopenDeaths++; culprit.reopenDeaths >= reopenDeaths {
			culprit.fail(fmt.Errorf("cannot be recovered: its handler's process has died %d times while reopening it",
				culprit.reopenDeaths))
		}
	}
	for _, o := range condemned {
		h.unpark(o)
		o.end(control.Failf(syscall.EIO, "the handler's process died with this request %d times", o.deaths))
		h.noteProgress()
	}
	return culprit
}

// lostRequest is a request that its host took with it and that was ended at once.
type lostRequest struct {
	RequestInfo
	overdue bool
}

// noteLost keeps for judge what it will not find among the parked requests.
func (h *handler) noteLost(o *op) {
	r := lostRequest{o.info(), o.req.Overdue()}
	r.Deaths++
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lost = append(h.lost, r)
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
	for _, d := range h.lib.devicesServedBy(h) {
		h.noLongerPutOff(d)
	}
	for _, o := range parked {
		o.end(err)
	}
}
