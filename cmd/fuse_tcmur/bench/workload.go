// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"
)

// unit is what a workload's value counts.
type unit string

const (
	iops    unit = "IOPS"
	mbps    unit = "MB/s"
	seconds unit = "s" // less is better
)

// workload is one thing that is measured on each peer.
type workload struct {
	name  string
	title string
	unit  unit
	// Exactly one of fio, ext4 and shell is set.
	fio    fioOptions
	ext4   *ext4Workload
	shell  *shellWorkload
	pinned bool // server and client on one CPU; where the kernel serves this is not possible
	cached bool // through the page cache
	whole  bool // one pass over the device, however long it takes, instead of a fixed time
}

// sample is the outcome of one run.
type sample struct {
	Value float64 `json:"value"` // in the workload's unit
	// The rest is 0 where it cannot be told.
	CPU float64 `json:"cpu,omitempty"` // seconds per 100,000 requests, of client and server
	P50 float64 `json:"p50,omitempty"` // completion latency in microseconds
	P99 float64 `json:"p99,omitempty"`
}

// random is options for 4 KiB requests anywhere, with more to override them.
func random(rw string, more fioOptions) fioOptions {
	options := fioOptions{"rw": rw, "bs": "4k", "ioengine": "psync", "direct": "1"}
	maps.Copy(options, more)
	return options
}

func sequential(rw, bs, depth string) fioOptions {
	options := fioOptions{"rw": rw, "bs": bs, "ioengine": "psync", "direct": "1"}
	if depth != "1" {
		options["ioengine"], options["iodepth"] = "io_uring", depth
	}
	return options
}

// buffered is one pass through the page cache. Writes count until they have reached the server.
func buffered(rw, bs string) fioOptions {
	options := fioOptions{"rw": rw, "bs": bs, "ioengine": "psync", "direct": "0"}
	if rw == "write" {
		options["end_fsync"] = "1"
	}
	return options
}

// workloads is all of them, in the order of the report.
func workloads() []workload {
	qd16 := fioOptions{"ioengine": "io_uring", "iodepth": "16"}
	jobs4 := fioOptions{"numjobs": "4"}
	return []workload{
		{name: "randread-qd1", title: "4k random read, QD1", unit: iops, fio: random("randread", nil)},
		{name: "randwrite-qd1", title: "4k random write, QD1", unit: iops, fio: random("randwrite", nil)},
		{name: "randread-pinned", title: "4k random read, QD1, one CPU", unit: iops, fio: random("randread", nil),
			pinned: true},
		{name: "randwrite-pinned", title: "4k random write, QD1, one CPU", unit: iops, fio: random("randwrite", nil),
			pinned: true},
		{name: "randread-qd16", title: "4k random read, QD16", unit: iops, fio: random("randread", qd16)},
		{name: "randwrite-qd16", title: "4k random write, QD16", unit: iops, fio: random("randwrite", qd16)},
		{name: "randread-4jobs", title: "4k random read, 4 jobs", unit: iops, fio: random("randread", jobs4)},
		{name: "randwrite-4jobs", title: "4k random write, 4 jobs", unit: iops, fio: random("randwrite", jobs4)},
		{name: "mix-qd16", title: "4k random, 70% read, QD16", unit: iops, fio: random("randrw",
			fioOptions{"ioengine": "io_uring", "iodepth": "16", "rwmixread": "70"})},
		{name: "fsync-4k", title: "4k random write, each with fsync", unit: iops,
			fio: random("randwrite", fioOptions{"fsync": "1"})},
		{name: "read-128k", title: "128k sequential read", unit: mbps, fio: sequential("read", "128k", "1")},
		{name: "write-128k", title: "128k sequential write", unit: mbps, fio: sequential("write", "128k", "1")},
		{name: "read-1m", title: "1M sequential read", unit: mbps, fio: sequential("read", "1m", "1")},
		{name: "write-1m", title: "1M sequential write", unit: mbps, fio: sequential("write", "1m", "1")},
		{name: "read-1m-qd4", title: "1M sequential read, QD4", unit: mbps, fio: sequential("read", "1m", "4")},
		{name: "write-1m-qd4", title: "1M sequential write, QD4", unit: mbps, fio: sequential("write", "1m", "4")},
		{name: "buffered-read-4k", title: "4k sequential read, page cache", unit: mbps, fio: buffered("read", "4k"),
			cached: true, whole: true},
		{name: "buffered-write-4k", title: "4k sequential write, page cache", unit: mbps, fio: buffered("write", "4k"),
			cached: true, whole: true},
		{name: "buffered-read-1m", title: "1M sequential read, page cache", unit: mbps, fio: buffered("read", "1m"),
			cached: true, whole: true},
		{name: "buffered-write-1m", title: "1M sequential write, page cache", unit: mbps, fio: buffered("write", "1m"),
			cached: true, whole: true},
		{name: "ext4-cp", title: "ext4 on loop (direct): cp -r of Go's source + sync", unit: seconds,
			ext4: &ext4Workload{copyTree, true}},
		{name: "ext4-tar", title: "ext4 on loop (direct): tar -x of the same + sync", unit: seconds,
			ext4: &ext4Workload{extractTar, true}},
		{name: "ext4-cp-cached", title: "ext4 on loop (page cache): cp -r of Go's source + sync", unit: seconds,
			ext4: &ext4Workload{copyTree, false}, cached: true},
		{name: "ext4-tar-cached", title: "ext4 on loop (page cache): tar -x of the same + sync", unit: seconds,
			ext4: &ext4Workload{extractTar, false}, cached: true},
	}
}

