// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync/atomic"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// Statistics of devices. What a request costs is in begin and end: two looks at the clock and a handful of atomic
// additions. Requests are counted as the handler gets them: a longer read or write counts as several, one that is not
// aligned as those that it takes, and flushes of the device's own count as well.

// numOps is one more than the highest shared.Op.
const numOps = int(shared.OpZero) + 1

// Operations lists the operations that statistics tell apart.
func Operations() []shared.Op {
	return []shared.Op{shared.OpRead, shared.OpWrite, shared.OpFlush, shared.OpUnmap, shared.OpZero}
}

// epoch is what times are counted from: reading one clock costs half of what time.Now does, which reads two.
var epoch = time.Now()

// sinceEpoch is now, in ns.
func sinceEpoch() int64 { return int64(time.Since(epoch)) }

// deviceStats is what a device has done since it was added.
type deviceStats struct {
	since time.Time
	ops   [numOps]opStats

	lastError atomic.Pointer[statusError]
	complaint logLimit

	replayed   atomic.Int64 // changes
	resent     atomic.Int64 // requests
	replayLeft atomic.Int64 // bytes of the replay that is under way
	ownFlushes atomic.Int64
}

// opStats is about one operation of a device. Those who issue requests write to another cache line than those who end
// them.
type opStats struct {
	issued atomic.Uint64
	_      [56]byte

	failed atomic.Uint64
	bytes  atomic.Uint64 // of those that did not fail

	total   histogram // from the issue to the end; counts every request that has ended
	queue   histogram // of those that had to wait before their issue
	channel histogram // of those that the host has measured: total less handler
	handler histogram // of the same
}

func newDeviceStats() *deviceStats { return &deviceStats{since: time.Now()} }

// begin accounts for the issue of a request.
func (s *deviceStats) begin(o *op, kind shared.Op) {
	s.ops[kind].issued.Add(1)
	o.issued = sinceEpoch()
}

// end accounts for the end of a request; failures are counted where they become errors.
func (s *deviceStats) end(o *op, failed bool) {
	r := o.req
	of := &s.ops[r.Op]
	took := sinceEpoch() - o.issued
	of.total.add(took)
	if r.HandlerTime > 0 {
		inside := min(int64(r.HandlerTime), took) // a host may say anything
		of.handler.add(inside)
		of.channel.add(took - inside)
	}
	if !failed {
		of.bytes.Add(r.Length)
	}
}

// waited accounts for the time that a request had to wait, from began on, before it could be issued.
func (s *deviceStats) waited(kind shared.Op, began int64) {
	s.ops[kind].queue.add(sinceEpoch() - began)
}

// refused accounts for a request that came to nothing before it was issued.
func (s *deviceStats) refused(kind shared.Op, began int64) {
	of := &s.ops[kind]
	of.issued.Add(1)
	of.total.add(sinceEpoch() - began)
}

// fail counts a failed request, and returns what logLimit.allow says of logging it.
func (s *deviceStats) fail(e *statusError) (suppressed int64, log bool) {
	e.at = sinceEpoch()
	s.ops[e.op].failed.Add(1)
	s.lastError.Store(e)
	return s.complaint.allow(e.at)
}

// replayBegins and replayGoesOn account for the replay of retained changes.
func (s *deviceStats) replayBegins(requests []replayRequest) {
	var bytes int64
	for _, r := range requests {
		if r.op == shared.OpWrite {
			bytes += int64(r.length)
		}
	}
	s.replayLeft.Store(bytes)
}

func (s *deviceStats) replayGoesOn(payload uint64) { s.replayLeft.Add(-int64(payload)) }

func (s *deviceStats) replayEnds() { s.replayLeft.Store(0) }

// DeviceStats is what a device has done since it was added, at one moment.
type DeviceStats struct {
	Since time.Time
	// Ops has an entry for each shared.Op.
	Ops [numOps]OpStats
	// Retained is how many bytes of unflushed writes are kept now, with what keeping them costs; RetainedLimit bounds it.
	Retained, RetainedLimit int64
	// Memory is how many bytes the device has in memory that outlives its host.
	Memory int64
	// Replayed is how many retained changes were sent again, Resent how many requests that were in flight at a death.
	Replayed, Resent int64
	// ReplayLeft is how many bytes the replay that is under way has still to send; 0 if there is none.
	ReplayLeft int64
	// OwnFlushes is how many flushes nobody has asked for: Retained neared its limit.
	OwnFlushes int64
	// LastError is the latest failure of a request, nil if there was none, at LastErrorTime.
	LastError     error
	LastErrorTime time.Time
}

// OpStats is about one operation.
type OpStats struct {
	Count    uint64 // of requests that have ended
	Errors   uint64 // of these
	Bytes    uint64 // of those that did not fail
	InFlight uint64
	// Total is from the issue to the end of all requests. Queue is the wait before the issue, for those requests that
	// could not be issued at once. Channel and Handler are how Total is made up of the way to the host and back and of the
	// handler, for one read or write in eight, and all others.
	Total, Queue, Channel, Handler Latency
}

// Stats tells what the device has done.
func (d *Device) Stats() DeviceStats {
	s := d.stats
	stats := DeviceStats{
		Since:    s.since,
		Retained: d.unflushed.held(), RetainedLimit: d.opts.Retention, Memory: d.memory.size(),
		Replayed: s.replayed.Load(), Resent: s.resent.Load(), ReplayLeft: s.replayLeft.Load(),
		OwnFlushes: s.ownFlushes.Load(),
	}
	for _, kind := range Operations() {
		of, out := &s.ops[kind], &stats.Ops[kind]
		out.Errors, out.Bytes = of.failed.Load(), of.bytes.Load()
		out.Queue, out.Channel, out.Handler = of.queue.snapshot(), of.channel.snapshot(), of.handler.snapshot()
		out.Total = of.total.snapshot()
		out.Count = out.Total.Count
		out.InFlight = of.issued.Load() - out.Count // read last: whatever has ended was issued before
	}
	if e := s.lastError.Load(); e != nil {
		stats.LastError, stats.LastErrorTime = e, epoch.Add(time.Duration(e.at))
	}
	return stats
}
