// SPDX-License-Identifier: Apache-2.0

// Package conformance holds the tests that every handler has to pass to serve as a block device. It drives a handler as
// fuse_tcmur does, through plugin.Library and a real host process, without a mount, and compares the device with a
// model in memory.
//
// Authors of handlers run it without writing Go:
//
//	make conformance HANDLER=/path/handler_x.so CFG=/x/whatever
//
// Programs that have their own tests call Run. Whatever is on the device is overwritten.
package conformance

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// Kills says when the handler's process may be killed.
type Kills int

// The device has to be as if nothing had happened after a kill at one of these times.
const (
	KillAny  Kills = iota // with requests in flight
	KillIdle              // between requests only
	KillNever
)

// Handler is what Run tests.
type Handler struct {
	// Path is the handler's shared object.
	Path string
	// HostBinary is the path of tcmur-host.
	HostBinary string
	// Config is the device's configuration string: "/SUBTYPE/...".
	Config  string
	Options plugin.DeviceOptions
	// Reopen is the configuration string with which a device is added again that has been removed, for handlers that
	// make a new device of Config; "": Config.
	Reopen string
	// Span is the number of bytes at the start of the device that may be used; 0: all of them.
	Span int64
	// Volatile: contents are gone when the device is removed.
	Volatile bool
	Kills    Kills
	// Operations is how many random operations there are to be, 0 for DefaultOperations. The same Seed leads to the same
	// operations.
	Operations int
	Seed       uint64
}

// DefaultOperations is the number of random operations where Handler does not say.
const DefaultOperations = 1_000_000

// Run runs the tests as subtests, one after the other.
func Run(t *testing.T, h Handler) {
	t.Helper()
	if h.Operations == 0 {
		h.Operations = DefaultOperations
	}
	if h.Reopen == "" {
		h.Reopen = h.Config
	}
	b := newBench(t, h)
	for _, test := range []struct {
		name string
		run  func(*bench)
	}{
		{"Boundary", testBoundary},
		{"Alignment", testAlignment},
		{"Requests", testRequests},
		{"Clear", testClear},
		{"Flush", testFlush},
		{"ReadOnly", testReadOnly},
		{"Reopen", testReopen},
		{"Kill", testKill},
		{"Random", testRandom},
		{"Concurrency", testConcurrency},
	} {
		t.Run(test.name, func(t *testing.T) {
			b.T = t
			t.Cleanup(b.remove)
			b.add()
			test.run(b)
		})
	}
}

// bench is one run: the handler, loaded, and the device under test.
type bench struct {
	*testing.T
	Handler
	subtype string
	lib     *plugin.Library
	dev     *plugin.Device
	size    int64 // of the part of the device that may be used, bytes
	added   int   // how many times
}

// patience is how long adding, removing and recovering a device may take each.
const patience = 2 * time.Minute

func newBench(t *testing.T, h Handler) *bench {
	t.Helper()
	subtype, _, ok := strings.Cut(strings.TrimPrefix(h.Config, "/"), "/")
	if !ok || !strings.HasPrefix(h.Config, "/") || subtype == "" {
		t.Fatalf("configuration string %q: want /SUBTYPE/...", h.Config)
	}
	path, err := filepath.Abs(h.Path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	prefix := filepath.Join(t.TempDir(), "handler_")
	if err := os.Symlink(path, prefix+subtype+".so"); err != nil {
		t.Fatal(err)
	}
	lib, err := plugin.Init(plugin.Config{HandlerPrefixes: []string{prefix}, HostBinary: h.HostBinary})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, Handler: h, subtype: subtype, lib: lib}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_ = lib.Shutdown(ctx)
	})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := lib.LoadHandler(ctx, subtype); err != nil {
		t.Fatal(err)
	}
	return b
}

// add opens the device.
func (b *bench) add() {
	b.Helper()
	b.addWith(b.Options)
}

func (b *bench) addWith(opts plugin.DeviceOptions) {
	b.Helper()
	config := b.Config
	if b.added > 0 && b.Reopen != b.Config {
		config, opts.Size = b.Reopen, 0 // what is there has a size
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	dev, err := b.lib.AddDevice(ctx, 0, config, opts)
	if err != nil {
		b.Fatal(err)
	}
	b.dev = dev
	b.added++
	size := dev.Size()
	if b.Span > 0 {
		size = min(size, b.Span)
	}
	if b.size != 0 && b.size != size {
		b.Fatalf("the device had %d bytes, and has %d after it has been added again", b.size, size)
	}
	b.size = size
	if least := int64(64 * dev.BlockSize()); size < least {
		b.Fatalf("the device has %d bytes, fewer than the tests need (%d)", size, least)
	}
}

// remove closes the device, if it is open.
func (b *bench) remove() {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := b.lib.RemoveDevice(ctx, 0); err != nil && !errors.Is(err, syscall.ENODEV) {
		b.Error(err)
	}
}

// host describes the handler and its process.
func (b *bench) host() plugin.HandlerInfo {
	b.Helper()
	for _, h := range b.lib.Handlers() {
		if h.Subtype == b.subtype {
			return h
		}
	}
	b.Fatalf("handler %s is not loaded any more", b.subtype)
	return plugin.HandlerInfo{}
}

// kill kills the handler's process and waits until another one serves the device.
func (b *bench) kill() {
	b.Helper()
	before := b.host()
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		b.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		now := b.host()
		if now.Restarts > before.Restarts && now.State == plugin.HandlerRunning {
			return
		}
		if now.State == plugin.HandlerFailed || time.Now().After(deadline) {
			b.Fatalf("the handler did not recover from a kill: %s", now.State)
		}
	}
}
