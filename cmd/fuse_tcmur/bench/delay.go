// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"
)

// handlerDelay is what is added to each request to see how many are under way at once.
const handlerDelay = 50 * time.Millisecond

// delayed is a peer with a slow handler.
var delayed = []peer{
	{ours, "fuse_tcmur, handler fault", func(ctx context.Context, b *bed, s *server) error {
		if err := b.buildFault(ctx); err != nil {
			return err
		}
		add := fmt.Sprintf("add 0 %s /fault/size=%d,delay=%d", b.addDirect, b.size, handlerDelay.Microseconds())
		s.direct = "fault000"
		err := s.runOurs(ctx, b, []string{s.direct}, []string{"load fault", add},
			append([]string{"--handler-prefix", b.handlerPrefix()}, b.oursFlags...)...)
		s.direct = s.device(s.direct)
		return err
	}},
	{nbdfuse, "nbdfuse + nbdkit memory with its delay filter", func(ctx context.Context, b *bed, s *server) error {
		if err := s.makeMount(); err != nil {
			return err
		}
		s.direct = filepath.Join(s.mount, "nbd")
		return s.run(ctx, []string{s.direct}, "nbdfuse", s.direct, "[", "nbdkit", "--foreground", "--filter=delay", "memory",
			strconv.FormatInt(b.size, 10), fmt.Sprintf("delay-read=%dms", handlerDelay.Milliseconds()), "]")
	}},
}

// delayResult is how many requests a peer had under way at a queue depth.
type delayResult struct {
	Peer     string  `json:"peer"`
	Depth    int     `json:"depth"`
	InFlight float64 `json:"in_flight"` // median, by Little's law
	Spread   float64 `json:"spread"`
	Wanted   float64 `json:"wanted,omitempty"`
}

// inFlightTargets is what we want to have under way, by queue depth.
var inFlightTargets = map[int]float64{32: 31, 256: 250}

// delay is the mode that counts requests under way at a slow handler.
func delay(ctx context.Context, b *bed, opts *options) (err error) {
	var found []delayResult
	for _, p := range delayed {
		s, err := startServer(ctx, b, p)
		if err != nil {
			return err
		}
		results, err := measureDelay(ctx, b, s, opts)
		if err := errors.Join(err, s.stop()); err != nil {
			return err
		}
		found = append(found, results...)
	}
	fmt.Printf("Requests under way, random reads of 4 KiB, each delayed by %v in the handler:\n", handlerDelay)
	for _, r := range found {
		line := fmt.Sprintf("  %-8s QD%-4d %6.1f   spread %.0f%%", r.Peer, r.Depth, r.InFlight, 100*r.Spread)
		if r.Wanted > 0 {
			t := atLeast(r.Wanted)
			line += "   " + t.String() + map[bool]string{true: " ok", false: " MISS"}[t.met(r.InFlight)]
		}
		fmt.Println(line)
	}
	return writeJSON(opts.jsonPath(b, "delay"), struct {
		Machine machine       `json:"machine"`
		Notes   []string      `json:"notes,omitempty"`
		Results []delayResult `json:"results"`
	}{thisMachine(), opts.notes(), found})
}

func measureDelay(ctx context.Context, b *bed, s *server, opts *options) ([]delayResult, error) {
	var results []delayResult
	// The first use of memory by so many threads takes some hypervisors 10 ms.
	if err := fill(ctx, s.direct, b.size, 64, s.unblock); err != nil {
		return nil, fmt.Errorf("%s: %w", s.peer.name, err)
	}
	for _, depth := range []int{32, 256} {
		var values []float64
		for range opts.rounds {
			r, err := runFio(ctx, fioRun{
				file: s.direct, size: b.size, timeout: opts.runtime + time.Minute, unblock: s.unblock,
				options: random("randread", fioOptions{
					"ioengine": "io_uring", "iodepth": strconv.Itoa(depth), "time_based": "1",
					// It takes a while until all are under way.
					"ramp_time": fmt.Sprintf("%dms", (10 * handlerDelay).Milliseconds()),
					// Enough delays that the last, in which no new requests come, weighs little.
					"runtime": fmt.Sprintf("%dms", max(opts.runtime, 200*handlerDelay).Milliseconds()),
				}),
			})
			if err != nil {
				return nil, fmt.Errorf("%s at QD%d: %w", s.peer.name, depth, err)
			}
			values = append(values, r.IOPS*handlerDelay.Seconds())
		}
		result := delayResult{Peer: s.peer.name, Depth: depth, InFlight: median(values), Spread: spread(values)}
		if s.peer.name == ours {
			result.Wanted = inFlightTargets[depth]
		}
		results = append(results, result)
	}
	return results, nil
}
