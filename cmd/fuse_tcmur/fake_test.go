// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// fakeLibrary stands for libtcmur without host processes. Any subtype but "nosuch" can be loaded.
type fakeLibrary struct {
	mu       sync.Mutex
	handlers []string
	devices  map[int]*fakeDevice
	// removeErr is what the next RemoveDevice returns; keepDevice makes the device survive it.
	removeErr  error
	keepDevice bool
	// entered and proceed, when set, hold every LoadHandler up.
	entered, proceed chan struct{}
	shutdownErr      error
	shutdowns        int
	reloads          int
	deaths           []plugin.Death
}

func newFakeLibrary() *fakeLibrary { return &fakeLibrary{devices: map[int]*fakeDevice{}} }

func (l *fakeLibrary) LoadHandler(ctx context.Context, subtype string) error {
	if l.entered != nil {
		l.entered <- struct{}{}
		select {
		case <-l.proceed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case subtype == "nosuch":
		return fmt.Errorf("load nosuch: no file handler_nosuch.so: %w", syscall.ENOENT)
	case slices.Contains(l.handlers, subtype):
		return fmt.Errorf("load %s: already loaded: %w", subtype, syscall.EEXIST)
	}
	l.handlers = append(l.handlers, subtype)
	return nil
}

func (l *fakeLibrary) UnloadHandler(_ context.Context, subtype string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.handlers, subtype)
	if i < 0 {
		return fmt.Errorf("%s is not loaded: %w", subtype, syscall.ENOENT)
	}
	for _, device := range l.devices {
		if device.Handler() == subtype {
			return fmt.Errorf("%s has devices: %w", subtype, syscall.EBUSY)
		}
	}
	l.handlers = slices.Delete(l.handlers, i, i+1)
	return nil
}

func (l *fakeLibrary) ForceUnloadHandler(subtype string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.handlers, subtype)
	if i < 0 {
		return fmt.Errorf("%s is not loaded: %w", subtype, syscall.ENOENT)
	}
	for minor, device := range l.devices {
		if device.Handler() == subtype {
			delete(l.devices, minor)
		}
	}
	l.handlers = slices.Delete(l.handlers, i, i+1)
	return l.removeErr
}

func (l *fakeLibrary) ReloadHandler(_ context.Context, subtype string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Contains(l.handlers, subtype) {
		return fmt.Errorf("reload %s: no such handler is loaded: %w", subtype, syscall.ENOENT)
	}
	l.reloads++
	return nil
}

func (l *fakeLibrary) AddDevice(
	_ context.Context, minor int, config string, options plugin.DeviceOptions,
) (device, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	subtype, _, _ := strings.Cut(strings.TrimPrefix(config, "/"), "/")
	switch {
	case !slices.Contains(l.handlers, subtype):
		return nil, fmt.Errorf("%s: no handler %q is loaded: %w", config, subtype, syscall.ENXIO)
	case l.devices[minor] != nil:
		return nil, fmt.Errorf("minor %d is in use: %w", minor, syscall.EBUSY)
	}
	size := options.Size
	if size == 0 {
		size = 1 << 20
	}
	added := &fakeDevice{
		name: fmt.Sprintf("%s%03d", subtype, minor), minor: minor, handler: subtype, config: config,
		readOnly: options.ReadOnly, data: make([]byte, size),
	}
	l.devices[minor] = added
	return added, nil
}

func (l *fakeLibrary) RemoveDevice(_ context.Context, minor int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.devices[minor] == nil {
		return fmt.Errorf("no device has minor %d: %w", minor, syscall.ENODEV)
	}
	if !l.keepDevice {
		delete(l.devices, minor)
	}
	return l.removeErr
}

func (l *fakeLibrary) ForceRemoveDevice(minor int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.devices[minor] == nil {
		return fmt.Errorf("no device has minor %d: %w", minor, syscall.ENODEV)
	}
	delete(l.devices, minor)
	return l.removeErr
}

