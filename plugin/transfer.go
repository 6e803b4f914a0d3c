// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// This file is the fast path: a read or write that is started on one thread and ends on another, without a copy on the
// way and without a goroutine of its own.

// Completion is told the end of a transfer.
type Completion interface {
	// Complete is called exactly once, on the channel's completion thread or on the goroutine that found the host dead.
	// For a read data holds what was read, in memory that is valid only during the call; for a write n is the number of
	// bytes written. err is as ReadAt and WriteAt return it. It must not block.
	Complete(data []byte, n int, err error)
}

// transfer ties a request in the channel to the caller's completion.
type transfer struct {
	d    *Device
	done Completion
}

var transfers = sync.Pool{New: func() any { return new(transfer) }}

// StartRead begins a read of n bytes at byte off; Commit must follow. It may wait while all memory of the handler's
// channel is in use. It declines, with false, what only ReadAt can do: reads that cross the end of the device, are
// longer than MaxXfer or not aligned as the handler needs it.
func (d *Device) StartRead(n int, off int64, done Completion) bool {
	if off < 0 || n > d.maxXfer || (off|int64(n))&(d.alignment-1) != 0 || int64(n) > d.Size()-off || !d.canRead {
		return false
	}
	d.start(shared.OpRead, n, off, nil, done)
	return true
}

// StartWrite begins a write of p at byte off, which it has copied when it returns; Commit must follow. It may wait
// while all memory of the handler's channel is in use. It declines, with false, what only WriteAt can do: as StartRead,
// and any write that could meet an unaligned one.
func (d *Device) StartWrite(p []byte, off int64, done Completion) bool {
	n := len(p)
	if off < 0 || n > d.maxXfer || int64(n) > d.Size()-off || d.alignment > 1 || d.opts.ReadOnly || !d.canWrite {
		return false
	}
	d.start(shared.OpWrite, n, off, p, done)
	return true
}

// start sends what needs no special treatment.
func (d *Device) start(op shared.Op, n int, off int64, p []byte, done Completion) {
	if err := d.enter(); err != nil {
		done.Complete(nil, 0, err)
		return
	}
	r, err := d.handler.host.channel.Get(op, uint64(n))
	if err != nil {
		err = d.requestError(op, n, off, err, StatusHWError)
		d.gate.leave()
		done.Complete(nil, 0, err)
		return
	}
	copy(r.Payload(), p)
	t := transfers.Get().(*transfer)
	t.d, t.done = d, done
	r.Device, r.Offset, r.User, r.Done = uint32(d.minor), uint64(off), t, finishTransfer
	d.handler.host.channel.Push(r)
}

// finishTransfer is the Done of a transfer's request.
func finishTransfer(r *shared.Request) {
	t := r.User.(*transfer)
	d, done := t.d, t.done
	*t = transfer{}
	transfers.Put(t)
	switch {
	case r.Err != nil:
		done.Complete(nil, 0, d.requestError(r.Op, int(r.Length), int64(r.Offset), r.Err, Status(r.STS)))
	case r.Op == shared.OpRead:
		done.Complete(r.Payload(), int(r.Length), nil)
	default:
		done.Complete(nil, int(r.Length), nil)
	}
	r.Release()
	d.gate.leave()
}

// Commit makes sure that the handler's host sees the transfers that were started: once for a batch of them, from the
// goroutine that started them. With a spin limit above 0 it then waits at most so long for completions and carries them
// out itself; that pays when the caller's transfer is the only one in flight.
func (d *Device) Commit(spin time.Duration) {
	c := d.handler.host.channel
	c.Kick()
	if spin > 0 {
		c.Spin(spin)
	}
}
