// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// shortage is how long a request waits for memory of the channel before what is retained there is flushed.
const shortage = 100 * time.Millisecond

// get is Channel.Get for a channel whose memory may have to be freed first. Payloads that are retained stay in the
// channel, up to a half of it. They may lie so scattered that no large piece is left, and as the devices' own limits
// are not reached nothing would flush them: the request would wait for ever, and others behind it.
func (h *handler) get(c *shared.Channel, kind shared.Op, n uint64) (*shared.Request, error) {
	if n <= shared.MaxPayload {
		if r := c.TryGet(kind, n); r != nil {
			return r, nil
		}
	}
	served := make(chan struct{})
	defer close(served)
	go func() {
		again := time.NewTicker(shortage)
		defer again.Stop()
		for {
			select {
			case <-served:
				return
			case <-again.C:
				h.flushRetained()
			}
		}
	}()
	return c.Get(kind, n)
}

// flushRetained has all devices flushed of which something is retained.
func (h *handler) flushRetained() {
	for _, d := range h.lib.devicesServedBy(h) {
		if d.retains.Load() && d.unflushed.held() > 0 {
			d.flushSoon()
		}
	}
}
