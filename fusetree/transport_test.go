// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What both transports have to do alike. FUSETREE_TRANSPORT=uring in the environment makes all mounts of the tests use
// io_uring.

// fastMemory is a memory node that takes its requests by Start, and ends them in every way there is, by turns.
type fastMemory struct {
	memory
	turn    atomic.Uint64
	commits atomic.Int64
	polls   atomic.Int64 // that have found something

	heldMu sync.Mutex
	held   []*heldIO
}

// heldIO is a request that has been begun, with the payload of a write.
type heldIO struct {
	r       *IO
	payload []byte
}

func addFastMemory(t testing.TB, tree *Tree, name string, m *fastMemory) {
	t.Helper()
	ops := m.ops()
	ops.Start = m.start
	ops.Commit = m.commit
	m.node = must(tree.Add(name, tree.Root(), 0o600, ops, m))(t)
	m.node.UpdateSize(int64(len(m.data)))
}

func (m *fastMemory) start(r *IO) bool {
	h := &heldIO{r: r, payload: append([]byte(nil), r.Payload...)}
	switch m.turn.Add(1) % 4 {
	case 0:
		m.complete(h)
	case 1:
		m.heldMu.Lock()
		m.held = append(m.held, h)
		m.heldMu.Unlock()
	case 2:
		go m.complete(h)
	default:
		return false
	}
	return true
}

func (m *fastMemory) commit(n *Node, p Poller) {
	if n != m.node {
		panic("Commit of another node")
	}
	m.commits.Add(1)
	for deadline := time.Now().Add(time.Millisecond); p != nil && p.Pending() > 0 && time.Now().Before(deadline); {
		if p.Poll() { // which calls commit
			m.polls.Add(1)
		}
	}
	m.heldMu.Lock()
	held := m.held
	m.held = nil
	m.heldMu.Unlock()
	for _, h := range held {
		m.complete(h)
	}
}

func (m *fastMemory) complete(h *heldIO) {
	r := h.r
	if r.Kind == Write {
		m.mu.Lock()
		defer m.mu.Unlock()
		if r.Offset >= int64(len(m.data)) {
			r.Complete(nil, 0, syscall.ENOSPC)
			return
		}
		r.Complete(nil, copy(m.data[r.Offset:], h.payload), nil)
		return
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if r.Offset >= int64(len(m.data)) {
		r.Complete(nil, 0, io.EOF)
		return
	}
	end := min(r.Offset+int64(r.Size), int64(len(m.data)))
	r.Complete(m.data[r.Offset:end], 0, nil)
}

func TestStart(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const size = 3<<20 + 5
	m := &fastMemory{memory: memory{data: make([]byte, size), direct: true}}
	addFastMemory(t, s.Tree, "file", m)
	f := open(t, s.path("file"), os.O_RDWR)

	pattern := make([]byte, size)
	for i := range pattern {
		pattern[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16)
	}
	for _, chunk := range []int{1, 511, 4096, 4097, 128 << 10, 1 << 20, size} {
		m.put(0, string(make([]byte, size)))
		for range 5 { // all ways to end a request
			n := must(f.WriteAt(pattern[:chunk], size-int64(chunk)))(t)
			got := make([]byte, chunk+1)
			r, err := f.ReadAt(got, size-int64(chunk))
			if n != chunk || r != chunk || !errors.Is(err, io.EOF) {
				t.Fatalf("chunk of %d: wrote %d, read %d, %v", chunk, n, r, err)
			}
			if string(got[:chunk]) != string(pattern[:chunk]) {
				t.Fatalf("chunk of %d: read something else than was written", chunk)
			}
		}
	}
	for range 4 {
		_, err := f.WriteAt(pattern[:1], size)
		wantErr(t, "write beyond the end", err, syscall.ENOSPC)
	}
	if m.commits.Load() == 0 {
		t.Error("Commit was never called")
	}
}

func TestStartConcurrently(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const files, workers, blocks, rounds = 2, 8, 16, 20
	var group sync.WaitGroup
	var memories []*fastMemory
	for i := range files {
		name := string(rune('a' + i))
		m := &fastMemory{memory: memory{data: make([]byte, workers*blocks*stressBlock), direct: i%2 == 0}}
		addFastMemory(t, s.Tree, name, m)
		memories = append(memories, m)
		for w := range workers {
			group.Go(func() { writeAndCheck(t, s.path(name), uint64(w*blocks), blocks, rounds) })
		}
	}
	group.Wait()
	polls := int64(0)
	for _, m := range memories {
		polls += m.polls.Load()
	}
	if polls == 0 {
		t.Error("the thread that calls Commit has never found further requests")
	}
}

// TestDataThatFaults: the data of a read may be gone when it is to be sent, as mapped beyond the end of a file. That
// request fails, and nothing else.
func TestDataThatFaults(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const size = 1 << 20
	fd := must(unix.MemfdCreate("faults", unix.MFD_CLOEXEC))(t)
	defer func() { ok(t, "close", unix.Close(fd)) }()
	ok(t, "ftruncate", unix.Ftruncate(fd, size/2))
	data := must(unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED))(t)
	defer func() { ok(t, "munmap", unix.Munmap(data)) }()
	_, err := unix.Pwrite(fd, []byte("here"), size/2-4)
	ok(t, "pwrite", err)
	must(s.Add("file", s.Root(), 0o600, &Ops{
		Open: func(f *File) error { f.DirectIO = true; return nil },
		Start: func(r *IO) bool {
			r.Complete(data[r.Offset:][:r.Size], 0, nil)
			return true
		},
		Commit: func(*Node, Poller) {},
	}, nil))(t).UpdateSize(size)
	f := open(t, s.path("file"), os.O_RDONLY)
	for range 3 {
		for _, n := range []int{4096, 256 << 10} {
			_, err = f.ReadAt(make([]byte, n), size/2)
			wantErr(t, "read of what is gone", err, syscall.EIO)
		}
		got := make([]byte, 4)
		if _, err = f.ReadAt(got, size/2-4); err != nil || string(got) != "here" {
			t.Fatalf("read of what is there: %q, %v", got, err)
		}
	}
}

