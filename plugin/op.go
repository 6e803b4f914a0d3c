// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"sync"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// op is one request of a device, from its issue to its end. It outlives hosts: when the host that has it dies, it is
// parked, and the next host gets it.
type op struct {
	d    *Device
	req  *shared.Request // carries it now, or did when its host died: then still holds the payload
	done Completion
	// gated: the op has entered the device's gate and leaves it at its end.
	gated  bool
	issued int64 // since epoch, ns
	// mark is, for a flush, the position of the last retained write that it covers.
	mark uint64

	// What supervise knows of it; only while it is parked, or under handler.mu.

	deaths int           // hosts that died of themselves with the op in flight
	alone  int           // of these the last ones in a row that had nothing else in flight
	ended  chan struct{} // closed when it has ended or is parked again; nil when nobody waits
}

var ops = sync.Pool{New: func() any { return new(op) }}

// acquire returns a request of whichever host serves the device now. It waits its turn for memory, and for a recovery
// that is under way. EIO: the device or its handler has failed.
func (d *Device) acquire(kind shared.Op, n int) (*shared.Request, error) {
	for {
		in, err := d.handler.service(context.Background(), d)
		if err != nil {
			return nil, err
		}
		r, err := d.handler.get(in.channel, kind, uint64(n))
		if !errors.Is(err, shared.ErrPeerGone) {
			return r, err
		}
	}
}

// issue sends a request that acquire has made; Commit must follow.
func (d *Device) issue(r *shared.Request, off int64, gated bool, done Completion) {
	o := ops.Get().(*op)
	*o = op{d: d, req: r, done: done, gated: gated}
	r.Offset = uint64(off)
	d.stats.begin(o, r.Op)
	if r.Op == shared.OpFlush {
		o.mark = d.unflushed.position()
	}
	o.send()
}

// send pushes the op's request.
func (o *op) send() {
	r := o.req
	r.Device, r.Patience, r.User, r.Done = uint32(o.d.minor), o.d.patience, o, opDone
	r.Push()
}

// opDone is the Done of an op's request.
func opDone(r *shared.Request) {
	o := r.User.(*op)
	if errors.Is(r.Err, shared.ErrPeerGone) {
		o.d.handler.park(o)
		return
	}
	o.d.handler.noteProgress()
	o.end(r.Err)
}

// end tells the op's owner and gives up everything. For a write that succeeded the payload is retained first: whoever
// learns of its end may flush at once.
func (o *op) end(err error) {
	d, r, done, gated, ended := o.d, o.req, o.done, o.gated, o.ended
	n := int(r.Length)
	if failure := d.failure(); err != nil && failure != nil {
		err = failure // the host does not know the device any more
	}
	var data []byte
	if err == nil && r.Op == shared.OpRead {
		data, err = d.dataOf(r)
	}
	d.stats.end(o, err != nil)
	switch {
	case err != nil:
		done.Complete(nil, 0, d.requestError(r.Op, n, int64(r.Offset), err, Status(r.STS)))
	case r.Op == shared.OpRead:
		if keeping, ok := done.(KeepingCompletion); ok && gated && r.InPlace {
			d.gate.again()
			keeping.CompleteKept(data, &d.gate)
			break
		}
		done.Complete(data, n, nil)
	case r.Op == shared.OpFlush:
		d.unflushed.release(o.mark)
		done.Complete(nil, 0, nil)
	default:
		d.retain(r)
		done.Complete(nil, n, nil)
	}
	r.Release()
	*o = op{}
	ops.Put(o)
	if gated {
		d.gate.leave()
	}
	if ended != nil {
		close(ended)
	}
}

// dataOf is what a read that has succeeded has read. EIO: the host lies.
func (d *Device) dataOf(r *shared.Request) ([]byte, error) {
	if !r.InPlace {
		return r.Payload(), nil
	}
	if data := d.contents.at(int64(r.Offset), int(r.Length)); data != nil {
		return data, nil
	}
	return nil, control.Failf(syscall.EIO, "the host says that the data is in memory which the device does not have")
}

// move gives the op a request of a channel, with the same payload. ErrPeerGone: that one's host has died too, and the
// op is unchanged.
func (o *op) move(c *shared.Channel) error {
	old := o.req
	if c.Owns(old) {
		return nil // it was held back while the channel was suspended
	}
	r, err := c.Get(old.Op, old.Length)
	if err != nil {
		return err
	}
	if old.Op == shared.OpWrite {
		copy(r.Payload(), old.Payload()[:old.Length])
	}
	r.Offset, r.MayInPlace = old.Offset, old.MayInPlace
	o.req = r
	o.d.stats.resent.Add(1)
	old.Release()
	return nil
}

// errDied is what a request ends with that its host took with it and that is not sent again.
var errDied = control.Failf(syscall.EIO, "the handler's process died")
