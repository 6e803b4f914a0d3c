// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// variants is a directory in which a handler's file can be replaced.
type variants struct {
	*bed
	dir string
}

// newVariants makes it; the fronts of the bed find a handler "fault" there before any other.
func newVariants(b *bed) *variants {
	b.Helper()
	v := &variants{bed: b, dir: b.TempDir()}
	b.handlers = append([]string{"--handler-prefix", v.dir + "/handler_"}, b.handlers...)
	return v
}

// install replaces handler fault by a variant of it, as installers do: the old file stays what it is for those who have
// it open.
func (v *variants) install(name string, flags ...string) {
	v.Helper()
	testdata := filepath.Join(testbed.Root(), "plugin", "testdata")
	next := v.dir + "/next.so"
	args := append([]string{
		"-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-I" + filepath.Join(testbed.Root(), "plugin", "handlers"),
		"-I" + testdata, "-DVARIANT_NAME=" + strconv.Quote(name), "-o", next, testdata + "/variant.c", "-lpthread",
	}, flags...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		v.Fatalf("gcc: %v\n%s", err, out)
	}
	v.rename(next)
}

// spoil replaces handler fault by something that is no handler.
func (v *variants) spoil() {
	v.Helper()
	next := v.dir + "/next.so"
	if err := os.WriteFile(next, []byte("not ELF"), 0o600); err != nil {
		v.Fatal(err)
	}
	v.rename(next)
}

func (v *variants) rename(next string) {
	v.Helper()
	if err := os.Rename(next, v.dir+"/handler_fault.so"); err != nil {
		v.Fatal(err)
	}
}

// within fails the test when something takes longer than it may.
func (f *front) within(limit time.Duration, what string, do func()) {
	f.Helper()
	began := time.Now()
	do()
	if took := time.Since(began); took > limit {
		f.Errorf("%s took %v, more than %v", what, took, limit)
	} else {
		f.Logf("%s took %v", what, took)
	}
}

// TestE2EReload replaces a handler again and again while its devices are written to, by versions that work and by some
// that do not. Nobody has an error, and no write is lost, not even of the device whose handler keeps what is not
// flushed in its own memory.
func TestE2EReload(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	v := newVariants(b)
	v.install("Mark I")
	f := b.start()
	f.load("fault")
	dir := b.TempDir()
	f.must(fmt.Sprintf("add 0 /fault/size=0x201000,store=%[1]s/store\nadd 1 /fault/size=0x200000,lazy=%[1]s/lazy\n"+
		"add 2 /fault/size=0x200000,delay=3000,lazy=%[1]s/slow", dir))
	c := f.startClients()
	for device, flags := range []int{os.O_RDWR, os.O_RDWR | unix.O_DIRECT, os.O_RDWR} {
		for i := range int64(4) {
			c.writer(f.path(fmt.Sprintf("fault%03d", device)), flags, i<<19, 1<<19)
		}
	}
	c.first.Wait()
	for i := range 4 {
		name := fmt.Sprintf("Mark %d", i+2)
		v.install(name)
		if out := f.must("reload fault"); !strings.Contains(out, name) {
			t.Errorf("reload does not tell %s: %q", name, out)
		}
		f.within(2*time.Second, "a write after the reload", func() {
			f.writeAndCheck("fault000", 0x200000, 4096, byte(i)) // beyond what the clients write to
		})
		v.spoil()
		f.refused("reload fault", syscall.ENOENT, "handler_fault.so")
		v.install("unwilling", "-DVARIANT_REFUSES")
		f.refused("reload fault", syscall.EACCES, "fault000", "this version opens nothing", "the old one goes on")
		v.install("deadly", "-DVARIANT_CRASHES")
		f.refused("reload fault", syscall.EIO, "fault000", "the old one goes on")
	}
	v.install("the last")
	f.must("reload fault")
	c.end()
	f.must("remove 0\nremove 1\nremove 2")
	f.wantLog("handler reloaded", "stall=")
}

// TestE2EReloadAndDeath has processes die while they are being replaced: the old one, and the one that takes over.
func TestE2EReloadAndDeath(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	v := newVariants(b)
	v.install("Mark I")
	f := b.start()
	f.load("fault")
	f.must("add 0 /fault/size=0x400000,delay=500,lazy=" + b.TempDir() + "/lazy")
	c := f.startClients()
	for i := range int64(4) {
		c.writer(f.path("fault000"), os.O_RDWR|unix.O_DIRECT, i<<20, 1<<20)
	}
	c.first.Wait()
	const rounds = 20
	for i := range rounds {
		done := make(chan struct{})
		go func() {
			defer close(done)
			out, err := f.ctl("reload fault")
			if err != nil && !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("reload: %v\n%s", err, out)
			}
		}()
		// At another moment each time, each host of the bed but one that has loaded nothing yet.
		time.Sleep(time.Duration(i) * 2 * time.Millisecond)
		for _, pid := range b.hosts() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		<-done
	}
	c.end()
	f.must("remove 0\nunload fault")
}

