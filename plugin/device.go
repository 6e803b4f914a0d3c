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
	minBlockSize  = 512
	maxBlockSize  = 65536
	maxDeviceSize = 1<<63 - 1<<20
	// maxRetryTime is how long at most a handler's "busy" is put up with.
	maxRetryTime = 20 * time.Second
)

// DeviceOptions are what a user may ask of a device beyond its config string. The zero value asks for nothing.
type DeviceOptions struct {
	Size      int64 // bytes; 0: the handler's or the image's own
	BlockSize int   // bytes, a power of two from 512 to 65536; 0: the handler's own, 512 if it has none
	MaxXfer   int   // largest request to the handler in bytes, a multiple of 512 up to 1 MiB; 0: 1 MiB
	ReadOnly  bool
	// NoDiscard refuses Discard, with EOPNOTSUPP.
	NoDiscard bool
	// FailFast: when the handler's process dies its requests fail with EIO at once, instead of being sent again, and
	// nothing is retained. The device is still reopened.
	FailFast bool
	// Record is the absolute path of a file to make and record all changes of the device in, "" for none. The device is
	// slower then: its writes are made in whole sectors, and those of other lengths read first.
	Record string
	// Retention is how many bytes of unflushed writes are kept to be sent again; 0: DefaultRetention.
	Retention int64
	// Timeout is how long a request may take before the handler counts as hung and its process is killed; 0:
	// DefaultTimeout, negative: for ever.
	Timeout time.Duration
	// GuardsOff: the handler is driven as it is, without what is known about its bugs.
	GuardsOff bool
	// Format lets the handler format what the device is made of, where it does that; once, not when it is reopened.
	Format bool
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

	// direct is the channel of the host that has the device open, for the fast path; it may be that of a host that has
	// died, which takes no more requests. Set by the first open.
	direct atomic.Pointer[shared.Channel]

	unflushed *retention
	recorder  *recorder // nil unless asked for
	stats     *deviceStats
	patience  int64                 // Timeout in ticks
	failed    atomic.Pointer[error] // why it fails for good; nil while it works
	hasFailed chan struct{}         // closed when failed is set
	memory    *memory               // that outlives hosts; set by the first open
	contents  contents              // where answers to reads may lie

	// Set by open, then constant.
	blockSize  int
	maxXfer    int
	alignment  int64
	canRead    bool
	canWrite   bool
	clears     clearing
	canSeek    bool
	attributes Attributes
	// retains: writes are kept until they are flushed. May change with a reopen.
	retains atomic.Bool
	// unguarded: they should be, but FailFast forbids it.
	unguarded bool

	size atomic.Int64
	sizing
	flushes flushing

	closeDeaths int // of hosts in close

	// putOff is not nil while the handler serves without the device, which it reopens meanwhile, and is closed when that
	// has ended; guarded by handler.mu.
	putOff chan struct{}
	// What supervise knows of it:
	reopenDeaths int  // of hosts in a row, in its reopen or replay
	reopensSlow  bool // others should not have to wait for its reopen

	gate     gate
	unevenMu sync.RWMutex // an unaligned write excludes all other writes while it reads, modifies and writes blocks
}

// open opens the device in a host and takes over its attributes, or with reopen set compares them with those that its
// users know.
func (d *Device) open(ctx context.Context, in *host, reopen bool) error {
	if d.memory == nil {
		d.memory = newMemory(d.name)
	}
	in.memory.lend(uint32(d.minor), d.memory)
	reply, err := in.rpc.Open(ctx, &hostpb.OpenRequest{
		Device: uint32(d.minor), Name: d.name, Config: d.inner,
		Size: uint64(d.asked.Load()), BlockSize: uint32(d.opts.BlockSize), MaxXfer: uint32(d.opts.MaxXfer),
		ReadOnly: d.opts.ReadOnly, Reopen: reopen, RetryMs: retryTime(d.opts.Timeout),
		GuardsOff: d.opts.GuardsOff, Format: d.opts.Format && !reopen,
	})
	if err != nil {
		return in.rpcError("open", err)
	}
	if reopen {
		err = d.compare(reply)
	} else {
		err = d.adopt(reply)
	}
	if err == nil {
		d.contents.look(d, reply.GetContents())
	}
	if err != nil {
		_, closeErr := in.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)})
		return errors.Join(err, control.FromStatus(closeErr))
	}
	return nil
}

