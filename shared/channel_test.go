// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testDeadline = 30 * time.Second

func newChannel(t testing.TB, opts Options) *Channel {
	t.Helper()
	c, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// do sends a request and waits for it; the caller releases it.
func do(t testing.TB, c *Channel, r *Request) {
	t.Helper()
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	c.Submit(r)
	select {
	case <-done:
	case <-time.After(testDeadline):
		t.Fatal("request did not end")
	}
}

// memory is a device in the peer.
type memory struct {
	mu   sync.Mutex
	data []byte
}

func (m *memory) serve(p *peer, n int) {
	p.serve(n, func(s submission) uint32 {
		m.mu.Lock()
		defer m.mu.Unlock()
		switch s.op {
		case OpRead:
			copy(p.payload(s), m.data[s.offset:])
		case OpWrite:
			copy(m.data[s.offset:], p.payload(s))
		case OpFlush:
		default:
			return uint32(syscall.EOPNOTSUPP)
		}
		return 0
	})
}

// TestConcurrentRoundTrips has many goroutines write and read back their own part of a device, in all sizes.
func TestConcurrentRoundTrips(t *testing.T) {
	t.Parallel()
	const clients, region, rounds = 64, 256 << 10, 60
	c := newChannel(t, Options{Memory: 2 * MaxPayload}) // small: requests have to wait for memory
	p := newPeer(t, c)
	(&memory{data: make([]byte, clients*region)}).serve(p, 4)
	var wg sync.WaitGroup
	for k := range clients {
		wg.Go(func() {
			for i := range rounds {
				n := 1 + (i*i*977+k*4099)%region
				pattern := bytes.Repeat([]byte{byte(k), byte(i)}, n/2+1)[:n]
				w, err := c.Get(OpWrite, uint64(n))
				if err != nil {
					t.Error(err)
					return
				}
				w.Offset = uint64(k * region)
				copy(w.Payload(), pattern)
				do(t, c, w)
				err = w.Err
				w.Release()
				r, getErr := c.Get(OpRead, uint64(n))
				if err != nil || getErr != nil {
					t.Error(err, getErr)
					return
				}
				r.Offset = uint64(k * region)
				do(t, c, r)
				if r.Err != nil || !bytes.Equal(r.Payload(), pattern) {
					t.Errorf("client %d, round %d: wrong contents (%v)", k, i, r.Err)
				}
				r.Release()
			}
		})
	}
	wg.Wait()
	if n := c.InFlight(); n != 0 {
		t.Errorf("%d requests are not released", n)
	}
}

// TestErrors checks that a handler's status and errno arrive, and that an impossible errno is EIO.
func TestErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		errno uint32
		want  error
	}{{0, nil}, {uint32(syscall.ENOSPC), syscall.ENOSPC}, {4096, syscall.EIO}, {1 << 31, syscall.EIO}} {
		c := newChannel(t, Options{Memory: MaxPayload})
		newPeer(t, c).serve(1, func(submission) uint32 { return tt.errno })
		r, err := c.Get(OpFlush, 0)
		if err != nil {
			t.Fatal(err)
		}
		do(t, c, r)
		if !errors.Is(r.Err, tt.want) {
			t.Errorf("errno %d arrives as %v, want %v", tt.errno, r.Err, tt.want)
		}
		r.Release()
	}
}

// TestGetWaitsItsTurn fills the memory and sees a large request wait, a small one wait behind it, and both served in
// order.
func TestGetWaitsItsTurn(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: 2 * MaxPayload})
	newPeer(t, c)
	first, _ := c.Get(OpWrite, MaxPayload)
	second, _ := c.Get(OpWrite, MaxPayload/2)
	order := make(chan *Request, 2)
	wait := func(n uint64, queued int) {
		go func() {
			r, err := c.Get(OpWrite, n)
			if err != nil {
				t.Error(err)
			}
			order <- r
		}()
		for deadline := time.Now().Add(testDeadline); ; {
			c.memMu.Lock()
			n := len(c.waiters)
			c.memMu.Unlock()
			if n == queued {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d requests wait, want %d", n, queued)
			}
		}
	}
	wait(MaxPayload, 1)
	wait(pageSize, 2) // would fit, but it is not its turn
	second.Release()
	big := <-order
	if big.Length != MaxPayload {
		t.Fatalf("the small request overtook the large one")
	}
	first.Release()
	small := <-order
	big.Release()
	small.Release()
}

