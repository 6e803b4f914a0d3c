// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"io"
	"math"
	"slices"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// cacheTimeout is how long the kernel may keep names and attributes. It could be for ever: whatever changes is
// invalidated. The bound limits the effect of a lost invalidation.
const cacheTimeout = time.Minute

// Cookies of readdir: 0 starts a directory, and each entry's cookie says "continue after this one". That of a child
// is its id plus childCookie, so that a position stays valid while children come and go.
const (
	dotCookie    = 1
	dotDotCookie = 2
	childCookie  = 2 // ids of children are greater than rootID, so these are free
)

// SEEK_DATA and SEEK_HOLE of lseek(2), the only ones that reach a FUSE server.
const (
	seekData = 3
	seekHole = 4
)

// rawFS answers FUSE requests from a Tree. It does not know how requests arrive.
//
// Each opcode has its own answer here, since ENOSYS is not an error but a message: the kernel stops sending the opcode
// for the whole connection and acts as if the operation had succeeded, or could never succeed. It is used only
// where that is wanted, which the comment there says.
type rawFS struct {
	t *Tree
}

var _ fuse.RawFileSystem = (*rawFS)(nil)

func (r *rawFS) String() string { return r.t.opts.FsType }

func (r *rawFS) SetDebug(bool) {}

// Init does nothing: the notifier is set by who makes the transport, which need not be a fuse.Server.
func (r *rawFS) Init(*fuse.Server) {}

func (r *rawFS) OnUnmount() {}

// node returns the node of an id that the kernel holds; nil only if the kernel is wrong. Tree.mu is held.
func (r *rawFS) node(id uint64) *Node { return r.t.nodes[id] }

// Names and attributes.

func (r *rawFS) Lookup(_ <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	parent := r.node(header.NodeId)
	if parent == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if !parent.dir {
		return fuse.ENOTDIR
	}
	n := parent.children[name]
	if n == nil {
		// By error, not by an entry with node id 0: the absence is not cached, and Add has nothing to invalidate.
		return fuse.ENOENT
	}
	n.lookups++
	out.NodeId = n.id
	out.SetEntryTimeout(cacheTimeout)
	// The attributes expire at once, and a GETATTR follows. An update made while this reply is under way finds no
	// inode to invalidate, and the kernel would keep what it reads here; a GETATTR it can tell to be out of date.
	out.SetAttrTimeout(0)
	n.fillAttr(&out.Attr)
	return fuse.OK
}

func (r *rawFS) Forget(nodeid, nlookup uint64) {
	if nodeid == rootID {
		return
	}
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	n := r.node(nodeid)
	if n == nil {
		return
	}
	if nlookup > n.lookups {
		r.t.log.Warn("kernel forgets more than it looked up", "node", n.path(), "lookups", n.lookups, "forgets", nlookup)
		nlookup = n.lookups
	}
	n.lookups -= nlookup
	r.t.drop(n)
}

func (r *rawFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	n := r.node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if r.t.opts.WritebackCache && in.Flags()&fuse.FUSE_GETATTR_FH != 0 && n.refuses(r.t.files.get(in.Fh())) {
		return fuse.Status(syscall.ENOSPC)
	}
	n.fillAttr(&out.Attr)
	out.SetTimeout(cacheTimeout)
	return fuse.OK
}

// Statx says ENOSYS for the whole connection: then the kernel asks by GETATTR, which tells all there is.
func (r *rawFS) Statx(<-chan struct{}, *fuse.StatxIn, *fuse.StatxOut) fuse.Status { return fuse.ENOSYS }

