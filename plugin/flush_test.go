// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// TestFlushShared: flushes that are asked for while one is under way share the next one, whose failure is told to all
// of them, and to nobody else.
func TestFlushShared(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/delay=700000,flush@2=4", plugin.DeviceOptions{})
	flushes := func() uint64 { return d.Stats().Ops[shared.OpFlush].Total.Count }
	inFlight := func() bool { return d.Stats().Ops[shared.OpFlush].InFlight > 0 }
	first := make(chan error, 1)
	go func() { first <- d.Flush() }()
	eventually(t, "the first flush", 5*time.Second, inFlight)
	const waiters = 20
	others := make(chan error, waiters)
	for range waiters {
		go func() { others <- d.Flush() }()
	}
	if err := <-first; err != nil {
		t.Errorf("the first flush: %v", err)
	}
	for range waiters {
		if err := <-others; !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush that shares one that fails: %v", err)
		}
	}
	if n := flushes(); n != 2 {
		t.Errorf("the handler was flushed %d times, want twice", n)
	}
	if err := d.Flush(); err != nil || d.FlushFailures() != 1 {
		t.Errorf("the next flush: %v; %d have failed, want 1", err, d.FlushFailures())
	}
}

// TestFlushWaitersSurvive: the end of a host is not the end of a flush that many wait for.
func TestFlushWaitersSurvive(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/delay=100000,lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
	const waiters = 8
	ends := make(chan error, waiters)
	for range waiters {
		go func() { ends <- d.Flush() }()
	}
	eventually(t, "a flush", 5*time.Second, func() bool { return d.Stats().Ops[shared.OpFlush].InFlight > 0 })
	kill(t, l, "fault")
	for range waiters {
		if err := <-ends; err != nil {
			t.Error(err)
		}
	}
	if n := d.Retained(); n != 0 {
		t.Errorf("%d bytes are retained after the flushes", n)
	}
	kill(t, l, "fault")
	wantContents(t, d, block(1), 0)
}
