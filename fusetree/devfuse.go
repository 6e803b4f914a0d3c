// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/shared/watch"
)

// Requests read from /dev/fuse, in batches. Each reader thread blocks on one descriptor and then drains a second,
// non-blocking one: both are clones of the one that was mounted. A request must be answered on the descriptor that it
// was read from. All of them are kept open for the life of the connection.

const (
	// maxReaders is the number of reader threads. More only wake each other.
	maxReaders = 2
	// largeRequest is the size in bytes from which on the kernel's copying of a request, or its reply, takes much
	// longer than it takes to wake a thread that can do the same with another one meanwhile.
	largeRequest = 128 << 10
	// lingering is how long a thread looks out for another request before it sleeps, if requests come from several
	// clients or ahead of their answers: a multiple of what waking it would take.
	lingering = 30 * time.Microsecond
	// crowdPatience is how many times in a row requests have to come one by one for that to be over.
	crowdPatience = 16
	// solitude is how many requests in a row have to come one by one for the reader to follow the client.
	solitude = 64
	// largeWrite is the size in bytes from which on a payload is worth a buffer of the node's own: copying less costs
	// less than the buffer's book-keeping.
	largeWrite = 64 << 10
	// bufferPatience is after how many requests that had no use for it a node's buffer is given back.
	bufferPatience = 64
	// longReply is the size in bytes from which on the kernel's copying of a reply takes so long that the scheduler
	// should know.
	longReply = 64 << 10
	// devIocClone is FUSE_DEV_IOC_CLONE.
	devIocClone = 0x8004e500
)

// deviceTransport serves a connection by reads from /dev/fuse.
type deviceTransport struct {
	*connection
	readers *deviceReaders
}

func (d *deviceTransport) serve() {
	d.readers.serve()
	d.drain()
}

func (d *deviceTransport) close() {
	d.readers.close()
	d.connection.close()
}

// deviceReaders is the reader threads of a connection.
type deviceReaders struct {
	c        *connection
	open     []*descriptor
	readers  []*reader
	helper   *helper   // nil if there is none
	repliers *repliers // nil if there are none
}

// newDeviceReaders opens the descriptors for n threads. Where few requests will come this way it can be done without
// the threads that are there for many of them.
func newDeviceReaders(c *connection, n int, few bool) (_ *deviceReaders, err error) {
	d := &deviceReaders{c: c}
	defer func() {
		if err != nil {
			d.close()
			err = fmt.Errorf("clone the FUSE connection: %w", err)
		}
	}()
	if !few {
		d.repliers = newRepliers()
	}
	if !few && n == 1 && mayLookOut() {
		r, err := d.newReader()
		if err != nil {
			return nil, err
		}
		d.helper = newHelper(r)
	}
	for range n {
		r, err := d.newReader()
		if err != nil {
			return nil, err
		}
		r.clients.repliers, r.helper = d.repliers, d.helper
		d.readers = append(d.readers, r)
	}
	return d, nil
}

// newReader makes a reader with descriptors of its own.
func (d *deviceReaders) newReader() (r *reader, err error) {
	r = &reader{c: d.c}
	if r.blocking, err = d.clone(0); err == nil {
		r.draining, err = d.clone(unix.O_NONBLOCK)
	}
	return r, err
}

// clone opens a further descriptor of the connection.
func (d *deviceReaders) clone(flags int) (*descriptor, error) {
	fd, err := cloneDescriptor(d.c.fd, flags)
	if err != nil {
		return nil, err
	}
	clone := &descriptor{fd}
	d.open = append(d.open, clone)
	return clone, nil
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

// readerThreads is how many reader threads to have. A thread with work to do does not sleep, so that of two
// processors a second one would only take time from the clients and the node, unless requests are large (helper).
func readerThreads() int { return max(1, min(maxReaders, runtime.NumCPU()-1)) }

// serve answers requests until the connection ends.
func (d *deviceReaders) serve() {
	var threads sync.WaitGroup
	for _, r := range d.readers {
		threads.Go(r.serve)
	}
	threads.Wait()
	if d.helper != nil {
		d.helper.close()
	}
}

func (d *deviceReaders) close() {
	if d.repliers != nil {
		d.repliers.close()
	}
	for _, from := range d.open {
		_ = unix.Close(from.fd)
	}
}

// descriptor is one of /dev/fuse.
type descriptor struct{ fd int }

// reply implements origin.
func (d *descriptor) reply(r *IO, data []byte) { sendReply(d.fd, &r.header, &r.vector, data) }

// sendReply sends a reply whose header does not yet count the data. The vector is memory to gather it with.
func sendReply(fd int, h *replyHeader, vector *[2]unix.Iovec, data []byte) {
	vector[0].Base = (*byte)(unsafe.Pointer(h))
	vector[0].SetLen(int(h.Length))
	parts := 1
	if len(data) > 0 {
		h.Length += uint32(len(data))
		vector[1].Base = unsafe.SliceData(data)
		vector[1].SetLen(len(data))
		parts = 2
	}
	// An error means that nobody waits for the reply any more.
	if len(data) < longReply {
		_, _, _ = unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vector[0])), uintptr(parts))
	} else {
		_, _, _ = unix.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vector[0])), uintptr(parts))
	}
}

