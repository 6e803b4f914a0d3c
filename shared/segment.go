// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// All unsafe code of the package is in this file. A segment is only ever reached through these accessors, each of which
// does one atomic access to a naturally aligned word: a value that the host can change is read once, into a local.

// segment is one sealed memfd and the front's mapping of it.
type segment struct {
	file *os.File // for donation to the host; nil once closed
	mem  []byte   // the whole segment; read-only mapped for the complete segment
}

// newSegment makes a memfd of arenaOffset+arena bytes. With writable the front gets the only writable mapping that will
// ever exist: F_SEAL_FUTURE_WRITE refuses every later one, and write(2), to everybody. Without it the front maps the
// segment read-only and whoever holds the descriptor may write.
func newSegment(name string, arena int64, writable bool) (*segment, error) {
	size := int64(arenaOffset) + arena
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("size of the memory channel: %w", err)
	}
	prot, seals := unix.PROT_READ, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW
	if writable {
		prot |= unix.PROT_WRITE
		seals |= unix.F_SEAL_FUTURE_WRITE
	}
	mem, err := unix.Mmap(fd, 0, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("mmap of the memory channel: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals|unix.F_SEAL_SEAL); err != nil {
		_ = unix.Munmap(mem)
		f.Close()
		return nil, fmt.Errorf("sealing the memory channel: %w", err)
	}
	return &segment{file: f, mem: mem}, nil
}

// arena is the payload part of the segment.
func (s *segment) arena() []byte { return s.mem[arenaOffset:] }

// closeFile gives up the descriptor; the mapping stays.
func (s *segment) closeFile() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// unmap ends the mapping. Nobody may hold a slice of it any more.
func (s *segment) unmap() {
	if s.mem != nil {
		_ = unix.Munmap(s.mem)
		s.mem = nil
	}
}

// word32 and word64 are the only places where an offset becomes a pointer; the slice expressions bounds-check it.

func (s *segment) word32(off int) *uint32 {
	return (*uint32)(unsafe.Pointer(&s.mem[off : off+4 : off+4][0]))
}
func (s *segment) word64(off int) *uint64 {
	return (*uint64)(unsafe.Pointer(&s.mem[off : off+8 : off+8][0]))
}

func (s *segment) load32(off int) uint32     { return atomic.LoadUint32(s.word32(off)) }
func (s *segment) load64(off int) uint64     { return atomic.LoadUint64(s.word64(off)) }
func (s *segment) add32(off int, d uint32)   { atomic.AddUint32(s.word32(off), d) }
func (s *segment) store32(off int, v uint32) { atomic.StoreUint32(s.word32(off), v) }
func (s *segment) store64(off int, v uint64) { atomic.StoreUint64(s.word64(off), v) }

// put32 and put64 are plain stores for fields that a later atomic store publishes. Only the front's own segment.

func (s *segment) put32(off int, v uint32) { *s.word32(off) = v }
func (s *segment) put64(off int, v uint64) { *s.word64(off) = v }

// futexWait sleeps until the word changes from want, a wake, or a signal; it may return early for no reason. The word
// may be in a read-only mapping. It is a Syscall, not a RawSyscall: the scheduler and the garbage collector have to
// know that this thread blocks.
func (s *segment) futexWait(off int, want uint32) {
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(s.word32(off))), futexWait, uintptr(want), 0, 0, 0)
}

// futexWake wakes at most n sleepers of the word. It never blocks, so it does without the scheduler's bookkeeping.
func (s *segment) futexWake(off int, n int) {
	_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(s.word32(off))), futexWake, uintptr(n), 0, 0, 0)
}

// Operations of futex(2), in the form that works between processes.
const (
	futexWait = 0
	futexWake = 1
)
