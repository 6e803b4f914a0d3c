// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The connection is this package's own transport: it reads requests from /dev/fuse and writes the replies. READ and
// WRITE to nodes that want it so (Ops.Start) go to the node straight from the reader thread, in batches, and are
// answered by whoever completes them. Everything else is go-fuse's ProtocolServer's to parse and rawFS's to answer.
//
// Each reader thread blocks on one descriptor and then drains a second, non-blocking one: both are clones of the one
// that was mounted. A request must be answered on the descriptor that it was read from. All of them are kept open for
// the life of the connection, together with the INIT request: that is what a successor process would need.

// Operation codes of FUSE requests that the connection treats by itself.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opAccess      = 34
	opInterrupt   = 36
	opBatchForget = 42
)

const (
	// readers is the number of reader threads. Two keep the requests of two processors flowing; more only wake each other.
	readers = 2
	// maxBatch is how many requests a reader takes before it sees to it that they are being worked on.
	maxBatch = 32
	// largeWrite is the size in bytes from which on a payload is worth a buffer of the node's own: copying less costs less
	// than the buffer's book-keeping.
	largeWrite = 64 << 10
	// bufferPatience is after how many requests that had no use for it a node's buffer is given back.
	bufferPatience = 64
	// spinLimit is how long a reader waits for the only request in flight before it goes to sleep: about as long as waking
	// a thread twice takes.
	spinLimit = 20 * time.Microsecond
	// devIocClone is FUSE_DEV_IOC_CLONE.
	devIocClone = 0x8004e500
	// smallReply is enough room for any reply but those to READ, READDIR and the like, which say how much they need.
	smallReply = 8192
)

type connection struct {
	tree     *Tree
	protocol *fuse.ProtocolServer
	maxWrite int
	fds      []int  // the mounted descriptor first; then a blocking clone per further reader, and a draining one for each
	init     []byte // the INIT request, for a successor

	slow     sync.WaitGroup // requests that have a goroutine of their own
	free     sync.Pool      // of *IO
	inFlight atomic.Int64   // IOs given to nodes and not completed
	closing  atomic.Bool
	idleMu   sync.Mutex
	idle     chan struct{} // closed when closing is set and inFlight is 0
}

// newConnection takes over a descriptor of /dev/fuse that has been mounted, and exchanges INIT with the kernel.
func newConnection(t *Tree, fd int, opts *fuse.MountOptions) (*connection, error) {
	c := &connection{
		tree: t, protocol: fuse.NewProtocolServer(&rawFS{t}, opts), maxWrite: opts.MaxWrite, fds: []int{fd},
		idle: make(chan struct{}),
	}
	if err := c.handshake(); err != nil {
		c.close()
		return nil, fmt.Errorf("FUSE handshake: %w", err)
	}
	for i := 1; i < 2*readers; i++ {
		flags := 0
		if i >= readers {
			flags = unix.O_NONBLOCK
		}
		clone, err := cloneDescriptor(fd, flags)
		if err != nil {
			c.close()
			return nil, fmt.Errorf("clone the FUSE connection: %w", err)
		}
		c.fds = append(c.fds, clone)
	}
	return c, nil
}

// handshake answers the kernel's first request.
func (c *connection) handshake() error {
	buf := make([]byte, max(headerSize+c.maxWrite, smallReply))
	var n int
	var err error
	for {
		n, err = unix.Read(c.fds[0], buf)
		if err == nil {
			break
		}
		if errno := syscall.Errno(0); !errors.As(err, &errno) || !retryable(errno) {
			return err
		}
	}
	c.init = append([]byte(nil), buf[:n]...)
	if n < inHeaderSize || (*fuse.InHeader)(unsafe.Pointer(&buf[0])).Opcode != opInit {
		return errShortRequest
	}
	return c.answer(c.fds[0], [][]byte{c.init}, smallReply)
}

func cloneDescriptor(fd, flags int) (int, error) {
	clone, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.IoctlSetPointerInt(clone, devIocClone, fd); err != nil {
		_ = unix.Close(clone)
		return -1, err
	}
	return clone, nil
}