// TestAbandon ends requests of every kind: completed by the host but not yet reaped, in flight, waiting for memory, and
// submitted later.
func TestAbandon(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	results := make(chan error, 2)
	inFlight, _ := c.Get(OpWrite, MaxPayload)
	inFlight.Done = func(r *Request) { results <- r.Err }
	late, _ := c.Get(OpFlush, 0)
	lateDone := make(chan error, 1)
	late.Done = func(r *Request) { lateDone <- r.Err }
	c.Submit(inFlight)
	waiting := make(chan error, 1)
	go func() {
		_, err := c.Get(OpWrite, 1)
		waiting <- err
	}()
	for blocked := false; !blocked; {
		c.memMu.Lock()
		blocked = len(c.waiters) == 1
		c.memMu.Unlock()
	}
	p.halt()
	c.Abandon()
	c.Abandon()
	if err := <-results; !errors.Is(err, ErrPeerGone) {
		t.Errorf("request in flight ended with %v", err)
	}
	if err := <-waiting; !errors.Is(err, ErrPeerGone) {
		t.Errorf("waiting Get ended with %v", err)
	}
	c.Submit(late)
	if err := <-lateDone; !errors.Is(err, ErrPeerGone) {
		t.Errorf("late Submit ended with %v", err)
	}
	if _, err := c.Get(OpFlush, 0); !errors.Is(err, ErrPeerGone) {
		t.Errorf("late Get: %v", err)
	}
	inFlight.Release()
	late.Release()
}

// TestAbandonCountsPostedCompletions: what the host completed before it died was done.
func TestAbandonCountsPostedCompletions(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	r, _ := c.Get(OpFlush, 0)
	result := make(chan error, 1)
	r.Done = func(r *Request) { result <- r.Err }
	r.Push() // without a Kick nobody looks for the completion
	s, ok := p.take()
	if !ok {
		t.Fatal("nothing was submitted")
	}
	p.post(s.tag, s.gen, 0, 0)
	c.Abandon()
	if err := <-result; err != nil {
		t.Errorf("completed request ended with %v", err)
	}
	r.Release()
}