// SetAttr accepts times, and sizes as the node's Truncate decides; mode and owner belong to the program. Requests that
// change nothing succeed, for the sake of cp -p and the like.
//
// FUSE_ATOMIC_O_TRUNC is not negotiated, so an open(2) with O_TRUNC comes here first. The reply carries the size that
// holds then: the kernel believes it, not what it asked for.
func (r *rawFS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	r.t.mu.Lock()
	n := r.node(in.NodeId)
	if n != nil {
		n.fillAttr(&out.Attr)
	}
	r.t.mu.Unlock()
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if mode, ok := in.GetMode(); ok && mode != out.Mode&permissions {
		return fuse.EPERM
	}
	if uid, ok := in.GetUID(); ok && uid != out.Uid {
		return fuse.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != out.Gid {
		return fuse.EPERM
	}
	if size, ok := in.GetSize(); ok {
		if st := r.truncate(n, in, int64(size)); !st.Ok() {
			return st
		}
	}
	n.attrMu.Lock()
	if atime, ok := in.GetATime(); ok {
		n.attr.atime = atime
	}
	if mtime, ok := in.GetMTime(); ok {
		n.attr.mtime = mtime
	}
	n.attr.ctime = time.Now()
	n.attrMu.Unlock()

	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	n.fillAttr(&out.Attr)
	out.SetTimeout(0) // the kernel believes this reply even if an update has overtaken it, as in Lookup
	return fuse.OK
}

func (r *rawFS) truncate(n *Node, in *fuse.SetAttrIn, size int64) fuse.Status {
	var f *File
	if fh, ok := in.GetFh(); ok {
		if f = r.t.files.get(fh); f == nil {
			return fuse.EBADF
		}
	}
	switch {
	case n.dir:
		return fuse.EISDIR
	case n.gone.Load():
		return fuse.ENODEV
	case size < 0:
		return fuse.EINVAL
	case n.ops.Truncate == nil:
		return fuse.OK
	case r.t.opts.WritebackCache && size == n.Size():
		return fuse.OK // tellSize; and if it is a user, then what the kernel took without room is all that is cut off
	}
	n.resizing.Add(1) // the reply tells the kernel of the size
	defer n.resizing.Add(-1)
	return r.t.status(n, "truncate", n.ops.Truncate(f, size))
}

// Access is not sent with the mount option default_permissions.
func (r *rawFS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Readlink: there are no symbolic links.
func (r *rawFS) Readlink(<-chan struct{}, *fuse.InHeader) ([]byte, fuse.Status) {
	return nil, fuse.EINVAL
}

// StatFs says that there is no space to account for, the name length, and the node's block size, at least a page: that
// is the discard granularity of a loop device on it.
func (r *rawFS) StatFs(_ <-chan struct{}, header *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	size := uint32(defaultBlockSize)
	if n := r.node(header.NodeId); n != nil {
		n.attrMu.Lock()
		size = max(size, n.attr.blockSize)
		n.attrMu.Unlock()
	}
	*out = fuse.StatfsOut{
		Bsize:   size,
		Frsize:  size,
		NameLen: maxNameLen,
		Files:   uint64(len(r.t.nodes)),
	}
	return fuse.OK
}

// Changes of the tree through the mount are not permitted. (EPERM, not ENOSYS: for that the kernel would try the next
// best opcode each time.)

func (r *rawFS) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (r *rawFS) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (r *rawFS) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EPERM }

func (r *rawFS) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EPERM }

func (r *rawFS) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status {
	return fuse.EPERM
}

func (r *rawFS) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (r *rawFS) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (r *rawFS) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.EPERM
}

// Tmpfile says ENOSYS for the whole connection: O_TMPFILE can never work here, and open(2) then fails with EOPNOTSUPP.
func (r *rawFS) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status {
	return fuse.ENOSYS
}

// Extended attributes: ENOSYS for the whole connection, since no node has any. The kernel then answers EOPNOTSUPP by
// itself; otherwise each write would cost a GETXATTR of security.capability.

