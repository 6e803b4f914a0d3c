// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// metric is what a target is about.
type metric int

const (
	value metric = iota // the workload's own
	cpu                 // per request
)

// target is what the ratio of our figure to a peer's should be.
type target struct {
	metric metric
	limit  float64
	atMost bool // the limit is an upper one
}

func atLeast(limit float64) target { return target{limit: limit} }
func atMost(limit float64) target  { return target{limit: limit, atMost: true} }

func cpuAtMost(limit float64) target { return target{metric: cpu, limit: limit, atMost: true} }

// The file system on a loop device, whether that is as mount(8) makes it or past the page cache.
var ext4Targets = map[string][]target{gofuse: {atMost(1.05)}, nbdfuse: {atMost(0.7)}, loop: {atMost(1.25)}}

// targets is what we want, by workload and peer.
var targets = map[string]map[string][]target{
	"randread-qd16":  {gofuse: {atLeast(1)}, nbdfuse: {atLeast(5)}, libfuse: {atLeast(0.65)}},
	"randwrite-qd16": {gofuse: {atLeast(1)}, nbdfuse: {atLeast(5)}, libfuse: {atLeast(0.65)}},
	"randread-4jobs": {
		gofuse: {atLeast(1), cpuAtMost(1.3)}, nbdfuse: {atLeast(4), cpuAtMost(0.35)}, libfuse: {atLeast(0.65)},
	},
	"randread-qd1":      {gofuse: {atLeast(1)}, nbdfuse: {atLeast(2.5)}, libfuse: {atLeast(0.9)}},
	"read-128k":         {gofuse: {atLeast(1.1)}, nbdfuse: {atLeast(1.8)}},
	"read-1m":           {gofuse: {atLeast(0.9)}, nbdfuse: {atLeast(1.6)}},
	"write-1m":          {gofuse: {atLeast(0.95)}, nbdfuse: {atLeast(1.5)}},
	"buffered-write-1m": {gofuse: {atLeast(0.9)}, nbdfuse: {atLeast(1.2)}},
	"ext4-cp":           ext4Targets,
	"ext4-tar":          ext4Targets,
	"ext4-cp-cached":    ext4Targets,
	"ext4-tar-cached":   ext4Targets,
}

// targetFor returns the target of a metric, nil if there is none.
func targetFor(workload, peer string, m metric) *target {
	for _, t := range targets[workload][peer] {
		if t.metric == m {
			return &t
		}
	}
	return nil
}

// met reports whether a ratio is as it should be. A ratio of 0 is one that could not be told.
func (t target) met(ratio float64) bool {
	if t.atMost {
		return ratio > 0 && ratio <= t.limit
	}
	return ratio >= t.limit
}

func (t target) String() string {
	if t.atMost {
		return fmt.Sprintf("<= %.2f", t.limit)
	}
	return fmt.Sprintf(">= %.2f", t.limit)
}
