// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

const (
	// DefaultRetention is how many bytes of unflushed writes are kept for a device.
	DefaultRetention = 32 << 20
	// chunkSize is the unit in which memory for copies of payloads is allocated. It holds any one payload.
	chunkSize = 1 << 20
	// spareChunks is how many of them are kept for later: all of those that are in use when the default limit leads to a
	// flush. New ones would cost several times as much as the copies in them.
	spareChunks = DefaultRetention / 2 / chunkSize
	// keepSize is the size in bytes from which on a payload is not copied but kept where it is, in the channel.
	keepSize = 64 << 10
	// entryCost is what an entry counts beyond its payload, so that a flood of changes without any payload is bounded.
	entryCost = 64
)

// retention keeps the writes of a device that have completed but that no completed flush covers: a handler may have
// acknowledged them into the memory of its process. When that dies they are sent again, in the order in which they
// completed. Entries have positions, counted from 1; a flush covers all up to the position at its issue.
type retention struct {
	mu      sync.Mutex
	entries []retained // in the order of completion
	first   uint64     // position of entries[0]
	bytes   int64
	room    *sync.Cond // told when bytes has fallen
	flush   bool       // an automatic flush is under way
	failed  error      // of the last automatic flush; nil once one has succeeded
	chunk   *chunk     // where the next copy goes; nil if there is none yet
	spare   []*chunk
	opened  int // chunks since the last flush
}

// chunk is memory for copies, used from the beginning to the end.
type chunk struct {
	memory []byte // all of it
	used   int    // bytes
	live   int    // entries that have their data here
}

// retained is one change of the device's contents.
type retained struct {
	op     shared.Op
	off    uint64
	length uint64
	data   []byte // of a write; in chunk or piece
	chunk  *chunk
	piece  *shared.Piece
}

func newRetention() *retention {
	r := &retention{first: 1}
	r.room = sync.NewCond(&r.mu)
	return r
}

// position is that of the latest entry.
func (r *retention) position() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.first + uint64(len(r.entries)) - 1
}

// add appends a completed request and returns the bytes kept.
func (r *retention) add(req *shared.Request) int64 {
	e := retained{op: req.Op, off: req.Offset, length: req.Length}
	if req.Op == shared.OpWrite && req.Length >= keepSize {
		if e.piece = req.Keep(); e.piece != nil {
			e.data = e.piece.Bytes()[:e.length]
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if req.Op == shared.OpWrite && e.piece == nil {
		r.copy(&e, req.Payload()[:e.length])
	}
	r.entries = append(r.entries, e)
	r.bytes += int64(len(e.data)) + entryCost
	return r.bytes
}

// copy gives the entry a copy of the data; mu is held.
func (r *retention) copy(e *retained, data []byte) {
	c := r.chunk
	if c == nil || c.used+len(data) > len(c.memory) {
		r.recycle(c)
		if n := len(r.spare); n > 0 {
			c, r.spare = r.spare[n-1], r.spare[:n-1]
		} else {
			c = &chunk{memory: make([]byte, chunkSize)}
		}
		r.chunk = c
		r.opened++
	}
	e.data, e.chunk = c.memory[c.used:c.used+len(data):c.used+len(data)], c
	c.used += copy(e.data, data)
	c.live++
}

// recycle takes a chunk that nothing is added to any more, unless there are entries in it; mu is held.
func (r *retention) recycle(c *chunk) {
	if c != nil && c.live == 0 && len(r.spare) < spareChunks {
		c.used = 0
		r.spare = append(r.spare, c)
	}
}

// release drops the entries up to a position.
func (r *retention) release(position uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if position < r.first {
		return
	}
	n := position - r.first + 1
	for i := range r.entries[:n] {
		e := &r.entries[i]
		r.bytes -= int64(len(e.data)) + entryCost
		switch {
		case e.piece != nil:
			e.piece.Release()
		case e.chunk != nil:
			if e.chunk.live--; e.chunk != r.chunk {
				r.recycle(e.chunk)
			}
		}
	}
	rest := copy(r.entries, r.entries[n:])
	clear(r.entries[rest:])
	r.entries = r.entries[:rest]
	r.first = position + 1
	if n := len(r.spare); n > 1 && r.opened == 0 {
		r.spare[n-1], r.spare = nil, r.spare[:n-1] // so much is not written any more between two flushes
	}
	r.opened = 0
	r.room.Broadcast()
}

// drop drops all entries: the device is gone.
func (r *retention) drop() { r.release(r.position()) }

// snapshot is all entries, for a replay, during which none is added or dropped.
func (r *retention) snapshot() []retained {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]retained(nil), r.entries...)
}

// held is the number of bytes kept.
func (r *retention) held() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

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
	r.mu.Lock()
	if r.flush {
		r.mu.Unlock()
		return
	}
	r.flush = true
	r.mu.Unlock()
	go func() {
		d.stats.ownFlushes.Add(1)
		err := d.Flush()
		if err != nil { // which has been logged, now and then
			d.handler.log.Debug("flushing what is retained failed", "device", d.name, "retained", r.held(), "error", err)
		}
		r.mu.Lock()
		r.flush, r.failed = false, err
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
		for r.bytes >= d.opts.Retention && r.flush {
			r.room.Wait()
		}
		full, err := r.bytes >= d.opts.Retention, r.failed
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
