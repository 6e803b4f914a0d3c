// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestGateCounts(t *testing.T) {
	g := newGate()
	a := &deviceNode{device: &fakeDevice{name: "a"}}
	b := &deviceNode{device: &fakeDevice{name: "b"}}
	for _, writable := range []bool{true, false} {
		if err := g.enterDevice(b, writable); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.enterDevice(a, false); err != nil {
		t.Fatal(err)
	}
	want := []openDevice{{"a", openCount{1, 0}}, {"b", openCount{2, 1}}}
	if diff := cmp.Diff(want, g.openDevices(), cmp.AllowUnexported(openDevice{}, openCount{})); diff != "" {
		t.Error(diff)
	}
	if open := g.shutWhenIdle(0); len(open) != 2 || g.refuseWhenStopping() != nil {
		t.Errorf("shut with %v open", open)
	}
	g.leaveDevice(a, false)
	g.leaveDevice(b, true)
	g.leaveDevice(b, false)
	if open := g.shutWhenIdle(0); len(open) != 0 || g.refuseWhenStopping() == nil {
		t.Errorf("not shut, with %v open", open)
	}
}

// TestGateWaitsForRelease: a release that comes within the grace period counts.
func TestGateWaitsForRelease(t *testing.T) {
	g := newGate()
	node := &deviceNode{device: &fakeDevice{name: "a"}}
	if err := g.enterDevice(node, true); err != nil {
		t.Fatal(err)
	}
	result := make(chan []openDevice)
	go func() { result <- g.shutWhenIdle(time.Minute) }()
	g.leaveDevice(node, true)
	if open := <-result; len(open) != 0 {
		t.Errorf("%v is still open", open)
	}
}
