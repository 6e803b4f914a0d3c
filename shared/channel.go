// SPDX-License-Identifier: Apache-2.0

// Package shared is the I/O channel between the front and one host: two shared-memory segments, a ring in each, futex
// doorbells, and payload memory. channel.h defines the bytes and the rules; the host's side is C. This package is the
// front's side.
//
// The front trusts nothing that a host can write. Requests, write payloads and all bookkeeping are in memory that a
// host cannot write; from the complete segment each value is read once, checked, then used. What a host does wrong
// there is reported through Options.Fault and never harms more than that host's own requests.
//
// A Channel serves one instance of a host. When that host dies, Abandon ends every request that it had not completed;
// the next host gets a new Channel.
//
// Lock order: reapMu, then sqMu; memMu is taken alone. No lock is held while a request's Done runs.
package shared

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared/watch"
)

// ErrPeerGone is the result of a request whose host was abandoned before it completed the request, and the error of
// calls on an abandoned channel. Whether the host carried the request out is unknown.
var ErrPeerGone = errors.New("the process serving this request is gone")

// DefaultMemory is how many bytes of payloads may be under way in a channel at a time, where Options do not say.
const DefaultMemory = 64 << 20

// Options of a channel.
type Options struct {
	// Memory bounds the payloads under way, in bytes, both directions together: a multiple of MaxPayload, DefaultMemory
	// if 0. Requests beyond it wait their turn. Each segment has address space for as much, which is backed by memory
	// only where it has been used.
	Memory int64
	// Fault, if not nil, is told of each violation of the protocol by the host. It must neither block nor call the
	// channel.
	Fault func(error)
	// Busy, if not nil, is called when the first request is sent, and the first one after each call of Rest. It must
	// neither block nor call the channel.
	Busy func()
}

// Channel is the front's end. All methods may be called from several goroutines at once.
type Channel struct {
	submit, complete *segment
	fault            func(error)
	busy             func()

	memMu     lock
	arenas    [2]*arena // by Request.direction
	memory    uint64    // Options.Memory
	room      uint64    // bytes of payload that may still be handed out
	kept      uint64    // bytes of payload in Pieces
	tags      []uint32  // free tags, last in first out
	waiters   []*waiter // who waits for a tag or for payload memory, in order of arrival
	closed    bool      // Abandon was called: nothing is handed out any more
	suspended bool      // nothing but what is privileged is handed out
	out       int       // requests handed out and not yet released
	closing   bool      // Close was called: the memory goes with the last request and the last Piece

	sqMu     lock
	sqTail   uint64
	gone     bool         // Abandon was called: nothing is published any more, the segments are not touched any more
	refusing bool         // nothing but what is privileged is published
	unrung   atomic.Int32 // published since the last doorbell

	reapMu lock
	cqHead atomic.Uint64 // written under reapMu
	reaped bool          // Abandon took the last completions

	// armed says that cq_waiting tells of somebody who attends to completions, or is yet to do so, in Kick.
	armed atomic.Bool
	// awaiters counts the threads in await. They see to everything that is sent meanwhile.
	awaiters atomic.Int32
	// lookers counts who looks at the rings without holding reapMu or sqMu; freed that the segments are unmapped, or about
	// to be: nobody may start to look.
	lookers atomic.Int32
	freed   atomic.Bool
	inVain  atomic.Int32 // how often in a row await has not paid
	watch   watch.Watch

	requests [RingEntries]Request // by tag; each belongs to whoever Get gave it to

	sent     atomic.Int64  // requests in flight
	payload  atomic.Uint64 // of the latest one, in bytes
	took     atomic.Int64  // by the handler for the latest request that this was measured of, in ns
	clock    atomic.Int64  // counts the calls of Tick
	resting  atomic.Bool   // nobody may be calling Tick
	stopping atomic.Bool
	ending   sync.WaitGroup // calls of Reap that have taken requests and not yet ended them
	reaper   chan struct{}  // closed when the completion thread has ended
}

// waiter is a goroutine in Get.
type waiter struct {
	op    Op
	n     uint64
	ready chan *Request // receives the request, or nil when the channel was abandoned
}

