// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"sync"
	"sync/atomic"
)

// gate counts the calls in progress on a device, so that its removal can wait for their end. The zero value is open;
// the count is in the low bits of state, and closedBit says that nobody may enter any more.
type gate struct {
	state atomic.Int64

	mu   sync.Mutex
	idle chan struct{} // not nil while shut waits; closed by the last one out
}

const closedBit = 1 << 62

// enter reports whether the caller may go on; if so, leave must follow.
func (g *gate) enter() bool {
	if g.state.Add(1)&closedBit != 0 {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() {
	if g.state.Add(-1) == closedBit {
		g.mu.Lock()
		if g.idle != nil {
			close(g.idle)
			g.idle = nil
		}
		g.mu.Unlock()
	}
}

// again is enter for somebody who is in, and so is not refused; leave must follow.
func (g *gate) again() { g.state.Add(1) }

// Release is leave, for those to whom the device's memory was left.
func (g *gate) Release() { g.leave() }

// open undoes shut.
func (g *gate) open() { g.state.And(^int64(closedBit)) }

// shut lets nobody enter any more and waits until everybody has left. When the context ends first the gate is open
// again, and the result is the context's error. Not for concurrent use.
func (g *gate) shut(ctx context.Context) error {
	idle := make(chan struct{})
	g.mu.Lock()
	g.idle = idle
	g.mu.Unlock()
	g.state.Or(closedBit)
	if g.state.Load() == closedBit { // nobody is in, so perhaps nobody leaves
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		g.open()
		return ctx.Err()
	}
}