// TestSegmentsAreSealed tries what a hostile host could try with the descriptors it was given.
func TestSegmentsAreSealed(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	defer c.Close()
	submit, complete := c.Files()
	for _, f := range []*os.File{submit, complete} {
		for _, size := range []int64{0, 1 << 30} {
			if err := f.Truncate(size); !errors.Is(err, syscall.EPERM) {
				t.Errorf("%s: truncate to %d: %v", f.Name(), size, err)
			}
		}
	}
	if _, err := submit.WriteAt([]byte{1}, 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("write to the submit segment: %v", err)
	}
	const both = unix.PROT_READ | unix.PROT_WRITE
	mem, err := unix.Mmap(int(submit.Fd()), 0, 4096, both, unix.MAP_SHARED)
	if !errors.Is(err, syscall.EPERM) {
		t.Errorf("writable mapping of the submit segment: %v", err)
		_ = unix.Munmap(mem)
	}
	mem, err = unix.Mmap(int(submit.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	if err := unix.Mprotect(mem, both); err == nil {
		t.Error("the submit segment could be made writable")
	}
	if err := unix.Fallocate(int(submit.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err == nil {
		t.Error("a hole could be punched into the submit segment")
	}
}

// TestCloseFreesEverything counts mappings and descriptors. Not parallel: it looks at the whole process.
func TestCloseFreesEverything(t *testing.T) {
	count := func() int {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		n := strings.Count(string(maps), "memfd:tcmur-")
		for _, e := range fds {
			if l, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.Contains(l, "memfd:tcmur-") {
				n++
			}
		}
		return n
	}
	before := count()
	c := newChannel(t, Options{})
	if count() <= before {
		t.Fatal("the count sees nothing of an open channel")
	}
	r, err := c.Get(OpWrite, 10)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if r.Payload()[9] = 1; r.Payload()[9] != 1 { // still ours
		t.Error("the payload is gone before its release")
	}
	r.Release()
	c.Close()
	if n := count(); n != before {
		t.Errorf("%d mappings and descriptors are left", n-before)
	}
}

// TestKeep parts payloads from their requests: they survive the channel's end, half of the memory is left for others,
// and everything is freed with the last of them.
func TestKeep(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: 4 * MaxPayload})
	newPeer(t, c).serve(1, func(submission) uint32 { return 0 })
	var pieces []*Piece
	for i := range 4 {
		r, err := c.Get(OpWrite, MaxPayload)
		if err != nil {
			t.Fatal(err)
		}
		r.Payload()[0] = byte(i + 1)
		do(t, c, r)
		if p := r.Keep(); p != nil {
			pieces = append(pieces, p)
		}
		r.Release()
	}
	if len(pieces) != 2 {
		t.Fatalf("%d of 4 payloads were kept, want half", len(pieces))
	}
	c.Close()
	for i, p := range pieces {
		if p.Bytes()[0] != byte(i+1) {
			t.Errorf("piece %d begins with %d", i, p.Bytes()[0])
		}
		p.Release()
	}
	if c.submit.mem != nil {
		t.Error("the memory is still there")
	}
}

// TestAbandonWaits: what the completion thread has taken has ended when Abandon returns, however long that takes. Who
// replaces the host looks then at what the dead one has completed.
func TestAbandonWaits(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	r, err := c.Get(OpFlush, 0)
	if err != nil {
		t.Fatal(err)
	}
	taken := make(chan struct{})
	var ended atomic.Bool
	r.Done = func(r *Request) {
		close(taken)
		time.Sleep(50 * time.Millisecond) // as a thread does that has lost its processor
		r.Release()
		ended.Store(true)
	}
	c.Submit(r)
	s, _ := p.take()
	p.post(s.tag, s.gen, 0, 0)
	<-taken
	c.Abandon()
	if !ended.Load() {
		t.Error("Abandon returned before a completed request had ended")
	}
}

// TestHostileCompletions posts completions that no honest host would.
func TestHostileCompletions(t *testing.T) {
	t.Parallel()
	var faults atomic.Int32
	c := newChannel(t, Options{Memory: MaxPayload, Fault: func(error) { faults.Add(1) }})
	p := newPeer(t, c)
	r, _ := c.Get(OpFlush, 0)
	var dones atomic.Int32
	done := make(chan struct{}, 10)
	r.Done = func(*Request) { dones.Add(1); done <- struct{}{} }
	c.Submit(r)
	s, _ := p.take()
	p.post(RingEntries, 1, 0, 0)           // no such tag
	p.post(1<<32-1, 1, 0, 0)               // no such tag
	p.post(s.tag, s.gen+1, 0, 0)           // a use to come
	p.post(s.tag, s.gen-1, 0, 0)           // a use that is over
	p.post((s.tag+1)%RingEntries, 0, 0, 0) // a tag that is not in flight
	p.post(s.tag, s.gen, 0, 0)
	<-done
	p.post(s.tag, s.gen, 0, 0) // twice
	for deadline := time.Now().Add(testDeadline); faults.Load() < 6; {
		if time.Now().After(deadline) {
			t.Fatalf("%d of 6 violations were noticed", faults.Load())
		}
	}
	if n := dones.Load(); n != 1 {
		t.Errorf("Done was called %d times", n)
	}
	r.Release()
}

// FuzzCompletions scribbles over everything that a host can write while requests are in flight: nothing crashes, each
// request ends exactly once, and Close returns.
func FuzzCompletions(f *testing.F) {
	entry := binary.LittleEndian.AppendUint64(nil, 1)
	entry = binary.LittleEndian.AppendUint64(entry, 1<<32|3)
	f.Add(uint16(4096), entry)
	f.Add(uint16(64), []byte{1, 2, 3, 4})
	f.Add(uint16(0), bytes.Repeat([]byte{0xff}, 30000))
	f.Fuzz(func(t *testing.T, at uint16, scribble []byte) {
		c := newChannel(t, Options{Memory: MaxPayload})
		p := newPeer(t, c)
		const n = 8
		var ended [n]atomic.Int32
		var all sync.WaitGroup
		requests := make([]*Request, n)
		for i := range requests {
			r, err := c.Get(OpRead, 100)
			if err != nil {
				t.Fatal(err)
			}
			all.Add(1)
			r.Done = func(*Request) { ended[i].Add(1); all.Done() }
			requests[i] = r
		}
		c.Submit(requests...)
		copy(p.complete.mem[at:], scribble)
		p.complete.futexWake(offCQBell, 1)
		c.Reap()
		c.Abandon()
		all.Wait()
		for i, r := range requests {
			if got := ended[i].Load(); got != 1 {
				t.Errorf("request %d ended %d times", i, got)
			}
			r.Release()
		}
	})
}

// FuzzHostileHost lets a host write what it likes wherever it may while requests come and go, as a program: each step
// of four bytes says what is written, and where. Whatever it is, every request ends exactly once, the front neither
// crashes nor waits for ever, and nothing stays handed out.
func FuzzHostileHost(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 9, 9, 9})
	f.Add([]byte{2, 0, 1, 0, 2, 0, 2, 0, 2, 1, 255, 255, 3, 64, 0, 255, 3, 128, 0, 255})
	f.Add(bytes.Repeat([]byte{2, 7, 7, 7, 0, 0, 0, 0}, 40))
	f.Fuzz(func(t *testing.T, program []byte) {
		var faults atomic.Int32
		c := newChannel(t, Options{Memory: MaxPayload, Fault: func(error) { faults.Add(1) }})
		p := newPeer(t, c)
		var issued, ended atomic.Int32
		for step := 0; len(program) >= 4 && step < 200; step++ {
			kind, a, b, d := program[0], program[1], program[2], program[3]
			program = program[4:]
			switch kind % 5 {
			case 0: // the front issues a request
				r := c.TryGet([]Op{OpRead, OpWrite, OpFlush}[a%3], 1+uint64(b)*16)
				if r == nil {
					continue
				}
				var once atomic.Bool
				issued.Add(1)
				may := r.Op == OpRead && d&1 != 0
				r.MayInPlace = may
				r.Done = func(r *Request) {
					if r.InPlace && !may {
						t.Error("a request ended in place that must not")
					}
					if once.Swap(true) {
						t.Error("a request ended twice")
						return
					}
					_ = append([]byte(nil), r.Payload()...)
					r.Release()
					ended.Add(1)
				}
				c.Submit(r)
			case 1: // an honest completion
				if s, ok := p.take(); ok {
					p.post(s.tag, s.gen, int32(int8(a)), uint32(b)|uint32(d)<<16)
				}
			case 2: // a completion that was never asked for, where the next one is expected
				p.post(uint32(a)<<uint(d%24), uint32(b), int32(d), uint32(d)<<24)
			case 3: // any word of the head and the ring
				at := (int(a)<<8 | int(b)) &^ 3
				p.complete.store32(at%arenaOffset, uint32(d)*0x01010101)
			case 4:
				p.complete.futexWake(offCQBell, 1)
				c.Reap()
			}
		}
		c.Abandon()
		if i, e := issued.Load(), ended.Load(); i != e {
			// Those that the completion thread has taken may end a moment later.
			for deadline := time.Now().Add(testDeadline); ended.Load() != i; {
				if time.Now().After(deadline) {
					t.Fatalf("%d of %d requests ended", ended.Load(), i)
				}
			}
		}
		if n := c.InFlight(); n != 0 {
			t.Errorf("%d requests are still handed out", n)
		}
	})
}

