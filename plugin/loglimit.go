// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"sync/atomic"
	"time"
)

// complaintPause is how long after a message about a failed request of a device the next one follows at the earliest.
const complaintPause = 10 * time.Second

// logLimit lets a message through now and then and counts the others. The zero value is ready.
type logLimit struct {
	next       atomic.Int64 // sinceEpoch of the earliest next message
	suppressed atomic.Int64
}

// allow reports whether a message may be logged now, in ns since epoch, and how many were not since the last one.
func (l *logLimit) allow(now int64) (suppressed int64, ok bool) {
	next := l.next.Load()
	if now < next || !l.next.CompareAndSwap(next, now+int64(complaintPause)) {
		l.suppressed.Add(1)
		return 0, false
	}
	return l.suppressed.Swap(0), true
}

// overdue returns how many messages were suppressed, once a new one could be logged; those are settled then.
func (l *logLimit) overdue(now int64) int64 {
	if l.suppressed.Load() == 0 || now < l.next.Load() {
		return 0
	}
	return l.suppressed.Swap(0)
}

// complain logs the failure of a request, unless the device had one logged a moment ago.
func (d *Device) complain(e *statusError) {
	if suppressed, ok := d.stats.fail(e); ok {
		d.handler.log.Warn("request failed", "device", d.name, "reason", e.Error(), "suppressed", suppressed)
	}
}

// settleComplaints logs how many failures were not logged, where no further one has brought that to light.
func (l *Library) settleComplaints() {
	for _, d := range l.Devices() {
		if n := d.stats.complaint.overdue(sinceEpoch()); n > 0 {
			d.handler.log.Warn("requests failed", "device", d.name, "count", n)
		}
	}
}
