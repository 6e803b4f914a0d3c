// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// clientCount is how many clients work on the device at the same time.
const clientCount = 16

// client works on every sixteenth block of the device, so that its neighbours' are not its own, one request at a time.
type client struct {
	number int
	dev    *plugin.Device
	rng    *rand.Rand
	seed   uint64
	block  int64 // bytes
	blocks int64 // of its own
	wrote  []int // by own block: the operation that wrote it last, 0 for none
	ops    int
}

// offset of an own block.
func (c *client) offset(i int64) int64 { return (i*clientCount + int64(c.number)) * c.block }

// run does n operations.
func (c *client) run(n int) error {
	buf, want := make([]byte, c.block), make([]byte, c.block)
	for range n {
		c.ops++
		i := c.rng.Int64N(c.blocks)
		dice := c.rng.IntN(64)
		switch {
		case dice == 0:
			if err := c.dev.Flush(); err != nil {
				return fmt.Errorf("client %d, operation %d: %w", c.number, c.ops, err)
			}
		case dice < 32 || c.wrote[i] == 0:
			fill(buf, c.seed, c.ops, c.offset(i))
			if n, err := c.dev.WriteAt(buf, c.offset(i)); n != len(buf) || err != nil {
				return fmt.Errorf("client %d, operation %d: write at %d: %d, %w", c.number, c.ops, c.offset(i), n, err)
			}
			c.wrote[i] = c.ops
		default:
			if err := c.check(buf, want, i); err != nil {
				return err
			}
		}
	}
	return nil
}

// check reads an own block.
func (c *client) check(buf, want []byte, i int64) error {
	if n, err := c.dev.ReadAt(buf, c.offset(i)); n != len(buf) || err != nil {
		return fmt.Errorf("client %d, operation %d: read at %d: %d, %w", c.number, c.ops, c.offset(i), n, err)
	}
	fill(want, c.seed, c.wrote[i], c.offset(i))
	if !bytes.Equal(buf, want) {
		return fmt.Errorf("client %d, operation %d: the block at %d is not what operation %d of the same client wrote: "+
			"there is %x, there should be %x", c.number, c.ops, c.offset(i), c.wrote[i], buf[:16], want[:16])
	}
	return nil
}

// testConcurrency has clients work on neighbouring blocks at the same time, and the handler's process be killed under
// them, where that is allowed.
func testConcurrency(b *bench) {
	block := int64(b.dev.BlockSize())
	blocks := min(64, b.size/block/clientCount)
	var clients []*client
	for i := range clientCount {
		clients = append(clients, &client{
			number: i, dev: b.dev, seed: b.Seed + uint64(i), rng: rand.New(rand.NewPCG(b.Seed, uint64(2+i))),
			block: block, blocks: blocks, wrote: make([]int, blocks),
		})
	}
	rounds := 1
	if b.Kills == KillAny {
		rounds = 4
	}
	for round := range rounds {
		failures := make(chan error, clientCount)
		var begun, running sync.WaitGroup
		begun.Add(clientCount)
		for _, c := range clients {
			running.Go(func() {
				err := c.run(1)
				begun.Done()
				if err == nil {
					err = c.run(b.Operations / clientCount / rounds)
				}
				if err != nil {
					failures <- err
				}
			})
		}
		begun.Wait()
		if round > 0 {
			b.kill()
		}
		running.Wait()
		close(failures)
		for err := range failures {
			b.Errorf("%v (seed %d)", err, b.Seed)
		}
		if b.Failed() {
			return
		}
	}
	buf, want := make([]byte, block), make([]byte, block)
	for _, c := range clients {
		for i := range c.blocks {
			if c.wrote[i] == 0 {
				continue
			}
			b.must(c.check(buf, want, i))
		}
	}
}