// hosts lists the bed's host processes.
func (b *bed) hosts() []int {
	var pids []int
	for _, pid := range b.processes() {
		if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); filepath.Base(exe) == "tcmur-host" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stuckRead starts a read that the handler does not return from. It may not have reached the handler yet.
func (f *front) stuckRead(device string) (*os.File, <-chan error) {
	f.Helper()
	file := f.open(device, os.O_RDONLY|unix.O_DIRECT)
	read := make(chan error, 1)
	go func() {
		_, err := file.ReadAt(make([]byte, 4096), 0)
		read <- err
	}()
	return file, read
}

// TestE2EForce takes devices away from a handler that hangs and from users who have them open, mounted among them:
// within two seconds, without harm to others.
func TestE2EForce(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "fault")
	f := b.start()
	f.must("load ram\nload fault\nadd 0 /fault/read=hang,volatile\nadd 1 /ram/@/300M\nadd 2 /fault/store=" +
		b.TempDir() + "/store")
	mountpoint := b.mkfsAndMount(f, "ram001")
	file, read := f.stuckRead("fault000")
	neighbour := f.open("fault002", os.O_RDWR)
	want := pattern(4096, 3)
	if _, err := neighbour.WriteAt(want, 0); err != nil {
		t.Error(err)
	}
	f.refused("remove 0", syscall.EBUSY, "fault000")
	f.within(2*time.Second, "remove --force of a device that hangs", func() { f.must("remove --force 0") })
	if err := <-read; !errors.Is(err, syscall.EIO) {
		t.Errorf("the read that hung: %v", err)
	}
	if _, err := file.ReadAt(make([]byte, 4096), 0); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("read of a device that was taken away: %v", err)
	}
	got := make([]byte, 4096)
	if _, err := neighbour.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device's neighbour: %v", err)
	}
	f.must("add 0 /fault/volatile")
	f.writeAndCheck("fault000", 0, 4096, 5)

	f.within(2*time.Second, "remove --force of a device that is mounted", func() { f.must("remove --force 1") })
	if err := os.WriteFile(mountpoint+"/file", make([]byte, 1<<20), 0o600); err == nil {
		b.run("sync", "-f", mountpoint) // what the page cache has taken may fail later
	}
	b.run("umount", mountpoint)
	f.must("add 1 /ram/@/1M")
	f.writeAndCheck("ram001", 0, 4096, 5)

	f.must("remove --force 0\nadd 0 /fault/read=hang,volatile")
	_, read = f.stuckRead("fault000")
	f.refused("unload fault", syscall.EBUSY)
	f.within(2*time.Second, "unload --force", func() { f.must("unload --force fault") })
	if err := <-read; !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENODEV) {
		t.Errorf("the read that hung: %v", err)
	}
	if _, err := os.Stat(f.mount + "/sys/modules/fault"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("the handler is still there: %v", err)
	}
	f.load("fault")
	f.must("add 2 /fault/volatile")
	f.writeAndCheck("fault002", 0, 4096, 5)
}

// TestE2EExitWithHungHandler: no handler keeps exit from ending within five seconds, whatever it hangs in.
func TestE2EExitWithHungHandler(t *testing.T) {
	t.Parallel()
	for _, hangs := range []string{"flush", "close"} {
		t.Run(hangs, func(t *testing.T) {
			b := newBed(t, 60*time.Second, "fault")
			f := b.start()
			f.must("load ram\nload fault\nadd 0 /fault/volatile," + hangs + "=hang\nadd 1 /ram/@")
			f.writeAndCheck("ram001", 0, 4096, 1)
			file := f.open("fault000", os.O_RDWR)
			if _, err := file.WriteAt(pattern(4096, 1), 0); err != nil {
				t.Error(err)
			}
			f.refused("exit", syscall.EBUSY, "fault000")
			file.Close()
			f.within(5*time.Second, "exit", func() {
				f.must("exit")
				f.wantExit(3)
			})
			b.wantNothingLeft()
		})
	}
	t.Run("force", func(t *testing.T) {
		b := newBed(t, 60*time.Second, "fault")
		f := b.start()
		f.must("load fault\nadd 0 /fault/volatile,read=hang")
		file, read := f.stuckRead("fault000")
		f.within(5*time.Second, "exit --force", func() {
			f.must("exit --force")
			f.wantExit(3)
		})
		if err := <-read; err == nil {
			t.Error("the read that hung has succeeded")
		}
		file.Close()
		b.wantNothingLeft()
	})
}

