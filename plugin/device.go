// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

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
	// FailFast: when the handler's process dies its requests fail with EIO at once, instead of being sent again, and
	// nothing is retained. The device is still reopened.
	FailFast bool
	// Retention is how many bytes of unflushed writes are kept to be sent again; 0: DefaultRetention.
	Retention int64
	// Timeout is how long a request may take before the handler counts as hung and its process is killed; 0:
	// DefaultTimeout, negative: for ever.
	Timeout time.Duration
}

func validBlockSize(n int) bool { return n >= minBlockSize && n <= maxBlockSize && n&(n-1) == 0 }

func (o DeviceOptions) check() error {
	switch {
	case o.Size < 0:
		return control.Failf(syscall.EINVAL, "size %d is negative", o.Size)
	case o.BlockSize != 0 && !validBlockSize(o.BlockSize):
		return control.Failf(syscall.EINVAL, "block size %d: must be a power of two from %d to %d",
			o.BlockSize, minBlockSize, maxBlockSize)
	case o.Retention < 0:
		return control.Failf(syscall.EINVAL, "retention of %d bytes is negative", o.Retention)
	case o.MaxXfer != 0 && (o.MaxXfer < minBlockSize || o.MaxXfer > shared.MaxPayload || o.MaxXfer%minBlockSize != 0):
		return control.Failf(syscall.EINVAL, "max_xfer %d: must be a multiple of %d, at most %d",
			o.MaxXfer, minBlockSize, shared.MaxPayload)
	}
	return nil
}

// setDefaults fills in what was left open.
func (o *DeviceOptions) setDefaults() {
	if o.Retention == 0 {
		o.Retention = DefaultRetention
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
}

// Device is an open device. Its methods may be called concurrently; after RemoveDevice its I/O fails with ENODEV.
type Device struct {
	minor   int
	name    string
	config  string // as the user gave it
	inner   string // as the handler gets it: without the leading slash
	handler *handler
	opts    DeviceOptions
	ready   bool // in the table and usable; guarded by Library.mu
	served  bool // open in the handler's host; guarded by Library.mu

	unflushed *retention
	patience  int64                 // Timeout in ticks
	failed    atomic.Pointer[error] // why it fails for good; nil while it works
	hasFailed chan struct{}         // closed when failed is set

	// Set by open, then constant.
	blockSize int
	maxXfer   int
	alignment int64
	canRead   bool
	canWrite  bool
	retains   bool // writes are kept until they are flushed

	size atomic.Int64

	closeDeaths int // of hosts in close

	gate     gate
	unevenMu sync.RWMutex // an unaligned write excludes all other writes while it reads, modifies and writes blocks
}

// open opens the device in a host and takes over its attributes, or with reopen set compares them with those that its
// users know.
func (d *Device) open(ctx context.Context, in *host, reopen bool) error {
	reply, err := in.rpc.Open(ctx, &hostpb.OpenRequest{
		Device: uint32(d.minor), Name: d.name, Config: d.inner,
		Size: uint64(d.opts.Size), BlockSize: uint32(d.opts.BlockSize), MaxXfer: uint32(d.opts.MaxXfer),
		ReadOnly: d.opts.ReadOnly, Reopen: reopen,
	})
	if err != nil {
		return in.rpcError("open", err)
	}
	if reopen {
		err = d.compare(reply)
	} else {
		err = d.adopt(reply)
	}
	if err != nil {
		_, closeErr := in.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)})
		return errors.Join(err, control.FromStatus(closeErr))
	}
	return nil
}

// firstOpen opens a new device in whichever host serves its handler, once more if that dies of something else
// meanwhile.
func (d *Device) firstOpen(ctx context.Context) error {
	if _, err := d.handler.service(ctx, d); err != nil {
		return err
	}
	in := d.handler.current()
	if err := d.handler.checkConfig(ctx, d.inner); err != nil {
		return err
	}
	if err := d.open(ctx, in, false); err != nil {
		return err
	}
	// From here on a recovery reopens it. One that has begun since the open has missed it.
	d.handler.lib.mu.Lock()
	d.served = true
	d.handler.lib.mu.Unlock()
	if d.handler.current() != in || !in.alive() {
		d.handler.lib.mu.Lock()
		d.served = false
		d.handler.lib.mu.Unlock()
		return control.Failf(syscall.EIO, "the handler's process died meanwhile; try again")
	}
	return nil
}

// compare checks that a reopened device is what it was.
func (d *Device) compare(r *hostpb.OpenReply) error {
	if int64(r.GetSize()) != d.Size() || int64(r.GetAlignment()) > d.alignment {
		return control.Failf(syscall.EIO, "it had %d bytes, and has %d after its handler was restarted", d.Size(), r.GetSize())
	}
	return nil
}

// fail ends the device's service for good; all its requests fail with the reason.
func (d *Device) fail(reason error) {
	var err error = control.Failf(syscall.EIO, "%s has failed: %v", d.name, reason) // whatever errno the reason has
	if d.failed.CompareAndSwap(nil, &err) {
		close(d.hasFailed)
		d.handler.log.Error("device has failed; remove it", "device", d.name, "reason", reason)
	}
}

// failure is why the device fails, nil while it works.
func (d *Device) failure() error {
	if p := d.failed.Load(); p != nil {
		return *p
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
	// Without a flush, what has completed is as durable as it gets.
	d.retains = r.GetCanFlush() && r.GetCanWrite() && !d.opts.FailFast && !d.opts.ReadOnly
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
	for {
		if _, err := d.handler.service(ctx, d); errors.Is(err, syscall.ETIMEDOUT) {
			d.gate.open()
			return fmt.Errorf("%s: %w: %w", d.name, errBusy, err)
		} else if err != nil {
			return err
		}
		in := d.handler.current()
		_, err := in.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)})
		if err == nil {
			return nil
		}
		err = in.rpcError("close", err)
		if in.alive() {
			return fmt.Errorf("its last flush failed: %w", err)
		}
		if d.unflushed.held() == 0 {
			d.fail(errors.New("its handler died while closing it"))
			return nil // nothing was lost
		}
		// It died in close: the next host gets the retained writes, and another chance.
		if d.closeDeaths++; d.closeDeaths >= poisonDeaths {
			d.fail(errors.New("its handler dies while closing it"))
			return fmt.Errorf("its handler died %d times while closing it: writes since the last flush may be lost (%w)",
				d.closeDeaths, syscall.EIO)
		}
		<-in.abandoned
	}
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