func (l *fakeLibrary) Deaths(minor int) []plugin.Death {
	l.mu.Lock()
	defer l.mu.Unlock()
	var some []plugin.Death
	for _, death := range l.deaths {
		if minor < 0 || slices.ContainsFunc(death.Requests, func(r plugin.RequestInfo) bool { return r.Minor == minor }) {
			some = append(some, death)
		}
	}
	return some
}

func (l *fakeLibrary) HasDevice(minor int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.devices[minor] != nil
}

func (l *fakeLibrary) Handlers() []plugin.HandlerInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	var infos []plugin.HandlerInfo
	for _, subtype := range l.handlers {
		path := "/lib/handler_" + subtype + ".so"
		infos = append(infos, plugin.HandlerInfo{Subtype: subtype, Path: path, PID: 42})
	}
	return infos
}

func (l *fakeLibrary) Shutdown(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shutdowns++
	l.handlers, l.devices = nil, map[int]*fakeDevice{}
	return l.shutdownErr
}

// fakeDevice is a device in memory that counts its flushes.
type fakeDevice struct {
	name, handler, config string
	minor                 int
	readOnly              bool

	resized  func(size int64)
	mu       sync.Mutex
	data     []byte
	flushes  int
	flushErr error
	writeErr error
	failure  error
}

func (d *fakeDevice) Name() string    { return d.name }
func (d *fakeDevice) Minor() int      { return d.minor }
func (d *fakeDevice) Handler() string { return d.handler }
func (d *fakeDevice) Size() int64     { return int64(len(d.data)) }
func (d *fakeDevice) BlockSize() int  { return 512 }
func (d *fakeDevice) ReadOnly() bool  { return d.readOnly }
func (d *fakeDevice) Config() string  { return d.config }
func (d *fakeDevice) MaxXfer() int    { return 1 << 20 }

func (d *fakeDevice) Options() plugin.DeviceOptions { return plugin.DeviceOptions{} }

func (d *fakeDevice) Stats() plugin.DeviceStats { return plugin.DeviceStats{} }

func (d *fakeDevice) Attributes() plugin.Attributes { return plugin.Attributes{BlockSize: 512} }

func (d *fakeDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.data)) {
		return 0, nil
	}
	return copy(p, d.data[off:]), nil
}

func (d *fakeDevice) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.data)) {
		return 0, syscall.ENOSPC
	}
	return copy(d.data[off:], p), d.writeErr
}

// The fake leaves everything to ReadAt and WriteAt.

func (d *fakeDevice) StartRead(int, int64, plugin.Completion) bool     { return false }
func (d *fakeDevice) StartWrite([]byte, int64, plugin.Completion) bool { return false }
func (d *fakeDevice) Landing() *plugin.Landing                         { return nil }
func (d *fakeDevice) StartFlush(plugin.Completion) bool                { return false }
func (d *fakeDevice) Commit(shared.Poller)                             {}

func (d *fakeDevice) StartLanded(*plugin.Landing, int, int64, plugin.Completion) bool { return false }

func (d *fakeDevice) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return d.flushErr
}

func (d *fakeDevice) SeekData(off int64, _ bool) (int64, error) { return off, nil }

func (d *fakeDevice) FlushFailures() uint64 { return 0 }

func (d *fakeDevice) Discard(off, n int64) error { return d.Zero(off, n) }

func (d *fakeDevice) Zero(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	return nil
}

func (d *fakeDevice) Resize(_ context.Context, size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = append(d.data, make([]byte, max(0, size-int64(len(d.data))))...)[:size]
	d.resized(size)
	return nil
}

func (d *fakeDevice) OnResize(f func(size int64)) {
	d.resized = f
	f(d.Size())
}

func (d *fakeDevice) Failure() error { return d.failure }

func (d *fakeDevice) flushCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushes
}

