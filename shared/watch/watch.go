// SPDX-License-Identifier: Apache-2.0

// Package watch is for threads that look out for something that comes soon, instead of sleeping until they are woken.
package watch

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// tooLong is how long others may keep a processor that was offered to them. Those whom a watcher waits for need far
	// less. Others use up their time slice, which is some milliseconds, whereas a thread that is woken comes before them.
	tooLong = 300 * time.Microsecond
	// allowance is how much time may be lost in that way within a period: now and then a hypervisor takes the processor
	// away for longer, too.
	allowance = 20 * time.Millisecond
	period    = 100 * time.Millisecond
	// respite is how long watching is then left alone.
	respite = 250 * time.Millisecond
)

// Watch tells whether it is worth it: where others want to compute it costs far more than it saves. The zero value is
// ready. All methods may be called from several threads at once.
type Watch struct {
	until atomic.Int64 // end of the respite, ns since epoch, as all below
	since atomic.Int64 // beginning of the period
	lost  atomic.Int64 // in the period
}

var epoch = time.Now()

// Pays reports whether to begin watching.
func (w *Watch) Pays() bool {
	until := w.until.Load()
	return until == 0 || int64(time.Since(epoch)) > until
}

// OfferProcessor lets another thread run on this processor, if one wants to.
func OfferProcessor() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// Yield offers the processor to other threads, and reports whether to go on watching. A watcher has to call it every
// few microseconds: what it waits for may need this processor.
func (w *Watch) Yield() bool {
	began := time.Since(epoch)
	OfferProcessor()
	return w.yielded(began, time.Since(epoch))
}

// yielded takes note of how long the processor was gone, both times since epoch.
func (w *Watch) yielded(began, ended time.Duration) bool {
	if ended-began < tooLong {
		return true
	}
	if int64(ended)-w.since.Load() > int64(period) {
		w.since.Store(int64(ended))
		w.lost.Store(0)
	}
	if w.lost.Add(int64(ended-began)) < int64(allowance) {
		return true
	}
	w.lost.Store(0)
	w.until.Store(int64(ended + respite))
	return false
}
