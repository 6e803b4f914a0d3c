// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// comparison runs workloads on peers in turn.
type comparison struct {
	bed       *bed
	peers     []peer
	workloads []workload
	rounds    int
	runtime   time.Duration // of one run of a workload that has no end of its own
	warmUp    bool          // each workload begins with a round that does not count
	progress  io.Writer

	servers  map[string]*server
	starts   map[string]int
	failures []string
}

// maxStarts is how often a peer is started that fails.
const maxStarts = 3

// run measures everything. What failed is in the results; the error says what could not be cleaned up.
func (c *comparison) run(ctx context.Context) (*results, error) {
	c.servers, c.starts = map[string]*server{}, map[string]int{}
	r := &results{
		Machine: thisMachine(), Rounds: c.rounds, Runtime: c.runtime.Seconds(), SizeMiB: c.bed.size >> 20,
	}
	for _, w := range c.workloads {
		if ctx.Err() != nil {
			break
		}
		r.Workloads = append(r.Workloads, c.runWorkload(ctx, w))
	}
	var errs []error
	for _, p := range c.peers {
		s := c.servers[p.name]
		if s == nil {
			continue
		}
		if m, ok := c.memory(s); ok {
			r.Memory = append(r.Memory, m)
		}
		errs = append(errs, s.stop())
	}
	if ctx.Err() != nil {
		c.fail("stopped before the end: %v", context.Cause(ctx))
	}
	r.Failures = c.failures
	return r, errors.Join(errs...)
}

// runWorkload runs one workload, one run on each peer after the other, and that again for each round. Who begins
// changes from round to round.
func (c *comparison) runWorkload(ctx context.Context, w workload) workloadResult {
	c.say("%-20s", w.name)
	defer c.say("\n")
	var running []peer
	for _, p := range c.peers {
		if w.fits(p) && c.server(ctx, p) != nil {
			running = append(running, p)
		}
	}
	samples := map[string][]sample{}
	first := 0
	if c.warmUp {
		first = -1
	}
	for round := first; round < c.rounds; round++ {
		for i := range running {
			p := running[(i+max(round, 0))%len(running)]
			s := c.servers[p.name]
			if s == nil || ctx.Err() != nil {
				continue
			}
			runtime := c.runtime
			if round < 0 {
				runtime = min(runtime, 500*time.Millisecond)
			}
			result, err := w.measure(ctx, c.bed, s, runtime)
			if err != nil {
				c.dismiss(ctx, s, w, err)
				continue
			}
			if round >= 0 {
				samples[p.name] = append(samples[p.name], result)
			}
		}
		c.say(".")
	}
	result := workloadResult{Name: w.name, Title: w.title, Unit: w.unit}
	for _, p := range running {
		result.Peers = append(result.Peers, sum(p.name, samples[p.name]))
	}
	return result
}

// server returns the server of a peer and starts it if it does not run. It returns nil if that fails.
func (c *comparison) server(ctx context.Context, p peer) *server {
	if s := c.servers[p.name]; s != nil || c.starts[p.name] == maxStarts || ctx.Err() != nil {
		return s
	}
	c.starts[p.name]++
	s, err := startFilled(ctx, c.bed, p)
	if err != nil {
		if ctx.Err() == nil {
			c.fail("%v", err)
		}
		return nil
	}
	c.servers[p.name] = s
	return s
}

// dismiss stops a server on which a run has failed. The next workload has a new one.
func (c *comparison) dismiss(ctx context.Context, s *server, w workload, err error) {
	if ctx.Err() == nil {
		if ended := s.ended(); ended != nil {
			err = ended // what else failed is a consequence
		}
		c.fail("%s on %s: %v", w.name, s.peer.name, err)
	}
	if err := s.stop(); err != nil {
		c.fail("stop %s: %v", s.peer.name, err)
	}
	delete(c.servers, s.peer.name)
}

func (c *comparison) fail(format string, args ...any) {
	c.failures = append(c.failures, fmt.Sprintf(format, args...))
	c.say("\nFAILED: %s\n", c.failures[len(c.failures)-1])
}

// say reports progress. That nobody can read it is no reason to stop.
func (c *comparison) say(format string, args ...any) {
	_, _ = fmt.Fprintf(c.progress, format, args...)
}

// memory is what a server needs besides its device's contents, if it has processes.
func (c *comparison) memory(s *server) (memoryResult, bool) {
	pids := s.pids()
	if len(pids) == 0 || s.ended() != nil {
		return memoryResult{}, false
	}
	bytes, err := residentMemory(pids)
	if err != nil {
		c.fail("memory of %s: %v", s.peer.name, err)
		return memoryResult{}, false
	}
	// What the server has mapped of the contents is in there; some read and write them through a descriptor.
	for bytes >= c.bed.size {
		bytes -= c.bed.size
	}
	return memoryResult{s.peer.name, float64(bytes) / (1 << 20)}, true
}
