// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// flushing has flushes of one device follow one another: those that are asked for while one is under way share the next
// one, which begins after all that was written before any of them was asked for.
type flushing struct {
	mu      sync.Mutex
	running bool
	waiting []Completion // for the next one

	failures atomic.Uint64 // flushes that failed
}

// sharedFlush is the Completion of a flush that some wait for. They have entered the device's gate.
type sharedFlush struct {
	d       *Device
	waiters []Completion
	record  int64 // of recorder.begin
}

// Flush makes every write that completed before it durable, as far as the handler can. Calls at the same time may share
// one flush of the handler, and its failure. Errors as for WriteAt.
func (d *Device) Flush() error {
	w := waits.Get().(*wait)
	w.p, w.err = nil, nil
	if !d.joinFlush(w) {
		waits.Put(w)
		return control.Failf(syscall.ENODEV, "device %s was removed", d.name)
	}
	d.Commit(nil)
	<-w.done
	err := w.err
	waits.Put(w)
	return err
}

// StartFlush begins a flush, as Flush does it; Commit must follow. It never waits, and declines where the device is
// being removed, and on a device that is recorded.
func (d *Device) StartFlush(done Completion) bool { return d.recorder == nil && d.joinFlush(done) }

// joinFlush has done wait for the next flush that begins. False: the device is being removed.
func (d *Device) joinFlush(done Completion) bool {
	if !d.gate.enter() {
		return false
	}
	f := &d.flushes
	f.mu.Lock()
	if f.running {
		f.waiting = append(f.waiting, done)
		f.mu.Unlock()
		return true
	}
	f.running = true
	f.mu.Unlock()
	waiters := []Completion{done}
	if d.recorder == nil {
		if r := d.direct.Load().TryGet(shared.OpFlush, 0); r != nil {
			d.issue(r, 0, false, &sharedFlush{d: d, waiters: waiters})
			return true
		}
	}
	go d.flushFor(waiters)
	return true
}

// flushFor sends a flush, and waits for room to do so.
func (d *Device) flushFor(waiters []Completion) {
	s := &sharedFlush{d: d, waiters: waiters}
	began := sinceEpoch()
	r, err := d.acquire(shared.OpFlush, 0)
	if err != nil {
		d.stats.refused(shared.OpFlush, began)
		s.finish(d.requestError(shared.OpFlush, 0, 0, err, StatusHWError))
		return
	}
	d.stats.waited(shared.OpFlush, began)
	c := r.Channel()
	s.record = d.recorder.begin(shared.OpFlush)
	d.issue(r, 0, false, s)
	c.Kick(nil)
}

// Complete implements Completion.
func (s *sharedFlush) Complete(_ []byte, _ int, err error) {
	if s.d.recorder == nil {
		s.finish(err)
		return
	}
	go func() { // recording waits for a file
		s.d.recorder.end(s.record, shared.OpFlush, nil, 0, 0, err)
		s.finish(err)
	}()
}

// finish tells all who wait, and begins the next flush if there are others.
func (s *sharedFlush) finish(err error) {
	f := &s.d.flushes
	if err != nil {
		f.failures.Add(1) // before anybody learns of it
	}
	f.mu.Lock()
	next := f.waiting
	f.waiting = nil
	f.running = len(next) > 0
	f.mu.Unlock()
	if len(next) > 0 {
		go s.d.flushFor(next)
	}
	for _, w := range s.waiters {
		w.Complete(nil, 0, err)
		s.d.gate.leave()
	}
}

// FlushFailures counts the flushes that have failed, those included that the device made by itself. Whoever relies on
// flushes of others looks whether it has changed.
func (d *Device) FlushFailures() uint64 { return d.flushes.failures.Load() }