// Request is one operation on its way to a host and back. Get makes it, the caller fills the exported fields and, for a
// write, the payload; Submit sends it; Done is called once; Release ends it. Between Submit and Done it must not be
// touched.
type Request struct {
	Op     Op     // set by Get
	Length uint64 // bytes; set by Get; may be lowered before Submit
	Device uint32 // index given to the host when the device was opened
	Offset uint64 // bytes, where on the device

	// Patience is how many calls of Tick the request may be in flight for; 0: any number.
	Patience int64

	// MayInPlace allows the host to complete a read with the data left in the device's contents.
	MayInPlace bool

	// Done is called exactly once per Submit, on the channel's completion thread or, when the channel is abandoned, on
	// the goroutine that does so. It must not block.
	Done func(*Request)

	// Err is valid from Done on: nil, a syscall.Errno from the host, or ErrPeerGone.
	Err error
	// STS is the handler's TCMU_STS status, valid from Done on unless Err is ErrPeerGone.
	STS int32
	// InPlace: the read's data is not in the payload but in the device's contents, at Offset. Never without MayInPlace.
	// Valid from Done on.
	InPlace bool
	// HandlerTime is how long the handler had the request, as the host says; 0 where it did not measure that. Valid from
	// Done on.
	HandlerTime time.Duration
	// Sent is valid from Done on: false if the channel was abandoned before the host could see the request.
	Sent bool

	// User is the caller's own.
	User any

	ch         *Channel
	tag        uint32
	gen        atomic.Uint32 // uses of the tag
	inflight   atomic.Bool   // from Submit until completion
	privileged bool          // suspend.go
	deadline   atomic.Int64  // in Channel.clock; 0: none
	memOff     uint64        // piece of the arena, memLen bytes; memLen 0: none
	memLen     uint64
}

// New makes a channel and starts its completion thread. Close must be called in the end.
func New(opts Options) (*Channel, error) {
	if opts.Memory == 0 {
		opts.Memory = DefaultMemory
	}
	if opts.Memory < MaxPayload || opts.Memory%MaxPayload != 0 {
		return nil, fmt.Errorf("memory of a channel must be a multiple of %d bytes: %w", MaxPayload, syscall.EINVAL)
	}
	submit, err := newSegment("tcmur-submit", opts.Memory, true)
	if err != nil {
		return nil, err
	}
	complete, err := newSegment("tcmur-complete", opts.Memory, false)
	if err != nil {
		submit.closeFile()
		submit.unmap()
		return nil, err
	}
	c := &Channel{
		submit: submit, complete: complete, fault: opts.Fault, busy: opts.Busy,
		arenas: [2]*arena{newArena(opts.Memory), newArena(opts.Memory)},
		memory: uint64(opts.Memory), room: uint64(opts.Memory),
		reaper: make(chan struct{}),
	}
	c.resting.Store(true)
	for t := RingEntries - 1; t >= 0; t-- {
		c.tags = append(c.tags, uint32(t))
		c.requests[t].ch, c.requests[t].tag = c, uint32(t)
	}
	submit.put32(offMagic, channelMagic)
	submit.put32(offVersion, channelVersion)
	submit.put64(offSubmitArenaSize, uint64(opts.Memory))
	submit.put64(offCompleteArenaSize, uint64(opts.Memory))
	go c.completions()
	return c, nil
}

// Files returns the descriptors to donate to the host: the submit segment, which can only be mapped read-only, and the
// complete segment. The channel keeps ownership; they are valid until CloseFiles or Close.
func (c *Channel) Files() (submit, complete *os.File) { return c.submit.file, c.complete.file }

// CloseFiles closes the descriptors once the host has inherited them.
func (c *Channel) CloseFiles() {
	c.submit.closeFile()
	c.complete.closeFile()
}

// Get returns a request of the given operation with payload memory of n bytes (0 for operations without payload; at
// most MaxPayload with one). When all requests or all memory are in use it waits its turn, first come first served;
// what needs no memory does not wait for those who do. The error is ErrPeerGone after Abandon and while the channel is
// suspended, EINVAL for a bad n.
func (c *Channel) Get(op Op, n uint64) (*Request, error) {
	if op.carriesPayload() && n > MaxPayload {
		return nil, fmt.Errorf("%s of %d bytes: at most %d: %w", op, n, MaxPayload, syscall.EINVAL)
	}
	c.memMu.Lock()
	if c.closed || c.suspended {
		c.memMu.Unlock()
		return nil, ErrPeerGone
	}
	if c.isNext(op, n) {
		if r := c.tryGet(op, n); r != nil {
			c.memMu.Unlock()
			return r, nil
		}
	}
	w := &waiter{op: op, n: n, ready: make(chan *Request, 1)}
	c.waiters = append(c.waiters, w)
	c.memMu.Unlock()
	if r := <-w.ready; r != nil {
		return r, nil
	}
	return nil, ErrPeerGone
}

