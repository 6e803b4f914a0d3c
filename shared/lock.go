// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"runtime"
	"sync/atomic"

	"github.com/fuse-tcmur/fuse_tcmur/shared/watch"
)

// lock is a mutual exclusion lock for sections of well below a microsecond on threads that goroutines are locked to.
// For those a [sync.Mutex] is slow where it has to wait: parking and resuming such a goroutine takes several switches
// of threads, far longer than the wait. The zero value is unlocked.
type lock struct{ held atomic.Bool }

const (
	lockSpins  = 100 // looks at the lock before the processor is offered to others
	lockYields = 20  // offers to other threads before the goroutine scheduler is asked, which may know who has the lock
)

// Lock waits for the lock.
func (l *lock) Lock() {
	for n := 0; !l.TryLock(); n++ {
		switch {
		case n < lockSpins:
			pause()
		case n < lockSpins+lockYields:
			watch.OfferProcessor()
		default:
			runtime.Gosched()
		}
	}
}

// TryLock reports whether the lock was to be had.
func (l *lock) TryLock() bool { return !l.held.Load() && l.held.CompareAndSwap(false, true) }

// Unlock gives it back.
func (l *lock) Unlock() { l.held.Store(false) }
