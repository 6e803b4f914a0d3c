// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Answers without a copy. Where a handler says that kept memory is what is on its device, byte for byte, the front maps
// it, and the host may answer reads by "it is there": the kernel then copies the data from there to the reader. What is
// there may change meanwhile, as with any two requests that are under way at the same time.
//
// The front itself never looks at a byte of it. The host may shorten the memory whenever it likes, and reading what is
// mapped beyond the end is a fault; for a system call that is EFAULT.

// contents is a view of a device's kept memory.
type contents struct {
	view atomic.Pointer[[]byte] // mapped read-only, perhaps beyond the memory's end; nil: there is none

	mu    sync.Mutex
	name  string   // of the kept memory; "": the handler does not say
	views [][]byte // all mappings: earlier ones may be in use until the end
}

// look takes over what a reply to Open says. No request of the device is under way.
func (c *contents) look(d *Device, name string) {
	c.mu.Lock()
	if name != c.name {
		c.name = name
		c.view.Store(nil)
	}
	c.mu.Unlock()
	c.extend(d)
}

// extend makes sure that the view, if there is one, is as long as the device. Without address space for that the device
// works as if nothing was said.
func (c *contents) extend(d *Device) {
	c.mu.Lock()
	defer c.mu.Unlock()
	size := d.Size()
	if c.name == "" || c.have(0, int(size)) {
		return
	}
	// A power of two, so that few views are left behind by a device that grows in small steps.
	length := int64(1) << bits.Len64(uint64(size-1))
	view, err := d.memory.mapRegion(c.name, int(length))
	if err != nil {
		d.handler.log.Warn("reads of the device are copied, its memory could not be mapped", "device", d.name,
			"memory", c.name, "error", err)
		return
	}
	c.views = append(c.views, view)
	c.view.Store(&view)
}

// have reports whether n bytes at off are in view.
func (c *contents) have(off int64, n int) bool {
	return c.at(off, n) != nil
}

// at is n bytes at off; nil if they are not in view (any more).
func (c *contents) at(off int64, n int) []byte {
	view := c.view.Load()
	if view == nil || off+int64(n) > int64(len(*view)) {
		return nil
	}
	return (*view)[off : off+int64(n) : off+int64(n)]
}

// unmap ends all views. No request of the device is under way, nor will be.
func (c *contents) unmap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.name = ""
	c.view.Store(nil)
	for _, view := range c.views {
		_ = unix.Munmap(view)
	}
	c.views = nil
}