// requestHeader is the fixed part of a request: the header and, for READ and WRITE, its argument.
type requestHeader struct {
	fuse.InHeader
	io ioArgument
}

const headerSize = int(unsafe.Sizeof(requestHeader{}))

// bytes is the header as it was read.
func (h *requestHeader) bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(h)), headerSize)
}

// reader is one reader thread.
type reader struct {
	batch
	c                  *connection
	blocking, draining *descriptor // the latter does not block
	ended              bool        // the connection is over
	crowd              int         // more than 0: requests come from several clients, or ahead of their answers
	watch              watch.Watch
	alone              int // requests in a row that came one by one
	follower           follower
	clients            clients
	helper             *helper // nil if there is none
	large              bool    // the last request was

	header *requestHeader
	vector [2]unix.Iovec // header, and data or lent
	data   []byte        // our own memory for what follows the header
	lent   Buffer        // a node's memory for the same; nil if there is none
	unused int           // requests since lent was of use
}

// result of reading one request.
type readResult int

const (
	readNothing readResult = iota // there was none
	readOther                     // it was dealt with
	readIO                        // a node has started it
	readEnd                       // the connection is over
)

// serve answers requests until the connection ends.
func (b *reader) serve() {
	defer b.prepare()()
	for !b.ended {
		if b.next() {
			b.attend()
		}
	}
}

// prepare makes the memory that requests are read to. The function it returns must be called in the end.
func (b *reader) prepare() (free func()) {
	runtime.LockOSThread()
	b.header, b.data = new(requestHeader), make([]byte, b.c.maxWrite+os.Getpagesize())
	// A page that is used for the first time is allocated while the kernel copies a request there. With little memory
	// left that may wait for dirty pages, which only this request can write back.
	for i := 0; i < len(b.data); i += os.Getpagesize() {
		b.data[i] = 0
	}
	pin := new(runtime.Pinner)
	pin.Pin(b.header)
	pin.Pin(&b.data[0])
	b.vector[0].Base = (*byte)(unsafe.Pointer(b.header))
	b.vector[0].SetLen(headerSize)
	b.vector[1].Base = &b.data[0]
	b.vector[1].SetLen(len(b.data))
	return func() {
		b.dropBuffer()
		pin.Unpin()
	}
}

// attend sees to a request that has been started, and to those that come meanwhile.
func (b *reader) attend() {
	b.crowd = max(0, b.crowd-1)
	if b.c.inFlight.Load() > 1 {
		if b.large && b.helper != nil {
			b.helper.call()
		}
		b.begin() // the first request is on its way at once; the others of the batch share a doorbell
		b.drain()
		b.alone = 0
	} else {
		b.alone++
	}
	b.commit(b)
}

// next waits for a request, and reports whether a node has started it.
func (b *reader) next() bool {
	if b.crowd > 0 && b.watch.Pays() && b.linger() {
		return true
	}
	if b.ended {
		return false
	}
	if repliers := b.clients.repliers; repliers != nil {
		b.clients.asleep.Store(true)
		repliers.send()
		defer b.clients.asleep.Store(false)
	}
	return b.read(b.blocking, true) == readIO
}

// linger looks out for a request for a while, and reports whether a node has started one.
func (b *reader) linger() bool {
	for since := time.Now(); ; {
		switch b.read(b.draining, false) {
		case readIO:
			return true
		case readEnd:
			return false
		case readOther:
			since = time.Now()
		case readNothing:
			if time.Since(since) > lingering {
				b.crowd = 0
				return false
			}
			if !b.watch.Yield() {
				return false
			}
		}
	}
}

