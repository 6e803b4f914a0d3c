// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// The attributes below /sys: for each device what /sys/block has for a block device, in the kernel's formats, and for
// each handler what its process is.

// sectorSize is the unit of the kernel's counts and sizes, whatever a device's block size is.
const sectorSize = 512

// showDevice makes the attributes of a device.
func (f *front) showDevice(node *deviceNode) (*branch, error) {
	b, err := newBranch(f.tree, node.device.Name(), f.blockDir)
	if err != nil {
		return nil, err
	}
	d := node.device
	err = b.addTexts(b.dir, []attribute{
		{"size", func() string { return line(d.Size() / sectorSize) }},
		{"ro", func() string { return bit(d.ReadOnly()) }},
		{"state", func() string { return line(f.deviceState(d)) }},
		{"cache", func() string { return line(node.cache()) }},
		{"stat", node.statText},
		{"inflight", func() string { return inFlightText(d.Stats()) }},
	})
	if err == nil {
		queue, mkdirErr := b.mkdir("queue", b.dir)
		if err = mkdirErr; err == nil {
			err = b.addTexts(queue, []attribute{
				{"logical_block_size", func() string { return line(d.BlockSize()) }},
				{"max_sectors_kb", func() string { return line(d.MaxXfer() / 1024) }},
				{"discard_granularity", func() string { return line(discardGranularity(d)) }},
				{"rotational", func() string { return bit(d.Attributes().Rotational) }},
				{"nr_requests", func() string { return line(shared.RingEntries) }},
			})
		}
	}
	if err != nil {
		return nil, errors.Join(err, b.remove())
	}
	return b, nil
}

// showHandler makes the attributes of a handler's host.
func (f *front) showHandler(subtype string) (*branch, error) {
	b, err := newBranch(f.tree, subtype, f.hostsDir)
	if err != nil {
		return nil, err
	}
	show := func(what func(plugin.HandlerInfo) any) func() string {
		return func() string {
			info, _ := f.handler(subtype)
			return line(what(info))
		}
	}
	err = b.addTexts(b.dir, []attribute{
		{"pid", show(func(h plugin.HandlerInfo) any { return h.PID })},
		{"state", show(func(h plugin.HandlerInfo) any { return h.State })},
		{"restarts", show(func(h plugin.HandlerInfo) any { return h.Restarts })},
		{"abi", show(func(h plugin.HandlerInfo) any { return h.ABI })},
		{"path", show(func(h plugin.HandlerInfo) any { return h.Path })},
	})
	if err != nil {
		return nil, errors.Join(err, b.remove())
	}
	return b, nil
}

func line(value any) string { return fmt.Sprintln(value) }

func bit(on bool) string {
	if on {
		return "1\n"
	}
	return "0\n"
}

// deviceState is that of the device's handler, unless it has failed alone.
func (f *front) deviceState(d device) string {
	if d.Failure() != nil {
		return string(plugin.HandlerFailed)
	}
	if info, ok := f.handler(d.Handler()); ok {
		return string(info.State)
	}
	return string(plugin.HandlerRunning)
}

// discardGranularity is in bytes; 0 where nothing can be discarded.
func discardGranularity(d device) int {
	if d.Options().NoDiscard {
		return 0
	}
	return d.BlockSize()
}

// inFlightText is as in /sys/block/*/inflight: reads and writes.
func inFlightText(stats plugin.DeviceStats) string {
	return fmt.Sprintf("%8d %8d\n", stats.Ops[shared.OpRead].InFlight, stats.Ops[shared.OpWrite].InFlight)
}

// busyTime estimates how long a device had requests in flight, which the kernel calls io_ticks. Nothing measures that:
// between two looks it is what the requests took together, and no more than the time that has passed.
type busyTime struct {
	mu     sync.Mutex // guards the fields below
	last   time.Time
	taken  time.Duration // by all requests, at the last look
	result time.Duration
}

// at is the estimate for a moment when the requests have taken so long altogether.
func (b *busyTime) at(now time.Time, taken time.Duration, since time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last.IsZero() {
		b.last = since
	}
	if now.After(b.last) {
		b.result += max(0, min(taken-b.taken, now.Sub(b.last)))
		b.last, b.taken = now, taken
	}
	return b.result
}

// statText is as in /sys/block/*/stat, see block/stat.rst of the kernel's documentation: requests, merges (none),
// sectors and milliseconds of reads and of writes; requests in flight; milliseconds busy, and of all requests together;
// then the same four for discards, and the number and milliseconds of flushes. What zeroes a range counts as a write.
func (n *deviceNode) statText() string {
	stats := n.device.Stats()
	read, write := stats.Ops[shared.OpRead], stats.Ops[shared.OpWrite]
	zero, unmap, flush := stats.Ops[shared.OpZero], stats.Ops[shared.OpUnmap], stats.Ops[shared.OpFlush]
	var inFlight uint64
	var taken time.Duration
	for _, op := range stats.Ops {
		inFlight += op.InFlight
		taken += op.Total.Sum
	}
	ms := func(t time.Duration) int64 { return t.Milliseconds() }
	return fmt.Sprintf("%8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d\n",
		read.Count, 0, read.Bytes/sectorSize, ms(read.Total.Sum),
		write.Count+zero.Count, 0, (write.Bytes+zero.Bytes)/sectorSize, ms(write.Total.Sum+zero.Total.Sum),
		inFlight, ms(n.busy.at(time.Now(), taken, stats.Since)), ms(taken),
		unmap.Count, 0, unmap.Bytes/sectorSize, ms(unmap.Total.Sum),
		flush.Count, ms(flush.Total.Sum))
}
