// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// This file is the fast path: a read or write that is started on one thread and ends on another, without a copy on the
// way and without a goroutine of its own.

// Completion is told the end of a transfer.
type Completion interface {
	// Complete is called exactly once, on the channel's completion thread or on the goroutine that found the host dead.
	// For a read data holds what was read, in memory that is valid only during the call; for a write n is the number of
	// bytes written. err is as ReadAt and WriteAt return it. It must not block.
	//
	// The memory of a read may be the device's own, which its handler can cut off at any time: system calls that read it
	// then fail with EFAULT. Whoever reads it otherwise must be prepared for a fault, see debug.SetPanicOnFault.
	Complete(data []byte, n int, err error)
}

// KeepingCompletion is a Completion that can use the memory of a read after it was told.
type KeepingCompletion interface {
	Completion
	// CompleteKept is Complete for a read that has succeeded, where the memory of data is the device's own. It is there
	// until keep.Release is called, which must happen once, on any goroutine, soon: the device cannot be removed before.
	CompleteKept(data []byte, keep interface{ Release() })
}

// StartRead begins a read of n bytes at byte off; Commit must follow. It never waits. It declines, with false, what
// only ReadAt can do: reads that cross the end of the device, are longer than MaxXfer, not aligned as the handler needs
// it, or have to wait because all memory of the handler's channel is in use.
func (d *Device) StartRead(n int, off int64, done Completion) bool {
	if off < 0 || n > d.maxXfer || (off|int64(n))&(d.alignment-1) != 0 || int64(n) > d.Size()-off || !d.canRead {
		return false
	}
	if !d.gate.enter() {
		return false
	}
	r := d.direct.Load().TryGet(shared.OpRead, uint64(n))
	if r == nil {
		d.gate.leave()
		return false
	}
	r.MayInPlace = d.contents.have(off, n)
	d.issue(r, off, true, done)
	return true
}

// StartWrite begins a write of p at byte off, which it has copied when it returns; Commit must follow. It never waits.
// It declines, with false, what only WriteAt can do: as StartRead, and any write that could meet an unaligned one.
func (d *Device) StartWrite(p []byte, off int64, done Completion) bool {
	if !d.plainWrite(len(p), off) || !d.gate.enter() {
		return false
	}
	r := d.direct.Load().TryGet(shared.OpWrite, uint64(len(p)))
	if r == nil {
		d.gate.leave()
		return false
	}
	copy(r.Payload(), p)
	d.issue(r, off, true, done)
	return true
}

// plainWrite reports whether a write can be sent as it is.
func (d *Device) plainWrite(n int, off int64) bool {
	return off >= 0 && n <= d.maxXfer && int64(n) <= d.Size()-off && d.alignment == 1 && !d.opts.ReadOnly && d.canWrite &&
		!d.full()
}

// Landing is memory of a handler's channel for the payload of a write that is yet to come: a large payload that is read
// into it need not be copied. It belongs to whoever called Device.Landing, and is not for concurrent use.
type Landing struct {
	r *shared.Request // nil when the memory was taken or released
}

// Landing returns memory for shared.MaxPayload bytes, nil if there is none to spare. Release must follow, or a
// StartLanded that takes it.
func (d *Device) Landing() *Landing {
	if !d.gate.enter() {
		return nil
	}
	defer d.gate.leave()
	if r := d.direct.Load().TryGet(shared.OpWrite, shared.MaxPayload); r != nil {
		return &Landing{r}
	}
	return nil
}

// Bytes is the memory; nil once it was taken or released.
func (l *Landing) Bytes() []byte {
	if l.r == nil {
		return nil
	}
	return l.r.Payload()
}

// Release gives the memory back, if it was not taken. It may be called twice.
func (l *Landing) Release() {
	if l.r != nil {
		l.r.Release()
		l.r = nil
	}
}

// StartLanded is StartWrite of the first n bytes of the landing's memory, which it takes instead of copying it. It also
// declines, and takes nothing, where the landing is that of another handler.
func (d *Device) StartLanded(l *Landing, n int, off int64, done Completion) bool {
	if l.r == nil || n == 0 || !d.plainWrite(n, off) || !d.gate.enter() {
		return false
	}
	if !d.direct.Load().Owns(l.r) {
		d.gate.leave()
		return false
	}
	r := l.r
	l.r = nil
	r.Shrink(uint64(n))
	d.issue(r, off, true, done)
	return true
}

// Commit makes sure that the handler's host sees the transfers that were started: once for a batch of them, from the
// goroutine that started them. With p not nil it then carries out completions for p, as long as they come soon; see
// shared.Channel.Kick.
func (d *Device) Commit(p shared.Poller) {
	d.direct.Load().Kick(p)
}
