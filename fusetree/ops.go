// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Ops are the operations behind a regular file. Every member is optional. They are called concurrently, also for one
// node and for one open file, and must not use the mount of their own tree.
//
// An error that carries a [syscall.Errno] (errors.As) reaches the user as this errno, any other as EIO and is logged.
// ENOSYS becomes EOPNOTSUPP: the kernel takes ENOSYS as "no file of this mount can do it" and never asks again.
type Ops struct {
	// Open is called for each open(2), before any other operation on f. It may set f.Data, f.DirectIO and f.KeepCache.
	// An error fails the open(2), and then f is never used again. Without it every open succeeds. O_TRUNC is not among
	// the flags: it arrives as a call of Truncate.
	Open func(f *File) error

	// Release is called once for each successful open, after the last close of it and after every other operation on f
	// has returned. It is called after Detach and after an unmount too.
	Release func(f *File)

	// Fsync is called for fsync(2), and with datasync set for fdatasync(2). Without it both succeed. The kernel does
	// not call it for sync(2) and syncfs(2), nor after a write on a DirectIO file opened with O_SYNC or O_DSYNC (see
	// WriteFlags.DSync).
	Fsync func(f *File, datasync bool) error

	// Read fills p from byte offset off and returns the number of bytes read. Less than len(p) means end of file; io.EOF
	// is not an error. An error after some bytes is not reported, the bytes are. Without it read(2) fails with EINVAL.
	//
	// Page-cached opens never read beyond the node's size. DirectIO opens do: end of file is for Read to decide.
	Read func(f *File, p []byte, off int64) (int, error)

	// Write writes p at byte offset off and returns the number of bytes written. An error after some bytes is not
	// reported, the bytes are. Without it write(2) fails with EINVAL. With O_APPEND the kernel chooses off, by the
	// node's size.
	//
	// With Options.WritebackCache it is called for DirectIO opens when they write, for others at any time, with f any of
	// the files that are open for writing, and never beyond the node's size: such writes fail with ENOSPC, which fsync(2)
	// and close(2) report, and as far as possible the writer's next write(2).
	Write func(f *File, p []byte, off int64, flags WriteFlags) (int, error)

	// Start is asked before Read, Write and Fsync. It may begin the request and return true, and r.Complete then ends it
	// at any time, also before Start returns; with false r is not used, and Read, Write or Fsync is called, from a
	// goroutine for the request alone. Start runs on a thread that all requests of the mount have to pass through, so it
	// must not wait for anything but its turn. What it began may be held back until Commit.
	Start func(r *IO) bool

	// Buffer may lend memory into which the payload of a later large write to the node is read; nil if there is none to
	// spare. Start finds it in IO.Buffer.
	Buffer func() Buffer

	// Commit follows one or more calls of Start for the node, on the same thread: what was held back must get going. With
	// p not nil this thread has nothing to do before some requests have come to their end, or new ones arrive. Commit
	// may see to both, which p is for, as long as something happens at least every few dozen microseconds: that is
	// cheaper than to wake threads.
	Commit func(n *Node, p Poller)

	// Fallocate is called for fallocate(2) on a file that is open for writing, with its mode. The kernel lets through
	// only the flags FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE and FALLOC_FL_ZERO_RANGE, and 0. It has written back what
	// it had cached of the range, and drops it after a success; meanwhile other writes to the node wait. A Fallocate
	// that changes the size calls UpdateSize. Without it fallocate(2) fails with EOPNOTSUPP.
	Fallocate func(f *File, mode uint32, off, length int64) error

	// Seek is called for lseek(2) with SEEK_DATA or, with hole set, SEEK_HOLE, for an offset below the node's size. The
	// kernel does not write back what has been written to a mapping before it asks, so what Seek takes for a hole between
	// off and data is written back, and Seek asked again. Without it, and in cases of doubt, everything is data.
	Seek func(f *File, off int64, hole bool) (int64, error)

	// Truncate is called for ftruncate(2), truncate(2) and open(2) with O_TRUNC; f is nil where no open file is
	// involved, as for the latter two. A Truncate that changes the size calls UpdateSize. Without it the request is
	// accepted and ignored, and the size stays, as O_TRUNC on a block device does.
	Truncate func(f *File, size int64) error
}

// Buffer is memory that a node lends to the transport. All methods are called on the transport's thread.
type Buffer interface {
	// Bytes is the memory, at least Options.MaxWrite bytes; nil once a Start has taken it, and then the transport has no
	// more to do with it.
	Bytes() []byte
	// Release gives it back.
	Release()
}

// Poller is the thread that a Commit is called on, which would otherwise sleep until there is something to do.
type Poller interface {
	// Pending is the number of requests that the thread has started lately and that have not been completed.
	Pending() int
	// Poll starts the requests that have arrived, with a Commit for them, and reports whether there were any. It does
	// not wait, and is for the thread itself only, until Commit returns.
	Poll() bool
}

// File is one open(2) of a node.
type File struct {
	// Node is what was opened.
	Node *Node

	// Flags are the flags of open(2), without O_CREAT, O_EXCL, O_NOCTTY and O_TRUNC, which the kernel handles.
	Flags uint32

	// Data is private to the node's Ops. They order their own accesses after Open.
	Data any

	// DirectIO, when Open sets it, bypasses the page cache for this open file (FOPEN_DIRECT_IO), with concurrent writes
	// (FOPEN_PARALLEL_DIRECT_WRITES): reads and writes arrive as users issue them, cut at Options.MaxWrite. Mapping such
	// a file shared needs Linux 6.6 or later.
	DirectIO bool

	// KeepCache, when Open sets it, keeps what the page cache holds of the node (FOPEN_KEEP_CACHE). Otherwise each open
	// drops it.
	KeepCache bool

	opened  uint64 // opens of the node up to this one
	handle  uint64 // index in the tree's handle table; not 0 once open
	flushed bool   // under Tree.mu: a close(2) has been seen
}

// WriteFlags are the open(2) flags that hold for one write.
type WriteFlags uint32

// DSync reports whether the data must be on stable storage before the write completes: the file was opened with O_DSYNC
// or O_SYNC, or the write was a pwritev2(2) with RWF_DSYNC or RWF_SYNC. The kernel follows a write through the page
// cache by an Fsync by itself; on a DirectIO file it leaves it to Write.
func (f WriteFlags) DSync() bool {
	return f&syscall.O_DSYNC != 0 // part of O_SYNC
}

// noOps stands for a nil *Ops.
var noOps = &Ops{}

// maxErrno bounds what the kernel accepts in a reply; it drops the request's reply otherwise, and the caller hangs.
const maxErrno = 511

// status is the FUSE reply for the error of a node's operation.
func (t *Tree) status(n *Node, op string, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) || errno <= 0 || errno > maxErrno {
		t.log.Error("operation failed without an errno, reporting EIO", "op", op, "node", n.Path(), "error", err)
		return fuse.EIO
	}
	if errno == syscall.ENOSYS {
		return fuse.ENOTSUP
	}
	return fuse.Status(errno)
}