// poller is a Poller with nothing else to do.
type poller struct{ pending atomic.Int32 }

func (p *poller) Pending() int { return int(p.pending.Load()) }
func (p *poller) Poll() bool   { return false }

// TestKick takes completions in Kick while the completion thread sleeps, and sees that no completion is lost at the
// change from one to the other.
func TestKick(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	slow := make(chan struct{})
	p.serve(2, func(s submission) uint32 {
		if s.offset == 1 {
			<-slow
		}
		return 0
	})
	for i := range 2000 {
		r, err := c.Get(OpFlush, 0)
		if err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			r.Offset = 1 // completes after Kick has given up
		}
		done := make(chan struct{})
		var self poller
		self.pending.Add(1)
		r.Done = func(*Request) {
			self.pending.Add(-1)
			close(done)
		}
		r.Push()
		c.Kick(&self)
		if i%100 == 99 {
			slow <- struct{}{}
		}
		select {
		case <-done:
		case <-time.After(testDeadline):
			t.Fatalf("request %d did not end", i)
		}
		r.Release()
	}
	c.Close()
	var self poller
	self.pending.Add(1)
	c.Kick(&self) // nobody waits on a closed channel
}

// TestInPlace: a host may leave the data of a read where it is only where the front allows it.
func TestInPlace(t *testing.T) {
	t.Parallel()
	var faults atomic.Int32
	c := newChannel(t, Options{Memory: MaxPayload, Fault: func(error) { faults.Add(1) }})
	p := newPeer(t, c)
	for _, k := range []struct {
		may     bool
		result  uint32 // error and flags
		inPlace bool
		err     error
		faults  int32
	}{
		{may: true, result: flagInPlace << 16, inPlace: true},
		{may: true},
		{may: false},
		{may: false, result: flagInPlace << 16, err: syscall.EIO, faults: 1},
		{may: true, result: 6 << 16, err: syscall.EIO, faults: 1},
	} {
		faults.Store(0)
		r, err := c.Get(OpRead, 512)
		if err != nil {
			t.Fatal(err)
		}
		r.MayInPlace = k.may
		done := make(chan struct{})
		r.Done = func(*Request) { close(done) }
		c.Submit(r)
		s, ok := p.take()
		if !ok || (s.flags&flagMayInPlace != 0) != k.may {
			t.Fatalf("%+v: submission is %+v", k, s)
		}
		p.post(s.tag, s.gen, 0, k.result)
		<-done
		if r.InPlace != k.inPlace || !errors.Is(r.Err, k.err) || faults.Load() != k.faults {
			t.Errorf("%+v: in place %v, error %v, %d faults", k, r.InPlace, r.Err, faults.Load())
		}
		r.Release()
	}
}