// TryGet is Get for callers that must not wait: nil when it would have to, or when the channel was abandoned or is
// suspended. n is at most MaxPayload.
func (c *Channel) TryGet(op Op, n uint64) *Request {
	c.memMu.Lock()
	defer c.memMu.Unlock()
	if c.closed || c.suspended || !c.isNext(op, n) {
		return nil
	}
	return c.tryGet(op, n)
}

// isNext reports whether it is the turn of a request of n bytes; it needs memMu. A flush must not wait for memory: it
// may be what frees some.
func (c *Channel) isNext(op Op, n uint64) bool {
	return len(c.waiters) == 0 || !op.carriesPayload() || n == 0
}

// Owns reports whether the request is one of this channel's.
func (c *Channel) Owns(r *Request) bool { return r.ch == c }

// tryGet needs memMu; nil means not now.
func (c *Channel) tryGet(op Op, n uint64) *Request {
	if len(c.tags) == 0 {
		return nil
	}
	r := &c.requests[c.tags[len(c.tags)-1]]
	r.Op = op
	if op.carriesPayload() && n > 0 {
		size := pieceSize(n)
		if size > c.room {
			return nil
		}
		off, ok := c.arenas[r.direction()].alloc(n)
		if !ok {
			return nil
		}
		c.room -= size
		r.memOff, r.memLen = off, n
	}
	c.tags = c.tags[:len(c.tags)-1]
	r.Length, r.Device, r.Offset, r.Done, r.Err, r.STS, r.User = n, 0, 0, nil, nil, 0, nil
	r.Patience, r.Sent, r.privileged, r.HandlerTime = 0, false, false, 0
	r.MayInPlace, r.InPlace = false, false
	c.out++
	return r
}

// Channel is the channel that the request belongs to.
func (r *Request) Channel() *Channel { return r.ch }

// direction tells which arena holds the payload: 0 submit, 1 complete.
func (r *Request) direction() int {
	if r.Op == OpRead {
		return 1
	}
	return 0
}

// Payload is the request's piece of shared memory, as long as Get was asked for. For a write the caller fills it before
// Submit. For a read it holds the data from Done on; it is read-only memory and, while the host lives, a hostile host
// may still change it. Not valid after Release or Close.
func (r *Request) Payload() []byte {
	s := r.ch.submit
	if r.Op == OpRead {
		s = r.ch.complete
	}
	return s.arena()[r.memOff : r.memOff+r.memLen : r.memOff+r.memLen]
}

// Release gives the request's tag and memory back. A request may be released before Submit or after Done, not between.
func (r *Request) Release() {
	c := r.ch
	c.memMu.Lock()
	if r.memLen > 0 {
		c.arenas[r.direction()].release(r.memOff, r.memLen)
		c.room += pieceSize(r.memLen)
		r.memLen = 0
	}
	r.Done, r.User = nil, nil
	c.tags = append(c.tags, r.tag)
	c.out--
	last := c.unused()
	c.serveWaiters()
	c.memMu.Unlock()
	if last {
		c.free()
	}
}

// unused reports whether nobody will use the memory any more; it needs memMu.
func (c *Channel) unused() bool { return c.closing && c.out == 0 && c.kept == 0 }

// Piece is payload memory that outlives its request.
type Piece struct {
	c      *Channel
	dir    int
	off, n uint64
}

// Keep parts the payload memory from a request that has been done, for somebody who needs the payload for longer than
// the request; nil when a half of the channel's memory is kept already, since what is kept leaves less for requests. A
// piece survives Abandon and Close.
func (r *Request) Keep() *Piece {
	c := r.ch
	c.memMu.Lock()
	defer c.memMu.Unlock()
	size := pieceSize(max(1, r.memLen))
	if r.memLen == 0 || c.kept+size > c.memory/2 {
		return nil
	}
	c.kept += size
	p := &Piece{c, r.direction(), r.memOff, r.memLen}
	r.memLen = 0
	return p
}

