// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// transfer is a Completion that copies what was read, and survives when it cannot be.
type transfer struct {
	p    []byte
	err  error
	done chan struct{}
}

func (c *transfer) Complete(data []byte, _ int, err error) {
	defer close(c.done)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault, ok := recover().(interface{ Addr() uintptr }); ok && fault != nil {
			c.err = syscall.EFAULT
		}
	}()
	c.err = err
	copy(c.p, data)
}

// startRead reads on the fast path, which alone has answers in place.
func startRead(t *testing.T, d *plugin.Device, p []byte, off int64) error {
	t.Helper()
	c := &transfer{p: p, done: make(chan struct{})}
	eventually(t, "the fast path to take a read", 10*time.Second, func() bool { // not while another host takes over
		return d.StartRead(len(p), off, c)
	})
	d.Commit(nil)
	select {
	case <-c.done:
	case <-time.After(10 * time.Second):
		t.Fatal("read does not end")
	}
	return c.err
}

func wantRead(t *testing.T, d *plugin.Device, want []byte, off int64) {
	t.Helper()
	got := make([]byte, len(want))
	if err := startRead(t, d, got, off); err != nil {
		t.Fatalf("%s: read of %d bytes at %d: %v", d.Name(), len(want), off, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: read of %d bytes at %d is wrong, %#x... instead of %#x...", d.Name(), len(want), off, got[0], want[0])
	}
}

// TestReadsInPlace has a handler leave the data of reads where it is. What it puts into the buffer is wrong.
func TestReadsInPlace(t *testing.T) {
	l, log := open(t, "keep")
	load(t, l, "keep")
	place := add(t, l, 0, "/keep/place", plugin.DeviceOptions{})
	nowhere := add(t, l, 1, "/keep/nowhere", plugin.DeviceOptions{})
	small := add(t, l, 2, "/keep/place/small", plugin.DeviceOptions{MaxXfer: 4096})
	log.waitFor(t, "could not be mapped")
	for round := range 3 {
		for i := range 64 {
			for _, d := range []*plugin.Device{place, nowhere, small} {
				mustWrite(t, d, block(100*round+i), int64(i)*4096)
				wantRead(t, d, block(100*round+i), int64(i)*4096)
			}
		}
		wantRead(t, place, append(block(100*round+7), block(100*round+8)...), 7*4096)
		wantRead(t, place, block(100*round + 63)[4000:], 63*4096+4000)
		// Those who copy the data themselves get a copy, which this handler does not make.
		wantContents(t, place, bytes.Repeat([]byte{0xee}, 4096), 0)
		kill(t, l, "keep")
		wantRead(t, place, block(100*round), 0)
		wantRead(t, nowhere, block(100*round), 0)
	}
}

// keeper is a KeepingCompletion that goes on using what was read.
type keeper struct {
	transfer
	data []byte
	keep interface{ Release() }
}

func (k *keeper) CompleteKept(data []byte, keep interface{ Release() }) {
	k.data, k.keep = data, keep
	close(k.done)
}

// TestContentsKept: a device is not removed before all have let go of its memory.
func TestContentsKept(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	d := add(t, l, 0, "/ram/@/1M", plugin.DeviceOptions{})
	mustWrite(t, d, block(3), 0)
	k := &keeper{transfer: transfer{done: make(chan struct{})}}
	if !d.StartRead(4096, 0, k) {
		t.Fatal("the fast path does not take a read")
	}
	d.Commit(nil)
	<-k.done
	if k.keep == nil {
		t.Fatal("the data was not left where it is: ", k.err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := l.RemoveDevice(ctx, 0); !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("removal of a device whose memory is in use: %v", err)
	}
	mustWrite(t, d, block(4), 0)
	if !bytes.Equal(k.data, block(4)) {
		t.Error("it is not the device's memory")
	}
	k.keep.Release()
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
}

// TestContentsCutOff: memory that its handler takes away is missed by the read concerned and nobody else.
func TestContentsCutOff(t *testing.T) {
	l, _ := open(t, "keep")
	load(t, l, "keep")
	d := add(t, l, 0, "/keep/cut", plugin.DeviceOptions{})
	other := add(t, l, 1, "/keep/place", plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
	mustWrite(t, other, block(2), 0)
	wantRead(t, d, block(1), 0)
	for range 3 {
		if err := startRead(t, d, make([]byte, 4096), 63*4096); !errors.Is(err, syscall.EFAULT) {
			t.Errorf("read of what is gone: %v", err)
		}
		wantRead(t, other, block(2), 0)
	}
	if err := l.RemoveDevice(context.Background(), 0); err != nil {
		t.Error(err)
	}
}

// TestRAMInPlace reads, on the fast path, what is written, cleared and cut off, across sizes.
func TestRAMInPlace(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	d := add(t, l, 0, "/ram/@/4M", plugin.DeviceOptions{})
	zeroes := make([]byte, 1<<20)
	wantRead(t, d, zeroes, 0)
	if used, _ := memfdUsage(t, "ram000"); used != 0 {
		t.Errorf("reading what was never written takes %d bytes", used)
	}
	all := bytes.Repeat(block(5), 1024)
	for off := 0; off < len(all); off += 1 << 20 {
		mustWrite(t, d, all[off:off+1<<20], int64(off))
	}
	wantRead(t, d, all[:1<<20], 1<<20)
	if err := d.Discard(1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	wantRead(t, d, zeroes, 1<<20)
	wantRead(t, d, append(bytes.Clone(all[:8192]), zeroes[:8192]...), 1<<20-8192)
	if used, _ := memfdUsage(t, "ram000"); used != 3<<20 {
		t.Errorf("three quarters of 4 MiB take %d bytes", used)
	}
	for _, size := range []int64{64 << 20, 2 << 20, 8 << 20, 1 << 20, 200 << 20} {
		if err := d.Resize(context.Background(), size); err != nil {
			t.Fatal(err)
		}
		wantRead(t, d, all[:1<<20], 0)
		if size > 1<<20 {
			mustWrite(t, d, block(9), size-4096)
			wantRead(t, d, block(9), size-4096)
		}
		kill(t, l, "ram")
		wantRead(t, d, all[:1<<20], 0)
	}
}
