// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"sync/atomic"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// deviceMode is the mode of device nodes: like block devices, they are not for everybody to read.
const deviceMode = 0o660

// largeWrite is from how many bytes on a payload that already lies in the channel's memory stays where it is: a
// page-sized one would keep a megabyte from others until it is cut off.
const largeWrite = 64 << 10

// device is what the node of a device needs of plugin.Device; that is where the methods' contracts are written down.
type device interface {
	Name() string
	Minor() int
	Handler() string
	Size() int64
	BlockSize() int
	ReadOnly() bool
	Config() string
	MaxXfer() int
	Options() plugin.DeviceOptions
	Stats() plugin.DeviceStats
	Attributes() plugin.Attributes
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	StartRead(n int, off int64, done plugin.Completion) bool
	StartWrite(p []byte, off int64, done plugin.Completion) bool
	Landing() *plugin.Landing
	StartLanded(landing *plugin.Landing, n int, off int64, done plugin.Completion) bool
	StartFlush(done plugin.Completion) bool
	Commit(p shared.Poller)
	Flush() error
	FlushFailures() uint64
	Discard(off, n int64) error
	Zero(off, n int64) error
	SeekData(off int64, hole bool) (int64, error)
	Resize(ctx context.Context, size int64) error
	OnResize(f func(size int64))
	Failure() error
}

// deviceNode is a device with its node: it translates file operations into block I/O.
type deviceNode struct {
	device device
	gate   *gate
	node   *fusetree.Node        // set when the node is in the tree
	cover  atomic.Pointer[cover] // what is mounted over it; nil if nothing ever was
	// args are what add was given, and sizeAtAdd is the size in bytes that came of it.
	args       addArgs
	sizeAtAdd  int64
	attributes *branch // below /sys/block
	busy       busyTime
}

// cache is what the kernel caches of the device.
func (n *deviceNode) cache() cacheMode { return n.args.cache.orDefault() }

// ops is the device's side of its node.
func (n *deviceNode) ops() *fusetree.Ops {
	return &fusetree.Ops{
		Open:    n.open,
		Release: n.release,
		Start:   n.start,
		Buffer:  n.buffer,
		Commit:  n.commit,
		Read:    n.read,
		Write:   n.write,
		Fsync:   n.fsync,

		Fallocate: n.fallocate,
		Seek:      n.seek,
		Truncate:  n.truncate,
	}
}

// open counts the open. EROFS: for writing, and the device is read-only. ESHUTDOWN: the program is stopping.
func (n *deviceNode) open(file *fusetree.File) error {
	writable := isWritable(file.Flags)
	if writable && n.device.ReadOnly() {
		return failf(syscall.EROFS, "%s is read-only", n.device.Name())
	}
	if err := n.gate.enterDevice(n, writable); err != nil {
		return err
	}
	state := &openFile{}
	state.reported.Store(n.device.FlushFailures())
	file.Data = state
	n.cache().apply(file)
	return nil
}

func (n *deviceNode) release(file *fusetree.File) {
	n.gate.leaveDevice(n, isWritable(file.Flags))
}

// start is the fast path of read, write and fsync.
func (n *deviceNode) start(r *fusetree.IO) bool {
	switch r.Kind {
	case fusetree.Read:
		return n.device.StartRead(r.Size, r.Offset, r)
	case fusetree.Fsync:
		return n.device.StartFlush(&fsyncEnd{r, n.device})
	case fusetree.Write:
	}
	if r.File.DirectIO && r.Flags.DSync() {
		return false // a flush has to follow
	}
	if landing, ok := r.Buffer.(*plugin.Landing); ok && len(r.Payload) >= largeWrite &&
		n.device.StartLanded(landing, len(r.Payload), r.Offset, r) {
		return true
	}
	return n.device.StartWrite(r.Payload, r.Offset, r)
}

// buffer lends memory of the device's channel for the next large write.
func (n *deviceNode) buffer() fusetree.Buffer {
	if landing := n.device.Landing(); landing != nil {
		return landing
	}
	return nil
}

func (n *deviceNode) commit(_ *fusetree.Node, p fusetree.Poller) { n.device.Commit(p) }

func (n *deviceNode) read(_ *fusetree.File, p []byte, off int64) (int, error) {
	return n.device.ReadAt(p, off)
}

// write writes to the device. An error hides how much was written before it: a short count would hide the error, which
// must reach the fsync of whoever wrote through the page cache.
func (n *deviceNode) write(file *fusetree.File, p []byte, off int64, flags fusetree.WriteFlags) (int, error) {
	written, err := n.device.WriteAt(p, off)
	if err != nil {
		return 0, err
	}
	if written < len(p) && uint32(flags)&syscall.O_DIRECT != 0 {
		// The kernel makes EIO of a short count here, as if something was broken. The device is full.
		return 0, failf(syscall.ENOSPC, "%s: write of %d bytes at %d, across the end", n.device.Name(), len(p), off)
	}
	// After a write on an O_DSYNC file the kernel sends FSYNC by itself, except to a node that was opened past the
	// page cache: there the flag on the write is all that is to be seen.
	if file.DirectIO && flags.DSync() {
		if err := n.fsync(file, true); err != nil {
			return 0, err
		}
	}
	return written, nil
}

func (n *deviceNode) seek(_ *fusetree.File, off int64, hole bool) (int64, error) {
	return n.device.SeekData(off, hole)
}

// truncate refuses to make the device larger (EINVAL, as a block device does) and does nothing otherwise: its size does
// not change this way, but cp, dd and shells truncate what they write to.
func (n *deviceNode) truncate(_ *fusetree.File, size int64) error {
	if size > n.device.Size() {
		return failf(syscall.EINVAL, "%s has %d bytes, and gets no larger by being truncated to %d", n.device.Name(),
			n.device.Size(), size)
	}
	return nil
}

// isWritable tells from open(2) flags whether the file can be written to.
func isWritable(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }
