// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// results is the outcome of a run as it is written to a file.
type results struct {
	Machine   machine          `json:"machine"`
	Rounds    int              `json:"rounds"`
	Runtime   float64          `json:"runtime_seconds"`
	SizeMiB   int64            `json:"size_mib"`
	Notes     []string         `json:"notes,omitempty"` // settings other than the usual
	Workloads []workloadResult `json:"workloads"`
	Memory    []memoryResult   `json:"memory"`
	Failures  []string         `json:"failures,omitempty"`
}

type workloadResult struct {
	Name  string       `json:"name"`
	Title string       `json:"title"`
	Unit  unit         `json:"unit"`
	Peers []peerResult `json:"peers"` // those that were run, ours first
}

type peerResult struct {
	Peer    string   `json:"peer"`
	Samples []sample `json:"samples"`
	// Medians of the samples, and how far their values lie apart.
	Median sample  `json:"median"`
	Spread float64 `json:"spread"`
}

// memoryResult is what a server needs besides the contents of its device, at the end of the run.
type memoryResult struct {
	Peer string  `json:"peer"`
	MiB  float64 `json:"mib"`
}

// sum makes a result of samples.
func sum(peer string, samples []sample) peerResult {
	column := func(of func(sample) float64) []float64 {
		var values []float64
		for _, s := range samples {
			values = append(values, of(s))
		}
		return values
	}
	values := column(func(s sample) float64 { return s.Value })
	return peerResult{
		Peer: peer, Samples: samples, Spread: spread(values),
		Median: sample{
			Value: median(values),
			CPU:   median(column(func(s sample) float64 { return s.CPU })),
			P50:   median(column(func(s sample) float64 { return s.P50 })),
			P99:   median(column(func(s sample) float64 { return s.P99 })),
		},
	}
}

// find returns the result of a peer, nil if it has none.
func (w workloadResult) find(peer string) *peerResult {
	for i := range w.Peers {
		if w.Peers[i].Peer == peer && len(w.Peers[i].Samples) > 0 {
			return &w.Peers[i]
		}
	}
	return nil
}

func readResults(path string) (*results, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &results{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// writeJSON writes anything to a file, in a directory that is made if it is missing.
func writeJSON(path string, what any) error {
	text, err := json.MarshalIndent(what, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(text, '\n'))
}

func writeFile(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}
