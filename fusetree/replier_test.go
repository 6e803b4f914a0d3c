// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// moreThreads lets Go run so many threads at a time that there are repliers. Tests that call it are not parallel.
func moreThreads(t *testing.T) {
	t.Helper()
	if n := runtime.NumCPU(); n < 2 || n > fewProcessors {
		t.Skipf("%d processors: replies are not left to others", n)
	}
	before := runtime.GOMAXPROCS(runtime.NumCPU() + goThreads + 2)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// TestReplier: whatever is left to a replier is sent once, also when it is falling asleep just then.
func TestReplier(t *testing.T) {
	moreThreads(t)
	ends := must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0))(t)
	for _, fd := range ends {
		defer func() { ok(t, "close", unix.Close(fd)) }()
	}
	// A reply that is lost must not keep the test waiting.
	ok(t, "setsockopt", unix.SetsockoptTimeval(ends[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	s := newRepliers()
	const posters, rounds = 3, 4000
	var left, refused atomic.Int64
	room := make(chan struct{}, 32) // a write to a full socket would wait, and with it all of Go
	var group sync.WaitGroup
	for i := range posters {
		group.Go(func() {
			p := s.on(i % 2)
			for n := range rounds {
				room <- struct{}{}
				data := bytes.Repeat([]byte{byte(n)}, n%100)
				r := &IO{header: replyHeader{}}
				r.header.Length, r.header.Unique = uint32(outHeaderSize), uint64(i*rounds+n)
				if p.post(ends[0], r, data) {
					left.Add(1)
				} else {
					refused.Add(1)
					sendReply(ends[0], &r.header, &r.vector, data)
				}
				if n%500 == 0 {
					for end := time.Now().Add(deadline); p.attends.Load() && time.Now().Before(end); {
						runtime.Gosched() // until it has fallen asleep
					}
					p.rested.Store(0) // and may be woken at once
				}
			}
		})
	}
	seen := make([]bool, posters*rounds)
	buf := make([]byte, 4096)
	for range seen {
		n, err := unix.Read(ends[1], buf)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(ends[1], buf)
		}
		if err != nil {
			t.Fatal("a reply is missing: ", err)
		}
		<-room
		unique := binary.NativeEndian.Uint64(buf[8:])
		if unique >= uint64(len(seen)) || seen[unique] {
			t.Fatalf("reply %d came twice, or is none", unique)
		}
		seen[unique] = true
		round := int(unique) % rounds
		if n != int(binary.NativeEndian.Uint32(buf)) || n != outHeaderSize+round%100 {
			t.Fatalf("reply %d has %d bytes and says %d", unique, n, binary.NativeEndian.Uint32(buf))
		}
		if bytes.Count(buf[outHeaderSize:n], []byte{byte(round)}) != n-outHeaderSize {
			t.Fatalf("reply %d has other data", unique)
		}
	}
	group.Wait()
	s.close()
	t.Logf("%d replies left to others, %d not", left.Load(), refused.Load())
	if left.Load() == 0 || refused.Load() == 0 {
		t.Error("one of both has not been tested")
	}
}

// newPipe makes one that does not block, for the duration of the test.
func newPipe(t *testing.T) (pipe [2]int) {
	t.Helper()
	ok(t, "pipe", unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	for _, fd := range pipe {
		t.Cleanup(func() { ok(t, "close", unix.Close(fd)) })
	}
	return pipe
}

// TestReplierIsFull: replies are taken only as long as there is room.
func TestReplierIsFull(t *testing.T) {
	moreThreads(t)
	pipe := newPipe(t)
	p := &replier{}
	p.prepare()
	p.attends.Store(true) // so it seems
	for i := range replierSlots + 1 {
		r := &IO{}
		r.header.Length = uint32(outHeaderSize)
		if p.post(pipe[1], r, []byte("x")) != (i < replierSlots) {
			t.Fatalf("reply %d is treated differently", i)
		}
	}
	if n := p.send(); n != replierSlots {
		t.Errorf("sent %d replies", n)
	}
	if n := must(unix.Read(pipe[0], make([]byte, 4096)))(t); n != replierSlots*(outHeaderSize+1) {
		t.Errorf("%d bytes arrived", n)
	}
	if !p.post(pipe[1], &IO{}, nil) {
		t.Error("no room after all has been sent")
	}
}

// released counts the calls of Release.
type released struct{ atomic.Int64 }

func (r *released) Release() { r.Add(1) }

// TestReplierKeepsData: data that somebody keeps is not copied, and let go when it has been sent, in either way.
func TestReplierKeepsData(t *testing.T) {
	moreThreads(t)
	pipe := newPipe(t)
	p := &replier{}
	p.prepare()
	p.attends.Store(true) // so it seems
	all := &clients{}
	all.here.Store(1)
	way := &clientWay{&client{all: all}, &descriptor{pipe[1]}}
	way.replier.Store(p)
	const round = 2 * replierSlots // so that some find no room
	data, keep := make([]byte, 1), &released{}
	c := &connection{tree: &Tree{}}
	got := make([]byte, 4096)
	for i := range round {
		r := c.get()
		r.Kind, r.origin, r.pending = Read, way, &atomic.Int32{}
		r.pending.Add(1)
		r.CompleteKept(data, keep)
		if sent := max(0, i+1-replierSlots); keep.Load() != int64(sent) {
			t.Fatalf("after %d replies, %d of them sent, %d were let go", i+1, sent, keep.Load())
		}
	}
	if n := must(unix.Read(pipe[0], got))(t); n != (round-replierSlots)*(outHeaderSize+1) {
		t.Errorf("%d bytes arrived at once", n)
	}
	data[0] = 1
	if p.send() != replierSlots || keep.Load() != round {
		t.Errorf("%d of %d were let go in the end", keep.Load(), round)
	}
	n := must(unix.Read(pipe[0], got))(t)
	if n != replierSlots*(outHeaderSize+1) || got[outHeaderSize] != 1 || got[n-1] != 1 {
		t.Errorf("%d bytes arrived later, or of copies: %v", n, got[:n])
	}
}

// TestReplierIsLate: what a thread does not come to is sent by others, but not before it had its time.
func TestReplierIsLate(t *testing.T) {
	moreThreads(t)
	pipe := newPipe(t)
	p := &replier{created: time.Now()}
	p.prepare()
	p.attends.Store(true) // so it seems
	s := &repliers{list: []*replier{nil, p}}
	post := func() {
		r := &IO{}
		r.header.Length = uint32(outHeaderSize)
		if !p.post(pipe[1], r, nil) {
			t.Fatal("the reply was not taken")
		}
	}
	sent := func() bool { return p.posted.Load() == 0 }

	p.looked.Store(int64(time.Hour))
	post()
	if s.sendLate(); sent() {
		t.Error("a reply was taken from a thread that is in time")
	}
	p.looked.Store(-int64(time.Hour))
	if s.sendLate(); !sent() {
		t.Error("a reply stays with a thread that does not come to it")
	}

	c := clients{repliers: s}
	k := &client{all: &c}
	k.replier.Store(p)
	way := k.begin(&descriptor{pipe[1]}).(*clientWay)
	p.cpu = -1 // anywhere else
	reply := func() {
		r := &IO{}
		r.header.Length = uint32(outHeaderSize)
		way.reply(r, nil)
	}
	if reply(); sent() {
		t.Error("the reply was not left to the thread")
	}
	s.send()
	c.asleep.Store(true)
	if reply(); !sent() {
		t.Error("a reply was left to the thread, and nobody looks after it")
	}
	if n := must(unix.Read(pipe[0], make([]byte, 4096)))(t); n != 3*outHeaderSize {
		t.Errorf("%d bytes arrived", n)
	}
}

func TestReplierRests(t *testing.T) {
	t.Parallel()
	p := &replier{created: time.Now()}
	for want := replierOften; want < replierSeldom; want *= 2 {
		if p.rest(0); p.pause != want {
			t.Fatalf("pause of %v, want %v", p.pause, want)
		}
	}
	for range 3 {
		p.rest(replierWorth - 1)
	}
	if p.pause != replierSeldom {
		t.Errorf("longest pause is %v", p.pause)
	}
	if p.rest(replierWorth); p.pause != replierOften {
		t.Errorf("pause of %v after something to do", p.pause)
	}
	if time.Duration(p.rested.Load()) < replierOften {
		t.Error("the pause is over already")
	}
}

// TestClients: replies are left to others for clients that have one request at a time, and only for those.
func TestClients(t *testing.T) {
	moreThreads(t)
	c := clients{repliers: newRepliers()}
	defer c.repliers.close()
	tid := uint32(unix.Gettid())
	d := &descriptor{-1}
	later := func() {
		c.now = c.now.Add(lookSeldom)
		c.requests = 1 // the clock stays
	}
	one := func(k *client) { k.begin(d).(*clientWay).waiting.Add(-1) }

	c.now = time.Now()
	c.requests = 1
	k := c.of(tid)
	one(k)
	if k.replier.Load() != nil {
		t.Error("a client is known before it has been looked at")
	}
	getsReplier := func() bool {
		for end := time.Now().Add(deadline); time.Now().Before(end); one(k) {
			later()
			if k = c.of(tid); k.replier.Load() != nil {
				return true
			}
		}
		return false
	}
	if !getsReplier() {
		t.Fatal("a client with one request at a time has no replier")
	}
	if c.of(tid+maxClients) != nil {
		t.Error("a second client has displaced the first")
	}
	k.begin(d)
	one(k)
	k.cancel()
	later()
	if k = c.of(tid); k.replier.Load() != nil {
		t.Error("a client with two requests at a time has a replier")
	}
	one(k)
	if !getsReplier() {
		t.Error("a client that has one request at a time now has no replier")
	}
	later()
	if other := c.of(tid + maxClients); other == nil || other == k || other.tid != tid+maxClients {
		t.Error("the first client keeps the place of a second one for ever")
	}
}

// TestRepliesFromElsewhere: several clients on each processor read and write, each one request at a time, and replies
// are left to repliers.
func TestRepliesFromElsewhere(t *testing.T) {
	moreThreads(t)
	s := serve(t, Options{IOUring: IOUringOff}) // which has a thread on each processor anyway
	s.mu.Lock()
	repliers := s.kernel.(*deviceTransport).readers.repliers
	s.mu.Unlock()
	const blocks, each = 16, 2
	m := &fastMemory{memory: memory{data: make([]byte, each*len(repliers.list)*blocks*stressBlock), direct: true}}
	addFastMemory(t, s.Tree, "file", m)
	f := open(t, s.path("file"), os.O_RDWR)
	used := func() (n int) {
		for _, p := range repliers.list {
			if p != nil && p.rested.Load() != 0 {
				n++
			}
		}
		return n
	}
	end := time.Now().Add(deadline)
	var users sync.WaitGroup
	for i := range each * len(repliers.list) {
		users.Go(func() {
			runtime.LockOSThread() // for good, with its place
			var here unix.CPUSet
			here.Set(i % len(repliers.list))
			_ = unix.SchedSetaffinity(0, &here)
			for round := uint64(1); used() == 0 && time.Now().Before(end); round++ {
				if err := rewrite(f, uint64(i*blocks), blocks, round); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	users.Wait()
	if used() == 0 {
		t.Error("no reply was left to a replier")
	}
}

// rewrite writes blocks and reads them again, one by one.
func rewrite(f *os.File, first uint64, blocks int, round uint64) error {
	p := make([]byte, stressBlock)
	for b := first; b < first+uint64(blocks); b++ {
		fillBlock(p, b, round)
		if _, err := unix.Pwrite(int(f.Fd()), p, int64(b)*stressBlock); err != nil {
			return fmt.Errorf("write block %d: %w", b, err)
		}
		clear(p)
		if _, err := unix.Pread(int(f.Fd()), p, int64(b)*stressBlock); err != nil {
			return fmt.Errorf("read block %d: %w", b, err)
		}
		if err := checkBlock(p, b, round); err != nil {
			return err
		}
	}
	return nil
}