// chain is a Poller that sends another request whenever it is asked, until it has sent all.
type chain struct {
	c       *Channel
	pending atomic.Int32
	left    int // requests
	polls   int
}

func (p *chain) Pending() int { return int(p.pending.Load()) }

func (p *chain) Poll() bool {
	if p.left == 0 {
		return false
	}
	r := p.c.TryGet(OpFlush, 0)
	if r == nil { // all are in flight, and it is this thread that ends them
		return false
	}
	p.polls++
	p.left--
	p.pending.Add(1)
	r.Done = func(r *Request) {
		r.Release()
		p.pending.Add(-1)
	}
	r.Push()
	p.c.Kick(nil)
	return true
}

// TestKickGoesOn has the thread that waits in Kick send further requests meanwhile.
func TestKickGoesOn(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	defer c.Close()
	p := newPeer(t, c)
	p.serve(2, func(submission) uint32 { return 0 })
	self := &chain{c: c, left: 1000}
	mine := 0 // requests that were not sent from within Kick
	for deadline := time.Now().Add(testDeadline); self.left > 0 || self.Pending() > 0; c.Kick(self) {
		if time.Now().After(deadline) {
			t.Fatalf("%d requests are pending, %d are yet to be sent", self.Pending(), self.left)
		}
		if self.Pending() == 0 {
			self.Poll()
			mine++
		}
	}
	if mine == self.polls {
		t.Error("Kick has not gone on with other work")
	}
	if n := c.InFlight(); n != 0 {
		t.Errorf("%d requests are still handed out", n)
	}
}

// TestKickBySeveral has several threads wait in Kick at a time: each goes on when its own requests have ended.
func TestKickBySeveral(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	p.serve(1, func(submission) uint32 { return 0 })
	var together atomic.Bool
	together.Store(runtime.GOMAXPROCS(0) == 1) // there a thread in Kick is the only one that runs
	deadline := time.Now().Add(testDeadline)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			done := make(chan struct{}, 1)
			for i := 0; (i < 1000 || !together.Load()) && !t.Failed(); i++ {
				if time.Now().After(deadline) {
					t.Error("never did two wait at a time")
				}
				r, err := c.Get(OpFlush, 0)
				if err != nil {
					t.Error(err)
					return
				}
				self := &witness{c: c, together: &together}
				self.pending.Add(1)
				r.Done = func(*Request) {
					self.pending.Add(-1)
					done <- struct{}{}
				}
				r.Push()
				c.Kick(self)
				select {
				case <-done:
				case <-time.After(testDeadline):
					t.Errorf("request %d did not end", i)
					return
				}
				r.Release()
			}
		})
	}
	all.Wait()
	if n := c.awaiters.Load(); n != 0 {
		t.Errorf("%d threads still wait", n)
	}
}

