// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Latencies are counted in buckets that grow with what they count: four to each power of two of nanoseconds, from
// 256 ns to 69 s, one for what is shorter and one for what is longer.
const (
	firstOctave  = 8  // 2^8 ns
	lastOctave   = 36 // 2^36 ns
	octaveShift  = 2  // buckets in an octave, as a power of two
	octaveSplit  = 1 << octaveShift
	histogramLen = (lastOctave-firstOctave)*octaveSplit + 2
)

// histogram counts latencies; safe for concurrent use.
type histogram struct {
	sum     atomic.Int64 // ns
	buckets [histogramLen]atomic.Uint64
}

// bucketOf is the bucket that ns belongs to.
func bucketOf(ns int64) int {
	if ns < 1<<firstOctave {
		return 0
	}
	octave := bits.Len64(uint64(ns)) - 1
	if octave >= lastOctave {
		return histogramLen - 1
	}
	part := int(ns>>(octave-octaveShift)) & (octaveSplit - 1)
	return 1 + (octave-firstOctave)*octaveSplit + part
}

// bucketEnd is where bucket i ends, in ns: it counts what is shorter. The last one has no end.
func bucketEnd(i int) int64 {
	octave, part := firstOctave+i/octaveSplit, i%octaveSplit
	return int64(octaveSplit+part) << (octave - octaveShift)
}

func (h *histogram) add(ns int64) {
	h.sum.Add(ns)
	h.buckets[bucketOf(ns)].Add(1)
}

func (h *histogram) snapshot() Latency {
	l := Latency{Sum: time.Duration(h.sum.Load())}
	for i := range h.buckets {
		l.buckets[i] = h.buckets[i].Load()
		l.Count += l.buckets[i]
	}
	return l
}

// Latency is a distribution of times.
type Latency struct {
	Count   uint64
	Sum     time.Duration
	buckets [histogramLen]uint64
}

// Quantile is the time that the fraction q of all (0 to 1) did not exceed, rounded up to the end of a bucket, by at
// most a quarter; 0 if nothing was counted.
func (l *Latency) Quantile(q float64) time.Duration {
	if l.Count == 0 {
		return 0
	}
	rank := max(1, uint64(q*float64(l.Count)+0.5))
	var below uint64
	for i, n := range l.buckets {
		if below += n; below >= rank {
			return time.Duration(bucketEnd(i))
		}
	}
	return time.Duration(bucketEnd(histogramLen - 1))
}

// Octaves calls yield for each power of two of nanoseconds with the number of times below it, in rising order.
func (l *Latency) Octaves(yield func(below time.Duration, count uint64) bool) {
	count := l.buckets[0]
	for octave := firstOctave; octave <= lastOctave; octave++ {
		if !yield(1<<octave, count) {
			return
		}
		if octave < lastOctave {
			first := 1 + (octave-firstOctave)*octaveSplit
			for _, n := range l.buckets[first : first+octaveSplit] {
				count += n
			}
		}
	}
}
