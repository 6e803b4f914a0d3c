// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"sync"
	"sync/atomic"
)

const (
	handlePageSize = 256
	handlePages    = 4096 // bounds the number of files open at once to about a million
)

// handleTable maps the file handles that the kernel passes in each request to open files. Reads and writes look up
// their file here, so get takes no lock.
//
// A handle is used again after put: the kernel sends RELEASE only when no other request refers to the handle.
type handleTable struct {
	pages [handlePages]atomic.Pointer[handlePage]

	mu   sync.Mutex // guards what follows
	next uint64     // lowest handle never given out
	free []uint64   // handles to give out again, last first
}

type handlePage [handlePageSize]atomic.Pointer[File]

// put enters f and sets f.handle. It returns false when the table is full.
func (h *handleTable) put(f *File) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.free); n > 0 {
		f.handle = h.free[n-1]
		h.free = h.free[:n-1]
	} else {
		f.handle = max(h.next, 1) // 0 stands for "no handle"
		if f.handle >= handlePages*handlePageSize {
			return false
		}
		h.next = f.handle + 1
	}
	page := &h.pages[f.handle/handlePageSize]
	if page.Load() == nil {
		page.Store(new(handlePage))
	}
	page.Load()[f.handle%handlePageSize].Store(f)
	return true
}

// get returns the open file of a handle, nil if there is none.
func (h *handleTable) get(handle uint64) *File {
	if handle >= handlePages*handlePageSize {
		return nil
	}
	page := h.pages[handle/handlePageSize].Load()
	if page == nil {
		return nil
	}
	return page[handle%handlePageSize].Load()
}

// take removes a handle and returns its file, nil if there is none.
func (h *handleTable) take(handle uint64) *File {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.get(handle)
	if f != nil {
		h.pages[handle/handlePageSize].Load()[handle%handlePageSize].Store(nil)
		h.free = append(h.free, handle)
	}
	return f
}

// all returns the open files at this moment.
func (h *handleTable) all() []*File {
	h.mu.Lock()
	defer h.mu.Unlock()
	var files []*File
	for handle := uint64(1); handle < h.next; handle++ {
		if f := h.get(handle); f != nil {
			files = append(files, f)
		}
	}
	return files
}
