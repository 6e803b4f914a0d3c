// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testDeadline = 60*time.Second + 90*blastWindow

// open makes a Library that finds the shipped handlers and those built from testdata, and shuts it down at the end of
// the test. Its log goes to the returned buffer.
func open(t testing.TB, handlers ...string) (*plugin.Library, *log) {
	t.Helper()
	testbed.Deadline(t, testDeadline)
	testbed.NothingLeft(t)
	var buf log
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{testbed.BuildHandlers(t, handlers...), testbed.ShippedHandlers()},
		HostBinary:      testbed.Program(t, "tcmur-host"),
		Logger:          hclog.New(&hclog.LoggerOptions{Level: hclog.Info, Output: &buf}),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = l.Shutdown(ctx)
		if t.Failed() {
			t.Log(buf.String())
		}
	})
	return l, &buf
}

// log is a buffer that the library's goroutines write to.
type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// waitFor waits until all of the texts stand in one line of the log.
func (l *log) waitFor(t *testing.T, texts ...string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		for line := range strings.Lines(l.String()) {
			found := true
			for _, text := range texts {
				found = found && strings.Contains(line, text)
			}
			if found {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the log has no line with all of %q:\n%s", texts, l)
		}
	}
}

func load(t testing.TB, l *plugin.Library, subtype string) {
	t.Helper()
	if err := l.LoadHandler(t.Context(), subtype); err != nil {
		t.Fatal(err)
	}
}

func add(t testing.TB, l *plugin.Library, minor int, config string, opts plugin.DeviceOptions) *plugin.Device {
	t.Helper()
	d, err := l.AddDevice(t.Context(), minor, config, opts)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// wantErrno checks the errno, and that the message names what it should.
func wantErrno(t testing.TB, what string, err error, errno syscall.Errno, texts ...string) {
	t.Helper()
	if !errors.Is(err, errno) {
		t.Errorf("%s: %v, want %v", what, err, errno)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: message %q does not say %q", what, err, text)
		}
	}
}

// TestHandlerErrors goes through the tables of tcmur_handler_load, tcmur_handler_unload and libtcmur_exit.
func TestHandlerErrors(t *testing.T) {
	l, _ := open(t, "fault", "noinit", "initfails", "initdies")
	ctx := t.Context()
	wantErrno(t, "no such file", l.LoadHandler(ctx, "nosuch"), syscall.ENOENT, "nosuch.so")
	wantErrno(t, "no handler_init", l.LoadHandler(ctx, "noinit"), syscall.EBADF, "handler_init")
	wantErrno(t, "handler_init fails", l.LoadHandler(ctx, "initfails"), syscall.EIO, "on fire")
	wantErrno(t, "handler_init dies", l.LoadHandler(ctx, "initdies"), syscall.EIO)
	for _, bad := range []string{"", "../ram", "a/b", "a b", strings.Repeat("x", 65)} {
		wantErrno(t, "bad subtype", l.LoadHandler(ctx, bad), syscall.EINVAL)
	}
	load(t, l, "ram")
	wantErrno(t, "loaded twice", l.LoadHandler(ctx, "ram"), syscall.EEXIST)
	wantErrno(t, "not loaded", l.UnloadHandler(ctx, "file"), syscall.ENOENT, "ram")
	add(t, l, 0, "/ram/@", plugin.DeviceOptions{})
	wantErrno(t, "has devices", l.UnloadHandler(ctx, "ram"), syscall.EBUSY, "ram000")
	wantErrno(t, "exit with devices", l.Exit(ctx), syscall.EBUSY, "ram000")
	if err := l.RemoveDevice(ctx, 0); err != nil {
		t.Error(err)
	}
	if err := l.Exit(ctx); err != nil {
		t.Errorf("exit unloads handlers without devices: %v", err)
	}
	if n := len(l.Handlers()); n != 0 {
		t.Errorf("%d handlers are left", n)
	}
}

// TestDlopenFailure is the other ENOENT of tcmur_handler_load: the file is there and cannot be opened.
func TestDlopenFailure(t *testing.T) {
	testbed.NothingLeft(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "handler_broken.so"), []byte("not ELF"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{dir + "/handler_"}, HostBinary: testbed.Program(t, "tcmur-host"),
	})
	if err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "not a shared object", l.LoadHandler(t.Context(), "broken"), syscall.ENOENT, "handler_broken.so")
}

