// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestE2EStop goes through the ways to end an idle front. Each flushes and closes every device and leaves nothing.
func TestE2EStop(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		stop func(f *front)
	}{
		{"exit", func(f *front) { f.must("exit") }},
		{"exit-in-shell", func(f *front) {
			if out, status := f.shell(f, "echo exit > $M/dev/tcmur"); status != 0 {
				f.Errorf("status %d, %s", status, out)
			}
		}},
		{"SIGINT", func(f *front) { f.signal(os.Interrupt) }},
		{"SIGTERM", func(f *front) { f.signal(syscall.SIGTERM) }},
		{"umount", func(f *front) { f.run("umount", f.mount) }},
		{"lazy-umount", func(f *front) { f.run("umount", "-l", f.mount) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, 60*time.Second, "record")
			f := b.start()
			image := filepath.Join(b.TempDir(), "image")
			f.must("load ram\nload file\nload record\nadd 0 /ram/@\nadd 1 size=1M /file/" + image)
			r := f.record(2)
			f.writeAndCheck("file001", 4096, 4096, 7)
			f.writeAndCheck(r.device, 4096, 4096, 7)
			start := time.Now()
			tt.stop(f)
			f.wantExit(0)
			t.Logf("ended after %v", time.Since(start))
			b.wantNothingLeft()
			if _, err := os.Stat(f.mount); !errors.Is(err, syscall.ENOENT) {
				t.Errorf("the mount point that the front made: %v", err)
			}
			if lines := r.lines(); !slices.Equal(lines[max(0, len(lines)-2):], []string{"flush", "close"}) {
				t.Errorf("the device's last callouts: %v, want a flush and a close", lines)
			}
			contents, err := os.ReadFile(image)
			if err != nil || !slices.Equal(contents[4096:8192], pattern(4096, 7)) {
				t.Errorf("the image does not have what was written (%v)", err)
			}
		})
	}
}

// force sends signals as an impatient user does, until the front takes one for the order to stop whatever is in use.
func (f *front) force(sig os.Signal) {
	f.Helper()
	impatience := time.NewTicker(100 * time.Millisecond)
	defer impatience.Stop()
	for start := time.Now(); time.Since(start) < graceful && !hasLine(f.log.String(), "stop forced"); {
		<-impatience.C
		if err := f.cmd.Process.Signal(sig); errors.Is(err, os.ErrProcessDone) {
			break
		}
	}
	f.wantLog("stop forced")
}

// TestE2EStopWhileBusy: a mount that is in use is not taken away by one signal; the log says who uses it. It is by two.
func TestE2EStopWhileBusy(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram\nadd 0 /ram/@\nadd 1 /ram/@/300M")
	mountpoint := b.mkfsAndMount(f, "ram001")
	reader := f.open("ram000", os.O_RDONLY)
	f.signal(syscall.SIGTERM)
	f.wantLog("cannot stop", "ram000", "ram001", "/dev/loop", mountpoint)
	f.writeAndCheck("ram000", 0, 4096, 1)
	if err := os.WriteFile(mountpoint+"/file", []byte("still here"), 0o600); err != nil {
		t.Error(err)
	}
	f.must("add 2 /ram/@/1M")
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", f.path("ram001"))

	// Only read by its user, the device loses nothing by force.
	f.force(os.Interrupt)
	f.wantExit(0)
	if _, err := reader.ReadAt(make([]byte, 4096), 0); err == nil {
		t.Error("a device can be read after its front has ended")
	}
	reader.Close()
	b.wantNothingLeft()
}

// TestE2EStopForced: who forces the stop of a front whose device is being written to is told that data may be lost.
func TestE2EStopForced(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	f.must("load record")
	r := f.record(0)
	writer := f.open(r.device, os.O_RDWR)
	if _, err := writer.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	f.signal(syscall.SIGTERM)
	f.wantLog("cannot stop", r.device)
	f.signal(syscall.SIGTERM) // too soon to be meant: a service manager's and a terminal's may come together
	f.writeAndCheck(r.device, 0, 4096, 1)
	f.force(syscall.SIGTERM)
	f.wantExit(3)
	f.wantLog("still open for writing", r.device)
	if _, err := writer.Write(make([]byte, 4096)); err == nil {
		t.Error("a device can be written to after its front has ended")
	}
	writer.Close()
	b.wantNothingLeft()
	if lines := r.lines(); lines[len(lines)-1] != "close" || !slices.Contains(lines[1:], "flush") {
		t.Errorf("the device's last callouts: %v, want a flush and a close", lines)
	}
}

