// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// newWrite is a write with a payload of so many bytes, each of which is fill.
func newWrite(t testing.TB, c *shared.Channel, n int, fill byte) *shared.Request {
	t.Helper()
	req, err := c.Get(shared.OpWrite, uint64(n))
	if err != nil {
		t.Fatal(err)
	}
	copy(req.Payload(), bytes.Repeat([]byte{fill}, n))
	return req
}

// TestRetentionBatches adds changes of all lengths and gives them up at random positions: what is held is always what
// came after, with its contents, and what it counts.
func TestRetentionBatches(t *testing.T) {
	c, err := shared.New(shared.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	random := rand.New(rand.NewPCG(4, 4))
	r := newRetention()
	type change struct {
		n    int
		fill byte
	}
	var want []change // from position first on
	first := uint64(1)
	for step := range 20000 {
		x := change{n: []int{0, 1, 63, 64, 65, 512, 4096, 5000, keepSize, keepSize + 4096}[random.IntN(10)], fill: byte(step)}
		if x.n == 0 {
			req, err := c.Get(shared.OpUnmap, 4096)
			if err != nil {
				t.Fatal(err)
			}
			r.add(req)
			req.Release()
		} else {
			req := newWrite(t, c, x.n, x.fill)
			r.add(req)
			req.Release()
		}
		want = append(want, x)
		if random.IntN(200) > 0 && len(want) < 3000 {
			continue
		}
		// Before what is held, in the middle, or all.
		position := first - 1 + uint64(random.IntN(len(want)+1))
		if random.IntN(3) == 0 {
			position = r.position()
		}
		r.release(position)
		want, first = want[position-first+1:], position+1
		held, bytesHeld := r.snapshot(), int64(0)
		if len(held) != len(want) {
			t.Fatalf("step %d: %d changes are held instead of %d", step, len(held), len(want))
		}
		for i, e := range held {
			bytesHeld += e.cost()
			if !bytes.Equal(e.data, bytes.Repeat([]byte{want[i].fill}, want[i].n)) {
				t.Fatalf("step %d: change %d of %d bytes has other contents", step, i, want[i].n)
			}
		}
		if r.held() != bytesHeld {
			t.Fatalf("step %d: %d bytes are counted instead of %d", step, r.held(), bytesHeld)
		}
	}
	r.drop()
	if r.held() != 0 || len(r.snapshot()) != 0 {
		t.Errorf("%d bytes are left", r.held())
	}
	if _, used := c.Usage(); used != 0 {
		t.Errorf("%d bytes of the channel's memory are left", used)
	}
}

// TestRetentionCopyUnderWay has a flush give up a change whose payload is still being copied: what is copied there late
// harms nobody.
func TestRetentionCopyUnderWay(t *testing.T) {
	c, err := shared.New(shared.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	first, second := newWrite(t, c, 4096, 1), newWrite(t, c, 4096, 2)
	defer first.Release()
	defer second.Release()
	r := newRetention()
	r.add(first)
	late := r.snapshot()[0].data
	r.batches[0].copies.Add(1) // as if add had not come to the end of its copy
	r.release(r.position())
	r.add(second)
	streamCopy(late, first.Payload())
	if held := r.snapshot(); len(held) != 1 || !bytes.Equal(held[0].data, second.Payload()) {
		t.Error("a change that was retained later has the late one's payload")
	}
}

// TestStreamCopy copies all lengths around the lines that it works in, from any alignment, and nothing beyond.
func TestStreamCopy(t *testing.T) {
	from := make([]byte, 4096+streamLine)
	for i := range from {
		from[i] = byte(i*7 + i/256)
	}
	memory := make([]byte, batchSize) // as a batch has it
	for _, n := range []int{0, 1, 63, 64, 65, 127, 128, 512, 4095, 4096} {
		for skip := range 17 {
			t.Run(fmt.Sprintf("%d/%d", n, skip), func(t *testing.T) {
				clear(memory[:2*len(from)])
				streamCopy(memory[streamLine:][:n:n], from[skip:][:n])
				if !bytes.Equal(memory[streamLine:][:n], from[skip:][:n]) {
					t.Error("not what was copied")
				}
				if memory[streamLine-1] != 0 || memory[streamLine+n] != 0 {
					t.Error("bytes around it have changed")
				}
			})
		}
	}
}

// BenchmarkRetain is what retention adds to a write of 4 KiB: keeping it, and its share of the flush that gives it up.
func BenchmarkRetain(b *testing.B) {
	c, err := shared.New(shared.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	req, err := c.Get(shared.OpWrite, 4096)
	if err != nil {
		b.Fatal(err)
	}
	defer req.Release()
	r := newRetention()
	for b.Loop() {
		if r.add(req) > DefaultRetention/2 {
			r.drop()
		}
	}
}
