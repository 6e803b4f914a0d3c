// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// entryHeader is struct fuse_uring_req_header: a request as it comes, but for its payload, and then its reply.
type entryHeader struct {
	inOut       [128]byte // fuse.InHeader, then fuse.OutHeader
	argument    [128]byte // what follows the header of a request of this kind
	_           uint64    // flags
	commitID    uint64    // which request is being answered
	payloadSize uint32    // bytes, of the request and then of the reply
	_           uint32
	_           uint64
}

// entryMemory is an entry's header with what tells the kernel where it is and where the payload is.
type entryMemory struct {
	entryHeader
	where [2]unix.Iovec // read by the kernel when the entry is registered
}

// ringEntry is room for one request at a time. It is the kernel's, until a completion says that it holds a request;
// then it is ours, until its reply is committed.
type ringEntry struct {
	thread   *ringThread
	queue    *ringQueue
	index    uint64 // of the entry among those of the thread; user data of its commands
	memory   *entryMemory
	payload  []byte
	commitID uint64
	next     *ringEntry // of those whose reply is due
}

// allocateEntries makes n entries, whose payloads are of size bytes, in memory that is the kernel's and not Go's, and
// that costs nothing before it is used.
func allocateEntries(n, size int) (memory []byte, entries []*ringEntry, err error) {
	page := os.Getpagesize()
	headers := (n*int(unsafe.Sizeof(entryMemory{})) + page - 1) &^ (page - 1)
	memory, err = unix.Mmap(-1, 0, headers+n*size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, nil, fmt.Errorf("memory for %d FUSE requests of %d bytes: %w", n, size, err)
	}
	all := unsafe.Slice((*entryMemory)(unsafe.Pointer(&memory[0])), n)
	for i := range all {
		e := &ringEntry{memory: &all[i], payload: memory[headers+i*size:][:size:size]}
		e.memory.where[0].Base = &e.memory.inOut[0]
		e.memory.where[0].SetLen(int(unsafe.Sizeof(entryHeader{})))
		e.memory.where[1].Base = &e.payload[0]
		e.memory.where[1].SetLen(size)
		entries = append(entries, e)
	}
	return memory, entries, nil
}

func (e *ringEntry) header() *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&e.memory.inOut)) }
func (e *ringEntry) argument() *ioArgument  { return (*ioArgument)(unsafe.Pointer(&e.memory.argument)) }

// request is what the entry holds, as it would have come from /dev/fuse. EPROTO: it contradicts itself.
func (e *ringEntry) request() (in [][]byte, payload []byte, err error) {
	size := int(e.memory.payloadSize)
	argument := int64(e.header().Length) - int64(inHeaderSize) - int64(size)
	if size > len(e.payload) || argument < 0 || argument > int64(len(e.memory.argument)) {
		return nil, nil, fmt.Errorf("request of %d bytes with %d of payload: %w", e.header().Length, size, syscall.EPROTO)
	}
	payload = e.payload[:size]
	return [][]byte{e.memory.inOut[:inHeaderSize], e.memory.argument[:argument], payload}, payload, nil
}

// reply implements origin.
func (e *ringEntry) reply(r *IO, data []byte) {
	size, err := copyData(e.payload, data)
	if err != nil {
		r.header.Status = -int32(syscall.EIO)
	}
	if int(r.header.Length) > outHeaderSize && r.Kind == Write {
		*(*fuse.WriteOut)(unsafe.Pointer(&e.payload[0])) = r.header.written
		size = int(unsafe.Sizeof(r.header.written))
	}
	e.finish(r.header.OutHeader, size)
}

// copyData copies data that may be in memory of somebody else's, who may take it away: EFAULT.
func copyData(to, data []byte) (n int, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch fault := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // of runtime.Error for a fault
			n, err = 0, syscall.EFAULT
		default:
			panic(fault)
		}
	}()
	return copy(to, data), nil
}

// finish makes the reply ready, of whose payload so many bytes are in place.
func (e *ringEntry) finish(out fuse.OutHeader, payload int) {
	out.Length = uint32(outHeaderSize + payload)
	*(*fuse.OutHeader)(unsafe.Pointer(&e.memory.inOut)) = out
	e.memory.payloadSize = uint32(payload)
	e.thread.finished(e)
}

// answer has go-fuse answer the request.
func (e *ringEntry) answer() {
	unique := e.header().Unique
	in, payload, err := e.request()
	if err != nil {
		e.thread.c.tree.log.Error("bad request from the kernel's ring", "error", err)
		e.finish(fuse.OutHeader{Status: -int32(syscall.EIO), Unique: unique}, 0)
		return
	}
	// The reply can take the request's place only where nobody is to read from there while it is written.
	var header fuse.OutHeader
	out := [][]byte{unsafe.Slice((*byte)(unsafe.Pointer(&header)), outHeaderSize), e.payload}
	if len(payload) > 0 {
		out[1] = make([]byte, smallReply)
	}
	n := e.thread.c.handle(in, out)
	if n < outHeaderSize { // requests that want no reply do not come this way
		header = fuse.OutHeader{Status: -int32(syscall.EIO), Unique: unique}
		n = outHeaderSize
	}
	if len(payload) > 0 {
		copy(e.payload, out[1][:n-outHeaderSize])
	}
	e.finish(header, n-outHeaderSize)
}