// retryTime is how long, in milliseconds, the host tries a request again that the handler is too busy for: less than
// what makes the handler count as hung.
func retryTime(timeout time.Duration) uint32 {
	most := maxRetryTime
	if timeout > 0 {
		most = min(most, timeout*2/3)
	}
	return uint32(max(1, most.Milliseconds()))
}

// firstOpen opens a new device in the host that serves its handler. A handler that does not return from that has its
// process killed when the context ends: no other device could be opened there any more.
func (d *Device) firstOpen(ctx context.Context) error {
	err := d.tryFirstOpen(ctx)
	if err != nil {
		d.memory.drop()
		d.contents.unmap()
	}
	return err
}

func (d *Device) tryFirstOpen(ctx context.Context) error {
	if err := d.handler.hold(ctx, d.handler.shape.TryRLock); err != nil {
		return err
	}
	defer d.handler.shape.RUnlock()
	in, err := d.handler.service(ctx, d)
	if err != nil {
		return err
	}
	if err = d.handler.checkConfig(ctx, in, d.inner); err == nil {
		err = d.open(ctx, in, false)
	}
	if err != nil {
		if timeIsUp(ctx) {
			in.killFor(killedForHang)
		}
		return err
	}
	d.direct.Store(in.channel)
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

// comeBack reopens the device in a host and replays its retained changes. On error it is not open there, unless the
// host has died (shared.ErrPeerGone, or the host is not alive).
func (d *Device) comeBack(ctx context.Context, in *host) error {
	if err := d.open(ctx, in, true); err != nil {
		return err
	}
	err := d.replay(in.channel)
	if err != nil && !errors.Is(err, shared.ErrPeerGone) {
		_ = d.closeIn(ctx, in) // what it says of the flush comes too late
	}
	return err
}

// compare checks that a reopened device is what it was.
func (d *Device) compare(r *hostpb.OpenReply) error {
	if d.mustRetain(r) {
		d.retains.Store(true) // and never back to false: the host before may have to go on
	}
	if !d.knows(int64(r.GetSize())) || int64(r.GetAlignment()) > d.alignment {
		return control.Failf(syscall.EIO, "it had %d bytes, and has %d after its handler was restarted",
			d.Size(), r.GetSize())
	}
	return nil
}

// fail ends the device's service for good; all its requests fail with the reason.
func (d *Device) fail(reason error) {
	var err error = control.Failf(syscall.EIO, "%s has failed: %v", d.name, reason) // whatever errno the reason has
	if d.failed.CompareAndSwap(nil, &err) {
		close(d.hasFailed)
		d.handler.log.Error("device has failed; remove it", "device", d.name, "reason", reason)
		d.memory.drop()
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
	size, block, xfer, align := r.GetSize(), r.GetBlockSize(), r.GetMaxXfer(), r.GetAlignment()
	switch {
	case size == 0 || size > maxDeviceSize:
		return control.Failf(syscall.EIO, "the handler gives the device a size of %d bytes; give one with size=", size)
	case !validBlockSize(int(block)):
		return control.Failf(syscall.EIO, "the handler gives the device a block size of %d bytes", block)
	case align == 0 || align > maxBlockSize || align&(align-1) != 0:
		return control.Failf(syscall.EIO, "the host asks for an alignment of %d bytes", align)
	case xfer < align || xfer > shared.MaxPayload:
		return control.Failf(syscall.EIO, "the handler gives the device a largest request of %d bytes", xfer)
	}
	if d.recorder != nil {
		if size%recordSector != 0 {
			return control.Failf(syscall.EINVAL, "a device of %d bytes cannot be recorded: it has no whole sectors", size)
		}
		align = max(align, recordSector)
	}
	d.size.Store(int64(size))
	d.blockSize, d.alignment = int(block), int64(align)
	d.maxXfer = int(xfer) - int(xfer)%int(align)
	d.canRead, d.canWrite = r.GetCanRead(), r.GetCanWrite()
	d.clears.adopt(r)
	d.canSeek = r.GetCanSeek()
	d.attributes = d.attributesIn(r)
	d.retains.Store(d.mustRetain(r))
	d.unguarded = d.opts.FailFast && d.losesWrites(r)
	return nil
}

// losesWrites: writes that have completed may go with the host until they are flushed. Without a flush, what has
// completed is as durable as it gets.
func (d *Device) losesWrites(r *hostpb.OpenReply) bool {
	return r.GetCanFlush() && r.GetCanWrite() && !r.GetWritesSurvive() && !d.opts.ReadOnly
}

// mustRetain decides whether writes have to be kept.
func (d *Device) mustRetain(r *hostpb.OpenReply) bool { return d.losesWrites(r) && !d.opts.FailFast }

// errBusy is wrapped by the error of a close that gave up before it began: the device is still there.
var errBusy = errors.New("requests are still in progress")

// close waits for the device's calls in progress and closes it in the host, which flushes it first. ETIMEDOUT, with
// errBusy, when the calls do not end within the context: the device stays open. Any other error says that writes may be
// lost, and the device is closed.
func (d *Device) close(ctx context.Context) (err error) {
	if err := d.handler.hold(ctx, d.handler.shape.TryRLock); err != nil {
		return fmt.Errorf("%s: %w (%w)", d.name, errBusy, err)
	}
	defer d.handler.shape.RUnlock()
	if err := d.gate.shut(ctx); err != nil {
		return fmt.Errorf("%s: %w (%w)", d.name, errBusy, syscall.ETIMEDOUT)
	}
	defer func() {
		if !errors.Is(err, errBusy) {
			d.memory.drop()
			d.contents.unmap()
		}
	}()
	for {
		in, err := d.handler.service(ctx, d)
		switch {
		case errors.Is(err, syscall.ETIMEDOUT):
			d.gate.open()
			return fmt.Errorf("%s: %w (%w)", d.name, errBusy, err)
		case err != nil:
			return d.lost(err) // it has failed; the host does not have it
		}
		err = d.closeIn(ctx, in)
		switch {
		case err == nil:
			return nil
		case in.alive():
			return fmt.Errorf("its last flush failed: %w", err)
		}
		// The host died in close: the next one gets the retained writes, and another chance.
		d.closeDeaths++
		switch {
		case d.unflushed.held() == 0: // there is nothing to try again for
			d.fail(errors.New("its handler died while closing it"))
			return d.lost(err)
		case d.closeDeaths >= poisonDeaths || ctx.Err() != nil:
			err = fmt.Errorf("its handler died %d times while closing it (last: %w)", d.closeDeaths, err)
			d.fail(err)
			return d.lost(err)
		}
		<-in.abandoned
	}
}

// closeIn closes the device in a host, which flushes it first; nothing is retained then any more. A handler that does
// not return from that within the context, or the device's timeout, has its process killed. Otherwise an error is that
// of the flush, and the device is closed.
func (d *Device) closeIn(ctx context.Context, in *host) error {
	if d.opts.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.opts.Timeout)
		defer cancel()
	}
	_, err := in.rpc.Close(ctx, &hostpb.CloseRequest{Device: uint32(d.minor)})
	if err == nil {
		d.unflushed.drop()
		return nil
	}
	err = in.rpcError("close", err)
	if timeIsUp(ctx) {
		in.killFor(killedForHang)
		<-in.abandoned
	}
	return err
}

// replyTime is how long before the end of a call's time a host may say that the handler has not come back from it.
const replyTime = 100 * time.Millisecond

// timeIsUp reports, after a call that has failed, whether it failed because of the end of its context.
func timeIsUp(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && time.Until(deadline) < replyTime
}

// lost is the error of a device that goes without having been closed: nil if no write was waiting for a flush, as far
// as the front has kept count of them.
func (d *Device) lost(reason error) error {
	held := d.unflushed.held()
	switch {
	case held == 0 && d.unguarded:
		return control.Failf(syscall.EIO, "writes since its last flush may be lost: %v", reason)
	case held == 0:
		return nil
	}
	return control.Failf(syscall.EIO, "%d bytes of unflushed writes may be lost: %v", held, reason)
}

// Failure is why all requests of the device fail and it should be removed, nil while it works. A device of a handler
// that has failed has failed too.
func (d *Device) Failure() error {
	if err := d.failure(); err != nil {
		return err
	}
	return d.handler.failure()
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

// Options are those the device was added with, and the defaults for what they left open.
func (d *Device) Options() DeviceOptions { return d.opts }

// ReadOnly reports whether the device was added read-only.
func (d *Device) ReadOnly() bool { return d.opts.ReadOnly }
