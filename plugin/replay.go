// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"slices"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

const (
	// replayWindow is how many requests of a replay are sent at once.
	replayWindow = 64
	// replayMerge is up to how many bytes of neighbouring writes are sent as one request.
	replayMerge = 256 << 10
)

// A replay has the effect of all retained changes in the order in which they had completed. Nobody sees the device
// before it has ended, and whatever interrupts it, the next one begins with the same changes: so only what the last
// change of each place has made of it is sent, in the order of the places. That is far less than the changes were where
// a file system, or a benchmark, has written to the same blocks again and again.

// replayRequest is one request of a replay: neighbouring parts of changes of the same kind.
type replayRequest struct {
	op     shared.Op
	off    uint64
	length uint64
	data   [][]byte // of writes
}

// netEffect makes requests of retained changes, none of which overlaps another one. A write gets at most most bytes,
// or as many as a change had.
func netEffect(entries []retained, most uint64) []replayRequest {
	var cuts []uint64 // where changes begin and end
	for _, e := range entries {
		cuts = append(cuts, e.off, e.off+e.length)
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	// Part i lies between cuts[i] and cuts[i+1]. The latest change goes first and takes its parts; free leads from each
	// part to itself or towards the next one that nobody has taken.
	owner, free := make([]int, len(cuts)), make([]int, len(cuts)+1)
	for i := range free {
		free[i] = i
	}
	next := func(i int) int {
		for free[i] != i {
			free[i] = free[free[i]]
			i = free[i]
		}
		return i
	}
	for n := len(entries) - 1; n >= 0; n-- {
		e := &entries[n]
		first, _ := slices.BinarySearch(cuts, e.off)
		for i := next(first); i < len(cuts) && cuts[i] < e.off+e.length; i = next(i) {
			owner[i], free[i] = n+1, i+1
		}
	}
	var all []replayRequest
	for i := 0; i+1 < len(cuts); i++ {
		if owner[i] == 0 {
			continue // nothing was changed between two changes
		}
		e := &entries[owner[i]-1]
		part := replayRequest{op: e.op, off: cuts[i], length: cuts[i+1] - cuts[i]}
		if e.op == shared.OpWrite {
			part.data = [][]byte{e.data[part.off-e.off:][:part.length]}
		}
		if n := len(all); n > 0 && all[n-1].adjoins(part) &&
			(part.op == shared.OpWrite && all[n-1].length+part.length <= most ||
				part.op != shared.OpWrite && owner[i] == owner[i-1]) {
			all[n-1].length += part.length
			all[n-1].data = append(all[n-1].data, part.data...)
			continue
		}
		all = append(all, part)
	}
	return all
}

func (r *replayRequest) adjoins(next replayRequest) bool {
	return r.op == next.op && r.off+r.length == next.off
}

// replay sends what is retained to a new host. Its error is shared.ErrPeerGone when that host has died, or the errno of
// a request that it refuses.
func (d *Device) replay(c *shared.Channel) error {
	entries := clipEntries(d.unflushed.snapshot(), uint64(d.Size()))
	requests := netEffect(entries, uint64(min(replayMerge, d.maxXfer)))
	d.stats.replayBegins(requests)
	defer d.stats.replayEnds()
	results := make(chan error, replayWindow)
	underWay := 0
	drain := func() error {
		c.Kick(nil)
		var first error
		for ; underWay > 0; underWay-- {
			if err := <-results; first == nil {
				first = err
			}
		}
		return first
	}
	for _, e := range requests {
		payload := uint64(0)
		if e.op == shared.OpWrite {
			payload = e.length
		}
		r := c.GetPrivileged(e.op, payload)
		if r == nil || underWay == replayWindow {
			if err := drain(); err != nil {
				if r != nil {
					r.Release()
				}
				return err
			}
		}
		if r == nil {
			var err error
			if r, err = c.Get(e.op, payload); err != nil {
				return err
			}
		}
		to := r.Payload()
		for _, data := range e.data {
			to = to[copy(to, data):]
		}
		r.Device, r.Offset, r.Length, r.Patience = uint32(d.minor), e.off, e.length, d.patience
		r.Done = func(r *shared.Request) {
			err := r.Err
			r.Release()
			d.stats.replayGoesOn(payload)
			results <- err
		}
		underWay++
		r.Push()
	}
	err := drain()
	if err == nil {
		d.stats.replayed.Add(int64(len(entries)))
	}
	return err
}

// clipEntries leaves out what is beyond size, where the device has been cut off since.
func clipEntries(entries []retained, size uint64) []retained {
	clipped := entries[:0]
	for _, e := range entries {
		if e.off >= size {
			continue
		}
		e.length = min(e.length, size-e.off)
		e.data = e.data[:min(uint64(len(e.data)), e.length)]
		clipped = append(clipped, e)
	}
	return clipped
}