// serve answers requests until the connection ends, and returns when everything that was under way is over. close must
// follow.
func (c *connection) serve() {
	var threads sync.WaitGroup
	for i := range readers {
		threads.Go(func() { c.reader(c.fds[i], c.fds[readers+i]) })
	}
	threads.Wait()
	c.closing.Store(true)
	if c.inFlight.Load() == 0 {
		c.signalIdle()
	}
	<-c.idle
	c.slow.Wait()
}

// signalIdle may be called more than once.
func (c *connection) signalIdle() {
	c.idleMu.Lock()
	defer c.idleMu.Unlock()
	select {
	case <-c.idle:
	default:
		close(c.idle)
	}
}

// close ends the connection. Neither serve nor a message to the kernel may be under way.
func (c *connection) close() {
	for _, fd := range c.fds {
		_ = unix.Close(fd)
	}
	c.fds = nil
}

// batch is what one reader thread has read and started since it last slept.
type batch struct {
	c      *connection
	header *requestHeader
	vector [2]unix.Iovec // header, and data or lent
	data   []byte        // our own memory for what follows the header
	lent   Buffer        // a node's memory for the same; nil if there is none
	unused int           // requests since lent was of use
	nodes  []*Node       // whose Commit is due
}

// result of reading one request.
type readResult int

const (
	readNothing readResult = iota // there was none
	readOther                     // it was dealt with
	readIO                        // a node has started it
	readEnd                       // the connection is over
)

// reader is one reader thread.
func (c *connection) reader(blocking, draining int) {
	runtime.LockOSThread()
	b := &batch{c: c, header: new(requestHeader), data: make([]byte, c.maxWrite+os.Getpagesize())}
	defer b.dropBuffer()
	var pin runtime.Pinner
	pin.Pin(b.header)
	pin.Pin(&b.data[0])
	defer pin.Unpin()
	b.vector[0].Base = (*byte)(unsafe.Pointer(b.header))
	b.vector[0].SetLen(headerSize)
	b.vector[1].Base = &b.data[0]
	b.vector[1].SetLen(len(b.data))
	for {
		switch b.read(blocking, true) {
		case readEnd:
			return
		case readIO:
		default:
			continue
		}
		// The first request is on its way at once; the others of the batch share a doorbell.
		b.commit(false, 0)
		ended := false
		for range maxBatch {
			r := b.read(draining, false)
			if ended = r == readEnd; ended || r == readNothing {
				break
			}
		}
		var spin time.Duration
		if c.inFlight.Load() == 1 {
			spin = spinLimit
		}
		b.commit(true, spin)
		if ended {
			return
		}
	}
}

// read reads one request and deals with it. Only a read that may wait goes through the scheduler.
func (b *batch) read(fd int, wait bool) readResult {
	var n uintptr
	var errno syscall.Errno
	if wait {
		n, _, errno = unix.Syscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(&b.vector[0])), 2)
	} else {
		n, _, errno = unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(&b.vector[0])), 2)
	}
	switch {
	case errno == 0:
	case errno == unix.EAGAIN:
		return readNothing
	case retryable(errno):
		return readOther
	default:
		if errno != unix.ENODEV && errno != unix.ECONNABORTED {
			b.c.tree.log.Error("reading from /dev/fuse failed, the mount ends", "error", errno)
		}
		return readEnd
	}
	h := b.header
	if int(n) < inHeaderSize || uint64(n) != uint64(h.Length) {
		b.c.tree.log.Error("bad request from /dev/fuse", "error", errShortRequest, "bytes", n)
		return readOther
	}
	data := b.data
	if b.lent != nil {
		data = b.lent.Bytes()
	}
	if (h.Opcode == opRead || h.Opcode == opWrite) && int(n) >= headerSize {
		if node, taken := b.c.startIO(fd, h, data[:int(n)-headerSize], b.lent); taken {
			b.due(node)
			b.chooseBuffer(node, int(n)-headerSize)
			return readIO
		}
	}
	b.dispatch(fd, int(n), data)
	b.chooseBuffer(nil, 0)
	return readOther
}

// chooseBuffer decides where the payload of the next request is read to, after one with size bytes of payload went to
// the node (nil if it went elsewhere): large writes tend to be followed by others to the same node.
func (b *batch) chooseBuffer(n *Node, size int) {
	if b.lent != nil {
		taken := b.lent.Bytes() == nil
		b.unused++
		if !taken && b.unused < bufferPatience && size < largeWrite {
			return
		}
		b.dropBuffer()
	}
	if size < largeWrite || n.ops.Buffer == nil {
		return
	}
	if lent := n.ops.Buffer(); lent != nil {
		memory := lent.Bytes()
		b.lent, b.unused = lent, 0
		b.vector[1].Base = &memory[0]
		b.vector[1].SetLen(len(memory))
	}
}

