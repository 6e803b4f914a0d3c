// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// statusError is the failure of a request: an errno, and the handler's status for those who want it. Its text is made
// only for those who read it: when many requests fail, most errors are not read.
type statusError struct {
	errno  syscall.Errno
	status Status
	device string
	op     shared.Op
	n      int
	off    int64
	cause  error // says what happened; nil: status does
	at     int64 // since epoch, ns
}

func (e *statusError) Error() string {
	what := fmt.Sprintf("%s: %s of %d bytes at %d", e.device, e.op, e.n, e.off)
	if e.op == shared.OpFlush {
		what = e.device + ": flush"
	}
	if e.cause != nil {
		return fmt.Sprintf("%s: %v", what, e.cause)
	}
	return fmt.Sprintf("%s: %v (handler status %s)", what, e.errno, e.status)
}

func (e *statusError) Unwrap() error { return e.errno }

// enter begins a call on the device; gate.leave must follow if the error is nil. ENODEV once the device is being
// removed.
func (d *Device) enter() error {
	if !d.gate.enter() {
		return control.Failf(syscall.ENODEV, "device %s was removed", d.name)
	}
	return nil
}

// ReadAt reads len(p) bytes at byte off. At the end of the device the count is short, beyond it 0, both without an
// error. EINVAL: negative offset. ENODEV: the device was removed. ENXIO: the handler cannot read. Otherwise the errno
// of the handler's status, EIO if its process died.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, control.Failf(syscall.EINVAL, "%s: read at negative offset %d", d.name, off)
	}
	if !d.canRead {
		return 0, control.Failf(syscall.ENXIO, "%s: handler %s cannot read", d.name, d.handler.subtype)
	}
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.gate.leave()
	p = p[:d.clip(off, len(p))]
	if (off|int64(len(p)))&(d.alignment-1) != 0 {
		return d.readUneven(p, off)
	}
	return d.pieces(shared.OpRead, p, off)
}

// WriteAt writes p at byte off. At the end of the device the count is short, without an error. ENOSPC: at or beyond the
// end. EROFS: read-only device. EINVAL: negative offset. ENODEV: the device was removed. ENXIO: the handler cannot
// write. Otherwise the errno of the handler's status, EIO if its process died; the count then tells what was written
// for certain.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case off < 0:
		return 0, control.Failf(syscall.EINVAL, "%s: write at negative offset %d", d.name, off)
	case d.opts.ReadOnly:
		return 0, control.Failf(syscall.EROFS, "%s is read-only", d.name)
	case !d.canWrite:
		return 0, control.Failf(syscall.ENXIO, "%s: handler %s cannot write", d.name, d.handler.subtype)
	}
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.gate.leave()
	n := d.clip(off, len(p))
	if n == 0 && len(p) > 0 {
		return 0, control.Failf(syscall.ENOSPC, "%s: write at %d, beyond the end at %d", d.name, off, d.Size())
	}
	p = p[:n]
	if d.alignment == 1 {
		return d.pieces(shared.OpWrite, p, off)
	}
	if (off|int64(n))&(d.alignment-1) != 0 {
		return d.writeUneven(p, off)
	}
	d.unevenMu.RLock()
	defer d.unevenMu.RUnlock()
	return d.pieces(shared.OpWrite, p, off)
}

// clip is how many of n bytes at off are on the device.
func (d *Device) clip(off int64, n int) int {
	return int(max(0, min(int64(n), d.Size()-off)))
}

// pieces does a read or write that is aligned as the handler needs it, in requests of at most MaxXfer bytes.
func (d *Device) pieces(op shared.Op, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, d.maxXfer)
		if err := d.request(op, p[done:done+n], off+int64(done)); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// readUneven reads the aligned range around p. Device sizes that are no multiple of the alignment end in a range that
// no aligned request reaches; the host clips there.
func (d *Device) readUneven(p []byte, off int64) (int, error) {
	start := off &^ (d.alignment - 1)
	end := (off + int64(len(p)) + d.alignment - 1) &^ (d.alignment - 1)
	buf := make([]byte, end-start)
	n, err := d.pieces(shared.OpRead, buf, start)
	return copy(p, buf[min(int64(n), off-start):n]), err
}

// writeUneven reads the blocks at both ends of the range, puts p between, and writes the whole.
func (d *Device) writeUneven(p []byte, off int64) (int, error) {
	d.unevenMu.Lock()
	defer d.unevenMu.Unlock()
	start := off &^ (d.alignment - 1)
	end := (off + int64(len(p)) + d.alignment - 1) &^ (d.alignment - 1)
	buf := make([]byte, end-start)
	if off > start {
		if _, err := d.pieces(shared.OpRead, buf[:d.alignment], start); err != nil {
			return 0, err
		}
	}
	if last := end - d.alignment; off+int64(len(p)) < end && (last > start || off == start) {
		if _, err := d.pieces(shared.OpRead, buf[last-start:], last); err != nil {
			return 0, err
		}
	}
	copy(buf[off-start:], p)
	n, err := d.pieces(shared.OpWrite, buf, start)
	return int(max(0, min(int64(len(p)), int64(n)-(off-start)))), err
}

// wait is the Completion of a request that its issuer waits for.
type wait struct {
	p    []byte // of a read: where the data goes
	err  error
	done chan struct{}
}

var waits = sync.Pool{New: func() any { return &wait{done: make(chan struct{}, 1)} }}

// Complete implements Completion.
func (w *wait) Complete(data []byte, _ int, err error) {
	copy(w.p, data)
	w.err = err
	w.done <- struct{}{}
}

// request sends one request and waits for it. p is the data to write or the buffer to fill.
func (d *Device) request(op shared.Op, p []byte, off int64) error {
	return d.requestFor(op, p, len(p), off)
}

// requestFor is request for n bytes: of p, or without data.
func (d *Device) requestFor(op shared.Op, p []byte, n int, off int64) error {
	began := sinceEpoch()
	var err error
	if op != shared.OpRead && op != shared.OpFlush {
		err = d.awaitRoom()
	}
	var r *shared.Request
	if err == nil {
		r, err = d.acquire(op, n)
	}
	if err != nil {
		d.stats.refused(op, began)
		return d.requestError(op, n, off, err, StatusHWError)
	}
	d.stats.waited(op, began)
	w := waits.Get().(*wait)
	w.p, w.err = nil, nil
	if op == shared.OpWrite {
		copy(r.Payload(), p)
	} else {
		w.p = p
	}
	c := r.Channel()
	at := d.recorder.begin(op)
	d.issue(r, off, false, w)
	c.Kick(nil)
	<-w.done
	err = w.err
	d.recorder.end(at, op, p, n, off, err)
	w.p = nil
	waits.Put(w)
	return err
}

// requestError is the one place where a failed request becomes an errno.
func (d *Device) requestError(op shared.Op, n int, off int64, err error, sts Status) error {
	e := &statusError{errno: syscall.EIO, status: sts, device: d.name, op: op, n: n, off: off}
	errors.As(err, &e.errno)
	// What the supervisor says tells more than a status.
	if failure := (*control.Failure)(nil); sts == StatusOK || errors.As(err, &failure) {
		e.status, e.cause = StatusHWError, err
	}
	d.complain(e)
	return e
}
