// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hashicorp/go-hclog"
)

const (
	maxNameLen = 255 // bytes, NAME_MAX

	defaultFsName        = "fusetree"
	defaultMaxWrite      = 1 << 20
	defaultMaxBackground = 256

	// closeGrace is how long Remove waits for a file of which a close(2) has been seen: the RELEASE request follows on
	// its own time. It passes in full, before EBUSY, if something else still uses the file: a duplicate of the
	// descriptor, a mapping, a loop device.
	closeGrace = time.Second
)

// Options are the settings of a tree. The zero value is usable.
type Options struct {
	// FsName is the first field of /proc/mounts; default "fusetree".
	FsName string

	// FsType is what follows "fuse." in the type field of /proc/mounts; default FsName.
	FsType string

	// Logger receives what cannot be reported as an error; default none.
	Logger hclog.Logger

	// MaxWrite bounds one read or write request, in bytes; default 1 MiB, which is also what most kernels allow.
	MaxWrite int

	// MaxBackground bounds how many asynchronous requests (readahead, asynchronous direct I/O) the kernel has under way
	// at once; default 256, at most 65535.
	MaxBackground int

	// IOUring tells whether requests are to arrive over io_uring; default IOUringOff. That needs Linux 6.14 or later and
	// the administrator's consent, "echo Y > /sys/module/fuse/parameters/enable_uring", at the time of Run.
	IOUring IOUringMode

	// WritebackCache lets the kernel keep what is written through the page cache, and send it later and in larger pieces:
	// before fsync(2) and close(2) return, or when it pleases. It holds for all files of the mount, whose sizes have to be
	// for the program to decide: the kernel takes writes of any length, and learns only when it sends them that there is
	// no room. See Node.UpdateSize and Ops.Write.
	WritebackCache bool
}

// Tree is a tree of nodes and, while Run runs, its mount.
type Tree struct {
	mountpoint string
	opts       Options
	log        hclog.Logger
	owner      fuse.Owner // of nodes at first: the user that this process runs as
	root       *Node
	files      handleTable
	mounted    chan struct{}

	runMu sync.Mutex // guards what follows; see run.go
	state runState
	mnt   *mount

	mu      sync.Mutex       // guards what follows, and what Node says
	nodes   map[uint64]*Node // every node that the kernel may ask for, and every node with a name
	lastID  uint64
	exited  bool
	kernel  notifier       // nil while not mounted
	notices sync.WaitGroup // messages under way to kernel; Add under mu, with kernel not nil
}

// Init makes an empty tree that Run will mount on the directory mountpoint. It does not touch the file system. EINVAL:
// mountpoint does not start with '/', or it ends in '/'; or an option is out of range.
func Init(mountpoint string, opts Options) (*Tree, error) {
	t, err := initTree(mountpoint, opts)
	if err == nil {
		t.root = newDirectory(t, rootID, "", nil)
		t.plant()
	}
	return t, err
}

// InitFile makes a tree that consists of one regular file, which Run will mount on the regular file mountpoint, such
// as one of another tree. mode, ops and data are as for Add, and so are their errors; otherwise it is as Init. Root
// returns the file. It lasts as long as the tree.
func InitFile(mountpoint string, mode uint32, ops *Ops, data any, opts Options) (*Tree, error) {
	if err := checkMode(mode); err != nil {
		return nil, fmt.Errorf("%s: %w", mountpoint, err)
	}
	t, err := initTree(mountpoint, opts)
	if err == nil {
		t.root = newFile(t, rootID, "", nil, mode, ops, data)
		t.plant()
	}
	return t, err
}

// initTree makes a tree without a root.
func initTree(mountpoint string, opts Options) (*Tree, error) {
	if !strings.HasPrefix(mountpoint, "/") || strings.HasSuffix(mountpoint, "/") {
		return nil, fmt.Errorf("mount point %q must start with '/' and not end in '/': %w", mountpoint, syscall.EINVAL)
	}
	if opts.MaxWrite < 0 || opts.MaxBackground < 0 || opts.MaxBackground > 0xffff {
		return nil, fmt.Errorf("MaxWrite %d or MaxBackground %d is out of range: %w",
			opts.MaxWrite, opts.MaxBackground, syscall.EINVAL)
	}
	if !opts.IOUring.valid() {
		return nil, fmt.Errorf("IOUring %q must be %s, %s or %s: %w",
			opts.IOUring, IOUringOff, IOUringAuto, IOUringOn, syscall.EINVAL)
	}
	if opts.FsName == "" {
		opts.FsName = defaultFsName
	}
	if opts.FsType == "" {
		opts.FsType = opts.FsName
	}
	if opts.MaxWrite == 0 {
		opts.MaxWrite = defaultMaxWrite
	}
	if opts.MaxBackground == 0 {
		opts.MaxBackground = defaultMaxBackground
	}
	if opts.Logger == nil {
		opts.Logger = hclog.NewNullLogger()
	}
	return &Tree{
		mountpoint: mountpoint,
		opts:       opts,
		log:        opts.Logger,
		owner:      fuse.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())},
		mounted:    make(chan struct{}),
		nodes:      make(map[uint64]*Node),
		lastID:     rootID,
	}, nil
}

