// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// peer is the host's side of a channel, for tests: the same rules as the C side, with mutexes where that has atomics.
type peer struct {
	submit, complete *segment
	mu               sync.Mutex
	head             uint64        // submissions taken
	tail             uint64        // completions posted
	took             time.Duration // what it says that a handler has taken
	stop             atomic.Bool
	workers          sync.WaitGroup
}

// submission is a copy of an entry.
type submission struct {
	tag, gen                uint32
	op                      Op
	device                  uint32
	offset, length, payload uint64
	flags                   uint32
}

// newPeer maps the channel's segments as a host does. The test's cleanup ends it and closes the channel.
func newPeer(t testing.TB, c *Channel) *peer {
	t.Helper()
	p := &peer{}
	s, k := c.Files()
	p.submit, p.complete = mapForHost(t, s, unix.PROT_READ), mapForHost(t, k, unix.PROT_READ|unix.PROT_WRITE)
	t.Cleanup(func() {
		p.halt()
		c.Close()
		p.submit.unmap()
		p.complete.unmap()
	})
	return p
}

func mapForHost(t testing.TB, f *os.File, prot int) *segment {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), prot, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	return &segment{mem: mem}
}

// take returns the next submission, if there is one.
func (p *peer) take() (submission, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	base := ringOffset + int(p.head%RingEntries)*sqeSize
	if p.submit.load64(base+sqeSeq) != p.head+1 {
		return submission{}, false
	}
	p.head++
	s := p.submit
	return submission{
		s.load32(base + sqeTag), s.load32(base + sqeGen), Op(s.load32(base + sqeOp)), s.load32(base + sqeDevice),
		s.load64(base + sqeOffset), s.load64(base + sqeLength), s.load64(base + sqePayload),
		s.load32(base + sqeFlags),
	}, true
}

// post completes a request, with error and flags in one word, and wakes the front if it sleeps.
func (p *peer) post(tag, gen uint32, sts int32, errno uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	base := ringOffset + int(p.tail%RingEntries)*cqeSize
	p.tail++
	p.complete.store32(base+cqeTag, tag)
	p.complete.store32(base+cqeGen, gen)
	p.complete.store32(base+cqeSTS, uint32(sts))
	p.complete.store32(base+cqeError, errno)
	p.complete.store64(base+cqeNanos, uint64(p.took))
	p.complete.store64(base+cqeSeq, p.tail)
	if p.submit.load32(offCQWaiting) == waitingAsleep {
		atomic.AddUint32(p.complete.word32(offCQBell), 1)
		p.complete.futexWake(offCQBell, 1)
	}
}

// payload is the request's piece of the arena.
func (p *peer) payload(s submission) []byte {
	seg := p.submit
	if s.op == OpRead {
		seg = p.complete
	}
	return seg.arena()[s.payload : s.payload+s.length]
}

// serve runs n workers that call do for each submission and complete it with the errno that do returns.
func (p *peer) serve(n int, do func(submission) uint32) {
	for range n {
		p.workers.Go(func() {
			for !p.stop.Load() {
				if s, ok := p.take(); ok {
					p.post(s.tag, s.gen, 0, do(s))
					continue
				}
				atomic.AddUint32(p.complete.word32(offSQSleepers), 1)
				bell := p.submit.load32(offSQBell)
				s, ok := p.take()
				if !ok && !p.stop.Load() {
					p.submit.futexWait(offSQBell, bell)
				}
				atomic.AddUint32(p.complete.word32(offSQSleepers), ^uint32(0))
				if ok {
					p.post(s.tag, s.gen, 0, do(s))
				}
			}
		})
	}
}

// halt ends the workers, as a death of the process would.
func (p *peer) halt() {
	p.stop.Store(true)
	gone := make(chan struct{})
	go func() {
		p.workers.Wait()
		close(gone)
	}()
	for {
		p.submit.futexWake(offSQBell, 64)
		select {
		case <-gone:
			return
		case <-time.After(time.Millisecond):
		}
	}
}
