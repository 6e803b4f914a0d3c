// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/shared/watch"
)

// A reply wakes the client that waits for it. If that sleeps on another processor, it takes an interrupt there, which
// in a virtual machine costs the reader more than all the rest of a small request. So, where several clients wait for
// one request each, small replies to those on other processors are left to a thread there, which looks out for them.

const (
	// replierPatience is how long such a thread looks out for another reply before it sleeps.
	replierPatience = 200 * time.Microsecond
	// replierRoom is the most data of a reply, in bytes, that is worth a copy.
	replierRoom = 16 << 10
	// replierSlots is how many replies can be left to a thread at a time.
	replierSlots = 32
	// A thread is not woken more often than every replierOften, and where it had less than replierWorth to do when it
	// was awake, half as often each time, down to every replierSeldom.
	replierOften  = time.Millisecond
	replierSeldom = 256 * time.Millisecond
	replierWorth  = 8
	// fewProcessors is up to how many there are such threads. Where there are more, hardly any client has to share
	// one, and looking out for its replies would take a processor for each client.
	fewProcessors = 4
	// goThreads is how many threads Go must be able to run at a time, beside one for each processor, if several of
	// them are to look out for something: they would keep others from running.
	goThreads = 2
)

// mayLookOut reports whether more threads than one may do so.
func mayLookOut() bool {
	n := runtime.NumCPU()
	return n > 1 && runtime.GOMAXPROCS(0) >= n+goThreads
}

// repliers is the threads of a connection that send replies, by processor. One is started when there is first
// something for it to do.
type repliers struct {
	list []*replier // nil where we may not run
	run  sync.WaitGroup
}

// newRepliers returns nil where there is no use for them.
func newRepliers() *repliers {
	var allowed unix.CPUSet
	if runtime.NumCPU() > fewProcessors || !mayLookOut() || unix.SchedGetaffinity(0, &allowed) != nil {
		return nil
	}
	s := &repliers{}
	for cpu := 0; allowed.Count() > 0; cpu++ {
		var r *replier
		if allowed.IsSet(cpu) {
			allowed.Clear(cpu)
			r = &replier{cpu: cpu, created: time.Now(), wake: make(chan struct{}, 1)}
			r.start = sync.OnceFunc(func() {
				r.prepare()
				s.run.Go(r.run)
			})
		}
		s.list = append(s.list, r)
	}
	return s
}

// on returns the one of a processor; nil if there is none.
func (s *repliers) on(cpu int) *replier {
	if cpu < 0 || cpu >= len(s.list) {
		return nil
	}
	return s.list[cpu]
}

// send sends what the threads have not come to yet, for a reader that is about to sleep: others may have taken their
// processors.
func (s *repliers) send() {
	for _, r := range s.list {
		if r != nil && r.posted.Load() != 0 {
			r.send()
		}
	}
}

// sendLate is the same for a reader that goes on, where a thread has not looked for so long that others must have its
// processor.
func (s *repliers) sendLate() {
	for _, r := range s.list {
		if r != nil && r.posted.Load() != 0 && r.now()-time.Duration(r.looked.Load()) > replierPatience {
			r.send()
		}
	}
}

// close ends the threads when they have sent what was left to them. Nobody may leave anything to them any more.
func (s *repliers) close() {
	for _, r := range s.list {
		if r != nil {
			close(r.wake)
		}
	}
	s.run.Wait()
}

// replier sends replies from one processor.
type replier struct {
	cpu     int
	created time.Time
	start   func() // has effect once
	wake    chan struct{}
	attends atomic.Bool  // it looks at posted
	looked  atomic.Int64 // when it did so last, ns since created
	rested  atomic.Int64 // the thread is not to be woken before, ns since created
	pause   time.Duration
	watch   watch.Watch

	slots  []postedReply
	free   atomic.Uint32 // slots that whoever posts may take, a bit each
	posted atomic.Uint32 // slots with a reply; who takes the bit sends it
}