// Bytes is the memory, as long as the request's payload memory was.
func (p *Piece) Bytes() []byte {
	s := p.c.submit
	if p.dir == 1 {
		s = p.c.complete
	}
	return s.arena()[p.off : p.off+p.n : p.off+p.n]
}

// Release gives the memory back. Nobody may use Bytes any more.
func (p *Piece) Release() {
	c := p.c
	c.memMu.Lock()
	c.arenas[p.dir].release(p.off, p.n)
	size := pieceSize(p.n)
	c.kept -= size
	c.room += size
	last := c.unused()
	c.serveWaiters()
	c.memMu.Unlock()
	if last {
		c.free()
	}
}

// serveWaiters needs memMu. Who waits longest is served first, even if a later one could be served now: a large request
// would never find room otherwise.
func (c *Channel) serveWaiters() {
	for len(c.waiters) > 0 && !c.closed {
		w := c.waiters[0]
		got := c.tryGet(w.op, w.n)
		if got == nil {
			return
		}
		c.waiters[0] = nil
		c.waiters = c.waiters[1:]
		w.ready <- got
	}
}

// Shrink gives back the payload memory beyond the first n bytes, n at least 1, and makes n the length of the request:
// for payload that turned out shorter than what was asked for. Before Submit only.
func (r *Request) Shrink(n uint64) {
	c := r.ch
	c.memMu.Lock()
	c.arenas[r.direction()].shrink(r.memOff, r.memLen, n)
	c.room += pieceSize(r.memLen) - pieceSize(n)
	r.memLen, r.Length = n, n
	c.serveWaiters()
	c.memMu.Unlock()
}

// Submit sends requests to the host with one doorbell for all of them. Each one's Done is called in any case; on an
// abandoned channel at once, with ErrPeerGone.
func (c *Channel) Submit(requests ...*Request) {
	for _, r := range requests {
		r.Push()
	}
	c.Kick(nil)
}

// Push sends a request without ringing the doorbell: Kick must follow, or the host may never look, nor its answer be
// seen. Done is called in any case; on an abandoned channel at once, with ErrPeerGone.
func (r *Request) Push() {
	c := r.ch
	c.arm() // most likely Kick will find it done: no need for the host to wake the completion thread
	c.sqMu.Lock()
	if c.gone || c.refusing && !r.privileged {
		c.sqMu.Unlock()
		r.Sent = false
		r.finish(ErrPeerGone)
		return
	}
	r.Sent = true
	if r.Patience > 0 {
		r.deadline.Store(c.clock.Load() + r.Patience)
	} else {
		r.deadline.Store(0)
	}
	var flags uint32
	if r.MayInPlace {
		flags |= flagMayInPlace
	}
	c.sent.Add(1)
	if c.resting.Load() && c.resting.Swap(false) && c.busy != nil {
		c.busy()
	}
	c.payload.Store(r.memLen)
	c.publish(r, flags)
	c.unrung.Add(1)
	c.sqMu.Unlock()
}

// Poller is a thread that waits in Kick for requests of its own.
type Poller interface {
	// Pending is the number of its requests that have not been completed.
	Pending() int
	// Poll begins what else there is to do for the thread, and reports whether there was something. It must not wait.
	Poll() bool
}

// Kick rings the doorbell for what was pushed since the last Kick, if workers of the host are asleep; should another
// one be about to look at the ring, only after completions have not come. With p not nil it carries out completions
// until nothing of p is pending, and lets p go on with its other work, as long as completions come soon (patience):
// for a thread that would have to be woken for either that is cheaper. Where they have not come soon lately it returns
// at once. Several threads may be at it, and carry out completions of each other.
func (c *Channel) Kick(p Poller) {
	// publish ended with a sequentially consistent store: either the host's worker sees the entry in its second look, or
	// this load sees the worker.
	pushed := c.unrung.Swap(0) > 0
	if pushed && c.look() {
		c.ring()
		c.lookers.Add(-1)
	}
	switch {
	case p == nil && c.awaiters.Load() > 0: // one of whom calls ringLate afterwards
	case c.armed.Load() || p != nil:
		c.attend(p)
	case pushed && c.look():
		c.ringLate()
		c.lookers.Add(-1)
	}
}

// ring wakes a worker of the host, if one sleeps and none is about to look at the ring. For those who may look, as the
// next two. Who calls it sees to a call of ringLate later.
func (c *Channel) ring() {
	if n := c.complete.load32(offSQSleepers); n > 0 && n < sleepersBackSoon {
		c.wake()
	}
}

