// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The connection is what the transports have in common. READ, WRITE and FSYNC to nodes that want it so (Ops.Start) go
// to the node straight from the thread that a request arrives on, in batches, and are answered by whoever completes
// them. Everything else is go-fuse's ProtocolServer's to parse and rawFS's to answer.

// transport is the way of requests from the kernel to a tree, and of the replies back.
type transport interface {
	notifier
	// serve answers requests until the connection ends, and returns when everything that was under way is over.
	serve()
	// close ends the connection, if it has not ended, and must be called once. Neither serve nor a message to the kernel
	// may be under way.
	close()
}

var (
	_ transport = (*deviceTransport)(nil)
	_ transport = (*uringTransport)(nil)
)

// Operation codes of FUSE requests that the connection treats by itself.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opFsync       = 20
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
	// maxBatch is how many requests a thread takes before it sees to it that they are being worked on.
	maxBatch = 32
	// maxBatchBytes is after how much payload it stops to take more.
	maxBatchBytes = 256 << 10
	// smallReply is enough room for any reply but those to READ, READDIR and the like, which say how much they need.
	smallReply = 8192
)

type connection struct {
	tree     *Tree
	protocol *fuse.ProtocolServer
	maxWrite int
	fd       int    // of /dev/fuse, the one that was mounted
	init     []byte // the INIT request; together with the descriptors it is what a successor process would need

	slow     sync.WaitGroup // requests that have a goroutine of their own
	free     sync.Pool      // of *IO
	inFlight atomic.Int64   // IOs given to nodes and not completed
	closing  atomic.Bool
	idleMu   sync.Mutex
	idle     chan struct{} // closed when closing is set and inFlight is 0
}

// newTransport takes over a descriptor of /dev/fuse that has been mounted, and exchanges INIT with the kernel.
func newTransport(t *Tree, fd int, opts *fuse.MountOptions) (transport, error) {
	c := newConnection(t, fd, opts)
	rings, err := c.handshake(opts)
	if err != nil {
		c.close()
		return nil, err
	}
	readers := readerThreads()
	if rings != nil {
		readers = 1
	}
	device, err := newDeviceReaders(c, readers, rings != nil)
	switch {
	case err != nil:
		if rings != nil {
			rings.close()
		}
		c.close()
		return nil, err
	case rings != nil:
		return &uringTransport{c, device, rings}, nil
	}
	return &deviceTransport{c, device}, nil
}

func newConnection(t *Tree, fd int, opts *fuse.MountOptions) *connection {
	return &connection{tree: t, maxWrite: opts.MaxWrite, fd: fd, idle: make(chan struct{})}
}

// handshake exchanges INIT with the kernel, and returns the rings that requests will arrive on; nil if there are none.
func (c *connection) handshake(opts *fuse.MountOptions) (*ringSet, error) {
	if err := c.readInit(); err != nil {
		return nil, fmt.Errorf("FUSE handshake: %w", err)
	}
	rings, err := c.wantedRings()
	if err != nil {
		return nil, err
	}
	if err := c.answerInit(opts, rings != nil); err != nil {
		if rings != nil {
			rings.close()
		}
		return nil, fmt.Errorf("FUSE handshake: %w", err)
	}
	if rings == nil {
		return nil, nil
	}
	return c.agreedRings(rings)
}

// readInit receives the kernel's first request.
func (c *connection) readInit() error {
	buf := make([]byte, max(headerSize+c.maxWrite, smallReply))
	for {
		n, err := unix.Read(c.fd, buf)
		if errno := syscall.Errno(0); errors.As(err, &errno) && retryable(errno) {
			continue
		}
		if err != nil {
			return err
		}
		c.init = append([]byte(nil), buf[:n]...)
		if n < inHeaderSize || (*fuse.InHeader)(unsafe.Pointer(&buf[0])).Opcode != opInit {
			return errShortRequest
		}
		return nil
	}
}

// answerInit tells the kernel what we can do, rings included.
func (c *connection) answerInit(opts *fuse.MountOptions, withRings bool) error {
	if withRings {
		opts.ExtraCapabilities |= fuse.CAP_OVER_IO_URING
	}
	c.protocol = fuse.NewProtocolServer(&rawFS{c.tree}, opts)
	return c.answer(c.fd, [][]byte{c.init}, smallReply)
}

// initFlags is what the kernel can do.
func (c *connection) initFlags() uint64 {
	in := fuse.InitIn{}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in)), c.init)
	return in.Flags64()
}