func (r *rawFS) GetXAttr(<-chan struct{}, *fuse.InHeader, string, []byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (r *rawFS) ListXAttr(<-chan struct{}, *fuse.InHeader, []byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (r *rawFS) SetXAttr(<-chan struct{}, *fuse.SetXAttrIn, string, []byte) fuse.Status {
	return fuse.ENOSYS
}

func (r *rawFS) RemoveXAttr(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.ENOSYS }

// Files.

// Open answers ESTALE for a node that has lost its name since the kernel looked it up: the kernel then looks the path
// up again and finds its successor, or none.
func (r *rawFS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	r.t.mu.Lock()
	n := r.node(in.NodeId)
	if n == nil || n.gone.Load() {
		r.t.mu.Unlock()
		return fuse.Status(syscall.ESTALE)
	}
	if n.dir {
		r.t.mu.Unlock()
		return fuse.EISDIR
	}
	n.opens++ // before the node's Open runs, so that Remove cannot succeed meanwhile
	r.t.mu.Unlock()

	f := &File{Node: n, Flags: in.Flags, opened: n.opened.Add(1)}
	if st := r.open(f); !st.Ok() {
		r.t.closed(f)
		return st
	}
	out.Fh = f.handle
	if f.DirectIO {
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	}
	if f.KeepCache {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
	return fuse.OK
}

// open calls the node's Open and gives f a handle.
func (r *rawFS) open(f *File) (st fuse.Status) {
	ops := f.Node.ops
	if ops.Open != nil {
		if err := ops.Open(f); err != nil {
			return r.t.status(f.Node, "open", err)
		}
	}
	if !r.t.files.put(f) {
		if ops.Release != nil {
			ops.Release(f)
		}
		return fuse.Status(syscall.ENFILE)
	}
	return fuse.OK
}

// file returns the open file of a request; not OK if there is none or its node is detached.
func (r *rawFS) file(handle uint64) (*File, fuse.Status) {
	f := r.t.files.get(handle)
	if f == nil {
		return nil, fuse.EBADF
	}
	if f.Node.gone.Load() {
		return nil, fuse.ENODEV
	}
	return f, fuse.OK
}

func (r *rawFS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	f, st := r.file(in.Fh)
	if !st.Ok() {
		return nil, st
	}
	read := f.Node.ops.Read
	if read == nil {
		return nil, fuse.EINVAL
	}
	n, err := read(f, buf, int64(in.Offset))
	if n < 0 || n > len(buf) {
		panic("fusetree: Read returned an impossible count")
	}
	if n == 0 && err != nil && !errors.Is(err, io.EOF) {
		return nil, r.t.status(f.Node, "read", err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (r *rawFS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	f, st := r.file(in.Fh)
	if !st.Ok() {
		return 0, st
	}
	write := f.Node.ops.Write
	if write == nil {
		return 0, fuse.EINVAL
	}
	if r.t.opts.WritebackCache && f.Node.overruns(in.Offset, len(data), in.WriteFlags) {
		return 0, r.writeOverrun(f, in, data)
	}
	n, err := write(f, data, int64(in.Offset), WriteFlags(in.Flags))
	if n < 0 || n > len(data) {
		panic("fusetree: Write returned an impossible count")
	}
	if n == 0 && err != nil {
		return 0, r.t.status(f.Node, "write", err)
	}
	return uint32(n), fuse.OK
}

// Writev joins the pieces: they are one write, and a node must see one.
func (r *rawFS) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if len(data) == 1 {
		return r.Write(cancel, in, data[0])
	}
	return r.Write(cancel, in, slices.Concat(data...))
}

func (r *rawFS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	const datasyncFlag = 1 // FUSE_FSYNC_FDATASYNC
	f, st := r.file(in.Fh)
	if !st.Ok() {
		return st
	}
	fsync := f.Node.ops.Fsync
	if fsync == nil {
		return fuse.OK
	}
	return r.t.status(f.Node, "fsync", fsync(f, in.FsyncFlags&datasyncFlag != 0))
}

// Flush is a close(2) of a descriptor, maybe not the last one. There is nothing to flush, but it tells Remove that a
// RELEASE may be near; so never ENOSYS.
func (r *rawFS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	f := r.t.files.get(in.Fh)
	if f == nil {
		return fuse.EBADF
	}
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if !f.flushed {
		f.flushed = true
		f.Node.flushed++
	}
	return fuse.OK
}

func (r *rawFS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	r.t.release(in.Fh)
}

// release ends an open file. The count of open files falls last: then the node's Release is over as well.
func (t *Tree) release(handle uint64) {
	f := t.files.take(handle)
	if f == nil {
		return
	}
	defer t.closed(f)
	if f.Node.ops.Release != nil {
		f.Node.ops.Release(f)
	}
}

// closed takes an open file, or a failed open, off its node.
func (t *Tree) closed(f *File) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := f.Node
	if f.flushed {
		n.flushed--
	}
	n.opens--
	if n.opens == 0 && n.idle != nil {
		close(n.idle)
		n.idle = nil
	}
	t.drop(n)
}

// Lseek treats files without Seek as free of holes. (So would the kernel after ENOSYS, but all files for ever.)
func (r *rawFS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	f, st := r.file(in.Fh)
	if !st.Ok() {
		return st
	}
	size := f.Node.Size()
	switch {
	case in.Offset >= uint64(size):
		return fuse.Status(syscall.ENXIO)
	case in.Whence != seekData && in.Whence != seekHole:
		return fuse.EINVAL
	}
	at, err := r.seek(f, int64(in.Offset), size, in.Whence == seekHole)
	if err != nil {
		return r.t.status(f.Node, "lseek", err)
	}
	out.Offset = uint64(at)
	return fuse.OK
}

// seek finds data or a hole from off on. What is not yet written back is data that the node does not know of.
func (r *rawFS) seek(f *File, off, size int64, hole bool) (int64, error) {
	seek := f.Node.ops.Seek
	switch {
	case seek == nil && hole:
		return size, nil
	case seek == nil:
		return off, nil
	case hole:
		return seek(f, off, true)
	}
	at, err := seek(f, off, false)
	if err == nil && at == off {
		return off, nil
	}
	if err != nil {
		at = size
	}
	if !r.t.writeBack(f.Node, off, at-off) {
		return off, nil
	}
	return seek(f, off, false)
}

// Fallocate: never ENOSYS, which would settle it for every node.
func (r *rawFS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	f, st := r.file(in.Fh)
	switch {
	case !st.Ok():
		return st
	case in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset:
		return fuse.Status(syscall.EFBIG)
	case f.Node.ops.Fallocate == nil:
		return fuse.ENOTSUP
	}
	f.Node.resizing.Add(1) // the kernel takes the size from the request
	defer f.Node.resizing.Add(-1)
	return r.t.status(f.Node, "fallocate", f.Node.ops.Fallocate(f, in.Mode, int64(in.Offset), int64(in.Length)))
}

// CopyFileRange fails in the way that makes the kernel copy by reading and writing.
func (r *rawFS) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.ENOTSUP
}

func (r *rawFS) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}

// Locks are the kernel's business, as for any local file: the capability is not negotiated and these are not sent.

func (r *rawFS) GetLk(<-chan struct{}, *fuse.LkIn, *fuse.LkOut) fuse.Status { return fuse.ENOSYS }

func (r *rawFS) SetLk(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

func (r *rawFS) SetLkw(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

// Directories.

// OpenDir needs no state: a position in a directory is the cookie of an entry. A removed directory is empty.
func (r *rawFS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	n := r.node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if !n.dir {
		return fuse.ENOTDIR
	}
	return fuse.OK
}

func (r *rawFS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	n := r.node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if !n.dir {
		return fuse.ENOTDIR
	}
	if in.Offset < dotCookie &&
		!out.AddDirEntry(fuse.DirEntry{Name: ".", Mode: syscall.S_IFDIR, Ino: n.id, Off: dotCookie}) {
		return fuse.OK
	}
	if in.Offset < dotDotCookie &&
		!out.AddDirEntry(fuse.DirEntry{Name: "..", Mode: syscall.S_IFDIR, Ino: n.parent.id, Off: dotDotCookie}) {
		return fuse.OK
	}
	// Continue with the first id whose cookie is greater.
	first, _ := slices.BinarySearchFunc(n.order, max(in.Offset, childCookie)-childCookie+1, compareID)
	for _, c := range n.order[first:] {
		mode := uint32(syscall.S_IFREG)
		if c.dir {
			mode = syscall.S_IFDIR
		}
		if !out.AddDirEntry(fuse.DirEntry{Name: c.name, Mode: mode, Ino: c.id, Off: c.id + childCookie}) {
			break
		}
	}
	return fuse.OK
}

// ReadDirPlus is switched off in the mount options: that lookups are counted in Lookup only is worth more than the
// requests it saves.
func (r *rawFS) ReadDirPlus(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.ENOTSUP
}

func (r *rawFS) ReleaseDir(*fuse.ReleaseIn) {}

// FsyncDir: a directory is always as durable as it will be.
func (r *rawFS) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

// compareID orders the children of a directory.
func compareID(n *Node, id uint64) int {
	switch {
	case n.id < id:
		return -1
	case n.id > id:
		return 1
	}
	return 0
}