// drain takes what is there, up to the limits of a batch, and reports whether a node has started any of it.
func (b *reader) drain() (some bool) {
	if repliers := b.clients.repliers; repliers != nil {
		repliers.sendLate()
	}
	for n := 0; n < maxBatch && b.bytes < maxBatchBytes && !b.ended; n++ {
		switch b.read(b.draining, false) {
		case readIO:
			some = true
		case readNothing:
			return some
		}
	}
	return some
}

// Poll implements Poller.
func (b *reader) Poll() bool {
	b.bytes = 0
	if !b.drain() {
		if b.alone > solitude { // by now the client sleeps
			b.follower.follow(b.header.Pid)
		}
		return false
	}
	b.crowd = crowdPatience
	b.alone = 0
	b.begin()
	return true
}

// read reads one request and deals with it. Only a read that may wait goes through the scheduler.
func (b *reader) read(from *descriptor, wait bool) readResult {
	var n uintptr
	var errno syscall.Errno
	if wait {
		n, _, errno = unix.Syscall(unix.SYS_READV, uintptr(from.fd), uintptr(unsafe.Pointer(&b.vector[0])), 2)
	} else {
		n, _, errno = unix.RawSyscall(unix.SYS_READV, uintptr(from.fd), uintptr(unsafe.Pointer(&b.vector[0])), 2)
	}
	switch {
	case errno == 0:
	case errno == unix.EAGAIN:
		return readNothing
	case retryable(errno):
		return readOther
	default:
		if errno != unix.ENODEV && errno != unix.ECONNABORTED {
			b.c.tree.log.Error("reading from /dev/fuse failed, aborting the mount", "error", errno)
			go func() { _ = b.c.tree.Abort() }() // other threads may be waiting in a read
		}
		b.ended = true
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
	payload := max(0, int(n)-headerSize)
	if int(n) >= headerSize || h.Opcode == opFsync && int(n) >= fsyncSize {
		if node, taken := b.startIO(from, data[:payload]); taken {
			b.large = h.Opcode != opFsync && h.io.size >= largeRequest
			b.chooseBuffer(node, payload)
			return readIO
		}
	}
	b.dispatch(from, int(n), data)
	b.chooseBuffer(nil, 0)
	return readOther
}

// startIO hands the request to its node if that takes it, as connection.startIO does.
func (b *reader) startIO(from *descriptor, payload []byte) (n *Node, taken bool) {
	h := b.header
	if b.crowd == 0 || b.clients.repliers == nil || h.Opcode != opRead && h.Opcode != opWrite {
		return b.c.startIO(&b.batch, from, &h.InHeader, &h.io, payload, b.lent)
	}
	k := b.clients.of(h.Pid)
	if k == nil {
		return b.c.startIO(&b.batch, from, &h.InHeader, &h.io, payload, b.lent)
	}
	n, taken = b.c.startIO(&b.batch, k.begin(from), &h.InHeader, &h.io, payload, b.lent)
	if !taken {
		k.cancel()
	}
	return n, taken
}

// chooseBuffer decides where the payload of the next request is read to, after one with size bytes of payload went to
// the node (nil if it went elsewhere): large writes tend to be followed by others to the same node.
func (b *reader) chooseBuffer(n *Node, size int) {
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
func (b *reader) dropBuffer() {
	if b.lent != nil {
		b.lent.Release()
		b.lent = nil
		b.vector[1].Base = &b.data[0]
		b.vector[1].SetLen(len(b.data))
	}
}

// dispatch answers a request through go-fuse: here and now, or from a goroutine with a copy.
func (b *reader) dispatch(from *descriptor, n int, data []byte) {
	c, h := b.c, b.header
	in := [][]byte{h.bytes()[:min(n, headerSize)], data[:max(0, n-headerSize)]}
	room := smallReply
	switch h.Opcode {
	case opRead, opReaddir:
		room += int(h.io.size)
	}
	if answersAtOnce(h.Opcode) {
		_ = c.answer(from.fd, in, room)
		return
	}
	whole := append(append(make([]byte, 0, n), in[0]...), in[1]...)
	c.slow.Go(func() { _ = c.answer(from.fd, [][]byte{whole}, room) })
}
