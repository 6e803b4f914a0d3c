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
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

const (
	minBlockSize = 512
	maxBlockSize = 65536
)

// DeviceOptions are what a user may ask of a device beyond its config string. The zero value asks for nothing.
type DeviceOptions struct {
	Size      int64 // bytes; 0: the handler's or the image's own
	BlockSize int   // bytes, a power of two from 512 to 65536; 0: the handler's own, 512 if it has none
	MaxXfer   int   // largest request to the handler in bytes, a multiple of 512 up to 1 MiB; 0: 1 MiB
	ReadOnly  bool
}

func validBlockSize(n int) bool { return n >= minBlockSize && n <= maxBlockSize && n&(n-1) == 0 }

func (o DeviceOptions) check() error {
	switch {
	case o.Size < 0:
		return control.Failf(syscall.EINVAL, "size %d is negative", o.Size)
	case o.BlockSize != 0 && !validBlockSize(o.BlockSize):
		return control.Failf(syscall.EINVAL, "block size %d: must be a power of two from %d to %d",
			o.BlockSize, minBlockSize, maxBlockSize)
	case o.MaxXfer != 0 && (o.MaxXfer < minBlockSize || o.MaxXfer > shared.MaxPayload || o.MaxXfer%minBlockSize != 0):
		return control.Failf(syscall.EINVAL, "max_xfer %d: must be a multiple of %d, at most %d",
			o.MaxXfer, minBlockSize, shared.MaxPayload)
	}
	return nil
}

// Device is an open device. Its methods may be called concurrently; after RemoveDevice its I/O fails with ENODEV.
type Device struct {
	minor   int
	name    string
	config  string
	handler *handler
	opts    DeviceOptions
	ready   bool // in the table and usable; guarded by Library.mu

	// Set by open, then constant.
	blockSize int
	maxXfer   int
	alignment int64
	canRead   bool
	canWrite  bool

	size atomic.Int64

	gate     gate
	unevenMu sync.RWMutex // an unaligned write excludes all other writes while it reads, modifies and writes blocks
}

// open opens the device in the handler's host and takes over its attributes. config is without its leading slash.
func (d *Device) open(ctx context.Context, config string, reopen bool) error {
	reply, err := d.handler.host.rpc.Open(ctx, &hostpb.OpenRequest{
		Device: uint32(d.minor), Name: d.name, Config: config,
		Size: uint64(d.opts.Size), BlockSize: uint32(d.opts.BlockSize), MaxXfer: uint32(d.opts.MaxXfer),
		ReadOnly: d.opts.ReadOnly, Reopen: reopen,
	})
	if err != nil {
		return d.handler.rpcError("open", err)
	}
	if err := d.adopt(reply); err != nil {
		_, closeErr := d.handler.host.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)})
		return errors.Join(err, control.FromStatus(closeErr))
	}
	return nil
}

// adopt checks what the host says of the device before it believes it. EIO when it cannot be.
func (d *Device) adopt(r *hostpb.OpenReply) error {
	const maxSize = 1<<63 - 1<<20
	size, block, xfer, align := r.GetSize(), r.GetBlockSize(), r.GetMaxXfer(), r.GetAlignment()
	switch {
	case size == 0 || size > maxSize:
		return control.Failf(syscall.EIO, "the handler gives the device a size of %d bytes; give one with size=", size)
	case !validBlockSize(int(block)):
		return control.Failf(syscall.EIO, "the handler gives the device a block size of %d bytes", block)
	case align == 0 || align > maxBlockSize || align&(align-1) != 0:
		return control.Failf(syscall.EIO, "the host asks for an alignment of %d bytes", align)
	case xfer < align || xfer > shared.MaxPayload:
		return control.Failf(syscall.EIO, "the handler gives the device a largest request of %d bytes", xfer)
	}
	d.size.Store(int64(size))
	d.blockSize, d.alignment = int(block), int64(align)
	d.maxXfer = int(xfer) - int(xfer)%int(align)
	d.canRead, d.canWrite = r.GetCanRead(), r.GetCanWrite()
	return nil
}

// errBusy is wrapped by the error of a close that gave up waiting for the device's requests: the device is still there.
var errBusy = errors.New("requests are still in progress")

// close waits for the device's calls in progress and closes it in the host, which flushes it first. ETIMEDOUT, with
// errBusy, when the calls do not end within the context: the device stays open. Any other error is that of the flush or
// of the host, and the device is closed.
func (d *Device) close(ctx context.Context) error {
	if err := d.gate.shut(ctx); err != nil {
		return fmt.Errorf("%s: %w (%w)", d.name, errBusy, syscall.ETIMEDOUT)
	}
	if !d.handler.host.alive() {
		return control.Failf(syscall.EIO, "its handler's process is dead: writes since the last flush may be lost")
	}
	if _, err := d.handler.host.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)}); err != nil {
		return fmt.Errorf("its last flush failed: %w", d.handler.rpcError("close", err))
	}
	return nil
}

// Name is the device's name, subtype and minor: "ram000".
func (d *Device) Name() string { return d.name }

// Minor is the device's number.
func (d *Device) Minor() int { return d.minor }

// Config is the config string as it was given: "/ram/@".
func (d *Device) Config() string { return d.config }

// Handler is the subtype of the device's handler.
func (d *Device) Handler() string { return d.handler.subtype }

// Size is the size in bytes.
func (d *Device) Size() int64 { return d.size.Load() }

// BlockSize is the logical block size in bytes.
func (d *Device) BlockSize() int { return d.blockSize }

// MaxXfer is the size of the largest request to the handler in bytes. Longer reads and writes are split.
func (d *Device) MaxXfer() int { return d.maxXfer }

// ReadOnly reports whether the device was added read-only.
func (d *Device) ReadOnly() bool { return d.opts.ReadOnly }
