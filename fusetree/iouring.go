// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is as much of io_uring(7) as the transport in uring.go needs; it knows nothing of FUSE beyond the shape of
// its commands. A ring belongs to the thread that made it, which alone may call its methods, but for wake: the kernel
// then runs everything that concerns the ring on this thread, while it is in enter, and never in between. So nothing
// interrupts other threads of the process, and a request's payload is copied by the thread that is going to use it.

// Numbers of the kernel's interface.
const (
	setupCQSize       = 1 << 3
	setupSubmitAll    = 1 << 7
	setupTaskrunFlag  = 1 << 9
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13
	setupNoMmap       = 1 << 14
	setupNoSQArray    = 1 << 16

	featNoIowait = 1 << 17

	enterGetEvents = 1 << 0
	enterNoIowait  = 1 << 7

	statusOverflow = 1 << 1
	statusTaskrun  = 1 << 2

	opMsgRing           = 40
	opUringCmd          = 46
	registerSendMsgRing = 31
)

const (
	// submissionEntries is the room for commands that have not been handed to the kernel: more are handed over in pieces.
	submissionEntries = 128
	// completionEntries is the room for completions that have not been taken: the kernel keeps more in a list of its own.
	completionEntries = 1024
	// ringsSize is the memory for heads, tails and completions, in bytes. The former take less than a page.
	ringsSize = 4096 + completionEntries*int(unsafe.Sizeof(completion{}))
	// submissionsSize is the memory for the submission entries.
	submissionsSize = submissionEntries * int(unsafe.Sizeof(longSubmission{}))
)

// ringOffsets is struct io_sqring_offsets, and struct io_cqring_offsets with other names.
type ringOffsets struct {
	head, tail, mask, entries uint32
	flags                     uint32 // of submissions: status; of completions: overflow
	dropped                   uint32 // of completions: cqes
	_, _                      uint32
	memory                    *byte // of submissions: for their entries; of completions: for the rest
}

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries, flags, _, _, features, _ uint32
	_                                              [3]uint32
	sq, cq                                         ringOffsets
}

// submission is struct io_uring_sqe, without the part that only rings with large ones have.
type submission struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64 // of a command: its code
	addr     uint64
	length   uint32
	opFlags  uint32
	userData uint64
	_        uint64
	command  [2]uint64
}

// longSubmission is struct io_uring_sqe with 128 bytes, which hold struct fuse_uring_cmd_req from command on.
type longSubmission struct {
	submission
	queue uint16
	_     [62]byte
}

// completion is struct io_uring_cqe.
type completion struct {
	userData uint64
	result   int32
	_        uint32
}

// ioRing is one io_uring.
type ioRing struct {
	fd     int
	memory []byte // what is shared with the kernel
	sqes   []longSubmission
	cqes   []completion
	sqTail *uint32 // only we store to it
	cqHead *uint32 // only we store to it
	cqTail *uint32
	status *uint32
	tail   uint32 // what sqTail is
	behind uint32 // submissions that the kernel has not taken
	flags  uintptr
	waker  submission // constant, so that every thread may use it
}

// wakeUp is the user data of the completion that a wake causes.
const wakeUp = ^uint64(0)

