// SPDX-License-Identifier: Apache-2.0

package shared

// Suspend stops the channel's service for a while, without the host's knowing: Get and TryGet hand out nothing, as
// after Abandon, and requests that are submitted from now on end with ErrPeerGone, unless GetPrivileged made them.
// Those in flight are not touched; Pending tells when there are none any more.
func (c *Channel) Suspend() {
	c.memMu.Lock()
	c.suspended = true
	waiters := c.waiters
	c.waiters = nil
	c.memMu.Unlock()
	for _, w := range waiters {
		w.ready <- nil
	}
	c.sqMu.Lock()
	c.refusing = true
	c.sqMu.Unlock()
}

// Resume ends what Suspend began.
func (c *Channel) Resume() {
	c.sqMu.Lock()
	c.refusing = false
	c.sqMu.Unlock()
	c.memMu.Lock()
	c.suspended = false
	c.memMu.Unlock()
}

// GetPrivileged is TryGet that a suspended channel serves too, for those who have suspended it.
func (c *Channel) GetPrivileged(op Op, n uint64) *Request {
	c.memMu.Lock()
	defer c.memMu.Unlock()
	if c.closed {
		return nil
	}
	r := c.tryGet(op, n)
	if r != nil {
		r.privileged = true
	}
	return r
}

// Pending is the number of requests that the host has been sent and has not completed. Their Done may still be running
// for a moment when it falls to 0.
func (c *Channel) Pending() int {
	n := 0
	for t := range c.requests {
		if c.requests[t].inflight.Load() {
			n++
		}
	}
	return n
}
