// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// TestNetEffect makes changes at random, and their net effect, and compares what becomes of a device.
func TestNetEffect(t *testing.T) {
	const size, most = 256, 24
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		want, got := make([]byte, size), make([]byte, size)
		for i := range want {
			want[i], got[i] = 0xff, 0xff
		}
		var entries []retained
		for range rng.IntN(40) {
			e := retained{op: shared.OpWrite, length: 1 + rng.Uint64N(16)}
			if e.off = rng.Uint64N(size - e.length); rng.IntN(4) == 0 {
				e.op = shared.OpZero
				clear(want[e.off:][:e.length])
			} else {
				for range e.length {
					e.data = append(e.data, byte(1+rng.IntN(250)))
				}
				copy(want[e.off:], e.data)
			}
			entries = append(entries, e)
		}
		end := uint64(0)
		for _, r := range netEffect(entries, most) {
			data := slices.Concat(r.data...)
			switch {
			case r.off < end:
				t.Errorf("seed %d: %d to %d overlaps what ends at %d", seed, r.off, r.off+r.length, end)
			case r.op == shared.OpWrite && (uint64(len(data)) != r.length || r.length > most):
				t.Errorf("seed %d: a write of %d bytes has %d", seed, r.length, len(data))
			case r.op == shared.OpWrite:
				copy(got[r.off:], data)
			default:
				clear(got[r.off:][:r.length])
			}
			end = r.off + r.length
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v\nwant %v", seed, got, want)
		}
	}
}

// BenchmarkNetEffect is of as many small writes as a device retains.
func BenchmarkNetEffect(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	entries := make([]retained, DefaultRetention/2/4096)
	data := make([]byte, 4096)
	for i := range entries {
		entries[i] = retained{op: shared.OpWrite, off: rng.Uint64N(1<<14) * 4096, length: 4096, data: data}
	}
	for b.Loop() {
		netEffect(entries, replayMerge)
	}
}