// TestE2EStopWithHungHandler: a handler that does not return keeps a front from nothing but a clean exit.
func TestE2EStopWithHungHandler(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "fault")
	f := b.start()
	f.must("load ram\nadd 1 /ram/@\nload fault\nadd 0 /fault/read=hang")
	file := f.open("fault000", os.O_RDONLY|unix.O_DIRECT)
	read := make(chan error, 1)
	go func() {
		_, err := file.ReadAt(make([]byte, 4096), 0)
		read <- err
	}()
	f.writeAndCheck("ram001", 0, 4096, 1)
	f.refused("remove 0", syscall.EBUSY, "fault000")
	f.signal(syscall.SIGTERM)
	f.wantLog("cannot stop", "fault000")
	f.force(syscall.SIGTERM)
	if err := <-read; err == nil {
		t.Error("the read that hung in the handler has succeeded")
	}
	file.Close()
	select {
	case <-f.exited:
	case <-time.After(60 * time.Second): // each step of a forced stop has its time limit
		t.Fatal("the front does not end")
	}
	if status := f.cmd.ProcessState.ExitCode(); status != 3 {
		t.Errorf("status %d, want 3", status)
	}
	b.wantNothingLeft()
}

// TestE2EFrontKilled: when a front is killed its hosts end by themselves, and the next front at the mount point
// replaces the mount that nobody serves any more.
func TestE2EFrontKilled(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	image := filepath.Join(b.TempDir(), "image")
	f.must("load ram\nload file\nload record\nadd 0 /ram/@\nadd 1 size=1M /file/" + image)
	r := f.record(2)
	f.writeAndCheck("file001", 0, 4096, 7)
	held := f.open("ram000", os.O_RDWR)
	f.signal(syscall.SIGKILL)
	<-f.exited
	killed := time.Now()
	for len(b.processes()) > 0 {
		if time.Since(killed) > 5*time.Second {
			t.Fatalf("hosts go on without their front: %v", b.leftovers())
		}
		time.Sleep(5 * time.Millisecond) // they are nobody's children now
	}
	t.Logf("hosts ended %v after their front", time.Since(killed))
	if lines := r.lines(); lines[len(lines)-1] != "close" {
		t.Errorf("the host did not close its device: %v", lines)
	}
	if _, err := held.ReadAt(make([]byte, 10), 0); err == nil {
		t.Error("a device can be read without a front")
	}
	held.Close()
	if _, err := os.ReadDir(f.mount); !errors.Is(err, syscall.ENOTCONN) {
		t.Fatalf("the mount of a front that was killed: %v, want ENOTCONN", err)
	}
	// What the kernel has cached of the mount must not make it look alive.
	_, _ = os.Stat(f.mount)

	next := b.startAt(f.mount)
	next.wantLog("died", f.mount)
	next.must("load file\nadd 1 /file/" + image)
	got := make([]byte, 4096)
	if _, err := next.open("file001", os.O_RDONLY).ReadAt(got, 0); err != nil || !slices.Equal(got, pattern(4096, 7)) {
		t.Errorf("the device does not have what was written (%v)", err)
	}
	if mounts := b.mountsBelow(f.mount); len(mounts) != 1 {
		t.Errorf("mounts: %v, want the new one only", mounts)
	}
}

// TestE2ELiveFront: a mount point that a front serves is not for a second one.
func TestE2ELiveFront(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram\nadd 0 /ram/@")
	link := filepath.Join(b.TempDir(), "link")
	if err := os.Symlink(f.mount, link); err != nil {
		t.Fatal(err)
	}
	for _, mount := range []string{f.mount, link} {
		second := b.launch(mount)
		second.wantExit(1)
		second.wantLog("another fuse_tcmur serves", f.mount, "--mountpoint")
	}
	f.writeAndCheck("ram000", 0, 4096, 1)
}