// ringLate wakes a worker that ring has left asleep because another one would be back soon, and still is not.
func (c *Channel) ringLate() {
	if c.sent.Load() > 0 && c.complete.load32(offSQSleepers) > sleepersBackSoon {
		c.wake()
	}
}

func (c *Channel) wake() {
	c.submit.add32(offSQBell, 1)
	c.submit.futexWake(offSQBell, 1)
}

// publish needs sqMu.
func (c *Channel) publish(r *Request, flags uint32) {
	if r.Op.carriesPayload() && r.Length > r.memLen {
		panic("shared: request longer than its payload memory")
	}
	gen := r.gen.Add(1)
	s, base := c.submit, ringOffset+int(c.sqTail%RingEntries)*sqeSize
	s.put32(base+sqeTag, r.tag)
	s.put32(base+sqeGen, gen)
	s.put32(base+sqeOp, uint32(r.Op))
	s.put32(base+sqeDevice, r.Device)
	s.put64(base+sqeOffset, r.Offset)
	s.put64(base+sqeLength, r.Length)
	s.put64(base+sqePayload, r.memOff)
	s.put32(base+sqeFlags, flags)
	// Not earlier: whoever takes the completion learns by this that the fields above have been read and are free to
	// change. What orders the two otherwise goes through the host, out of the sight of Go's memory model.
	r.inflight.Store(true)
	c.sqTail++
	s.store64(base+sqeSeq, c.sqTail)
}

// completions is the completion thread: it reaps until the channel is closed, asleep on the host's bell in between.
func (c *Channel) completions() {
	runtime.LockOSThread()
	defer close(c.reaper)
	for !c.stopping.Load() {
		if c.Reap() > 0 {
			continue
		}
		bell := c.complete.load32(offCQBell)
		c.waiting(waitingAsleep)
		if c.Reap() == 0 && !c.stopping.Load() {
			c.complete.futexWait(offCQBell, bell)
		}
		c.waiting(-waitingAsleep)
	}
}

// look lets the caller look at the rings until it calls lookers.Add(-1); false if they are gone.
func (c *Channel) look() bool {
	c.lookers.Add(1)
	if c.freed.Load() {
		c.lookers.Add(-1)
		return false
	}
	return true
}

// waiting changes who is to be woken. It is a full barrier: who has added to it looks at the ring once more.
func (c *Channel) waiting(delta int32) { c.submit.add32(offCQWaiting, uint32(delta)) }

// arm announces that somebody will attend to the next completion, in Kick, unless that is announced already.
func (c *Channel) arm() {
	if c.armed.Load() || !c.look() {
		return
	}
	if c.armed.CompareAndSwap(false, true) {
		c.waiting(waitingAttends)
	}
	c.lookers.Add(-1)
}

const (
	// eagerWait is how long Kick looks out for the next completion: a multiple of what waking a thread takes.
	eagerWait = 50 * time.Microsecond
	// quickWait is the same for a handler that takes less than quickTime for a request. If a completion of that does not
	// come then its worker is waiting for a processor, most likely the client's, who gives it up when it has used what it
	// got. To sleep meanwhile would make three threads wake each other.
	quickWait = 200 * time.Microsecond
	quickTime = 10 * time.Microsecond
	// eagerBytes of a request are worth a nanosecond more: the host copies them.
	eagerBytes = 4
	// After eagerTries waits in vain in a row only each eagerProbe-th is made.
	eagerTries = 4
	eagerProbe = 64
	// eagerLooks is how often it looks between two offers of the processor to others. The host, or the client, may be
	// waiting for just this processor.
	eagerLooks = 16
)

// attend carries out completions as Kick says, and ends the announcement that somebody would.
func (c *Channel) attend(p Poller) {
	if !c.look() {
		return
	}
	defer c.lookers.Add(-1)
	if p != nil && p.Pending() > 0 && c.watch.Pays() && c.waitPays() {
		c.awaiters.Add(1)
		if c.armed.CompareAndSwap(false, true) {
			c.waiting(waitingAttends)
		}
		c.await(p)
		c.awaiters.Add(-1)
	}
	c.ringLate()
	if c.awaiters.Load() > 0 {
		return
	}
	// Who arms after this finds no awaiter, and attends itself.
	if c.armed.Swap(false) {
		c.waiting(-waitingAttends)
		c.Reap() // what the host has announced to nobody
	}
}

