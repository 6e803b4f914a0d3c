// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"io"
	"sync/atomic"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// IOKind is what an IO is to do.
type IOKind int

// The kinds of IO.
const (
	Read IOKind = iota
	Write
	Fsync
)

// String is the operation's name in logs.
func (k IOKind) String() string { return [...]string{"read", "write", "fsync"}[k] }

// IO is one read, write or fsync that a node carries out when it pleases: it is given to Ops.Start, and Complete ends
// it.
type IO struct {
	File   *File
	Kind   IOKind
	Offset int64
	Size   int        // bytes: wanted, or len(Payload)
	Flags  WriteFlags // of a write

	// Payload is the data of a write. It belongs to the transport and is valid until Start returns.
	Payload []byte
	// Buffer, if not nil, is where Payload lies, from the beginning. Some node's Ops.Buffer has lent it; Start may take
	// it.
	Buffer Buffer

	keep    interface{ Release() } // whoever keeps the memory of a reply's data after Complete; nil if nobody does
	conn    *connection
	pending *atomic.Int32 // of the batch it was started in
	origin  origin
	unique  uint64
	// What the reply is gathered from; here, and not on a stack, so that it costs no allocation.
	header replyHeader
	vector [2]unix.Iovec
}

// origin is where a request came from, and where its reply must go.
type origin interface {
	// reply sends r.header, whose Length does not yet count the data, with the data of a read. r has been completed. If
	// that is for later, r.keep keeps the data, and reply takes it away from r.
	reply(r *IO, data []byte)
}

// replyHeader begins every reply, with the body of a reply to WRITE.
type replyHeader struct {
	fuse.OutHeader
	written fuse.WriteOut
}

// Complete ends the request with the error, or with data for a read, a count n for a write. It must be called
// exactly once, from any goroutine; data may be reused when it returns, and the IO must not be touched any more. Where
// reading data faults, as memory mapped beyond the end of a file does, the request fails with EIO. How
// errors reach the user is as for Ops.Read and Ops.Write, but an error is reported even where n is not 0.
func (r *IO) Complete(data []byte, n int, err error) {
	c := r.conn
	h := &r.header
	*h = replyHeader{OutHeader: fuse.OutHeader{Length: uint32(unsafe.Sizeof(h.OutHeader)), Unique: r.unique}}
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		h.Status = -int32(c.tree.status(r.File.Node, r.Kind.String(), err))
		data = nil
	case r.Kind == Write:
		h.written.Size = uint32(n)
		h.Length = uint32(unsafe.Sizeof(*h))
		data = nil
	case r.Kind == Fsync:
		data = nil
	}
	r.origin.reply(r, data)
	if keep := r.keep; keep != nil {
		r.keep = nil
		keep.Release()
	}
	c.put(r)
}

// CompleteKept is Complete for a read that has succeeded, of data that need not be copied if the reply cannot be sent
// at once: its memory is there until keep.Release is called, which happens once, on any goroutine, maybe before this
// returns.
func (r *IO) CompleteKept(data []byte, keep interface{ Release() }) {
	r.keep = keep
	r.Complete(data, len(data), nil)
}

// startIO hands a READ, WRITE or FSYNC to the node if the node takes it this way; other requests it leaves alone.
// payload is the data of a WRITE. It returns the node whose Commit has to follow, nil if there is none; taken is false
// when the request must go the slow way.
func (c *connection) startIO(
	b *batch, from origin, in *fuse.InHeader, arg *ioArgument, payload []byte, buf Buffer,
) (n *Node, taken bool) {
	var kind IOKind
	switch in.Opcode {
	case opRead:
	case opWrite:
		kind = Write
	case opFsync:
		kind = Fsync
	default:
		return nil, false
	}
	f := c.tree.files.get(arg.fh)
	if f == nil || f.Node.ops.Start == nil || f.Node.gone.Load() {
		return nil, false
	}
	if kind == Write && c.tree.opts.WritebackCache && f.Node.overruns(arg.offset, int(arg.size), arg.ioFlags) {
		return nil, false
	}
	r := c.get()
	if b.pending == nil {
		b.pending = new(atomic.Int32)
	}
	r.File, r.pending, r.origin, r.unique, r.Kind = f, b.pending, from, in.Unique, kind
	switch kind {
	case Read:
		r.Offset, r.Size = int64(arg.offset), int(arg.size)
	case Write:
		r.Offset, r.Size = int64(arg.offset), int(arg.size)
		r.Flags = WriteFlags(arg.writeFlags)
		r.Payload, r.Buffer = payload, buf
	case Fsync:
		r.Offset, r.Size = 0, 0
	}
	b.pending.Add(1)
	size := r.Size
	if !f.Node.ops.Start(r) {
		c.put(r)
		return nil, false
	}
	b.add(f.Node, size)
	return f.Node, true
}

// get makes an IO; put takes it back.

func (c *connection) get() *IO {
	c.inFlight.Add(1)
	if r, ok := c.free.Get().(*IO); ok {
		return r
	}
	return &IO{conn: c}
}

func (c *connection) put(r *IO) {
	pending := r.pending
	r.File, r.Payload, r.Buffer, r.origin, r.pending = nil, nil, nil, nil, nil
	r.vector[1].Base = nil
	c.free.Put(r)
	pending.Add(-1)
	if c.inFlight.Add(-1) == 0 && c.closing.Load() {
		c.signalIdle()
	}
}

// ioArgument follows the header of READ and WRITE: struct fuse_read_in and fuse_write_in are the same so far. That of
// FSYNC, struct fuse_fsync_in, is shorter and begins with fh, too.
type ioArgument struct {
	fh         uint64
	offset     uint64
	size       uint32
	ioFlags    uint32
	lockOwner  uint64
	writeFlags uint32
	_          uint32
}

// fsyncSize is the size of a FSYNC request.
const fsyncSize = inHeaderSize + 16

const (
	inHeaderSize  = int(unsafe.Sizeof(fuse.InHeader{}))
	outHeaderSize = int(unsafe.Sizeof(fuse.OutHeader{}))
)

var errShortRequest = errors.New("request is shorter than its header says")