// plant enters the root.
func (t *Tree) plant() {
	t.root.parent = t.root
	t.nodes[rootID] = t.root
}

// Root returns the root, which is a directory unless the tree was made by InitFile.
func (t *Tree) Root() *Node { return t.root }

// Exit ends the use of an empty tree: nothing can be added to it any more. EBUSY: the root has children, or the tree is
// mounted. Exit may be called again.
func (t *Tree) Exit() error {
	t.runMu.Lock()
	defer t.runMu.Unlock()
	if t.state == running {
		return fmt.Errorf("tree is still mounted on %s: %w", t.mountpoint, syscall.EBUSY)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.root.children); n > 0 {
		return fmt.Errorf("root still has %d child(ren): %w", n, syscall.EBUSY)
	}
	t.exited = true
	return nil
}

// Add makes a regular file of size 0 in the directory parent. mode holds its permission bits; ops, which may be nil and
// which must not change any more, its operations; data is for the caller's use (Node.Data).
//
// EINVAL: name is empty, ".", "..", longer than 255 bytes or contains '/' or NUL; parent is nil or of another tree;
// mode has other bits than 07777 and S_IFREG. EEXIST: parent has a child of this name. ENOTDIR: parent is not a
// directory. ENOENT: parent was removed. ESHUTDOWN: after Exit.
func (t *Tree) Add(name string, parent *Node, mode uint32, ops *Ops, data any) (*Node, error) {
	if err := checkMode(mode); err != nil {
		return nil, fmt.Errorf("add %q: %w", name, err)
	}
	n, err := t.insert(name, parent, func(id uint64) *Node { return newFile(t, id, name, parent, mode, ops, data) })
	if err != nil {
		return nil, fmt.Errorf("add %q: %w", name, err)
	}
	return n, nil
}

// Mkdir makes an empty directory of mode 0755 in the directory parent. The errors are those of Add.
func (t *Tree) Mkdir(name string, parent *Node) (*Node, error) {
	n, err := t.insert(name, parent, func(id uint64) *Node { return newDirectory(t, id, name, parent) })
	if err != nil {
		return nil, fmt.Errorf("mkdir %q: %w", name, err)
	}
	return n, nil
}

// Remove removes the regular file name from the directory parent.
//
// EBUSY: the file is open through the mount; where its users have closed it a moment ago, Remove waits for their close
// to arrive. ENOENT: no such child. EISDIR: it is a directory, see Rmdir. EINVAL: parent is nil or of another tree.
// ENOTDIR: parent is not a directory.
func (t *Tree) Remove(name string, parent *Node) error {
	expired := time.NewTimer(closeGrace)
	defer expired.Stop()
	for {
		closed, err := t.tryRemove(name, parent)
		if closed == nil {
			return err
		}
		select {
		case <-closed:
		case <-expired.C:
			return err
		}
	}
}

// tryRemove is one attempt of Remove. The channel is not nil if the only reason for err is a file that is being closed;
// it is closed when that is done.
func (t *Tree) tryRemove(name string, parent *Node) (<-chan struct{}, error) {
	t.mu.Lock()
	n, err := t.child(name, parent, false)
	if err != nil {
		t.mu.Unlock()
		return nil, fmt.Errorf("remove %q: %w", name, err)
	}
	if n.opens > 0 {
		defer t.mu.Unlock()
		err = fmt.Errorf("remove %s: %d open file(s): %w", n.path(), n.opens, syscall.EBUSY)
		if n.opens > n.flushed {
			return nil, err
		}
		if n.idle == nil {
			n.idle = make(chan struct{})
		}
		return n.idle, err
	}
	t.unlink(n)
	t.mu.Unlock()
	t.forgetName(parent, name)
	return nil, nil
}

// Detach removes the regular file name from the directory parent as Remove does, also while it is open. Operations on
// its open files then fail with ENODEV, and the node's Ops are not called any more, but for Release. Calls that had
// begun may still be running when Detach returns. The errors are those of Remove without EBUSY.
func (t *Tree) Detach(name string, parent *Node) error {
	return t.cut("detach", name, parent, false)
}

// Rmdir removes the directory name from the directory parent. ENOENT: no such child. ENOTEMPTY: it has children.
// ENOTDIR: it, or parent, is not a directory. EINVAL: parent is nil or of another tree.
//
// A process whose current directory it is keeps an empty directory without a name.
func (t *Tree) Rmdir(name string, parent *Node) error {
	return t.cut("rmdir", name, parent, true)
}

