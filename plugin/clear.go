// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"errors"
	"sync/atomic"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// This file makes ranges read as zeroes: with the handler's unmap where that zeroes, else with its writesame, else by
// writing. Ranges are of any length, requests are not: each has to end well within the device's timeout.

const (
	// unmapChunk and zeroChunk are the most bytes of one request; requests end at multiples of them.
	unmapChunk = 128 << 20
	zeroChunk  = 32 << 20
)

// clearing is how ranges of a device can be cleared.
type clearing struct {
	// noUnmap: the handler has no unmap, or none that zeroes. It may learn that from its storage.
	noUnmap atomic.Bool
	canZero bool  // the handler has writesame
	unit    int64 // bytes; the handler's callouts take multiples of it
}

// adopt takes over what the host says when it has opened the device.
func (c *clearing) adopt(r *hostpb.OpenReply) {
	c.noUnmap.Store(!r.GetCanUnmap() || !r.GetUnmapZeroes())
	c.canZero = r.GetCanWriteSame()
	c.unit = int64(max(r.GetBlockSize(), r.GetAlignment()))
}

// Discard gives back the space of n bytes at off where the handler can; they read back zeroes in any case. The range is
// cut at the end of the device. EOPNOTSUPP: the device was added with NoDiscard. Other errors are those of WriteAt, and
// then any part of the range may have been cleared.
func (d *Device) Discard(off, n int64) error {
	if d.opts.NoDiscard {
		return control.Failf(syscall.EOPNOTSUPP, "%s was added with discards off", d.name)
	}
	return d.clear(off, n, true)
}

// Zero makes n bytes at off read back zeroes. The range is cut at the end of the device. Errors are those of WriteAt,
// and then any part of the range may have been cleared.
func (d *Device) Zero(off, n int64) error { return d.clear(off, n, false) }

// clear does the whole units of the range by unmap or writesame, and what is left at its ends by writing.
func (d *Device) clear(off, n int64, discard bool) error {
	switch {
	case off < 0 || n < 0:
		return control.Failf(syscall.EINVAL, "%s: clearing %d bytes at %d", d.name, n, off)
	case d.opts.ReadOnly:
		return control.Failf(syscall.EROFS, "%s is read-only", d.name)
	case !d.canWrite:
		return control.Failf(syscall.ENXIO, "%s: handler %s cannot write", d.name, d.handler.subtype)
	}
	end := off + min(n, max(0, d.Size()-off))
	unit := d.clears.unit
	first, last := (off+unit-1)/unit*unit, end/unit*unit
	if first >= last {
		return d.writeZeroes(off, end)
	}
	if err := d.writeZeroes(off, first); err != nil {
		return err
	}
	for at := first; at < last; {
		next, err := d.clearSome(at, last, discard)
		if err != nil {
			return err
		}
		at = next
	}
	return d.writeZeroes(last, end)
}

// clearSome clears whole units from at, at most to last, in the best way there is, and returns where it has ended.
func (d *Device) clearSome(at, last int64, discard bool) (next int64, err error) {
	if discard && !d.clears.noUnmap.Load() {
		next = min(last, at/unmapChunk*unmapChunk+unmapChunk)
		err = d.clearRequest(shared.OpUnmap, at, next)
		if !errors.Is(err, syscall.EOPNOTSUPP) {
			return next, err
		}
		d.clears.noUnmap.Store(true)
	}
	next = min(last, at/zeroChunk*zeroChunk+zeroChunk)
	if d.clears.canZero {
		return next, d.clearRequest(shared.OpZero, at, next)
	}
	return next, d.writeZeroes(at, next)
}

// clearRequest sends one request. A removal of the device may come in before each of them.
func (d *Device) clearRequest(op shared.Op, at, end int64) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.gate.leave()
	d.unevenMu.RLock() // an unaligned write must not bring back what it has read before
	defer d.unevenMu.RUnlock()
	return d.requestFor(op, nil, int(end-at), at)
}

var zeroPage [4096]byte

// writeZeroes writes zeroes from at to end, except where it reads them: what is sparse stays so.
func (d *Device) writeZeroes(at, end int64) error {
	if at >= end {
		return nil
	}
	buf := make([]byte, min(end-at, int64(d.maxXfer)))
	for at < end {
		// Pieces end at multiples of the largest request, and so never need more than one.
		limit := int64(d.maxXfer)
		p := buf[:min(end, at/limit*limit+limit)-at]
		n, err := d.ReadAt(p, at)
		if err != nil || n < len(p) || !isZero(p) {
			clear(p)
			if _, err := d.WriteAt(p, at); err != nil {
				return err
			}
		}
		at += int64(len(p))
	}
	return nil
}

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroPage))
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
