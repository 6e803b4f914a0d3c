// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"sync"
	"sync/atomic"
)

// helperPatience is how many small requests in a row tell that large ones are over.
const helperPatience = 16

// helper is a second reader, for while there are several large requests at a time: the kernel copies them on the
// thread that reads the request, or sends the reply. Small requests it would only slow down.
type helper struct {
	reader  *reader
	start   func() // has effect once
	calls   chan struct{}
	awake   atomic.Bool
	running sync.WaitGroup
}

// newHelper makes a helper of a reader. Its thread starts when it is first called.
func newHelper(r *reader) *helper {
	h := &helper{reader: r, calls: make(chan struct{}, 1)}
	h.start = sync.OnceFunc(func() { h.running.Go(h.serve) })
	return h
}

// call is for readers that have come upon a large request that is not alone.
func (h *helper) call() {
	if h.awake.Load() || h.awake.Swap(true) {
		return
	}
	h.start()
	h.calls <- struct{}{} // there is room: one call for each sleep
}

// close ends the thread, when the connection has ended and nobody calls any more.
func (h *helper) close() {
	close(h.calls)
	h.running.Wait()
}

// serve is the thread. It serves until it has met helperPatience requests in a row that are not large.
func (h *helper) serve() {
	r := h.reader
	defer r.prepare()()
	for range h.calls {
		for small := 0; small < helperPatience && !r.ended; {
			r.large = false
			if r.next() {
				r.attend()
			}
			if r.large {
				small = 0
			} else {
				small++
			}
		}
		h.awake.Store(false)
	}
}