// TestE2EFailedStart: a front that cannot start says why, with the status for it, and leaves nothing behind.
func TestE2EFailedStart(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	commands := b.writeText("commands", "load ram\nadd 0 /ram/@\nadd 1 /nosuch/x\nadd 2 /ram/@/1M\n")
	file := b.writeText("file", "")
	for _, tt := range []struct {
		mount  string
		flags  []string
		status int
		text   string
	}{
		{"m", []string{"-c", "load ram", "-c", "add 0 /ram/@", "-c", "load nosuch"}, 1, "handler_nosuch.so"},
		{"m", []string{"-c", "load ram", "-c", "add 0 /nosuch/x", "-c", "exit"}, 1, "nosuch"},
		{"deep/down/m", []string{"--source", commands}, 1, commands + ":3: "},
		{"m", []string{"--source", "/nonexistent/commands"}, 1, "/nonexistent/commands"},
		{"m", []string{"--host-binary", "/nonexistent/host"}, 1, "/nonexistent/host"},
		{"m", []string{"--mountpoint", file}, 1, "not a directory"},
		{"m", []string{"--no-such-flag"}, 2, "no-such-flag"},
		{"m", []string{"--max-minors", "0"}, 2, "--max-minors"},
		{"m", []string{"--log-level", "loud"}, 2, "loud"},
		{"m", []string{"command"}, 2, "command"},
	} {
		f := b.launch(filepath.Join(b.mounts, tt.mount), tt.flags...)
		f.wantExit(tt.status)
		if !hasLine(f.log.String(), "fuse_tcmur: ", tt.text) {
			t.Errorf("%v: the message does not tell %q:\n%s", tt.flags, tt.text, f.log.tail())
		}
		b.wantNothingLeft()
		if entries, err := os.ReadDir(b.mounts); err != nil || len(entries) != 0 {
			t.Errorf("%v: left %v behind (%v)", tt.flags, entries, err)
		}
	}
}

// TestE2EStartCommands: what -c and --source are for, and what is printed then.
func TestE2EStartCommands(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	commands := b.writeText("commands", "# devices\nadd 0 size=64M /ram/@\n")
	f := b.start("-c", "load ram", "--source", commands, "-c", "add 1 /ram/@/1M", "--hints", "--log-format", "json")
	out := f.stdout.String()
	for _, want := range []string{f.path("ram000"), f.path("ram001"), "serving " + f.mount} {
		if !strings.Contains(out, want) {
			t.Errorf("the output does not tell %q:\n%s", want, out)
		}
	}
	f.writeAndCheck("ram000", 60<<20, 4096, 1)
	f.wantLog(`"@level":"info"`, "ram001")

	// A front that is told to end by its start commands ends well.
	once := b.launch(filepath.Join(b.mounts, "once"), append(b.handlers, "-c", "load ram", "-c", "exit")...)
	once.wantExit(0)
	// One that is told to stop meanwhile does.
	slow := b.launch(filepath.Join(b.mounts, "slow"), append(b.handlers, "-c", "load ram", "-c", "add 0 /ram/@")...)
	slow.wantLog("handler loaded")
	slow.signal(syscall.SIGTERM)
	select {
	case <-slow.exited:
	case <-time.After(graceful):
		t.Error("a front that was told to stop while it started does not end")
	}
	if entries, err := os.ReadDir(b.mounts); err != nil || len(entries) != 1 {
		t.Errorf("mount points %v are there, want the first front's only (%v)", entries, err)
	}
}

// TestE2EVersionAndHelp asks the program about itself.
func TestE2EVersionAndHelp(t *testing.T) {
	t.Parallel()
	b := newBed(t, 20*time.Second)
	for flag, want := range map[string]string{"--help": "EXIT STATUS", "--version": "fuse_tcmur "} {
		f := b.launch(filepath.Join(b.mounts, "never"), flag)
		f.wantExit(0)
		if !strings.Contains(f.stdout.String(), want) {
			t.Errorf("%s does not tell %q:\n%s", flag, want, f.stdout.String())
		}
	}
}