// retryable tells which errors of a read from /dev/fuse are no reason to stop: a signal, or a request that was taken
// back between its announcement and the read.
func retryable(errno syscall.Errno) bool {
	return errno == unix.EINTR || errno == unix.ENOENT || errno == unix.EAGAIN
}

// wantedRings prepares the rings if requests are to arrive over io_uring; nil if not.
func (c *connection) wantedRings() (*ringSet, error) {
	mode := c.tree.opts.IOUring
	if mode == "" || mode == IOUringOff {
		return nil, nil
	}
	rings, err := newRingSet(c)
	if err != nil {
		return nil, c.withoutRings(err)
	}
	return rings, nil
}

// agreedRings puts the rings to use, and returns nil if the connection has to go on without.
func (c *connection) agreedRings(rings *ringSet) (*ringSet, error) {
	if err := rings.register(); err != nil {
		rings.close()
		return nil, c.withoutRings(err)
	}
	return rings, nil
}

// withoutRings decides whether the lack of rings is an error.
func (c *connection) withoutRings(reason error) error {
	if c.tree.opts.IOUring == IOUringOn {
		return fmt.Errorf("FUSE over io_uring is not possible: %w", reason)
	}
	c.tree.log.Debug("no FUSE over io_uring, reading from /dev/fuse", "reason", reason)
	return nil
}

// drain waits until everything that was under way is over, when no more requests come.
func (c *connection) drain() {
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

func (c *connection) close() { _ = unix.Close(c.fd) }

// batch is what a thread has started since it last waited.
type batch struct {
	nodes   []*Node       // whose Commit is due
	bytes   int           // of payload
	pending *atomic.Int32 // requests of it that have not been completed; nil if it has none yet
}

// add notes that the node has started something.
func (b *batch) add(n *Node, bytes int) {
	b.bytes += bytes
	if !slices.Contains(b.nodes, n) {
		b.nodes = append(b.nodes, n)
	}
}

// begin tells the nodes to get going with what they were given so far. More may follow.
func (b *batch) begin() {
	for _, n := range b.nodes {
		if n.ops.Commit != nil {
			n.ops.Commit(n, nil)
		}
	}
}

// commit tells the nodes to get going with what they were given, and that nothing else is there to do but what p finds.
func (b *batch) commit(p Poller) {
	for i, n := range b.nodes {
		if n.ops.Commit == nil {
			continue
		}
		if i < len(b.nodes)-1 {
			n.ops.Commit(n, nil)
		} else {
			n.ops.Commit(n, p)
		}
	}
	if b.pending != nil && b.pending.Load() > 0 {
		b.pending = nil // they take their time, which must not matter to the next batch
	}
	clear(b.nodes)
	b.nodes, b.bytes = b.nodes[:0], 0
}

// Pending implements Poller.
func (b *batch) Pending() int {
	if b.pending == nil {
		return 0
	}
	return int(b.pending.Load())
}

// answersAtOnce tells which requests rawFS answers without calling a node, so that the thread they arrive on can wait
// for the reply. The others may take any time and need a goroutine.
func answersAtOnce(opcode uint32) bool {
	switch opcode {
	case opLookup, opForget, opBatchForget, opGetattr, opStatfs, opFlush, opOpendir, opReaddir, opReleasedir, opAccess,
		opInterrupt:
		return true
	}
	return false
}

// handle has a request answered by go-fuse and rawFS. It returns the size of the reply that is now in out, 0 if there
// is to be none.
func (c *connection) handle(in, out [][]byte) int {
	h := (*fuse.InHeader)(unsafe.Pointer(&in[0][0]))
	n, status := 0, fuse.ENOSYS
	// Nothing here can be interrupted, and the kernel has to learn that. go-fuse says EAGAIN of requests that it has not
	// seen: the kernel then asks again at once, and sends nothing else until the request is over.
	if h.Opcode != opInterrupt {
		n, status = c.protocol.HandleRequest(in, out)
	}
	if !status.Ok() {
		// Also where it could not be parsed: somebody waits for an answer all the same.
		*(*fuse.OutHeader)(unsafe.Pointer(&out[0][0])) = fuse.OutHeader{
			Length: uint32(outHeaderSize), Status: -int32(status), Unique: h.Unique,
		}
		n = outHeaderSize
	}
	return n
}

// answer handles a request and sends the reply, of at most room bytes, through a descriptor of /dev/fuse.
func (c *connection) answer(fd int, in [][]byte, room int) error {
	out := make([]byte, room)
	n := c.handle(in, [][]byte{out})
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
	_, err := unix.Write(c.fd, append(out, body...))
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