// TestE2EBlame crashes a handler in a read, and asks who it was.
func TestE2EBlame(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	if out := f.must("blame"); !strings.Contains(out, "no handler has died") {
		t.Errorf("before any death: %q", out)
	}
	f.load("fault")
	f.must("add 3 /fault/volatile,read:8192=segv")
	f.writeAndCheck("fault003", 0, 4096, 1)
	file := f.open("fault003", os.O_RDONLY|unix.O_DIRECT)
	if _, err := file.ReadAt(make([]byte, 4096), 8192); !errors.Is(err, syscall.EIO) {
		t.Errorf("the read that kills the handler: %v", err)
	}
	f.writeAndCheck("fault003", 0, 4096, 2)
	out := f.must("blame 3")
	t.Logf("blame 3:\n%s", out)
	for _, want := range []string{
		"handler fault", "signal 11", "read of 4096 bytes at 8192 on fault003", "died of SIGSEGV in read(device fault003, ",
		"offset 8192, length 4096", "backtrace: handler_fault.so", "EIO",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("blame does not tell %q", want)
		}
	}
	if strings.Contains(out, "@level") || strings.Contains(out, "[ERROR]") {
		t.Error("blame is full of log lines")
	}
	if dump := dumpOf(f); !strings.Contains(dump, "last death: ") || !strings.Contains(dump, "running") {
		t.Errorf("the node does not tell of the death:\n%s", dump)
	}
	f.wantLog("request is given up", "fault003", "read of 4096 bytes at 8192")
}

// TestE2EFailedDevice: a device that cannot be recovered fails, with all its requests and the next fsync of each open
// file; it shows, it can be removed, and it can be added again. Its neighbour goes on.
func TestE2EFailedDevice(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	pid := f.load("fault")
	f.must("add 0 /fault/\nadd 1 /fault/volatile")
	first, second := f.open("fault000", os.O_RDWR), f.open("fault000", os.O_RDWR|unix.O_DIRECT)
	if _, err := first.WriteAt(pattern(4096, 1), 0); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.wantLog("device has failed", "fault000")
	for what, err := range map[string]error{
		"fsync":             first.Sync(),
		"fsync of another":  second.Sync(),
		"read past a cache": func() error { _, err := second.ReadAt(make([]byte, 4096), 8192); return err }(),
		"write":             func() error { _, err := first.WriteAt(make([]byte, 4096), 0); return err }(),
		"direct write":      func() error { _, err := second.WriteAt(make([]byte, 4096), 0); return err }(),
	} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if dump := dumpOf(f); !strings.Contains(dump, "device failed: fault000: ") || strings.Contains(dump, "fault001: ") {
		t.Errorf("the dump does not tell what has failed:\n%s", dump)
	}
	f.writeAndCheck("fault001", 0, 4096, 2)
	f.refused("remove 0", syscall.EBUSY)
	first.Close()
	second.Close()
	f.refused("remove 0", syscall.EIO, "it is removed", "unflushed") // the write was never flushed
	f.must("add 0 /fault/")
	f.writeAndCheck("fault000", 0, 4096, 3)
	if dump := dumpOf(f); strings.Contains(dump, "device failed") {
		t.Errorf("the new device has failed:\n%s", dump)
	}
}

// TestE2EAddOptions gives the options of add that concern recovery.
func TestE2EAddOptions(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start("--death-budget", "2")
	f.load("fault")
	f.must("add 0 timeout=1 /fault/volatile,read@1=hang\nadd 1 recovery=fail /fault/volatile,write=hang\n" +
		"add 2 retain=64K /fault/size=0x200000,lazy=" + b.TempDir() + "/lazy")
	began := time.Now()
	// At the first call only: the device that is opened again counts anew, so that this one hangs, too, each time.
	direct := f.open("fault000", os.O_RDONLY|unix.O_DIRECT)
	if _, err := direct.ReadAt(make([]byte, 4096), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read that hangs each time: %v", err)
	}
	if took := time.Since(began); took < 3*time.Second || took > 15*time.Second {
		t.Errorf("it took %v to notice, three times", took)
	}
	f.wantLog("handler hangs", "fault")
	f.writeAndCheck("fault002", 0, 1<<20, 5)

	file := f.open("fault001", os.O_RDWR)
	written := make(chan error, 1)
	go func() {
		_, err := file.WriteAt(make([]byte, 4096), 0)
		written <- err
	}()
	select {
	case err := <-written:
		t.Errorf("a write that hangs has ended: %v", err)
	case <-time.After(200 * time.Millisecond): // there is nothing to wait for
	}
	for _, pid := range b.hosts() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err := <-written; !errors.Is(err, syscall.EIO) {
		t.Errorf("a write with recovery=fail: %v", err)
	}
	file.Close()
	f.writeAndCheck("fault002", 0, 1<<20, 6)
}
