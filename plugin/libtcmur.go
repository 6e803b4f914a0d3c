// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"slices"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// This file has the calls of libtcmur(3) that name a device by its minor. Read, Write and Flush start an operation and
// tell its end to the command; Device's methods do the same and wait.

// Command is one operation started with Library.Read, Write or Flush (struct tcmulib_cmd).
type Command struct {
	// Done is called exactly once for every operation that was started without an error, possibly before the call that
	// started it returns. The status is StatusOK or the handler's; StatusHWError also when its process died.
	Done func(*Command, Status)
	// Data is the caller's own.
	Data any
}

// vectorLength is the number of bytes in an iovec-like list of buffers.
func vectorLength(iov [][]byte) int {
	n := 0
	for _, b := range iov {
		n += len(b)
	}
	return n
}

// start checks what can be checked at once, then runs the operation on its own goroutine.
func (l *Library) start(
	minor int, cmd *Command, n int, off int64, able func(*Device) bool, run func(*Device) error,
) error {
	l.mu.Lock()
	d, err := l.lookup(minor)
	l.mu.Unlock()
	switch {
	case err != nil:
		return err
	case !able(d):
		return control.Failf(syscall.ENXIO, "%s: handler %s does not implement this", d.name, d.handler.subtype)
	case off < 0 || int64(n) > d.Size() || off > d.Size()-int64(n):
		return control.Failf(syscall.EINVAL, "%s: %d bytes at %d exceed the device's %d bytes", d.name, n, off, d.Size())
	}
	go func() {
		cmd.Done(cmd, statusOf(run(d)))
	}()
	return nil
}

// statusOf is the handler's status behind an error of a Device method.
func statusOf(err error) Status {
	var st *statusError
	switch {
	case err == nil:
		return StatusOK
	case errors.As(err, &st) && st.status != StatusOK:
		return st.status
	}
	return StatusHWError
}

// Read is tcmur_read: it starts a read into the buffers, in order, from byte off of the device. The buffers must stay
// untouched until cmd.Done. ENODEV: no device at the minor. ENXIO: the handler cannot read. EINVAL: the range exceeds
// the device.
func (l *Library) Read(minor int, cmd *Command, iov [][]byte, off int64) error {
	n := vectorLength(iov)
	return l.start(minor, cmd, n, off, func(d *Device) bool { return d.canRead }, func(d *Device) error {
		if len(iov) == 1 {
			_, err := d.ReadAt(iov[0], off)
			return err
		}
		buf := make([]byte, n)
		_, err := d.ReadAt(buf, off)
		for _, b := range iov {
			buf = buf[copy(b, buf):]
		}
		return err
	})
}

// Write is tcmur_write: it starts a write of the buffers, in order, to byte off of the device. The buffers must stay
// unchanged until cmd.Done. Errors as for Read; EROFS: the device is read-only.
func (l *Library) Write(minor int, cmd *Command, iov [][]byte, off int64) error {
	n := vectorLength(iov)
	if d := l.Device(minor); d != nil && d.opts.ReadOnly {
		return control.Failf(syscall.EROFS, "%s is read-only", d.name)
	}
	return l.start(minor, cmd, n, off, func(d *Device) bool { return d.canWrite }, func(d *Device) error {
		buf := slices.Concat(iov...)
		_, err := d.WriteAt(buf, off)
		return err
	})
}

// Flush is tcmur_flush: it starts a flush of every write that has completed. ENODEV: no device at the minor.
func (l *Library) Flush(minor int, cmd *Command) error {
	return l.start(minor, cmd, 0, 0, func(*Device) bool { return true }, (*Device).Flush)
}

// Size is tcmur_get_size: bytes. ENODEV: no device at the minor.
func (l *Library) Size(minor int) (int64, error) {
	return attribute(l, minor, (*Device).Size)
}

// BlockSize is tcmur_get_block_size: bytes. ENODEV: no device at the minor.
func (l *Library) BlockSize(minor int) (int, error) {
	return attribute(l, minor, (*Device).BlockSize)
}

// MaxXfer is tcmur_get_max_xfer: bytes. ENODEV: no device at the minor.
func (l *Library) MaxXfer(minor int) (int, error) {
	return attribute(l, minor, (*Device).MaxXfer)
}

// DeviceName is tcmur_get_dev_name; "" if there is no device at the minor.
func (l *Library) DeviceName(minor int) string {
	name, _ := attribute(l, minor, (*Device).Name)
	return name
}

func attribute[T any](l *Library, minor int, get func(*Device) T) (T, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d, err := l.lookup(minor)
	if err != nil {
		var zero T
		return zero, err
	}
	return get(d), nil
}