// dropBuffer goes back to memory of our own.
func (b *batch) dropBuffer() {
	if b.lent != nil {
		b.lent.Release()
		b.lent = nil
		b.vector[1].Base = &b.data[0]
		b.vector[1].SetLen(len(b.data))
	}
}

// due notes that the node has started something.
func (b *batch) due(n *Node) {
	for _, have := range b.nodes {
		if have == n {
			return
		}
	}
	b.nodes = append(b.nodes, n)
}

// commit tells the nodes to get going with what they were given; with last set, no more comes for now.
func (b *batch) commit(last bool, spin time.Duration) {
	for _, n := range b.nodes {
		if n.ops.Commit != nil {
			n.ops.Commit(n, spin)
		}
	}
	if last {
		clear(b.nodes)
		b.nodes = b.nodes[:0]
	}
}

// dispatch answers a request through go-fuse. Requests that rawFS answers without calling a node are answered here and
// now; the others may take any time and get a goroutine and a copy.
func (b *batch) dispatch(fd, n int, data []byte) {
	c, h := b.c, b.header
	in := [][]byte{h.bytes()[:min(n, headerSize)], data[:max(0, n-headerSize)]}
	room := smallReply
	switch h.Opcode {
	case opRead, opReaddir:
		room += int(h.io.size)
	}
	switch h.Opcode {
	case opLookup, opForget, opBatchForget, opGetattr, opStatfs, opFlush, opOpendir, opReaddir, opReleasedir, opAccess,
		opInterrupt:
		_ = c.answer(fd, in, room)
		return
	}
	whole := append(append(make([]byte, 0, n), in[0]...), in[1]...)
	c.slow.Go(func() { _ = c.answer(fd, [][]byte{whole}, room) })
}

// answer has a request answered by go-fuse and rawFS, and sends the reply, of at most room bytes, if there is one.
func (c *connection) answer(fd int, in [][]byte, room int) error {
	out := make([]byte, room)
	n, status := c.protocol.HandleRequest(in, [][]byte{out})
	if !status.Ok() {
		// It could not be parsed; somebody waits for an answer all the same.
		h := (*fuse.InHeader)(unsafe.Pointer(&in[0][0]))
		*(*fuse.OutHeader)(unsafe.Pointer(&out[0])) = fuse.OutHeader{
			Length: uint32(outHeaderSize), Status: -int32(status), Unique: h.Unique,
		}
		n = outHeaderSize
	}
	if n == 0 {
		return nil
	}
	_, err := unix.Write(fd, out[:n])
	return err
}

// Messages to the kernel that answer no request: an OutHeader without a request's number, its code where the status is.

const (
	notifyInvalInode = 2
	notifyInvalEntry = 3
)

// notify sends a message; body follows the header.
func (c *connection) notify(code int32, body []byte) fuse.Status {
	out := make([]byte, outHeaderSize, outHeaderSize+len(body))
	*(*fuse.OutHeader)(unsafe.Pointer(&out[0])) = fuse.OutHeader{Length: uint32(outHeaderSize + len(body)), Status: code}
	_, err := unix.Write(c.fds[0], append(out, body...))
	return fuse.ToStatus(err)
}

// InodeNotify implements notifier.
func (c *connection) InodeNotify(node uint64, off int64, length int64) fuse.Status {
	body := fuse.NotifyInvalInodeOut{Ino: node, Off: off, Length: length}
	return c.notify(notifyInvalInode, unsafe.Slice((*byte)(unsafe.Pointer(&body)), unsafe.Sizeof(body)))
}

// EntryNotify implements notifier.
func (c *connection) EntryNotify(parent uint64, name string) fuse.Status {
	body := fuse.NotifyInvalEntryOut{Parent: parent, NameLen: uint32(len(name))}
	header := unsafe.Slice((*byte)(unsafe.Pointer(&body)), unsafe.Sizeof(body))
	return c.notify(notifyInvalEntry, append(append(append([]byte(nil), header...), name...), 0))
}