// witness is a poller that notes whether another one waits, too.
type witness struct {
	poller
	c        *Channel
	together *atomic.Bool
}

func (w *witness) Poll() bool {
	if w.c.awaiters.Load() > 1 {
		w.together.Store(true)
	}
	return false
}

// TestPatience: how long a thread looks out for completions follows what the host has measured last.
func TestPatience(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	p := newPeer(t, c)
	for _, step := range []struct{ took, want time.Duration }{
		{0, quickWait}, {quickTime - 1, quickWait}, {quickTime, eagerWait}, {0, eagerWait}, {1, quickWait},
	} {
		p.took = step.took
		ended := make(chan struct{})
		r, err := c.Get(OpFlush, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.Done = func(*Request) { close(ended) }
		c.Submit(r)
		s, ok := p.take()
		if !ok {
			t.Fatal("nothing was sent")
		}
		p.post(s.tag, s.gen, 0, 0)
		c.Reap()
		<-ended
		r.Release()
		if got := c.patience(); got != step.want {
			t.Errorf("after %v: %v, want %v", step.took, got, step.want)
		}
	}
}

// TestRingLate lets a worker that has said that it would be back soon stay away: another one is woken all the same.
func TestRingLate(t *testing.T) {
	t.Parallel()
	for _, p := range []Poller{nil, &poller{}} {
		c := newChannel(t, Options{Memory: MaxPayload})
		host := newPeer(t, c)
		r, err := c.Get(OpFlush, 0)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		r.Done = func(r *Request) { ended <- r.Err }
		if p, ok := p.(*poller); ok {
			p.pending.Store(1)
			r.Done = func(r *Request) { p.pending.Store(0); ended <- r.Err }
		}
		host.complete.store32(offSQSleepers, sleepersBackSoon) // nobody sleeps
		r.Push()
		before := c.submit.load32(offSQBell)
		c.Kick(p)
		if c.submit.load32(offSQBell) != before {
			t.Errorf("%T: the bell was rung for nobody", p)
		}
		host.complete.store32(offSQSleepers, sleepersBackSoon+1)
		c.unrung.Add(1)
		c.Kick(p)
		if c.submit.load32(offSQBell) == before {
			t.Errorf("%T: the bell was not rung", p)
		}
		host.complete.store32(offSQSleepers, 0)
		host.serve(1, func(submission) uint32 { return 0 })
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(testDeadline):
			t.Fatalf("%T: the request does not end", p)
		}
		r.Release()
		c.Close()
	}
}

// TestRest: the first request, and the first one after each Rest, is told of, and nothing is in flight only once each
// request has ended.
func TestRest(t *testing.T) {
	var told atomic.Int32
	c := newChannel(t, Options{Busy: func() { told.Add(1) }})
	p := newPeer(t, c)
	ended := make(chan *Request, 2)
	send := func(want int32) {
		t.Helper()
		r, err := c.Get(OpFlush, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.Done = func(r *Request) { ended <- r }
		c.Submit(r)
		if n := told.Load(); n != want {
			t.Errorf("told of %d requests, want %d", n, want)
		}
	}
	end := func() {
		t.Helper()
		for range 2 {
			select {
			case r := <-ended:
				r.Release()
			case <-time.After(testDeadline):
				t.Fatal("request did not end")
			}
		}
	}
	send(1)
	send(1)
	if c.Rest() {
		t.Error("at rest with two requests in flight")
	}
	p.serve(1, func(submission) uint32 { return 0 })
	end()
	if !c.Rest() {
		t.Error("not at rest, though all requests have ended")
	}
	send(2)
	send(2)
	end()
}

// BenchmarkRoundTrip is one 4 KiB read at a time through both rings, with both sides asleep in between.
func BenchmarkRoundTrip(b *testing.B) {
	c := newChannel(b, Options{})
	p := newPeer(b, c)
	(&memory{data: make([]byte, 1<<20)}).serve(p, 1)
	done := make(chan struct{}, 1) // Submit itself may find the completion
	for b.Loop() {
		r, err := c.Get(OpRead, 4096)
		if err != nil {
			b.Fatal(err)
		}
		r.Done = func(*Request) { done <- struct{}{} }
		c.Submit(r)
		<-done
		r.Release()
	}
}