// cut takes the child's name away, whoever uses it, provided that it is a file or an empty directory as wanted.
func (t *Tree) cut(verb, name string, parent *Node, wantDir bool) error {
	t.mu.Lock()
	n, err := t.child(name, parent, wantDir)
	if err == nil && len(n.children) > 0 {
		err = syscall.ENOTEMPTY
	}
	if err != nil {
		t.mu.Unlock()
		return fmt.Errorf("%s %q: %w", verb, name, err)
	}
	t.unlink(n)
	t.mu.Unlock()
	t.forgetName(parent, name)
	return nil
}

// Lookup returns the node of a path from the mount point, which begins with '/'; "/" is the root. It returns nil if
// there is none.
func (t *Tree) Lookup(path string) *Node {
	rest, ok := strings.CutPrefix(path, "/")
	if !ok {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.root
	if rest == "" {
		return n
	}
	for name := range strings.SplitSeq(rest, "/") {
		if n = n.children[name]; n == nil {
			return nil
		}
	}
	return n
}

// checkMode accepts the mode of a regular file.
func checkMode(mode uint32) error {
	if mode&^permissions&^syscall.S_IFREG != 0 {
		return fmt.Errorf("mode %#o is not that of a regular file: %w", mode, syscall.EINVAL)
	}
	return nil
}

// checkName accepts what can name a child.
func checkName(name string) error {
	switch {
	case name == "", name == ".", name == "..":
		return fmt.Errorf("reserved or empty name: %w", syscall.EINVAL)
	case len(name) > maxNameLen:
		return fmt.Errorf("name is longer than %d bytes: %w", maxNameLen, syscall.EINVAL)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("name contains '/' or NUL: %w", syscall.EINVAL)
	}
	return nil
}

// checkParent accepts a directory of this tree.
func (t *Tree) checkParent(parent *Node) error {
	switch {
	case parent == nil || parent.tree != t:
		return fmt.Errorf("parent is not a node of this tree: %w", syscall.EINVAL)
	case !parent.dir:
		return fmt.Errorf("parent is not a directory: %w", syscall.ENOTDIR)
	}
	return nil
}

// insert puts a node made by create under parent.
func (t *Tree) insert(name string, parent *Node, create func(id uint64) *Node) (*Node, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := t.checkParent(parent); err != nil {
		return nil, err
	}
	n, err := t.link(name, parent, create)
	if err != nil {
		return nil, err
	}
	// A name that did not exist is not cached (raw.go), so only the parent's times and link count are out of date.
	t.forgetAttributes(parent)
	return n, nil
}

// link is the part of insert that holds the lock.
func (t *Tree) link(name string, parent *Node, create func(id uint64) *Node) (*Node, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.exited:
		return nil, fmt.Errorf("tree has ended: %w", syscall.ESHUTDOWN)
	case parent.gone.Load():
		return nil, fmt.Errorf("parent %s was removed: %w", parent.path(), syscall.ENOENT)
	case parent.children[name] != nil:
		return nil, syscall.EEXIST
	}
	t.lastID++
	n := create(t.lastID)
	t.nodes[n.id] = n
	parent.children[name] = n
	parent.order = append(parent.order, n) // ids only grow, so it stays sorted
	if n.dir {
		parent.subdirs++
	}
	parent.touch()
	return n, nil
}

// child finds the child called name, a directory or a regular file as wanted. Tree.mu is held.
func (t *Tree) child(name string, parent *Node, wantDir bool) (*Node, error) {
	if err := t.checkParent(parent); err != nil {
		return nil, err
	}
	n := parent.children[name]
	switch {
	case n == nil:
		return nil, syscall.ENOENT
	case n.dir && !wantDir:
		return nil, syscall.EISDIR
	case !n.dir && wantDir:
		return nil, syscall.ENOTDIR
	}
	return n, nil
}

// unlink takes n's name away. Tree.mu is held.
func (t *Tree) unlink(n *Node) {
	p := n.parent
	delete(p.children, n.name)
	if i, ok := slices.BinarySearchFunc(p.order, n.id, compareID); ok {
		p.order = slices.Delete(p.order, i, i+1)
	}
	if n.dir {
		p.subdirs--
	}
	p.touch()
	n.gone.Store(true)
	t.drop(n)
}

// drop ends the life of a node that has no name, is not open and is not known to the kernel. Tree.mu is held.
func (t *Tree) drop(n *Node) {
	if n.gone.Load() && n.lookups == 0 && n.opens == 0 {
		delete(t.nodes, n.id)
	}
}

// touch sets the times of a directory whose entries change. Tree.mu is held.
func (n *Node) touch() {
	now := time.Now()
	n.attrMu.Lock()
	n.attr.mtime, n.attr.ctime = now, now
	n.attrMu.Unlock()
}
