// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync"
	"sync/atomic"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

const (
	// DefaultRetention is how many bytes of unflushed writes are kept for a device.
	DefaultRetention = 32 << 20
	// batchSize is how much memory for copies of payloads a batch has, in bytes. It holds any one payload.
	batchSize = 1 << 20
	// batchEntries is how many changes a batch has room for: of the smallest payloads as many as there are copies of.
	batchEntries = batchSize / 512
	// spareBatches is how many of them are kept for later: all of those that are in use when the default limit leads to
	// a flush. New ones would cost several times as much as the copies in them.
	spareBatches = DefaultRetention / 2 / batchSize
	// streamLine is what payloads are aligned to in it, for streamCopy: a line of the cache, in bytes.
	streamLine = 64
	// keepSize is the size in bytes from which on a payload is not copied but kept where it is, in the channel.
	keepSize = 64 << 10
	// entryCost is what an entry counts beyond its payload, so that a flood of changes without any payload is bounded.
	entryCost = 64
)

// retention keeps the writes of a device that have completed but that no completed flush covers: a handler may have
// acknowledged them into the memory of its process. When that dies they are sent again, in the order in which they
// completed. Entries have positions, counted from 1; a flush covers all up to the position at its issue.
//
// Every write passes here, on threads that serve others too: what is done under mu is short, the copy of the payload
// is made outside it, and a flush gives up whole batches. By the time that a batch is used again its memory has long
// left the cache: an ordinary copy to there took several times as long as all the rest (streamCopy).
type retention struct {
	mu      sync.Mutex
	batches []*batch // of entries in the order of completion; the last one is added to
	last    uint64   // position of the latest entry
	spare   []*batch
	opened  int        // batches since the last flush
	room    *sync.Cond // told when bytes has fallen, and when flush has ended
	failed  error      // of the last automatic flush; nil once one has succeeded

	// These are read without mu, and fall only under it.

	bytes atomic.Int64
	flush atomic.Bool // an automatic flush is under way
}

// batch is some entries in a row, and memory for copies, which is used from the beginning to the end.
type batch struct {
	entries  []retained
	first    uint64 // position of entries[0]
	released int    // entries at the beginning that are gone
	bytes    int64  // of the others
	pieces   int    // entries that have had a piece
	memory   []byte // nil until there is something to copy
	used     int    // bytes of it
	// copies counts those who are still writing to memory. They have no lock: until they have ended the memory is not
	// used for anything else, even if a flush has given up their entries.
	copies atomic.Int32
}

// retained is one change of the device's contents.
type retained struct {
	op     shared.Op
	off    uint64
	length uint64
	data   []byte // of a write; in the batch's memory or in piece
	piece  *shared.Piece
}

// cost is what the entry counts, in bytes.
func (e *retained) cost() int64 { return int64(len(e.data)) + entryCost }

func newRetention() *retention {
	r := &retention{}
	r.room = sync.NewCond(&r.mu)
	return r
}

// position is that of the latest entry.
func (r *retention) position() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// add appends a completed request and returns the bytes kept.
func (r *retention) add(req *shared.Request) int64 {
	e := retained{op: req.Op, off: req.Offset, length: req.Length}
	var payload []byte // to be copied
	if req.Op == shared.OpWrite {
		if req.Length >= keepSize {
			e.piece = req.Keep()
		}
		if e.piece != nil {
			e.data = e.piece.Bytes()[:e.length]
		} else {
			payload = req.Payload()[:e.length]
		}
	}
	r.mu.Lock()
	b := r.batchFor(len(payload))
	if payload != nil {
		e.data = b.memory[b.used : b.used+len(payload) : b.used+len(payload)]
		b.used = (b.used + len(payload) + streamLine - 1) &^ (streamLine - 1)
		b.copies.Add(1)
	}
	if e.piece != nil {
		b.pieces++
	}
	b.entries = append(b.entries, e)
	b.bytes += e.cost()
	r.last++
	kept := r.bytes.Add(e.cost())
	r.mu.Unlock()
	if payload != nil {
		streamCopy(e.data, payload)
		b.copies.Add(-1)
	}
	return kept
}

