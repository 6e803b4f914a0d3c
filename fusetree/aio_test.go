// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iocb is struct iocb of linux/aio_abi.h, little endian.
type iocb struct {
	_      uint64 // aio_data
	_      uint32 // aio_key
	_      uint32 // aio_rw_flags
	opcode uint16
	_      int16 // aio_reqprio
	fd     uint32
	buf    uint64
	bytes  uint64
	off    int64
	_      uint64 // aio_reserved2
	_      uint32 // aio_flags
	_      uint32 // aio_resfd
}

// ioEvent is struct io_event.
type ioEvent struct {
	_, _ uint64 // data, obj
	res  int64
	_    int64 // res2
}

const aioPread = 0 // IOCB_CMD_PREAD

// Asynchronous direct reads that one thread submits reach the node side by side. Without FUSE_ASYNC_DIO the kernel
// would wait for each of them before it sends the next.
func TestAsynchronousDirectReads(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const depth, block = 32, 4096
	entered, leave := make(chan struct{}), make(chan struct{})
	must(s.Add("file", s.Root(), 0o600, &Ops{
		Open: func(f *File) error { f.DirectIO = true; return nil },
		Read: func(_ *File, p []byte, _ int64) (int, error) {
			entered <- struct{}{}
			<-leave
			return len(p), nil
		},
	}, nil))(t).UpdateSize(depth * block)
	f := open(t, s.path("file"), os.O_RDONLY|unix.O_DIRECT)

	// Outside Go's heap: the kernel writes into it while no Go code refers to it.
	buf := must(unix.Mmap(-1, 0, depth*block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE))(t)
	defer func() { ok(t, "munmap", unix.Munmap(buf)) }()

	var ring uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, depth, uintptr(unsafe.Pointer(&ring)), 0); errno != 0 {
		if errors.Is(errno, syscall.ENOSYS) {
			t.Skip("kernel without io_submit(2)")
		}
		t.Fatal(errno)
	}
	defer func() {
		if _, _, errno := unix.Syscall(unix.SYS_IO_DESTROY, ring, 0, 0); errno != 0 {
			t.Errorf("io_destroy: %v", errno)
		}
	}()
	submitted := make(chan int, 1)
	go func() {
		control := make([]*iocb, depth)
		for i := range control {
			control[i] = &iocb{
				opcode: aioPread,
				fd:     uint32(f.Fd()),
				buf:    uint64(uintptr(unsafe.Pointer(&buf[i*block]))),
				bytes:  block,
				off:    int64(i * block),
			}
		}
		n, _, _ := unix.Syscall(unix.SYS_IO_SUBMIT, ring, depth, uintptr(unsafe.Pointer(&control[0])))
		submitted <- int(n)
	}()
	for range depth {
		await(t, "all reads to be under way at once", entered)
	}
	close(leave)
	if n := await(t, "io_submit", submitted); n != depth {
		t.Fatalf("%d of %d reads submitted", n, depth)
	}
	events := make([]ioEvent, depth)
	n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ring, depth, depth, uintptr(unsafe.Pointer(&events[0])), 0, 0)
	if n != depth || errno != 0 {
		t.Fatalf("%d of %d reads completed: %v", n, depth, errno)
	}
	for _, e := range events {
		if e.res != block {
			t.Errorf("read returned %d", e.res)
		}
	}
}
