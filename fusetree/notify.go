// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// notifier is the way back to the kernel, whatever the transport is: fuse.Server and fuse.ProtocolServer have it.
type notifier interface {
	// InodeNotify sends NOTIFY_INVAL_INODE. A negative off invalidates the attributes but not the cached data.
	InodeNotify(node uint64, off int64, length int64) fuse.Status
	// EntryNotify sends NOTIFY_INVAL_ENTRY.
	EntryNotify(parent uint64, name string) fuse.Status
}

// noticePatience bounds how long a change of the tree waits until the kernel has taken note of it.
//
// Both messages are short, and neither waits for an operation of a node while that node is in use: invalidating
// attributes takes no lock that a request holds, and a name is invalidated under the lock of its directory, which only
// requests that the tree answers by itself hold. (That is why NOTIFY_DELETE is not used: it takes the file's own lock,
// and would wait for a hung write.) But the kernel, dropping the last reference to an inode whose readahead is under
// way, waits for that READ; then the message is left to finish on its own.
const noticePatience = 3 * time.Second

// forgetAttributes makes the kernel ask again for the attributes of n. No lock may be held.
func (t *Tree) forgetAttributes(n *Node) {
	t.mu.Lock()
	// A node that the kernel does not know has no cached attributes. One that it is just learning of is safe as well,
	// since the reply to LOOKUP carries attributes that expire at once.
	known := n.lookups > 0 || n.id == rootID
	kernel := t.kernel
	if kernel == nil || !known {
		t.mu.Unlock()
		return
	}
	t.notices.Add(1)
	t.mu.Unlock()
	t.notify("attributes", n, func() fuse.Status { return kernel.InodeNotify(n.id, -1, 0) })
}

// writeBack makes the kernel write back, and forget, what it has cached of a range of n. No lock may be held. False: it
// may not have done so.
func (t *Tree) writeBack(n *Node, off, length int64) bool {
	t.mu.Lock()
	kernel := t.kernel
	if kernel == nil {
		t.mu.Unlock()
		return false
	}
	t.notices.Add(1)
	t.mu.Unlock()
	return t.notify("data", n, func() fuse.Status { return kernel.InodeNotify(n.id, off, length) })
}

// forgetName makes the kernel look name up again in parent, from which it was removed. No lock may be held.
func (t *Tree) forgetName(parent *Node, name string) {
	t.mu.Lock()
	kernel := t.kernel
	if kernel == nil {
		t.mu.Unlock()
		return
	}
	t.notices.Add(1)
	t.mu.Unlock()
	t.notify("name", parent, func() fuse.Status { return kernel.EntryNotify(parent.id, name) })
	t.forgetAttributes(parent)
}

// notify sends a message from a goroutine of its own and waits until the kernel has acted on it, with patience. The
// caller has added it to t.notices. False: the kernel has not, or not yet.
func (t *Tree) notify(what string, n *Node, send func() fuse.Status) bool {
	done := make(chan bool, 1)
	go func() {
		defer t.notices.Done()
		st := send()
		done <- st.Ok()
		switch st {
		case fuse.OK:
		case fuse.ENOENT: // the kernel does not remember it: as good
		case fuse.ENODEV, fuse.EBADF, fuse.Status(syscall.ECONNABORTED), fuse.Status(syscall.ENOTCONN): // unmounted meanwhile
		default:
			t.log.Warn("kernel did not accept a message", "what", what, "node", n.Path(), "error", st)
		}
	}()
	patience := time.NewTimer(noticePatience)
	defer patience.Stop()
	select {
	case ok := <-done:
		return ok
	case <-patience.C:
		t.log.Warn("kernel is slow to act on a message, not waiting any longer", "what", what, "node", n.Path())
		return false
	}
}