// waitPays guesses, from the waits before, whether the next one will be worth it.
func (c *Channel) waitPays() bool {
	n := c.inVain.Load()
	if n < eagerTries {
		return true
	}
	c.inVain.Add(1)
	return n%eagerProbe == 0
}

// await carries out completions until nothing of p is pending, or the next one does not come in time.
func (c *Channel) await(p Poller) {
	for since := time.Now(); c.sent.Load() > 0; {
		reaped := c.posted() && c.tryReap() > 0
		if p.Pending() <= 0 {
			c.inVain.Store(0)
			return
		}
		began := p.Poll()
		if reaped {
			since = time.Now()
		}
		if reaped || began {
			continue
		}
		for i := 0; i < eagerLooks && !c.posted(); i++ {
			pause()
		}
		if c.posted() {
			continue
		}
		if time.Since(since) > c.patience() {
			c.inVain.Add(1)
			return
		}
		if !c.watch.Yield() {
			return
		}
	}
}

// patience is how long await looks out for the next completion.
func (c *Channel) patience() time.Duration {
	wait := eagerWait
	if time.Duration(c.took.Load()) < quickTime {
		wait = quickWait
	}
	return wait + time.Duration(c.payload.Load()/eagerBytes)
}

// posted tells, without a lock, whether the next completion is there: a hint.
func (c *Channel) posted() bool {
	head := c.cqHead.Load()
	return c.complete.load64(ringOffset+int(head%RingEntries)*cqeSize+cqeSeq) == head+1
}

// Reap takes every completion that the host has posted, calls Done for each, and returns how many it was.
func (c *Channel) Reap() int {
	c.reapMu.Lock()
	return c.reapLocked()
}

// tryReap is Reap that does not wait for another one that is under way: -1.
func (c *Channel) tryReap() int {
	if !c.reapMu.TryLock() {
		return -1
	}
	return c.reapLocked()
}

// reapLocked is Reap; it unlocks reapMu.
func (c *Channel) reapLocked() int {
	var buf [32]*Request
	done := c.reap(buf[:0])
	if len(done) > 0 {
		c.ending.Add(1)
		defer c.ending.Done()
	}
	c.reapMu.Unlock()
	for _, r := range done {
		r.finish(r.Err)
	}
	return len(done)
}

// reap needs reapMu. It appends the requests that the host has completed to done. Every word of an entry is read once.
func (c *Channel) reap(done []*Request) []*Request {
	if c.reaped {
		return done
	}
	s := c.complete
	for range RingEntries { // a hostile host cannot keep us here for longer
		head := c.cqHead.Load()
		base := ringOffset + int(head%RingEntries)*cqeSize
		if s.load64(base+cqeSeq) != head+1 {
			break
		}
		tag, gen := s.load32(base+cqeTag), s.load32(base+cqeGen)
		sts, result := int32(s.load32(base+cqeSTS)), s.load32(base+cqeError)
		errno, flags := result&0xffff, result>>16
		took := s.load64(base + cqeNanos)
		c.cqHead.Store(head + 1)
		if tag >= RingEntries {
			c.violation("completion of tag %d, which does not exist", tag)
			continue
		}
		r := &c.requests[tag]
		if r.gen.Load() != gen || !r.inflight.CompareAndSwap(true, false) {
			c.violation("completion of tag %d, use %d, which is not in flight", tag, gen)
			continue
		}
		c.sent.Add(-1)
		r.STS, r.Err, r.HandlerTime = sts, hostErrno(errno), time.Duration(min(took, 1<<62))
		if r.HandlerTime > 0 {
			c.took.Store(int64(r.HandlerTime))
		}
		r.InPlace = flags == flagInPlace && r.MayInPlace
		if flags != 0 && !r.InPlace {
			c.violation("completion of tag %d, use %d, with flags %#x", tag, gen, flags)
			r.Err = syscall.EIO
		}
		done = append(done, r)
	}
	return done
}

// hostErrno is what the host's error word stands for; what cannot be an errno is EIO.
func hostErrno(v uint32) error {
	switch {
	case v == 0:
		return nil
	case v > 4095:
		return syscall.EIO
	}
	return syscall.Errno(v)
}

func (c *Channel) violation(format string, args ...any) {
	if c.fault != nil {
		c.fault(fmt.Errorf(format, args...))
	}
}

