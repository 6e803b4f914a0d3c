// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"math/bits"
	"math/rand/v2"
	"time"
)

// testRandom does random operations, one at a time, and checks each against the model. Now and then the device is
// removed and added again, or the handler's process killed.
func testRandom(b *bench) {
	m := newModel(b)
	b.Logf("%d operations, seed %d", b.Operations, b.Seed)
	rng := rand.New(rand.NewPCG(b.Seed, 1))
	g := generator{rng: rng, m: m, block: int64(b.dev.BlockSize()), maxXfer: b.dev.MaxXfer()}
	buf := make([]byte, 2*g.maxXfer)
	events := min(20, max(2, b.Operations/5000)) // of each kind
	every := b.Operations/events + 1
	began := time.Now()
	for i := range b.Operations {
		var err error
		switch {
		case i%every == every/3:
			b.reopen(m)
		case i%every == 2*every/3:
			b.killIdle(m)
		}
		switch dice := rng.IntN(100); {
		case dice < 2:
			err = m.flush(b.dev)
		case dice < 5:
			offset, length := g.next()
			err = m.clear(b.dev, opDiscard+kind(dice%2), offset, length)
		case dice < 52:
			offset, length := g.next()
			err = m.write(b.dev, offset, length)
		default:
			offset, length := g.next()
			err = m.read(b.dev, buf, offset, length)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := m.readAll(b.dev); err != nil {
		b.Fatal(err)
	}
	b.Logf("%.0f operations per second", float64(b.Operations)/time.Since(began).Seconds())
}

// reopen removes the device and adds it again, unless its contents do not survive that.
func (b *bench) reopen(m *model) {
	b.Helper()
	if b.Volatile {
		return
	}
	m.record(opReopen, 0, 0)
	b.remove()
	b.add()
}

// killIdle kills the handler's process while it has no request, where that is allowed.
func (b *bench) killIdle(m *model) {
	b.Helper()
	if b.Kills == KillNever {
		return
	}
	m.record(opKill, 0, 0)
	b.kill()
}

// generator makes places on a device.
type generator struct {
	rng     *rand.Rand
	m       *model
	block   int64 // bytes
	maxXfer int   // bytes
	recent  int64 // offset of an earlier operation
}

// next is the offset and length of an operation: mostly a few whole blocks, at times single bytes, at times more than
// fits into one request; anywhere, or near an earlier one, or at a boundary.
func (g *generator) next() (offset int64, length int) {
	s := g.m.spans[g.rng.IntN(len(g.m.spans))]
	most := min(int64(len(s.bytes)), int64(2*g.maxXfer))
	var n int64
	switch dice := g.rng.IntN(1000); {
	case dice < 2:
		n = 1 + g.rng.Int64N(most)
	case dice < 100:
		n = 1 + g.rng.Int64N(min(most, 4*g.block))
	default:
		// One block twice as often as two, and so on up to 64.
		blocks := int64(1) << min(6, bits.TrailingZeros32(g.rng.Uint32()|1<<6))
		n = g.block * (1 + g.rng.Int64N(blocks))
	}
	n = min(n, most)
	room := int64(len(s.bytes)) - n
	var at int64
	switch dice := g.rng.IntN(100); {
	case dice < 30 && g.recent >= s.start && g.recent < s.end():
		at = g.recent - s.start + (g.rng.Int64N(9)-4)*g.block
	case dice < 45:
		at = g.rng.Int64N(room/65536+1)*65536 - n/2
	case dice < 50:
		at = room
	default:
		at = g.rng.Int64N(room + 1)
	}
	if n%g.block == 0 || g.rng.IntN(4) == 0 {
		at -= at % g.block
	}
	at = min(max(at, 0), room)
	g.recent = s.start + at
	return g.recent, int(n)
}