// batchFor is where an entry with so many bytes to copy goes; mu is held.
func (r *retention) batchFor(n int) *batch {
	var b *batch
	if len(r.batches) > 0 {
		b = r.batches[len(r.batches)-1]
	}
	if b == nil || len(b.entries) == batchEntries || b.used+n > batchSize {
		if last := len(r.spare) - 1; last >= 0 {
			b, r.spare = r.spare[last], r.spare[:last]
		} else {
			b = &batch{}
		}
		b.first = r.last + 1
		r.batches = append(r.batches, b)
		r.opened++
	}
	if b.memory == nil && n > 0 {
		b.memory = make([]byte, batchSize)
	}
	return b
}

// release drops the entries up to a position.
func (r *retention) release(position uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	empty := 0
	for _, b := range r.batches {
		r.bytes.Add(-b.release(position))
		if b.released < len(b.entries) {
			break
		}
		empty++
		// A copy that is still being made is rare: that batch is left to the garbage collector.
		if b.copies.Load() == 0 && len(r.spare) < spareBatches {
			b.entries, b.released, b.pieces, b.used = b.entries[:0], 0, 0, 0
			r.spare = append(r.spare, b)
		}
	}
	rest := copy(r.batches, r.batches[empty:])
	clear(r.batches[rest:])
	r.batches = r.batches[:rest]
	if n := len(r.spare); n > 1 && r.opened == 0 {
		r.spare[n-1], r.spare = nil, r.spare[:n-1] // so much is not written any more between two flushes
	}
	r.opened = 0
	r.room.Broadcast()
}

// release drops the batch's entries up to a position and returns what they have counted.
func (b *batch) release(position uint64) int64 {
	if position < b.first {
		return 0
	}
	n := int(min(position-b.first+1, uint64(len(b.entries))))
	freed := int64(0)
	if n == len(b.entries) && b.pieces == 0 {
		freed = b.bytes // what the entries refer to is the batch's own
	} else {
		for i := b.released; i < n; i++ {
			e := &b.entries[i]
			freed += e.cost()
			if e.piece != nil {
				e.piece.Release()
			}
			*e = retained{}
		}
	}
	b.bytes -= freed
	b.released = max(b.released, n)
	return freed
}

// drop drops all entries: the device is gone.
func (r *retention) drop() { r.release(r.position()) }

// snapshot is all entries, for a replay, during which none is added or dropped.
func (r *retention) snapshot() []retained {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []retained
	for _, b := range r.batches {
		all = append(all, b.entries[b.released:]...)
	}
	return all
}

// held is the number of bytes kept.
func (r *retention) held() int64 { return r.bytes.Load() }

// retain keeps a completed change of the device, and has it flushed when too much is kept.
func (d *Device) retain(req *shared.Request) {
	if !d.retains.Load() {
		return
	}
	if d.unflushed.add(req) > d.opts.Retention/2 {
		d.flushSoon()
	}
}

// flushSoon starts a flush of the device's own, unless one is under way.
func (d *Device) flushSoon() {
	r := d.unflushed
	if r.flush.Load() || !r.flush.CompareAndSwap(false, true) {
		return
	}
	go func() {
		d.stats.ownFlushes.Add(1)
		err := d.Flush()
		if err != nil { // which has been logged, now and then
			d.handler.log.Debug("flushing what is retained failed", "device", d.name, "retained", r.held(), "error", err)
		}
		r.mu.Lock()
		r.failed = err
		r.flush.Store(false)
		r.room.Broadcast()
		r.mu.Unlock()
	}()
}

// awaitRoom waits until a change may be sent: the retained ones may exceed the limit only by what is in flight. When
// they cannot be flushed it returns why.
func (d *Device) awaitRoom() error {
	if !d.retains.Load() {
		return nil
	}
	r := d.unflushed
	for {
		r.mu.Lock()
		for r.held() >= d.opts.Retention && r.flush.Load() {
			r.room.Wait()
		}
		full, err := r.held() >= d.opts.Retention, r.failed
		r.failed = nil // the next one tries again
		r.mu.Unlock()
		if !full || err != nil {
			return err
		}
		d.flushSoon()
	}
}

// full tells, without waiting, whether awaitRoom would have to wait.
func (d *Device) full() bool { return d.retains.Load() && d.unflushed.held() >= d.opts.Retention }