// TestInitErrors covers libtcmur_init.
func TestInitErrors(t *testing.T) {
	host := testbed.Program(t, "tcmur-host")
	for _, tt := range []struct {
		name string
		cfg  plugin.Config
		want syscall.Errno
	}{
		{"no prefix", plugin.Config{HostBinary: host}, syscall.EINVAL},
		{"no host", plugin.Config{HandlerPrefixes: []string{"x"}, HostBinary: "/nonexistent"}, syscall.ENOENT},
		{"minors", plugin.Config{HandlerPrefixes: []string{"x"}, HostBinary: host, MaxMinors: 5000}, syscall.EINVAL},
	} {
		_, err := plugin.Init(tt.cfg)
		wantErrno(t, tt.name, err, tt.want)
	}
}

// TestHostThatCannotStart leaves nothing behind, and says which program it was.
func TestHostThatCannotStart(t *testing.T) {
	testbed.NothingLeft(t)
	for name, contents := range map[string]string{"not executable": "", "not a host": "#!/bin/sh\necho hello\n"} {
		path := filepath.Join(t.TempDir(), "host")
		mode := os.FileMode(0o600)
		if contents != "" {
			mode = 0o700
		}
		if err := os.WriteFile(path, []byte(contents), mode); err != nil {
			t.Fatal(err)
		}
		l, err := plugin.Init(plugin.Config{HandlerPrefixes: []string{testbed.ShippedHandlers()}, HostBinary: path})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.LoadHandler(t.Context(), "ram"); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAllHandlerSlots is the ENOSPC of tcmur_handler_load.
func TestAllHandlerSlots(t *testing.T) {
	if testing.Short() {
		t.Skip("starts 64 processes")
	}
	testbed.Deadline(t, testDeadline)
	testbed.NothingLeft(t)
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{manySubtypes(t)}, HostBinary: testbed.Program(t, "tcmur-host"),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Exit(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	for i := range plugin.MaxHandlers {
		load(t, l, fmt.Sprintf("h%d", i))
	}
	wantErrno(t, "65th handler", l.LoadHandler(t.Context(), "h64"), syscall.ENOSPC)
}

// manySubtypes makes 65 handlers out of the fault handler by renaming its subtype in the binary.
func manySubtypes(t *testing.T) string {
	t.Helper()
	lib, err := os.ReadFile(testbed.BuildHandlers(t, "fault") + "fault.so")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for i := range plugin.MaxHandlers + 1 {
		name := fmt.Sprintf("h%d", i)
		renamed := bytes.ReplaceAll(lib, []byte("\x00fault\x00"), append([]byte{0}, (name + "\x00\x00\x00\x00\x00")[:6]...))
		if err := os.WriteFile(filepath.Join(dir, "handler_"+name+".so"), renamed, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir + "/handler_"
}

// TestDeviceErrors goes through the tables of tcmur_device_add, tcmur_check_config, tcmur_device_remove and the
// attribute calls.
func TestDeviceErrors(t *testing.T) {
	l, _ := open(t, "fault")
	ctx := t.Context()
	load(t, l, "ram")
	load(t, l, "fault")
	addErr := func(minor int, config string, opts plugin.DeviceOptions) error {
		_, err := l.AddDevice(ctx, minor, config, opts)
		return err
	}
	none := plugin.DeviceOptions{}
	wantErrno(t, "no handler", addErr(0, "/nosuch/x", none), syscall.ENXIO, "nosuch", "load")
	wantErrno(t, "prefix of a handler", addErr(0, "/ra/@", none), syscall.ENXIO)
	wantErrno(t, "no slash", addErr(0, "ram/@", none), syscall.EINVAL, "'/'")
	wantErrno(t, "too long", addErr(0, "/ram/"+strings.Repeat("x", 4096), none), syscall.EINVAL, "long")
	wantErrno(t, "negative minor", addErr(-1, "/ram/@", none), syscall.ENODEV, "255")
	wantErrno(t, "minor too large", addErr(256, "/ram/@", none), syscall.ENODEV, "255")
	wantErrno(t, "block size", addErr(0, "/ram/@", plugin.DeviceOptions{BlockSize: 1000}), syscall.EINVAL, "1000")
	wantErrno(t, "max xfer", addErr(0, "/ram/@", plugin.DeviceOptions{MaxXfer: 1 << 21}), syscall.EINVAL)
	wantErrno(t, "size", addErr(0, "/ram/@", plugin.DeviceOptions{Size: -1}), syscall.EINVAL)
	wantErrno(t, "check_config", addErr(0, "/fault/check=1", none), syscall.EINVAL, "told to refuse")
	wantErrno(t, "check_config", l.CheckConfig(ctx, "/fault/check=1"), syscall.EINVAL, "told to refuse")
	wantErrno(t, "open", addErr(0, "/fault/open=-13", none), syscall.EACCES, "told to fail")
	if err := l.CheckConfig(ctx, "/fault/"); err != nil {
		t.Errorf("check of a good config: %v", err)
	}
	add(t, l, 0, "/ram/@", none)
	wantErrno(t, "minor in use", addErr(0, "/ram/@/1M", none), syscall.EBUSY, "ram000")
	wantErrno(t, "same config", addErr(1, "/ram/@", none), syscall.EEXIST, "ram000")
	wantErrno(t, "remove nothing", l.RemoveDevice(ctx, 1), syscall.ENODEV)
	wantErrno(t, "remove far out", l.RemoveDevice(ctx, 4711), syscall.ENODEV)
	_, err := l.Size(1)
	wantErrno(t, "size", err, syscall.ENODEV)
	_, err = l.BlockSize(1)
	wantErrno(t, "block size", err, syscall.ENODEV)
	_, err = l.MaxXfer(1)
	wantErrno(t, "max xfer", err, syscall.ENODEV)
	if name := l.DeviceName(1); name != "" {
		t.Errorf("name of nothing: %q", name)
	}
	if name := l.DeviceName(0); name != "ram000" {
		t.Errorf("name: %q", name)
	}
	if size, err := l.Size(0); size != 1<<30 || err != nil {
		t.Errorf("size: %d, %v", size, err)
	}
}

// TestCommands goes through tcmur_read, tcmur_write and tcmur_flush with vectors, completions and every error.
func TestCommands(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	add(t, l, 0, "/fault/size=1048576", plugin.DeviceOptions{})
	add(t, l, 1, "/fault/read=5,write=4,flush=13", plugin.DeviceOptions{})
	add(t, l, 2, "/fault/size=65536", plugin.DeviceOptions{ReadOnly: true})
	run := func(start func(*plugin.Command) error) plugin.Status {
		t.Helper()
		done := make(chan plugin.Status, 1)
		if err := start(&plugin.Command{Done: func(_ *plugin.Command, s plugin.Status) { done <- s }}); err != nil {
			t.Fatal(err)
		}
		return <-done
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	out := [][]byte{data[:100], {}, data[100:5000], data[5000:]}
	if s := run(func(c *plugin.Command) error { return l.Write(0, c, out, 4096) }); s != plugin.StatusOK {
		t.Fatalf("write: %v", s)
	}
	if s := run(func(c *plugin.Command) error { return l.Flush(0, c) }); s != plugin.StatusOK {
		t.Fatalf("flush: %v", s)
	}
	in := [][]byte{make([]byte, 40000), make([]byte, len(data)-40000)}
	if s := run(func(c *plugin.Command) error { return l.Read(0, c, in, 4096) }); s != plugin.StatusOK {
		t.Fatalf("read: %v", s)
	}
	if !bytes.Equal(append(in[0], in[1]...), data) {
		t.Error("read returned other data than was written")
	}
	for what, got := range map[string]plugin.Status{
		"read":  run(func(c *plugin.Command) error { return l.Read(1, c, [][]byte{make([]byte, 512)}, 0) }),
		"write": run(func(c *plugin.Command) error { return l.Write(1, c, [][]byte{make([]byte, 512)}, 0) }),
		"flush": run(func(c *plugin.Command) error { return l.Flush(1, c) }),
	} {
		if want := map[string]plugin.Status{"read": 5, "write": 4, "flush": 13}[what]; got != want {
			t.Errorf("status of a failing %s: %v, want %v", what, got, want)
		}
	}
	never := &plugin.Command{Done: func(*plugin.Command, plugin.Status) { t.Error("completion of a call that failed") }}
	buf := [][]byte{make([]byte, 512)}
	wantErrno(t, "no device", l.Read(9, never, buf, 0), syscall.ENODEV)
	wantErrno(t, "no device", l.Write(999, never, buf, 0), syscall.ENODEV)
	wantErrno(t, "no device", l.Flush(-1, never), syscall.ENODEV)
	wantErrno(t, "beyond the end", l.Read(0, never, buf, 1<<20), syscall.EINVAL)
	wantErrno(t, "across the end", l.Write(0, never, buf, 1<<20-1), syscall.EINVAL)
	wantErrno(t, "negative", l.Read(0, never, buf, -1), syscall.EINVAL)
	wantErrno(t, "overflow", l.Read(0, never, buf, 1<<63-1), syscall.EINVAL)
	wantErrno(t, "read-only", l.Write(2, never, buf, 0), syscall.EROFS)
}

// TestReadWriteAt covers the ends of a device, splitting by max_xfer, and errors as errno.
func TestReadWriteAt(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "ram")
	load(t, l, "fault")
	d := add(t, l, 0, "/ram/@/3M", plugin.DeviceOptions{MaxXfer: 64 << 10})
	if d.MaxXfer() != 64<<10 || d.Size() != 3<<20 || d.Name() != "ram000" || d.Config() != "/ram/@/3M" {
		t.Errorf("attributes: %d %d %s %s", d.MaxXfer(), d.Size(), d.Name(), d.Config())
	}
	data := bytes.Repeat([]byte("fuse_tcmur!"), 200_000)
	if n, err := d.WriteAt(data, 1000); n != len(data) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(data))
	if n, err := d.ReadAt(got, 1000); n != len(data) || err != nil || !bytes.Equal(got, data) {
		t.Errorf("read: %d, %v, equal %v", n, err, bytes.Equal(got, data))
	}
	size := d.Size()
	for _, tt := range []struct {
		off  int64
		n    int
		want error
	}{{size - 100, 100, nil}, {size, 0, nil}, {size + 1, 0, nil}, {1<<62 + 7, 0, nil}} {
		if n, err := d.ReadAt(make([]byte, 4096), tt.off); n != tt.n || err != nil {
			t.Errorf("read at %d: %d, %v", tt.off, n, err)
		}
	}
	if n, err := d.WriteAt(make([]byte, 4096), size-100); n != 100 || err != nil {
		t.Errorf("write across the end: %d, %v", n, err)
	}
	_, err := d.WriteAt([]byte{1}, size)
	wantErrno(t, "write at the end", err, syscall.ENOSPC)
	_, err = d.ReadAt([]byte{1}, -1)
	wantErrno(t, "negative read", err, syscall.EINVAL)
	bad := add(t, l, 1, "/fault/read=1,write=11,flush=18", plugin.DeviceOptions{})
	_, err = bad.ReadAt(make([]byte, 1), 0)
	wantErrno(t, "NO_RESOURCE", err, syscall.ENOMEM, "fault001", "NO_RESOURCE")
	_, err = bad.WriteAt(make([]byte, 1), 0)
	wantErrno(t, "TIMEOUT", err, syscall.ETIMEDOUT)
	wantErrno(t, "WR_ERR_INCOMPAT_FRMT", bad.Flush(), syscall.EROFS)
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
	_, err = d.ReadAt(got, 0)
	wantErrno(t, "read of a removed device", err, syscall.ENODEV)
}

// TestRemoveReportsFlush: a device whose last flush fails is removed, and the failure is told.
func TestRemoveReportsFlush(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	add(t, l, 3, "/fault/flush=4", plugin.DeviceOptions{})
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 3), syscall.EIO, "flush")
	if l.Device(3) != nil {
		t.Error("the device is still there")
	}
}

// TestRemoveGivesUp: a device with a request that never ends cannot be removed within the time given, stays, and goes
// with Shutdown.
func TestRemoveGivesUp(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/read=hang", plugin.DeviceOptions{})
	read := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(make([]byte, 512), 0)
		read <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	wait := func() bool { // until the read is under way
		_, err := l.AddDevice(ctx, 1, "/fault/", plugin.DeviceOptions{})
		return err == nil
	}
	if !wait() {
		t.Fatal("a hanging read keeps other devices from being added")
	}
	for errors.Is(l.RemoveDevice(ctx, 0), nil) {
		t.Fatal("removed a device with a request in progress")
	}
	if l.Device(0) == nil {
		t.Fatal("the device is gone")
	}
	short, cancelShort := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancelShort()
	if err := l.Shutdown(short); err == nil {
		t.Error("Shutdown killed a handler without saying so")
	}
	wantErrno(t, "the hanging read", <-read, syscall.EIO)
}

// TestHostDeath kills a host under load, again and again: nobody notices but by the time it takes, and every write that
// was acknowledged is there.
func TestHostDeath(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "ram")
	load(t, l, "file")
	path := filepath.Join(t.TempDir(), "image")
	victim := add(t, l, 0, "/file/"+path, plugin.DeviceOptions{Size: 16 << 20})
	bystander := add(t, l, 1, "/ram/@/1M", plugin.DeviceOptions{})
	const clients, kills = 16, 10
	var wg sync.WaitGroup
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	for c := range clients {
		wg.Go(func() {
			buf, got := make([]byte, 4096), make([]byte, 4096)
			for i := 0; !stopped(); i++ {
				off := int64(c)<<20 + int64(i%200)*4096
				for k := range buf {
					buf[k] = byte(i + c + k)
				}
				if _, err := victim.WriteAt(buf, off); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				if _, err := victim.ReadAt(got, off); err != nil || !bytes.Equal(got, buf) {
					t.Errorf("client %d, write %d: read back other data (%v)", c, i, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		buf := make([]byte, 4096)
		for !stopped() {
			if _, err := bystander.WriteAt(buf, 4096); err != nil {
				t.Errorf("bystander: %v", err)
				return
			}
		}
	})
	for n := range kills {
		info := l.Handlers()[0]
		if info.Subtype != "file" {
			t.Fatal("handlers are not in order")
		}
		if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); l.Handlers()[0].Restarts <= n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("no recovery: %+v", l.Handlers()[0])
			}
		}
		time.Sleep(20 * time.Millisecond) // some load for the new one
	}
	close(stop)
	wg.Wait()
	logged.waitFor(t, "died", "file", "signal 9")
	if state := l.Handlers()[0].State; state != plugin.HandlerRunning {
		t.Errorf("state %s", state)
	}
	if n := len(l.Deaths(-1)); n != kills {
		t.Errorf("%d deaths are recorded", n)
	}
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
}

// TestHandlerCrashes has the handler end its process in each of its callbacks, each time that it is called: every call
// returns, with EIO, and says why.
func TestHandlerCrashes(t *testing.T) {
	for _, op := range []string{"check", "open", "read", "write", "flush", "close"} {
		for _, effect := range []string{"segv", "abort", "exit"} {
			t.Run(op+"-"+effect, func(t *testing.T) {
				l, logged := open(t, "fault")
				load(t, l, "fault")
				d, err := l.AddDevice(t.Context(), 0, "/fault/"+op+"="+effect, plugin.DeviceOptions{})
				if err == nil {
					switch op {
					case "read":
						_, err = d.ReadAt(make([]byte, 1), 0)
					case "write":
						_, err = d.WriteAt(make([]byte, 1), 0)
					case "flush":
						err = d.Flush()
					case "close":
						if err = l.RemoveDevice(t.Context(), 0); err != nil {
							t.Errorf("nothing was lost, but: %v", err)
						}
						err = syscall.EIO
					}
				}
				wantErrno(t, "call that crashed", err, syscall.EIO)
				logged.waitFor(t, "handler process died", "fault")
			})
		}
	}
}

// TestNoisyHandler: a handler that floods its standard output, standard error and log disturbs nothing.
func TestNoisyHandler(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	for i, effect := range []string{"stdout", "stderr", "log"} {
		d := add(t, l, i, "/fault/open="+effect+",read="+effect+",flush="+effect, plugin.DeviceOptions{})
		for range 3 {
			if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
				t.Error(err)
			}
			if err := d.Flush(); err != nil {
				t.Error(err)
			}
		}
		if err := l.RemoveDevice(t.Context(), i); err != nil {
			t.Error(err)
		}
	}
	logged.waitFor(t, "ERROR", "message 0 of a flood", "fault002")
	if n := len(logged.String()); n > 4<<20 {
		t.Errorf("the log has %d bytes", n)
	}
}

// TestConcurrency has 64 goroutines write and check their own stripes on 8 devices of 3 handlers, one asynchronous in
// turn.
func TestConcurrency(t *testing.T) {
	for _, async := range []string{"", "1"} {
		t.Run("async="+async, func(t *testing.T) {
			if async != "" {
				t.Setenv("TCMUR_FAULT_ASYNC", async)
			}
			l, _ := open(t, "fault")
			dir := t.TempDir()
			for _, subtype := range []string{"ram", "file", "fault"} {
				load(t, l, subtype)
			}
			const devices, clients, stripe, rounds = 8, 64, 128 << 10, 20
			var devs []*plugin.Device
			for i := range devices {
				config := []string{
					fmt.Sprintf("/ram/@/%d", devices*stripe*clients+i*4096), fmt.Sprintf("/file/%s/f%d", dir, i),
					fmt.Sprintf("/fault/size=%d,x=%d", clients*stripe, i),
				}[i%3]
				devs = append(devs, add(t, l, i, config, plugin.DeviceOptions{Size: []int64{0, clients * stripe, 0}[i%3]}))
			}
			var wg sync.WaitGroup
			for c := range clients {
				wg.Go(func() {
					d := devs[c%devices]
					for r := range rounds {
						n := 1 + (r*r*7919+c*104729)%stripe
						want := bytes.Repeat([]byte{byte(c), byte(r), 3}, n/3+1)[:n]
						if _, err := d.WriteAt(want, int64(c)*stripe); err != nil {
							t.Error(err)
							return
						}
						got := make([]byte, n)
						if _, err := d.ReadAt(got, int64(c)*stripe); err != nil || !bytes.Equal(got, want) {
							t.Errorf("%s client %d round %d: wrong contents (%v)", d.Name(), c, r, err)
							return
						}
						if r%5 == 0 {
							if err := d.Flush(); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestFilePersists writes through one device and reads the file.
func TestFilePersists(t *testing.T) {
	l, _ := open(t)
	load(t, l, "file")
	path := filepath.Join(t.TempDir(), "image")
	d := add(t, l, 7, "/file/"+path, plugin.DeviceOptions{Size: 1 << 20})
	if _, err := d.WriteAt([]byte("hello"), 1<<19); err != nil {
		t.Fatal(err)
	}
	if err := l.RemoveDevice(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	got := make([]byte, 5)
	if _, err := f.ReadAt(got, 1<<19); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if end, err := f.Seek(0, io.SeekEnd); end != 1<<20 || err != nil {
		t.Errorf("size %d, %v", end, err)
	}
}

// TestUnevenAccess writes and reads at odd offsets of a device whose handler takes only multiples of 512, from many
// goroutines at once: neighbours in one block do not undo each other.
func TestUnevenAccess(t *testing.T) {
	testbed.SystemHandlers(t)
	l, path := openQcow(t, 1<<20)
	d := add(t, l, 0, "/qcow/"+path, plugin.DeviceOptions{})
	const clients, each = 16, 37
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for r := range 20 {
				want := bytes.Repeat([]byte{byte(1 + c), byte(r)}, each)[:each]
				if n, err := d.WriteAt(want, int64(300+c*each)); n != each || err != nil {
					t.Errorf("write: %d, %v", n, err)
				}
				got := make([]byte, each)
				if n, err := d.ReadAt(got, int64(300+c*each)); n != each || err != nil || !bytes.Equal(got, want) {
					t.Errorf("client %d round %d: read %d, %v: %x", c, r, n, err, got)
				}
			}
		})
	}
	wg.Wait()
	edges := make([]byte, 300)
	if _, err := d.ReadAt(edges, 0); err != nil || !bytes.Equal(edges, make([]byte, 300)) {
		t.Errorf("bytes before the writes changed (%v)", err)
	}
}