// postedReply is a reply that is yet to be sent.
type postedReply struct {
	fd     int
	header replyHeader
	data   []byte                 // of a read
	keep   interface{ Release() } // keeps its memory; nil if that is room
	room   []byte                 // for data that nobody keeps
	vector [2]unix.Iovec
}

// prepare makes the slots, and uses their memory once: what takes replies must not wait for memory.
func (p *replier) prepare() {
	p.slots = make([]postedReply, replierSlots)
	memory := make([]byte, replierSlots*replierRoom)
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 0
	}
	for i := range p.slots {
		p.slots[i].room = memory[i*replierRoom:][:replierRoom:replierRoom]
	}
	p.free.Store(1<<replierSlots - 1)
}

// post leaves the reply to r to the thread, if that is awake; data that nobody keeps is copied. If it is not, post
// wakes it for the replies to come, and returns false.
func (p *replier) post(fd int, r *IO, data []byte) bool {
	if !p.attends.Load() {
		p.call()
		return false
	}
	i, ok := p.claim()
	if !ok {
		return false
	}
	s := &p.slots[i]
	s.fd, s.header, s.data, s.keep = fd, r.header, data, r.keep
	r.keep = nil
	if s.keep == nil {
		n, err := copyData(s.room, data)
		if err != nil {
			s.header.Status = -int32(syscall.EIO)
		}
		s.data = s.room[:n]
	}
	p.posted.Or(1 << i)
	if !p.attends.Load() {
		p.send() // it may have looked for the last time before that
	}
	return true
}

// claim takes a free slot.
func (p *replier) claim() (i int, ok bool) {
	for {
		free := p.free.Load()
		if free == 0 {
			return 0, false
		}
		i = bits.TrailingZeros32(free)
		if p.free.CompareAndSwap(free, free&^(1<<i)) {
			return i, true
		}
	}
}

// send sends what has been posted, and returns how many replies it was. Any thread may.
func (p *replier) send() (sent int) {
	for mask := p.posted.Swap(0); mask != 0; sent++ {
		i := bits.TrailingZeros32(mask)
		mask &^= 1 << i
		s := &p.slots[i]
		sendReply(s.fd, &s.header, &s.vector, s.data)
		s.data, s.vector[1].Base = nil, nil // it may not stay mapped
		if s.keep != nil {
			s.keep.Release()
			s.keep = nil
		}
		p.free.Or(1 << i)
	}
	return sent
}

// call wakes the thread, unless it was in vain lately.
func (p *replier) call() {
	if p.now() < time.Duration(p.rested.Load()) || !p.watch.Pays() {
		return
	}
	p.start()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *replier) now() time.Duration { return time.Since(p.created) }

// run is the thread.
func (p *replier) run() {
	runtime.LockOSThread() // for good: its place on a processor ends with the goroutine
	var here unix.CPUSet
	here.Set(p.cpu)
	_ = unix.SchedSetaffinity(0, &here) // it would be as good elsewhere, only slower
	for range p.wake {
		p.looked.Store(int64(p.now()))
		p.attends.Store(true)
		sent := p.attend()
		p.attends.Store(false)
		sent += p.send()
		p.rest(sent)
	}
}

// attend sends replies until none has come for a while, and returns how many it was.
func (p *replier) attend() (sent int) {
	for since := p.now(); ; {
		n, now := p.send(), p.now()
		p.looked.Store(int64(now))
		if n > 0 {
			sent += n
			since = now
		} else if now-since > replierPatience || !p.watch.Yield() {
			return sent
		}
	}
}

// rest decides how long the thread sleeps at least, after having sent so many replies.
func (p *replier) rest(sent int) {
	if sent >= replierWorth {
		p.pause = 0
	}
	p.pause = min(max(2*p.pause, replierOften), replierSeldom)
	p.rested.Store(int64(p.now() + p.pause))
}
