// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// fioOptions are options of a fio job, without the dashes.
type fioOptions map[string]string

// fioRun is one call of fio.
type fioRun struct {
	file    string
	files   []string // instead of file: one job for each
	size    int64    // of what is accessed, in bytes
	options fioOptions
	timeout time.Duration
	unblock func() // as in command
}

// fioResult is what one call of fio found, all jobs together.
type fioResult struct {
	Requests    int64   // that fio made
	IOPS        float64 // reads and writes
	BytesPerSec float64
	P50, P99    time.Duration // completion latency, of reads if there are any
	CPU         time.Duration // of the fio process, its start included
}

// argv is fio's command line. Options of the run override those that hold for all runs.
func (r fioRun) argv() []string {
	options := fioOptions{
		"size": strconv.FormatInt(r.size, 10), "output-format": "json", "thread": "1", "group_reporting": "1",
		"norandommap": "1", "randrepeat": "0", "allow_file_create": "0", "percentile_list": "50:99",
		// Filling buffers anew for each write would be the client's work, not the server's.
		"scramble_buffers": "0",
	}
	maps.Copy(options, r.options)
	argv := []string{"fio"}
	for _, key := range slices.Sorted(maps.Keys(options)) {
		argv = append(argv, "--"+key+"="+options[key])
	}
	files := r.files
	if len(files) == 0 {
		files = []string{r.file}
	}
	for i, file := range files {
		argv = append(argv, fmt.Sprintf("--name=job%d", i), "--filename="+file)
	}
	return argv
}

func runFio(ctx context.Context, r fioRun) (fioResult, error) {
	out, cpu, err := command{argv: r.argv(), timeout: r.timeout, unblock: r.unblock}.run(ctx)
	if err != nil {
		return fioResult{}, err
	}
	result, err := parseFio(out)
	result.CPU = cpu
	return result, err
}

// fioReport is the part of fio's JSON output that is used.
type fioReport struct {
	Jobs []struct {
		Error int      `json:"error"`
		Read  fioGroup `json:"read"`
		Write fioGroup `json:"write"`
	} `json:"jobs"`
}

type fioGroup struct {
	Requests    int64   `json:"total_ios"`
	IOPS        float64 `json:"iops"`
	BytesPerSec float64 `json:"bw_bytes"`
	Completion  struct {
		Percentile map[string]int64 `json:"percentile"` // nanoseconds
	} `json:"clat_ns"`
}

// parseFio reads what fio printed. Lines before the JSON, where fio puts warnings, are skipped. It expects group
// reporting: jobs are one group, and latencies of several groups could not be put together.
func parseFio(out []byte) (fioResult, error) {
	var result fioResult
	begin := bytes.IndexByte(out, '{')
	if begin < 0 {
		return result, fmt.Errorf("fio printed no JSON but %q", out)
	}
	var report fioReport
	if err := json.Unmarshal(out[begin:], &report); err != nil {
		return result, fmt.Errorf("output of fio: %w", err)
	}
	if len(report.Jobs) != 1 {
		return result, fmt.Errorf("output of fio: %d groups of jobs instead of one", len(report.Jobs))
	}
	job := report.Jobs[0]
	if job.Error != 0 {
		return result, fmt.Errorf("fio met error %d", job.Error)
	}
	result.Requests = job.Read.Requests + job.Write.Requests
	result.IOPS = job.Read.IOPS + job.Write.IOPS
	result.BytesPerSec = job.Read.BytesPerSec + job.Write.BytesPerSec
	if result.Requests == 0 {
		return result, errors.New("fio made no request")
	}
	latency := job.Read
	if job.Read.Requests == 0 {
		latency = job.Write
	}
	result.P50 = time.Duration(latency.Completion.Percentile["50.000000"])
	result.P99 = time.Duration(latency.Completion.Percentile["99.000000"])
	return result, nil
}

// calibrateFio measures what a fio costs that does next to nothing, to be subtracted from what others cost. It may
// make a file in dir.
func calibrateFio(ctx context.Context, dir string) (time.Duration, error) {
	var costs []time.Duration
	for range 3 {
		r, err := runFio(ctx, fioRun{
			size: 4096, options: fioOptions{"ioengine": "null", "rw": "randread", "bs": "4k", "allow_file_create": "1"},
			file: filepath.Join(dir, "none"), timeout: 30 * time.Second,
		})
		if err != nil {
			return 0, err
		}
		costs = append(costs, r.CPU)
	}
	slices.Sort(costs)
	return costs[1], nil
}
