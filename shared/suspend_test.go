// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"errors"
	"testing"
)

// TestSuspend: a suspended channel lets nothing through but what is privileged, whether it was asked for before or not,
// and lets go those who wait for memory; what was in flight ends as ever.
func TestSuspend(t *testing.T) {
	t.Parallel()
	c := newChannel(t, Options{Memory: MaxPayload})
	held := make(chan struct{})
	newPeer(t, c).serve(1, func(s submission) uint32 {
		if s.device == 1 {
			<-held
		}
		return 0
	})
	send := func(r *Request, device uint32) <-chan error {
		done := make(chan error, 1)
		r.Device, r.Done = device, func(r *Request) { done <- r.Err }
		c.Submit(r)
		return done
	}
	get := func(op Op, n uint64) *Request {
		r, err := c.Get(op, n)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	inFlight, before, memory := get(OpFlush, 0), get(OpFlush, 0), get(OpWrite, MaxPayload)
	inFlightDone := send(inFlight, 1)
	waiter := make(chan error, 1)
	go func() {
		_, err := c.Get(OpWrite, MaxPayload)
		waiter <- err
	}()

	c.Suspend()
	if err := <-waiter; !errors.Is(err, ErrPeerGone) {
		t.Errorf("who waits for memory: %v", err)
	}
	if _, err := c.Get(OpFlush, 0); !errors.Is(err, ErrPeerGone) {
		t.Errorf("Get: %v", err)
	}
	if c.TryGet(OpFlush, 0) != nil {
		t.Error("TryGet hands out a request")
	}
	if err := <-send(before, 0); !errors.Is(err, ErrPeerGone) || before.Sent {
		t.Errorf("a request from before: %v, sent %v", err, before.Sent)
	}
	if n := c.Pending(); n != 1 {
		t.Errorf("%d requests are pending, want 1", n)
	}
	close(held)
	if err := <-inFlightDone; err != nil || c.Pending() != 0 {
		t.Errorf("the request in flight: %v; %d are pending", err, c.Pending())
	}
	privileged := c.GetPrivileged(OpFlush, 0)
	if err := <-send(privileged, 0); err != nil {
		t.Errorf("a privileged request: %v", err)
	}

	c.Resume()
	if err := <-send(before, 0); err != nil {
		t.Errorf("the request from before, sent again: %v", err)
	}
	after := get(OpFlush, 0)
	if err := <-send(after, 0); err != nil {
		t.Errorf("a request after it: %v", err)
	}
	for _, r := range []*Request{inFlight, before, memory, privileged, after} {
		r.Release()
	}
	c.Abandon()
	c.Resume()
	if c.TryGet(OpFlush, 0) != nil || c.GetPrivileged(OpFlush, 0) != nil {
		t.Error("an abandoned channel was resumed")
	}
}
