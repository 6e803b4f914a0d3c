// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// retentionPairs is how many pairs of runs a round consists of. Their order alternates: many short pairs, of which
	// the middle ratio counts, tell more on a noisy machine than a few long ones.
	retentionPairs = 10
	// retentionShare is a run of a pair as a share of a run of other modes.
	retentionShare = 4
	// retentionSize is that of the devices, in bytes. The handler is left out of it as far as possible, so that its
	// caches hold them.
	retentionSize = 16 << 20
)

// retaining is a peer with two devices of one handler that has a flush: of the first one unflushed writes are
// retained, of the second one they are not. The handler's own flush costs nothing.
var retaining = peer{ours, "fuse_tcmur, handler fault", func(ctx context.Context, b *bed, s *server) error {
	if err := b.buildFault(ctx); err != nil {
		return err
	}
	commands := []string{"load fault"}
	// The same configuration would be the same device: one has its size in decimal, the other one in hexadecimal.
	for minor, options := range []string{"replay /fault/volatile,size=%d", "fail /fault/volatile,size=%#x"} {
		commands = append(commands, fmt.Sprintf("add %d %s recovery="+options, minor, b.addDirect, retentionSize))
	}
	files := []string{"fault000", "fault001"}
	err := s.runOurs(ctx, b, files, commands, append([]string{"--handler-prefix", b.handlerPrefix()}, b.oursFlags...)...)
	s.direct, s.cached = s.device(files[0]), s.device(files[1])
	return err
}}

// retentionResult compares a device whose writes are retained with one whose writes are not.
type retentionResult struct {
	Workload string `json:"workload"`
	Pairs    int    `json:"pairs"`
	// IOPS that the retaining device kept of the other one's: the middle one of all pairs, and the quartiles.
	Kept    float64 `json:"kept"`
	LowKept float64 `json:"kept_low"`
	TopKept float64 `json:"kept_high"`
	// CPU is the ratio of what front and host need for a request, the middle one of all pairs.
	CPU    float64 `json:"cpu"`
	Wanted float64 `json:"wanted"` // of Kept
}

// retention is the mode that measures what it costs to retain writes until they are flushed.
func retention(ctx context.Context, b *bed, opts *options) (err error) {
	s, err := startServer(ctx, b, retaining)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	var found []retentionResult
	for _, w := range []struct {
		rw, depth string
		wanted    float64
	}{{"randwrite", "16", 0.95}, {"randwrite", "1", 0.95}, {"randread", "16", 0.98}} {
		r, err := measureRetention(ctx, s, w.rw, w.depth, opts)
		if err != nil {
			return err
		}
		r.Wanted = w.wanted
		found = append(found, r)
	}
	fmt.Println("IOPS of a device whose unflushed writes are retained, as a share of those of one where they are not:")
	for _, r := range found {
		verdict := map[bool]string{true: " ok", false: " MISS"}[atLeast(r.Wanted).met(r.Kept)]
		fmt.Printf("  4k %-15s %.3f   middle half of %d pairs %.3f to %.3f   CPU %.3f   %v%s\n",
			r.Workload, r.Kept, r.Pairs, r.LowKept, r.TopKept, r.CPU, atLeast(r.Wanted), verdict)
	}
	return writeJSON(opts.jsonPath(b, "retention"), struct {
		Machine machine           `json:"machine"`
		Notes   []string          `json:"notes,omitempty"`
		Results []retentionResult `json:"results"`
	}{thisMachine(), opts.notes(), found})
}

// measureRetention runs pairs of the same workload on both devices.
func measureRetention(ctx context.Context, s *server, rw, depth string, opts *options) (retentionResult, error) {
	result := retentionResult{Workload: rw + " QD" + depth}
	var kept, cpu []float64
	for pair := range opts.rounds * retentionPairs {
		var iops, used [2]float64
		for i := range 2 {
			which := (pair + i) % 2
			before, err := cpuTime(s.pids())
			if err != nil {
				return result, err
			}
			r, err := runFio(ctx, fioRun{
				file: []string{s.direct, s.cached}[which], size: retentionSize, unblock: s.unblock,
				options: random(rw, fioOptions{
					"ioengine": "io_uring", "iodepth": depth, "time_based": "1",
					"runtime": fmt.Sprintf("%dms", max(opts.runtime/retentionShare, 100*time.Millisecond).Milliseconds()),
				}),
				timeout: opts.runtime + time.Minute,
			})
			if err != nil {
				return result, fmt.Errorf("retention, %s: %w", result.Workload, err)
			}
			after, err := cpuTime(s.pids())
			if err != nil {
				return result, err
			}
			iops[which], used[which] = r.IOPS, (after-before).Seconds()/float64(r.Requests)
		}
		kept, cpu = append(kept, ratio(iops[0], iops[1])), append(cpu, ratio(used[0], used[1]))
	}
	slices.Sort(kept)
	result.Pairs, result.Kept, result.CPU = len(kept), median(kept), median(cpu)
	result.LowKept, result.TopKept = kept[len(kept)/4], kept[len(kept)*3/4]
	return result, nil
}