// wholeLimit bounds a pass over the whole device, which a slow server may not finish.
const wholeLimit = 15 * time.Second

// fits reports whether the workload can be run on a peer.
func (w workload) fits(p peer) bool { return !w.pinned || p.name != loop }

// measure runs the workload once on s.
func (w workload) measure(ctx context.Context, b *bed, s *server, runtime time.Duration) (sample, error) {
	if err := s.ended(); err != nil {
		return sample{}, err
	}
	if w.cached && w.ext4 == nil {
		if err := useMemory(b.size); err != nil {
			return sample{}, err
		}
	}
	if w.ext4 != nil {
		t, err := w.ext4.run(ctx, b, s)
		return sample{Value: t.Seconds()}, err
	}
	if w.shell != nil {
		t, err := w.shell.run(ctx, b, s)
		return sample{Value: t.Seconds()}, err
	}
	return w.measureFio(ctx, b, s, runtime)
}

func (w workload) measureFio(ctx context.Context, b *bed, s *server, runtime time.Duration) (result sample, err error) {
	run := fioRun{file: s.direct, size: b.size, options: maps.Clone(w.fio), unblock: s.unblock}
	if w.cached {
		run.file = s.cached
	}
	if w.whole {
		runtime = wholeLimit
	} else {
		run.options["time_based"] = "1"
	}
	run.options["runtime"] = fmt.Sprintf("%dms", runtime.Milliseconds())
	run.timeout = runtime + 30*time.Second
	if w.pinned {
		const cpu = 0
		run.options["cpus_allowed"] = fmt.Sprint(cpu)
		unpin, err := s.pin(cpu)
		if unpin != nil {
			defer func() { err = errors.Join(err, unpin()) }()
		}
		if err != nil {
			return result, err
		}
	}
	pids := s.pids()
	before, err := cpuTime(pids)
	if err != nil {
		return result, err
	}
	r, err := runFio(ctx, run)
	if err != nil {
		return result, err
	}
	after, err := cpuTime(pids)
	if err != nil {
		return result, err
	}
	result.P50, result.P99 = float64(r.P50.Nanoseconds())/1e3, float64(r.P99.Nanoseconds())/1e3
	if len(pids) > 0 {
		cpu := after - before + max(r.CPU-b.fio, 0)
		result.CPU = cpu.Seconds() * 1e5 / float64(r.Requests)
	}
	result.Value = r.IOPS
	if w.unit == mbps {
		result.Value = r.BytesPerSec / 1e6
	}
	return result, nil
}
