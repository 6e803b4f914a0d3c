// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// sizing is what is known of a device's size besides the size itself.
type sizing struct {
	// asked is the size that an open asks for, 0 for the handler's own: that of DeviceOptions, or of the last Resize.
	asked atomic.Int64
	// pending is the size that a Resize under way is to bring about, otherwise 0. A host that dies in the middle of it
	// leaves the device with either.
	pending atomic.Int64
	// previous is the size before that.
	previous atomic.Int64

	resizeMu sync.Mutex // one Resize at a time

	changedMu sync.Mutex // held while changed runs
	changed   func(size int64)
}

// knows reports whether a reopened device may have this size.
func (d *Device) knows(size int64) bool {
	pending := d.pending.Load()
	return size == d.Size() || pending != 0 && (size == pending || size == d.previous.Load())
}

// OnResize has f called with the device's size, now and after each change of it. Calls follow one another; f must not
// call OnResize or Resize.
func (d *Device) OnResize(f func(size int64)) {
	d.changedMu.Lock()
	defer d.changedMu.Unlock()
	d.changed = f
	f(d.Size())
}

// setSize lets users have the new size.
func (d *Device) setSize(size int64) {
	d.changedMu.Lock()
	defer d.changedMu.Unlock()
	d.size.Store(size)
	d.contents.extend(d)
	if d.changed != nil {
		d.changed(size)
	}
}

// Resize changes the size of the device, in bytes, while it is in use: by the handler's reconfig. Requests beyond the
// new end fail, as on any block device that gets smaller; what was there is lost.
//
// EINVAL: the size is not a positive multiple of the block size, or the handler refuses it. EOPNOTSUPP: the handler
// cannot do it. EROFS: the device is read-only. ENODEV: it was removed. ETIMEDOUT: the context has ended; if the
// handler hangs, its process has been killed. EIO: its process died each time. Other errnos are the handler's. The size
// is as before then.
func (d *Device) Resize(ctx context.Context, size int64) error {
	err := d.resize(ctx, size)
	if err != nil {
		return fmt.Errorf("resize %s to %d bytes: %w", d.name, size, err)
	}
	d.handler.log.Info("device resized", "device", d.name, "size", size)
	return nil
}

func (d *Device) resize(ctx context.Context, size int64) error {
	switch {
	case size <= 0 || size%int64(d.blockSize) != 0 || size%d.alignment != 0:
		return control.Failf(syscall.EINVAL, "not a multiple of the block size of %d", max(d.blockSize, int(d.alignment)))
	case d.opts.ReadOnly:
		return control.Failf(syscall.EROFS, "it is read-only")
	}
	d.resizeMu.Lock()
	defer d.resizeMu.Unlock()
	if err := d.enter(); err != nil {
		return err
	}
	defer d.gate.leave()
	if err := d.handler.hold(ctx, d.handler.shape.TryRLock); err != nil {
		return err
	}
	defer d.handler.shape.RUnlock()

	before, asked := d.Size(), d.asked.Load()
	d.previous.Store(before)
	d.pending.Store(size)
	defer d.pending.Store(0)
	if size < before {
		// Users first: nothing must be on its way to what is cut off. And whatever becomes of the host from here on, it may
		// have been cut off.
		d.asked.Store(size)
		d.setSize(size)
	}
	err := d.reconfigure(ctx, size)
	switch {
	case err == nil && size > before:
		d.setSize(size)
	case err != nil && size < before:
		d.asked.Store(asked)
		d.setSize(before)
	}
	return err
}

// reconfigure has the handler resize the device in the host that serves it, and in each that takes its place meanwhile
// and may have missed it.
func (d *Device) reconfigure(ctx context.Context, size int64) error {
	for deaths := 0; ; {
		in, err := d.handler.service(ctx, d)
		if err != nil {
			return err
		}
		_, err = in.rpc.Resize(ctx, &hostpb.ResizeRequest{Device: uint32(d.minor), Size: uint64(size)})
		if err == nil {
			// The open by a successor asks for the new size from here on. One that has begun before has missed it.
			d.asked.Store(size)
			if d.handler.current() == in && in.alive() {
				return nil
			}
			continue
		}
		gone := errors.Is(control.FromStatus(err), control.ErrHostGone)
		err = in.rpcError("reconfig", err)
		switch {
		case ctx.Err() != nil:
			in.killFor(killedForHang)
			return err
		case !gone && in.alive():
			return err
		}
		if deaths++; deaths >= poisonDeaths {
			return control.Failf(syscall.EIO, "its handler died %d times in that (last: %v)", deaths, err)
		}
		<-in.abandoned
	}
}

// followSizes takes over the sizes that the handler gives its devices by itself, until the host is gone.
func (h *handler) followSizes(in *host) {
	changes, err := in.rpc.Watch(context.Background(), &hostpb.WatchRequest{})
	for err == nil {
		var change *hostpb.SizeChange
		if change, err = changes.Recv(); err == nil {
			h.sizeChanged(in, int(change.GetDevice()), change.GetSize())
		}
	}
}

func (h *handler) sizeChanged(in *host, minor int, size uint64) {
	d := h.lib.Device(minor)
	switch {
	case d == nil || d.handler != h || h.current() != in:
		return
	case size == 0 || size > maxDeviceSize || size%uint64(d.blockSize) != 0 || size%uint64(d.alignment) != 0:
		h.log.Error("handler gives its device an impossible size; ignored", "device", d.name, "size", size)
		return
	}
	d.resizeMu.Lock()
	defer d.resizeMu.Unlock()
	if d.asked.Load() != 0 {
		d.asked.Store(int64(size))
	}
	h.log.Info("handler has changed the size of its device", "device", d.name, "was", d.Size(), "is", size)
	d.setSize(int64(size))
}
