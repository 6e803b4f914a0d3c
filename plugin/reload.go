// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// This file replaces a handler's shared object while its devices are in use. The supervisor does it, so that a death of
// either process meanwhile finds it at work and not beside it.
//
// (1) A new host loads the new file; the old one serves all the while. (2) New requests wait, those in flight end. (3)
// The old host flushes and closes the devices. (4) The new one reopens them. (5) What could not be flushed is sent
// again, then what has waited. When (4) fails, the old host, which is still there, reopens them instead. When the old
// host dies on the way, the new one takes over as after any death.

const (
	// drainTimeout is how long requests in flight may take to end before a reload is given up.
	drainTimeout = 10 * time.Second
	// drainPoll is how often their end is looked for: it is no event for anybody else.
	drainPoll = time.Millisecond
	// reopenTimeout is how long the new host may take to open the devices.
	reopenTimeout = 30 * time.Second
	// withdrawTimeout is how long a new host may take to close what it has opened, when it is not wanted any more.
	withdrawTimeout = 5 * time.Second
)

// reloadCall is a request to the supervisor.
type reloadCall struct {
	ctx  context.Context
	path string
	done chan error // of capacity 1
}

// ReloadHandler replaces a loaded handler by what is now in its file, with open devices and I/O running: their requests
// wait meanwhile, and none fails for it. On error the old one goes on.
//
// ENOENT: not loaded, or there is no file any more. EBUSY: it is being loaded or unloaded. EIO: it has failed; remove
// its devices, unload it and load it. ETIMEDOUT: its requests, devices that are being added or removed, or the context
// ended it. Otherwise the errors are those of LoadHandler for the new file, and those of its open for the devices.
func (l *Library) ReloadHandler(ctx context.Context, subtype string) error {
	l.mu.Lock()
	h, err := l.findLoaded(subtype)
	l.mu.Unlock()
	if err == nil {
		err = h.reload(ctx)
	}
	if err != nil {
		return fmt.Errorf("reload %s: %w", subtype, err)
	}
	return nil
}

// reload has the supervisor do it.
func (h *handler) reload(ctx context.Context) error {
	path, err := h.lib.findFile(h.subtype)
	if err != nil {
		return err
	}
	if err := h.hold(ctx, h.shape.TryLock); err != nil {
		return err
	}
	defer h.shape.Unlock()
	call := reloadCall{ctx: ctx, path: path, done: make(chan error, 1)}
	select {
	case h.reloads <- call:
		return <-call.done
	case <-h.supervised:
		return control.Failf(syscall.EIO, "it has failed: %v; remove its devices, unload it and load it", h.failure())
	case <-ctx.Done():
		return control.Failf(syscall.ETIMEDOUT, "its process is still being replaced after a death")
	}
}

// hold takes a lock, by polling, because locks know nothing of contexts. ETIMEDOUT when the context ends first.
func (h *handler) hold(ctx context.Context, try func() bool) error {
	for !try() {
		select {
		case <-ctx.Done():
			return control.Failf(syscall.ETIMEDOUT,
				"handler %s is busy: a device is being added or removed, or it is being reloaded",
				h.subtype)
		case <-time.After(5 * drainPoll):
		}
	}
	return nil
}

// replace does a reload. On error the old host is in service again, or dead.
func (h *handler) replace(call reloadCall, old *host) error {
	ctx, cancel := context.WithCancel(call.ctx)
	defer cancel()
	defer context.AfterFunc(h.life, cancel)()
	began := time.Now()
	object := h.takeObject(call.path)
	next, reply, err := h.prepare(ctx, object)
	if err != nil {
		object.drop()
		return err
	}
	h.suspend()
	old.channel.Suspend()
	if err := h.handOver(ctx, old, next); err != nil {
		object.drop()
		h.graves = append(h.graves, next)
		if h.serveFrom(old) != nil {
			h.successor.Store(nil)
			return fmt.Errorf("%w; and the old process died meanwhile", err)
		}
		return fmt.Errorf("%w; the old one goes on", err)
	}
	h.mu.Lock()
	object, h.object, h.reply = h.object, object, reply
	h.mu.Unlock()
	object.drop()
	h.graves = append(h.graves, old)
	h.log.Info("handler reloaded", "handler", h.subtype, "path", call.path, "pid", next.pid(), "was", old.pid(), "stall",
		time.Since(began).Round(time.Millisecond).String())
	return nil
}

// handOver moves the handler's devices and requests from one host to another. On error the old one has all devices open
// that the handler can still open, unless it is dead.
func (h *handler) handOver(ctx context.Context, old, next *host) error {
	if err := h.drain(ctx, old); err != nil {
		return err
	}
	devices := h.lib.devicesServedBy(h)
	for _, d := range devices {
		if d.failure() != nil || !old.alive() {
			continue
		}
		if err := d.closeIn(ctx, old); err != nil && old.alive() {
			h.log.Warn("flush before a reload failed", "device", d.name, "retained", d.unflushed.held(), "error", err)
		}
	}
	if !old.alive() {
		<-old.abandoned
		h.judge(old)
		if err := h.takeOver(next); err != nil {
			next.kill()
			h.judge(next)
			return err
		}
		return nil
	}
	opened, err := h.openAll(ctx, devices, next)
	if err == nil {
		if err = h.enterService(next); err == nil {
			return nil
		}
	}
	if next.alive() {
		h.withdraw(opened, next)
	} else {
		<-next.abandoned
		h.judge(next)
	}
	for _, d := range devices {
		if h.bringBack(d, old, d.reopenPatience()) != nil {
			old.kill() // if it is not dead: what is retained did not all reach it; a recovery does it right
			break
		}
	}
	return err
}

// drain waits until the host has no request any more; its channel is suspended. nil also when it has died.
func (h *handler) drain(ctx context.Context, in *host) error {
	timeout := time.After(drainTimeout)
	poll := time.NewTicker(drainPoll)
	defer poll.Stop()
	for in.channel.Pending() > 0 {
		in.channel.Kick(nil) // for whoever pushed before the suspension and has not come to it yet
		select {
		case <-poll.C:
		case <-in.abandoned:
			return nil
		case <-timeout:
			return control.Failf(syscall.ETIMEDOUT, "requests in progress did not end within %v", drainTimeout)
		case <-ctx.Done():
			return control.Failf(syscall.EINTR, "interrupted while requests were in progress")
		}
	}
	return nil
}

// openAll reopens devices in a new host and replays what is retained. It returns those that are open there. A host that
// does not return from that in time is killed.
func (h *handler) openAll(ctx context.Context, devices []*Device, next *host) (opened []*Device, err error) {
	ctx, cancel := context.WithTimeout(ctx, reopenTimeout)
	defer cancel()
	for _, d := range devices {
		if d.failure() != nil {
			continue
		}
		if err := d.comeBack(ctx, next); err != nil {
			if timeIsUp(ctx) {
				next.killFor(killedForHang)
				<-next.abandoned
			}
			return opened, fmt.Errorf("%s: %w", d.name, err)
		}
		opened = append(opened, d)
	}
	return opened, nil
}

// withdraw closes devices in a host that is not wanted any more, before another one opens them.
func (h *handler) withdraw(devices []*Device, next *host) {
	ctx, cancel := context.WithTimeout(context.Background(), withdrawTimeout)
	defer cancel()
	for _, d := range devices {
		_ = d.closeIn(ctx, next) // whatever it says of the flush: the old one gets what is retained
	}
}