// fakeTree is a real tree that is never mounted: Run waits for an unmount, which is refused while busy is set.
type fakeTree struct {
	*fusetree.Tree

	mu        sync.Mutex
	busy      bool
	aborted   bool
	removeErr error // of every Remove, nil for the tree's own
	mkdirErr  error // of every Mkdir below /sys/modules
	mounted   chan struct{}
	unmounted chan struct{}
	runErr    error
}

func newFakeTree(t *testing.T) *fakeTree {
	t.Helper()
	tree, err := fusetree.Init("/test/mount", fusetree.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &fakeTree{Tree: tree, mounted: make(chan struct{}), unmounted: make(chan struct{})}
}

func (f *fakeTree) Run() error {
	close(f.mounted)
	<-f.unmounted
	return f.runErr
}

func (f *fakeTree) Mounted() <-chan struct{} { return f.mounted }

func (f *fakeTree) Unmount(bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy {
		return fmt.Errorf("in use: %w", syscall.EBUSY)
	}
	f.end()
	return nil
}

func (f *fakeTree) Abort() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborted = true
	f.end()
	return nil
}

// end lets Run return; f.mu is held.
func (f *fakeTree) end() {
	select {
	case <-f.unmounted:
	default:
		close(f.unmounted)
	}
}

func (f *fakeTree) setBusy(busy bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy = busy
}

func (f *fakeTree) Remove(name string, parent *fusetree.Node) error {
	if f.removeErr != nil {
		return f.removeErr
	}
	return f.Tree.Remove(name, parent)
}

func (f *fakeTree) Mkdir(name string, parent *fusetree.Node) (*fusetree.Node, error) {
	if f.mkdirErr != nil && parent.Path() == "/sys/modules" {
		return nil, f.mkdirErr
	}
	return f.Tree.Mkdir(name, parent)
}

// rig is a front on fakes, ready for commands.
type rig struct {
	lib    *fakeLibrary
	tree   *fakeTree
	front  *front
	interp *interpreter
	log    *logText
}

// logText is a log that can be read while it is written.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{lib: newFakeLibrary(), tree: newFakeTree(t), log: &logText{}}
	log := hclog.New(&hclog.LoggerOptions{Output: r.log, Level: hclog.Trace})
	// An empty /proc and /sys: nobody holds anything, nothing is mounted.
	dirs := systemDirs{proc: t.TempDir(), sys: t.TempDir()}
	var err error
	if r.front, err = newFront(r.lib, r.tree, "/test/mount", dirs, log); err != nil {
		t.Fatal(err)
	}
	r.interp = newInterpreter(r.front, log)
	return r
}

// run gives commands and returns what was printed.
func (r *rig) run(t *testing.T, text string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := r.interp.run(t.Context(), script{text: text}, &out)
	return out.String(), err
}

// mustRun gives commands that have to succeed.
func (r *rig) mustRun(t *testing.T, text string) string {
	t.Helper()
	out, err := r.run(t, text)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return out
}

// exists reports whether the tree has a node at path.
func (r *rig) exists(path string) bool { return r.tree.Lookup(path) != nil }

// open opens a device node as the kernel would.
func (r *rig) open(t *testing.T, minor int, flags uint32) (*deviceNode, *fusetree.File) {
	t.Helper()
	node := r.front.node(minor)
	if node == nil {
		t.Fatalf("no node for minor %d", minor)
	}
	file := &fusetree.File{Node: node.node, Flags: flags}
	if err := node.ops().Open(file); err != nil {
		t.Fatalf("open of minor %d: %v", minor, err)
	}
	return node, file
}

// writeFile makes a file for a test and returns its path.
func writeFile(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantErrno fails the test unless err stands for errno.
func wantErrno(t *testing.T, err error, errno syscall.Errno) {
	t.Helper()
	if got := errnoOf(err); got != errno {
		t.Errorf("error %v: errno %d (%v), want %d (%v)", err, got, got, errno, errno)
	}
}
