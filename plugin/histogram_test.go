// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// TestBuckets: each bucket begins where the one before it ends, and none is wider than a quarter of where it begins.
func TestBuckets(t *testing.T) {
	t.Parallel()
	for i := range histogramLen - 1 {
		end := bucketEnd(i)
		if got := bucketOf(end - 1); got != i {
			t.Errorf("%d ns is in bucket %d, want %d", end-1, got, i)
		}
		if got := bucketOf(end); got != i+1 {
			t.Errorf("%d ns is in bucket %d, want %d", end, got, i+1)
		}
		if i > 0 && (end-bucketEnd(i-1))*octaveSplit > bucketEnd(i-1) {
			t.Errorf("bucket %d goes from %d to %d ns", i, bucketEnd(i-1), end)
		}
	}
	for _, ns := range []int64{-1, 0, math.MaxInt64} {
		if i := bucketOf(ns); i < 0 || i >= histogramLen {
			t.Errorf("%d ns is in bucket %d", ns, i)
		}
	}
}

// TestQuantile compares quantiles with those of the sorted values.
func TestQuantile(t *testing.T) {
	t.Parallel()
	var h histogram
	values := make([]int64, 10001)
	for i := range values {
		values[i] = int64(math.Exp(rand.Float64()*14 + 6)) // 400 ns to 0.5 s
		h.add(values[i])
	}
	slices.Sort(values)
	l := h.snapshot()
	if l.Count != uint64(len(values)) {
		t.Errorf("count %d, want %d", l.Count, len(values))
	}
	for _, q := range []float64{0, 0.5, 0.9, 0.99, 0.999, 1} {
		exact := time.Duration(values[int(q*float64(len(values)-1))])
		got := l.Quantile(q)
		if got < exact*99/100 || got > exact*5/4+exact/50 {
			t.Errorf("quantile %v is %v, want %v or up to a quarter more", q, got, exact)
		}
	}
	var last uint64
	for below, count := range l.Octaves {
		exact, _ := slices.BinarySearch(values, int64(below))
		if count != uint64(exact) || count < last {
			t.Errorf("%d of %d are below %v, want %d", count, l.Count, below, exact)
		}
		last = count
	}
}

// BenchmarkStats is what statistics cost a request.
func BenchmarkStats(b *testing.B) {
	s := newDeviceStats()
	o := &op{req: &shared.Request{Op: shared.OpRead, Length: 4096}}
	for i := 0; b.Loop(); i++ {
		o.req.HandlerTime = time.Duration(1-min(1, i%8)) * time.Microsecond
		s.begin(o, shared.OpRead)
		s.end(o, false)
	}
}
