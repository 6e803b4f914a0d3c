// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"path"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// With Options.WritebackCache the kernel trusts nobody but itself on the size of a regular file: what GETATTR says of
// it is ignored. Two things follow.
//
// When the server changes a size, the kernel can be told only by a truncate(2), which a thread of ours makes on our own
// mount. It is answered by rawFS without a call of the node, and the kernel takes the size from the reply. While it
// waits, for a write(2) under way or for pages being written back, nothing of ours waits for it longer than
// noticePatience.
//
// When a user writes beyond the end, the kernel takes it, makes the file larger and learns that there is no room when
// it sends the pages. They fail with ENOSPC, which fsync(2) and close(2) report. But a program that writes until the
// device is full, such as dd without count, would never see either. So the size is put right, and the next GETATTR
// that the kernel makes for a write(2) to one of the files that were open fails with ENOSPC, and with it the write.

// writeback is what a node has for that.
type writeback struct {
	limit    atomic.Int64  // the size in bytes
	resizing atomic.Int32  // Truncate and Fallocate under way: their replies tell the kernel of a new size
	opened   atomic.Uint64 // opens, failed ones included
	overran  atomic.Uint64 // WRITEs beyond the end
	telling  atomic.Bool   // tellSizeAgain is under way

	refused     atomic.Uint64 // opened, as it was when the kernel sent data beyond the end; 0: nobody is to be refused
	refusedTill atomic.Int64  // in milliseconds of Unix time
}

// refusal is how long after an overrun a write(2) may be taken for its continuation.
const refusal = time.Second

// overruns reports whether a WRITE with these flags comes from the page cache and goes beyond the end.
func (n *Node) overruns(off uint64, size int, flags uint32) bool {
	return flags&fuse.WRITE_CACHE != 0 && off+uint64(size) > uint64(n.limit.Load())
}

// writeOverrun writes as much of a WRITE as there is room for, and fails it with ENOSPC.
func (r *rawFS) writeOverrun(f *File, in *fuse.WriteIn, data []byte) fuse.Status {
	n := f.Node
	if room := n.limit.Load() - int64(in.Offset); room > 0 {
		written, err := n.ops.Write(f, data[:min(room, int64(len(data)))], int64(in.Offset), WriteFlags(in.Flags))
		if written == 0 && err != nil {
			return r.t.status(n, "write", err)
		}
	}
	n.refusedTill.Store(time.Now().Add(refusal).UnixMilli())
	n.refused.Store(n.opened.Load())
	n.overran.Add(1)
	if !n.telling.Swap(true) {
		go r.t.tellSizeAgain(n) // not from here: it waits for this very WRITE
	}
	return fuse.Status(syscall.ENOSPC)
}

// tellSizeAgain calls tellSize until no WRITE has gone beyond the end meanwhile: each means that the kernel has made
// the file larger, maybe after it was told.
func (t *Tree) tellSizeAgain(n *Node) {
	for {
		before := n.overran.Load()
		t.tellSize(n)
		n.telling.Store(false)
		if n.overran.Load() == before || n.telling.Swap(true) {
			return
		}
	}
}

// refuses reports, once, whether an attempt to write to f continues one that went beyond the end.
func (n *Node) refuses(f *File) bool {
	till := n.refused.Load()
	if till == 0 || f == nil || f.opened > till || f.Flags&syscall.O_ACCMODE == syscall.O_RDONLY {
		return false
	}
	return n.refused.CompareAndSwap(till, 0) && time.Now().UnixMilli() <= n.refusedTill.Load()
}

// tellSize makes the kernel take over the size of n. No lock may be held.
func (t *Tree) tellSize(n *Node) {
	t.mu.Lock()
	// A file that the kernel does not know has no size there.
	known := n.lookups > 0 || n.id == rootID
	if t.kernel == nil || !known || n.gone.Load() {
		t.mu.Unlock()
		return
	}
	where := path.Join(t.mnt.path, n.path())
	t.notices.Add(1)
	t.mu.Unlock()
	t.notify("size", n, func() fuse.Status { return fuse.ToStatus(t.mnt.truncate(where, n.limit.Load())) })
}

// WriteBack makes the kernel send what it has not yet sent of what was written to the file, and drop what it has
// cached. It gives up after a few seconds, and then returns false.
func (n *Node) WriteBack() bool { return n.tree.writeBack(n, 0, 0) }

// truncate sets the size of the file at path, which must be on this mount. ENOENT: there is no such file, or something
// else is there.
func (m *mount) truncate(path string, size int64) error {
	return apart(-1, func() error {
		// Without an open that the node would notice.
		fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		id, err := mountOf(fd, "", unix.AT_EMPTY_PATH)
		switch {
		case err != nil:
			return err
		case id != m.id:
			return syscall.ENOENT
		}
		err = unix.Truncate(fmt.Sprintf("/proc/thread-self/fd/%d", fd), size)
		if errors.Is(err, syscall.ENOENT) {
			return syscall.ENOTSUP // no /proc
		}
		return err
	})
}
