// SPDX-License-Identifier: Apache-2.0

package shared

import "math/bits"

const (
	pageSize  = 4096
	maxOrder  = 8 // 2^8 pages are MaxPayload
	noOrder   = 0xff
	blockSize = pageSize << maxOrder
)

// arena hands out pieces of a segment's payload area: a buddy allocator whose smallest piece is a page and whose
// largest is MaxPayload. Its books are in the front's private memory. Pieces of one size are reused last in, first out,
// because a piece that was just in use is still in the processor's cache. Not safe for concurrent use.
type arena struct {
	free  [maxOrder + 1][]uint32 // page numbers of free pieces, by order; a stack each
	order []uint8                // order of the free piece that begins at a page, else noOrder
	pos   []uint32               // where in its stack that piece is
}

// newArena manages size bytes, a multiple of MaxPayload.
func newArena(size int64) *arena {
	pages := int(size / pageSize)
	a := &arena{order: make([]uint8, pages), pos: make([]uint32, pages)}
	for i := range a.order {
		a.order[i] = noOrder
	}
	for p := pages - blockSize/pageSize; p >= 0; p -= blockSize / pageSize {
		a.push(uint32(p), maxOrder)
	}
	return a
}

// orderFor is the order of the smallest piece that holds n bytes; n is at least 1 and at most MaxPayload.
func orderFor(n uint64) int { return bits.Len64((n - 1) / pageSize) }

func (a *arena) push(page uint32, order int) {
	a.order[page] = uint8(order)
	a.pos[page] = uint32(len(a.free[order]))
	a.free[order] = append(a.free[order], page)
}

// take removes the free piece that begins at page, wherever in its stack it is.
func (a *arena) take(page uint32) {
	order := a.order[page]
	s := a.free[order]
	last := s[len(s)-1]
	s[a.pos[page]] = last
	a.pos[last] = a.pos[page]
	a.free[order] = s[:len(s)-1]
	a.order[page] = noOrder
}

// alloc returns the byte offset of a piece of at least n bytes; ok is false when there is none now.
func (a *arena) alloc(n uint64) (off uint64, ok bool) {
	want := orderFor(n)
	order := want
	for order <= maxOrder && len(a.free[order]) == 0 {
		order++
	}
	if order > maxOrder {
		return 0, false
	}
	page := a.free[order][len(a.free[order])-1]
	a.take(page)
	for ; order > want; order-- {
		a.push(page+1<<(order-1), order-1)
	}
	return uint64(page) * pageSize, true
}

// pieceSize is what alloc(n) takes out of the arena, in bytes.
func pieceSize(n uint64) uint64 { return pageSize << orderFor(n) }

// shrink takes back the end of the piece that alloc(n) placed at off, so that it is as alloc(m) would have made it; m
// is at least 1 and at most n.
func (a *arena) shrink(off, n, m uint64) {
	page := uint32(off / pageSize)
	for order := orderFor(n); order > orderFor(m); order-- {
		a.push(page+1<<(order-1), order-1)
	}
}

// release takes back the piece that alloc(n) placed at off, and merges it with its free buddies.
func (a *arena) release(off, n uint64) {
	page, order := uint32(off/pageSize), orderFor(n)
	for order < maxOrder {
		buddy := page ^ 1<<order
		if a.order[buddy] != uint8(order) {
			break
		}
		a.take(buddy)
		page &^= 1 << order
		order++
	}
	a.push(page, order)
}
