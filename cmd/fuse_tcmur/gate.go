// SPDX-License-Identifier: Apache-2.0

package main

import (
	"sort"
	"sync"
	"syscall"
	"time"
)

// gate counts who has nodes open, and shuts when the program stops: what was found idle then stays idle.
//
// The counts are those of OPEN and RELEASE as the kernel sends them. RELEASE comes some time after close(2) has
// returned, which is why the ways to ask for idleness take a grace period.
type gate struct {
	mu       sync.Mutex // guards the fields below
	stopping bool
	devices  map[*deviceNode]*openCount // only nodes that are open
	ctl      int
	released chan struct{} // closed and replaced at each release
}

// openCount is how often a node is open, and how often of these for writing.
type openCount struct{ opens, writers int }

// openDevice describes a node that is open.
type openDevice struct {
	name string
	openCount
}

func newGate() *gate {
	return &gate{devices: map[*deviceNode]*openCount{}, released: make(chan struct{})}
}

// refuseWhenStopping returns ESHUTDOWN once the program has begun to stop.
func (g *gate) refuseWhenStopping() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refuseLocked()
}

func (g *gate) refuseLocked() error {
	if g.stopping {
		return failf(syscall.ESHUTDOWN, "the server is stopping")
	}
	return nil
}

// enterDevice counts an open of a device node, or refuses it (ESHUTDOWN).
func (g *gate) enterDevice(node *deviceNode, writable bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.refuseLocked(); err != nil {
		return err
	}
	count := g.devices[node]
	if count == nil {
		count = &openCount{}
		g.devices[node] = count
	}
	count.opens++
	if writable {
		count.writers++
	}
	return nil
}

// leaveDevice undoes an enterDevice.
func (g *gate) leaveDevice(node *deviceNode, writable bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	count := g.devices[node]
	count.opens--
	if writable {
		count.writers--
	}
	if count.opens == 0 {
		delete(g.devices, node)
	}
	g.signalLocked()
}

// enterCtl counts an open of the command node, or refuses it (ESHUTDOWN).
func (g *gate) enterCtl() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.refuseLocked(); err != nil {
		return err
	}
	g.ctl++
	return nil
}

// leaveCtl undoes an enterCtl.
func (g *gate) leaveCtl() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ctl--
	g.signalLocked()
}

func (g *gate) signalLocked() {
	close(g.released)
	g.released = make(chan struct{})
}

// openDevices lists the device nodes that are open, by name.
func (g *gate) openDevices() []openDevice {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.openDevicesLocked()
}

func (g *gate) openDevicesLocked() []openDevice {
	var open []openDevice
	for node, count := range g.devices {
		open = append(open, openDevice{name: node.device.Name(), openCount: *count})
	}
	sort.Slice(open, func(i, j int) bool { return open[i].name < open[j].name })
	return open
}

// shutWhenIdle begins to stop if no device node is open or all of them are released within grace: from then on nothing
// can be opened. Otherwise it changes nothing and returns the nodes that are open.
func (g *gate) shutWhenIdle(grace time.Duration) []openDevice {
	var open []openDevice
	g.waitFor(grace, func() bool {
		if open = g.openDevicesLocked(); len(open) > 0 {
			return false
		}
		g.stopping = true
		return true
	})
	return open
}

// shut begins to stop, whatever is open.
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopping = true
}

// waitCtlClosed waits until nobody has the command node open, and reports whether that came true within grace.
func (g *gate) waitCtlClosed(grace time.Duration) bool {
	return g.waitFor(grace, func() bool { return g.ctl == 0 })
}

// waitFor asks condition, under the lock, now and after each release until it holds or grace is over.
func (g *gate) waitFor(grace time.Duration, condition func() bool) bool {
	timeout := time.NewTimer(grace)
	defer timeout.Stop()
	for {
		g.mu.Lock()
		holds, released := condition(), g.released
		g.mu.Unlock()
		if holds {
			return true
		}
		select {
		case <-released:
		case <-timeout.C:
			return false
		}
	}
}