// addHung adds a node, "hung", whose requests begin in the channel, which has the given room, and end when the test
// completes them.
func addHung(t *testing.T, tree *Tree, room int) (begun chan *IO) {
	t.Helper()
	begun = make(chan *IO, room)
	must(tree.Add("hung", tree.Root(), 0o600, &Ops{
		Open:  func(f *File) error { f.DirectIO = true; return nil },
		Start: func(r *IO) bool { begun <- r; return true },
	}, nil))(t).UpdateSize(4096) // or else the kernel lets one write in at a time
	return begun
}

// Requests that hang take as much room as there is to begin with, and more, and others still get through.
func TestManyHungRequests(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const total, step = 3 * queueDepth, queueDepth / 4 // what a queue has to spare when it gets more
	begun := addHung(t, s.Tree, total)
	newDirectMemory(t, s.Tree, "other", 4096)
	fd := int(open(t, s.path("hung"), os.O_RDONLY).Fd())
	other := open(t, s.path("other"), os.O_RDONLY)

	var readers sync.WaitGroup
	var held []*IO
	for range total / step {
		for range step {
			readers.Go(func() {
				p := make([]byte, 1)
				if n, err := unix.Pread(fd, p, 0); n != 1 || err != nil || p[0] != 'x' {
					t.Errorf("read %q: %d, %v", p, n, err)
				}
			})
		}
		for range step {
			held = append(held, await(t, "a read to arrive", begun))
		}
		must(other.ReadAt(make([]byte, 1), 0))(t)
	}
	for _, r := range held {
		r.Complete([]byte("x"), 1, nil)
	}
	readers.Wait()
}

// TestInterruptedRequest: who is sent a signal while its request hangs is no obstacle to others.
func TestInterruptedRequest(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	begun := addHung(t, s.Tree, 1)
	newDirectMemory(t, s.Tree, "other", 4096)
	fd := int(open(t, s.path("hung"), os.O_RDONLY).Fd())
	other := open(t, s.path("other"), os.O_RDONLY)

	threads := make(chan int, 1)
	var reader sync.WaitGroup
	reader.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		threads <- unix.Gettid()
		if n, err := unix.Pread(fd, make([]byte, 1), 0); n != 1 || err != nil {
			t.Errorf("read after a signal: %d, %v", n, err)
		}
	})
	tid := await(t, "a thread", threads)
	r := await(t, "its request", begun)
	ok(t, "tgkill", unix.Tgkill(unix.Getpid(), tid, unix.SIGURG)) // as Go's own, to no effect
	for range 1000 {
		must(other.ReadAt(make([]byte, 1), 0))(t)
	}
	r.Complete([]byte("x"), 1, nil)
	reader.Wait()
}

// The connection is cut while a node has requests: Run waits for them, and their replies do no harm.
func TestAbortWithRequestsUnderWay(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const total = 8
	begun := addHung(t, s.Tree, total)
	fd := int(open(t, s.path("hung"), os.O_RDWR).Fd())
	var users sync.WaitGroup
	var held []*IO
	for i := range total {
		users.Go(func() {
			call := unix.Pread
			if i%2 == 0 {
				call = unix.Pwrite
			}
			_, err := call(fd, make([]byte, 4096), 0)
			if !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ENOTCONN) {
				t.Errorf("request %d: %v", i, err)
			}
		})
		held = append(held, await(t, "a request to arrive", begun))
	}
	ok(t, "Abort", s.Abort())
	users.Wait()
	select {
	case err := <-s.run:
		t.Errorf("Run has not waited: %v", err)
	default:
	}
	for _, r := range held {
		if r.Kind == Write {
			r.Complete(nil, r.Size, nil)
		} else {
			r.Complete(make([]byte, r.Size), 0, nil)
		}
	}
	s.wantRun(t, nil)
}

// The kernel forgets nodes that have been removed, by messages that go to the transport's side entrance.
func TestForget(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const files = 20
	for i := range files {
		name := "file" + string(rune('a'+i))
		newMemory(t, s.Tree, name, 10)
		stat(t, s.path(name))
		ok(t, "Remove", s.Remove(name, s.Root()))
	}
	left := 0
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
		s.mu.Lock()
		left = len(s.nodes) - 1
		s.mu.Unlock()
		if left == 0 {
			return
		}
	}
	t.Errorf("%d nodes are still known to the kernel", left)
}

// Whatever mounts have used is given back.
// Not parallel, because it counts what the process has open.
func TestNothingIsLeftOpen(t *testing.T) {
	count := func() (n int) {
		for _, e := range must(os.ReadDir("/proc/self/fd"))(t) {
			target, _ := os.Readlink("/proc/self/fd/" + e.Name())
			if target == "/dev/fuse" || strings.Contains(target, "io_uring") {
				n++
			}
		}
		return n + strings.Count(string(must(os.ReadFile("/proc/self/maps"))(t)), "io_uring")
	}
	before := count()
	for i := range 5 {
		s := serve(t, Options{})
		must(os.ReadDir(s.dir))(t)
		if count() == before {
			t.Error("a mount has nothing open")
		}
		if i%2 == 0 {
			umountByHand(t, s.dir)
		} else {
			ok(t, "Abort", s.Abort())
		}
		s.wantRun(t, nil)
	}
	if after := count(); after != before {
		t.Errorf("%d things open, %d before", after, before)
	}
}
