// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	rootID           = fuse.FUSE_ROOT_ID
	permissions      = 0o7777
	directoryMode    = 0o755
	defaultBlockSize = 4096
	minBlockSize     = 512
	maxBlockSize     = 1 << 30
	statBlock        = 512 // unit of st_blocks
)

// Node is a directory or a regular file of a [Tree]. All methods may be called from anywhere, also after the node was
// removed.
//
// The updating methods return once the kernel has forgotten the attributes it had cached, so that a stat(2) that
// starts afterwards sees the new ones. (Should the kernel itself be stuck, they give up the wait after a few seconds,
// with a warning in the log.)
type Node struct {
	tree *Tree
	id   uint64 // node id and inode number; never used twice
	name string
	dir  bool
	ops  *Ops
	data any

	// gone is set, under Tree.mu, when the node loses its name. Operations on files that are still open read it
	// without the lock.
	gone atomic.Bool

	// Under Tree.mu.
	parent   *Node // the root is its own parent; kept after removal
	children map[string]*Node
	order    []*Node       // the children by id, which is the order of readdir
	subdirs  int           // number of children that are directories
	lookups  uint64        // what the kernel has been told of the node and has not forgotten
	opens    int           // open files, and opens in progress
	flushed  int           // open files that have seen a close(2)
	idle     chan struct{} // closed when opens falls to 0; nil when nobody waits

	attrMu sync.Mutex // guards attr
	attr   attributes

	writeback
}

// attributes are what stat(2) shows.
type attributes struct {
	mode      uint32 // permissions
	owner     fuse.Owner
	size      int64
	blockSize uint32
	atime     time.Time
	mtime     time.Time
	ctime     time.Time
}

// newNode makes a node that is in no directory yet.
func newNode(t *Tree, id uint64, name string, parent *Node, mode uint32) *Node {
	now := time.Now()
	return &Node{
		tree:   t,
		id:     id,
		name:   name,
		parent: parent,
		attr: attributes{
			mode:      mode & permissions,
			owner:     t.owner,
			blockSize: defaultBlockSize,
			atime:     now,
			mtime:     now,
			ctime:     now,
		},
	}
}

// newFile makes a regular file that is in no directory yet.
func newFile(t *Tree, id uint64, name string, parent *Node, mode uint32, ops *Ops, data any) *Node {
	n := newNode(t, id, name, parent, mode)
	if n.ops = ops; ops == nil {
		n.ops = noOps
	}
	n.data = data
	return n
}

// newDirectory makes an empty directory that is in no directory yet.
func newDirectory(t *Tree, id uint64, name string, parent *Node) *Node {
	n := newNode(t, id, name, parent, directoryMode)
	n.dir = true
	n.ops = noOps
	n.children = make(map[string]*Node)
	return n
}

// Name returns the last component of the node's path, "" for the root.
func (n *Node) Name() string { return n.name }

// Path returns the node's path from the mount point, beginning with '/'. For a removed node it is the path it had.
func (n *Node) Path() string {
	n.tree.mu.Lock()
	defer n.tree.mu.Unlock()
	return n.path()
}

// path is Path with Tree.mu held.
func (n *Node) path() string {
	if n.id == rootID {
		return "/"
	}
	var parts []string
	for ; n.id != rootID; n = n.parent {
		parts = append(parts, n.name)
	}
	var b strings.Builder
	for i := len(parts) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(parts[i])
	}
	return b.String()
}

// Data returns what was given to Add, nil for directories.
func (n *Node) Data() any { return n.data }

// IsDir reports whether the node is a directory.
func (n *Node) IsDir() bool { return n.dir }

// Size returns the file's size in bytes, as last set by UpdateSize; 0 for directories.
func (n *Node) Size() int64 {
	n.attrMu.Lock()
	defer n.attrMu.Unlock()
	return n.attr.size
}

// OpenCount returns how many open files of the node the mount has, opens in progress included. A file that was closed
// counts until its Release has returned, which may be shortly after close(2) did.
func (n *Node) OpenCount() int {
	n.tree.mu.Lock()
	defer n.tree.mu.Unlock()
	return n.opens
}

// UpdateMode sets the permission bits (07777) of the node. Other bits are ignored.
func (n *Node) UpdateMode(mode uint32) {
	n.update(func(a *attributes) { a.mode = mode & permissions })
}

// UpdateOwner sets the user and the group of the node, which were those of this process.
func (n *Node) UpdateOwner(uid, gid uint32) {
	n.update(func(a *attributes) { a.owner = fuse.Owner{Uid: uid, Gid: gid} })
}

// UpdateSize sets the size of a file in bytes. It panics if size is negative. With Options.WritebackCache the kernel
// drops what it has of the file beyond the size, and it must not be called from operations other than Truncate and
// Fallocate.
func (n *Node) UpdateSize(size int64) {
	if size < 0 {
		panic("fusetree: UpdateSize: negative size")
	}
	n.update(func(a *attributes) { a.size = size })
	n.limit.Store(size)
	if n.tree.opts.WritebackCache && n.resizing.Load() == 0 {
		n.tree.tellSize(n)
	}
}

// UpdateMTime sets the modification time of the node to now. Nothing else does when a file is written. The kernel then
// drops the pages it has cached of the file: call it too when the contents change other than through the mount.
func (n *Node) UpdateMTime() {
	n.update(func(a *attributes) { a.mtime = time.Now() })
}

// UpdateBlockSize sets st_blksize in bytes, 4096 at first. The kernel knows powers of two only: others are rounded
// down, and values outside 512 bytes to 1 GiB are taken as the nearest of these.
func (n *Node) UpdateBlockSize(size int) {
	size = min(max(size, minBlockSize), maxBlockSize)
	n.update(func(a *attributes) { a.blockSize = 1 << (bits.Len(uint(size)) - 1) })
}

// update changes the attributes and makes the kernel ask for them again.
func (n *Node) update(change func(*attributes)) {
	n.attrMu.Lock()
	change(&n.attr)
	n.attr.ctime = time.Now()
	n.attrMu.Unlock()
	n.tree.forgetAttributes(n)
}

// fillAttr writes what stat(2) shows. Tree.mu is held.
func (n *Node) fillAttr(out *fuse.Attr) {
	n.attrMu.Lock()
	a := n.attr
	n.attrMu.Unlock()
	*out = fuse.Attr{
		Ino:     n.id,
		Size:    uint64(a.size),
		Blocks:  uint64(a.size+statBlock-1) / statBlock, // no holes, or cp(1) looks for them
		Mode:    syscall.S_IFREG | a.mode,
		Nlink:   1,
		Owner:   a.owner,
		Blksize: a.blockSize,
	}
	out.SetTimes(&a.atime, &a.mtime, &a.ctime)
	if n.dir {
		out.Mode = syscall.S_IFDIR | a.mode
		out.Nlink = uint32(2 + n.subdirs)
	}
	if n.gone.Load() {
		out.Nlink = 0
	}
}