// newRing makes a ring for the calling thread. ENOSYS, EPERM: there is no io_uring, or not for us. EINVAL: the kernel
// is older than 6.6.
//
// The memory is ours, not a mapping of the ring: that would keep the ring, and with it the connection, after a SIGKILL,
// as long as a thread waits for an answer from there (see apart).
func newRing() (*ioRing, error) {
	page := os.Getpagesize()
	sqOffset := (ringsSize + page - 1) &^ (page - 1)
	memory, err := unix.Mmap(-1, 0, sqOffset+submissionsSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("memory for an io_uring: %w", err)
	}
	params := ringParams{
		cqEntries: completionEntries,
		flags: setupCQSize | setupSubmitAll | setupSQE128 | setupSingleIssuer | setupDeferTaskrun |
			setupTaskrunFlag | setupNoSQArray | setupNoMmap,
		sq: ringOffsets{memory: &memory[sqOffset]},
		cq: ringOffsets{memory: &memory[0]},
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, submissionEntries, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		_ = unix.Munmap(memory)
		return nil, fmt.Errorf("io_uring_setup(2): %w", errno)
	}
	r := &ioRing{fd: int(fd), memory: memory, flags: enterGetEvents}
	if params.features&featNoIowait != 0 {
		r.flags |= enterNoIowait // or else an idle mount shows as a processor that waits for a disk
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&memory[off])) }
	r.sqTail, r.cqHead, r.cqTail = word(params.sq.tail), word(params.cq.head), word(params.cq.tail)
	r.status = word(params.sq.flags)
	r.sqes = unsafe.Slice((*longSubmission)(unsafe.Pointer(&memory[sqOffset])), submissionEntries)
	r.cqes = unsafe.Slice((*completion)(unsafe.Pointer(&memory[params.cq.dropped])), completionEntries)
	r.waker = submission{opcode: opMsgRing, fd: int32(r.fd), off: wakeUp}
	return r, nil
}

// close may be called from any thread, when the ring's own has ended.
func (r *ioRing) close() {
	_ = unix.Close(r.fd)
	_ = unix.Munmap(r.memory)
}

// push adds a command for a file; addr, if not nil, is an array of length, for the kernel to read before enter returns.
// There must be room. The completion carries userData.
func (r *ioRing) push(fd int, code uint32, addr *unix.Iovec, length int, userData, commit uint64, queue uint16) {
	r.sqes[r.tail%uint32(len(r.sqes))] = longSubmission{
		submission: submission{
			opcode: opUringCmd, fd: int32(fd), off: uint64(code),
			addr: uint64(uintptr(unsafe.Pointer(addr))), length: uint32(length),
			userData: userData, command: [2]uint64{0, commit},
		},
		queue: queue,
	}
	r.tail++
	r.behind++
	atomic.StoreUint32(r.sqTail, r.tail)
}

// full reports whether there is no room for another command.
func (r *ioRing) full() bool { return int(r.behind) == len(r.sqes) }

// submit hands the commands to the kernel. It takes no completions, except those of commands that fail at once.
func (r *ioRing) submit() error {
	for r.behind > 0 {
		if err := r.system(0, 0); err != nil {
			return err
		}
	}
	return nil
}

// due reports whether enter has something to do.
func (r *ioRing) due() bool {
	return r.behind > 0 || atomic.LoadUint32(r.status)&(statusTaskrun|statusOverflow) != 0
}

// enter hands the commands to the kernel and lets it make completions; with wait set, it returns when there is one, or
// for no reason.
func (r *ioRing) enter(wait bool) error {
	count := 0
	if wait {
		count = 1
	}
	return r.system(count, r.flags)
}

func (r *ioRing) system(wait int, flags uintptr) error {
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.behind), uintptr(wait), flags, 0, 0)
	switch errno {
	case 0:
		r.behind -= uint32(n)
	case unix.EINTR, unix.EAGAIN, unix.EBUSY, unix.EBADR: // a signal, or memory or room is short: try again
	default:
		return fmt.Errorf("io_uring_enter(2): %w", errno)
	}
	return nil
}

// ready reports whether next has something.
func (r *ioRing) ready() bool { return *r.cqHead != atomic.LoadUint32(r.cqTail) }

// next takes one completion.
func (r *ioRing) next() (c completion, ok bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return completion{}, false
	}
	c = r.cqes[head%uint32(len(r.cqes))]
	atomic.StoreUint32(r.cqHead, head+1)
	return c, true
}

// wake makes enter return on the ring's thread, with a completion that says so. Any thread may call it.
func (r *ioRing) wake() error {
	_, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_REGISTER, ^uintptr(0), registerSendMsgRing,
		uintptr(unsafe.Pointer(&r.waker)), 1, 0, 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_register(2), message to a ring: %w", errno)
	}
	return nil
}
