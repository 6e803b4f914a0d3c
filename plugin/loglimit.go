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

// allow reports whether a message may be logged now, in ns since epoch, and how many were not since the last one, with
// this one if it may not.
func (l *logLimit) allow(now int64) (suppressed int64, ok bool) {
	next := l.next.Load()
	if now < next || !l.next.CompareAndSwap(next, now+int64(complaintPause)) {
		return l.suppressed.Add(1), false
	}
	return l.suppressed.Swap(0), true
}

// complain logs the failure of a request, unless the device had one logged a moment ago. Those are counted, and the
// next message, which comes in a while at the latest, says how many they were.
func (d *Device) complain(e *statusError) {
	suppressed, ok := d.stats.fail(e)
	switch {
	case ok:
		d.handler.log.Warn("request failed", "device", d.name, "reason", e.Error(), "suppressed", suppressed)
	case suppressed == 1:
		time.AfterFunc(complaintPause, func() {
			if n := d.stats.complaint.suppressed.Swap(0); n > 0 {
				d.handler.log.Warn("requests failed", "device", d.name, "count", n)
			}
		})
	}
}