// finish hands the request back to its owner.
func (r *Request) finish(err error) {
	r.Err = err
	r.Done(r)
}

// Abandon ends the channel's service after its host has died (and is known to be dead: only then can nobody write to
// the segments any more). Completions that the host had already posted count; every other request in flight ends with
// ErrPeerGone, and so does every later one and every waiting Get. When it returns, Done has been called, and has
// returned, for every request that the host had completed or in flight: whoever comes after that finds all that is
// known of them. May be called more than once, from anywhere but a Done.
func (c *Channel) Abandon() {
	c.memMu.Lock()
	c.closed = true
	waiters := c.waiters
	c.waiters = nil
	c.memMu.Unlock()
	for _, w := range waiters {
		w.ready <- nil
	}

	c.reapMu.Lock()
	c.sqMu.Lock()
	c.gone = true
	c.sqMu.Unlock()
	done := c.reap(nil)
	c.reaped = true
	var lost []*Request
	for t := range c.requests {
		if r := &c.requests[t]; r.inflight.CompareAndSwap(true, false) {
			lost = append(lost, r)
		}
	}
	c.reapMu.Unlock()
	for _, r := range done {
		r.finish(r.Err)
	}
	c.ending.Wait()
	for _, r := range lost {
		r.finish(ErrPeerGone)
	}
}

// Tick advances the channel's clock, in which Request.Patience counts, and reports whether a request in flight has run
// out of patience. It has to be called regularly, except between a call of Rest and the next one of Options.Busy.
//
// It also looks for completions and wakes a worker of the host, once: a handler that has blocked unexpectedly may keep
// other requests of the batch that it was in from being begun, and their completions from being announced.
func (c *Channel) Tick() (overdue bool) {
	now := c.clock.Add(1)
	if c.Idle() {
		return false
	}
	c.nudge()
	for t := range c.requests {
		if r := &c.requests[t]; r.inflight.Load() && r.overdue(now) {
			return true
		}
	}
	return false
}

// Idle reports whether nothing is in flight.
func (c *Channel) Idle() bool { return c.sent.Load() == 0 }

// Rest is Idle; if it reports true then Tick need not be called until Options.Busy is.
func (c *Channel) Rest() bool {
	c.resting.Store(true)
	return c.Idle()
}

// nudge makes sure that what is in flight gets on.
func (c *Channel) nudge() {
	c.unrung.Add(1)
	c.Kick(nil)
	c.Reap()
}

func (r *Request) overdue(now int64) bool {
	deadline := r.deadline.Load()
	return deadline != 0 && now > deadline
}

// Overdue reports whether the request was in flight for longer than its Patience. From Done on.
func (r *Request) Overdue() bool { return r.Sent && r.overdue(r.ch.clock.Load()) }

// Usage tells how many bytes of payload memory there are, and how many of them are in use.
func (c *Channel) Usage() (memory, used uint64) {
	c.memMu.Lock()
	defer c.memMu.Unlock()
	return c.memory, c.memory - c.room
}

// InFlight is the number of requests that Get has handed out and that were not yet released.
func (c *Channel) InFlight() int {
	c.memMu.Lock()
	defer c.memMu.Unlock()
	return c.out
}

// Close abandons the channel, ends its completion thread, and frees the memory once the last request and the last Piece
// are released: a payload may be needed for as long. May be called more than once.
func (c *Channel) Close() {
	c.Abandon()
	if c.stopping.Swap(true) {
		<-c.reaper
		return
	}
	// A single wake could come between the completion thread's last look at stopping and its futex wait.
	for awake := false; !awake; {
		c.complete.futexWake(offCQBell, 1)
		select {
		case <-c.reaper:
			awake = true
		case <-time.After(time.Millisecond):
		}
	}
	c.CloseFiles()
	c.memMu.Lock()
	c.closing = true
	last := c.unused()
	c.memMu.Unlock()
	if last {
		c.free()
	}
}

// free unmaps the segments. Nobody holds a payload any more; it waits out whoever is still looking at the rings.
func (c *Channel) free() {
	c.freed.Store(true)
	for c.lookers.Load() > 0 {
		runtime.Gosched()
	}
	c.reapMu.Lock()
	c.sqMu.Lock()
	c.submit.unmap()
	c.complete.unmap()
	c.sqMu.Unlock()
	c.reapMu.Unlock()
}
