// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// comparison runs workloads on peers in turn. Each round has servers of its own: where in the machine's memory a server
// happens to lie can matter more than how it works.
type comparison struct {
	bed       *bed
	peers     []peer
	workloads []workload
	rounds    int
	runtime   time.Duration // of one run of a workload that has no end of its own
	progress  io.Writer

	servers  map[string]*server
	broken   map[string]int // how often a peer has failed
	failures []string
}

// maxBroken is how often a peer may fail before it is left out.
const maxBroken = 3

// run measures everything. What failed is in the results; the error says what could not be cleaned up.
func (c *comparison) run(ctx context.Context) (*results, error) {
	c.servers, c.broken = map[string]*server{}, map[string]int{}
	r := &results{
		Machine: thisMachine(), Rounds: c.rounds, Runtime: c.runtime.Seconds(), SizeMiB: c.bed.size >> 20,
	}
	samples := make([]map[string][]sample, len(c.workloads)) // by peer
	for i := range samples {
		samples[i] = map[string][]sample{}
	}
	var errs []error
	for round := range c.rounds {
		for i, w := range c.workloads {
			if ctx.Err() == nil {
				c.say("round %d of %d: %s\n", round+1, c.rounds, w.name)
				c.runWorkload(ctx, w, samples[i])
			}
		}
		r.Memory = c.memory()
		errs = append(errs, c.stop())
	}
	for i, w := range c.workloads {
		result := workloadResult{Name: w.name, Title: w.title, Unit: w.unit}
		for _, p := range c.peers {
			if w.fits(p) {
				result.Peers = append(result.Peers, sum(p.name, samples[i][p.name]))
			}
		}
		r.Workloads = append(r.Workloads, result)
	}
	if ctx.Err() != nil {
		c.fail("stopped before the end: %v", context.Cause(ctx))
	}
	r.Failures = c.failures
	return r, errors.Join(errs...)
}

// runWorkload runs one workload on each peer after the other, in any order, and adds to its samples. If a peer had the
// same one before it each time, that one's work would matter: it decides what memory the kernel has at hand.
func (c *comparison) runWorkload(ctx context.Context, w workload, samples map[string][]sample) {
	for _, i := range rand.Perm(len(c.peers)) {
		p := c.peers[i]
		if !w.fits(p) {
			continue
		}
		s := c.server(ctx, p)
		if s == nil {
			continue
		}
		result, err := w.measure(ctx, c.bed, s, c.runtime)
		if err != nil {
			c.dismiss(ctx, s, w, err)
			continue
		}
		samples[p.name] = append(samples[p.name], result)
	}
}

// server returns the server of a peer and starts it if it does not run. It returns nil if that fails.
func (c *comparison) server(ctx context.Context, p peer) *server {
	if s := c.servers[p.name]; s != nil || c.broken[p.name] == maxBroken || ctx.Err() != nil {
		return s
	}
	s, err := startFilled(ctx, c.bed, p)
	if err != nil {
		c.broken[p.name]++
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
	c.broken[s.peer.name]++
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

// stop stops all servers.
func (c *comparison) stop() error {
	var errs []error
	for name, s := range c.servers {
		errs = append(errs, s.stop())
		delete(c.servers, name)
	}
	return errors.Join(errs...)
}

func (c *comparison) fail(format string, args ...any) {
	c.failures = append(c.failures, fmt.Sprintf(format, args...))
	c.say("\nFAILED: %s\n", c.failures[len(c.failures)-1])
}

// say reports progress. That nobody can read it is no reason to stop.
func (c *comparison) say(format string, args ...any) {
	_, _ = fmt.Fprintf(c.progress, format, args...)
}

// memory is what the servers need besides their devices' contents, as far as they have processes.
func (c *comparison) memory() (found []memoryResult) {
	for _, p := range c.peers {
		s := c.servers[p.name]
		if s == nil || len(s.pids()) == 0 || s.ended() != nil {
			continue
		}
		bytes, err := residentMemory(s.pids())
		if err != nil {
			c.fail("memory of %s: %v", p.name, err)
			continue
		}
		// What the server has mapped of the contents is in there; some read and write them through a descriptor.
		for bytes >= c.bed.size {
			bytes -= c.bed.size
		}
		found = append(found, memoryResult{p.name, float64(bytes) / (1 << 20)})
	}
	return found
}
