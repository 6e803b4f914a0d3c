// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"math/rand/v2"
	"testing"
)

// TestArena allocates and releases at random against a map of owned pages: pieces never overlap, never leave the arena,
// and everything merges again in the end.
func TestArena(t *testing.T) {
	t.Parallel()
	const size = 8 * MaxPayload
	a := newArena(size)
	owner := make([]int, size/pageSize)
	type piece struct{ off, n uint64 }
	live := make(map[int]piece)
	rng := rand.New(rand.NewPCG(1, 2))
	for id := 1; id <= 200_000; id++ {
		if rng.IntN(2) == 0 {
			n := uint64(1) << rng.IntN(21)
			if n > 1 {
				n -= rng.Uint64N(n / 2)
			}
			off, ok := a.alloc(n)
			if !ok {
				continue
			}
			if off+n > size || off%pageSize != 0 {
				t.Fatalf("piece of %d bytes at %d", n, off)
			}
			for p := off / pageSize; p <= (off+n-1)/pageSize; p++ {
				if owner[p] != 0 {
					t.Fatalf("page %d given to %d and %d", p, owner[p], id)
				}
				owner[p] = id
			}
			if rng.IntN(4) == 0 { // give back a part
				m := 1 + rng.Uint64N(n)
				a.shrink(off, n, m)
				for p := (off + m - 1) / pageSize; p < (off+n-1)/pageSize; p++ {
					owner[p+1] = 0
				}
				n = m
			}
			live[id] = piece{off, n}
			continue
		}
		for k, l := range live {
			for p := l.off / pageSize; p <= (l.off+l.n-1)/pageSize; p++ {
				owner[p] = 0
			}
			a.release(l.off, l.n)
			delete(live, k)
			break
		}
	}
	for _, l := range live {
		a.release(l.off, l.n)
	}
	for i := range size / MaxPayload {
		if _, ok := a.alloc(MaxPayload); !ok {
			t.Fatalf("after releasing everything only %d pieces of the largest size are left", i)
		}
	}
	if _, ok := a.alloc(1); ok {
		t.Fatal("a full arena gave out memory")
	}
}
