// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// The program as a service: its config file, its log file, systemd's notifications, and --daemon.

// TestConfigFile: what the file says is there when the start is done, except for what failed, which is in the log. The
// program's own start commands come after it.
func TestConfigFile(t *testing.T) {
	b := newBed(t, time.Minute)
	config := writeConfig(t, "# two handlers\nload ram\nload file\n", "add 0 /ram/@\n", "add 1 /file//nonexistent/disk\n",
		"add 2 mode=0600 /ram/@/1M\n", "add 3 /nosuch/x\n", "nosuch command\n", "echo done\n")
	f := b.start("--config", config, "-c", "remove 2")
	if _, err := os.Stat(f.path("ram000")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(f.path("ram002")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ram002 was to be added, then removed: %v", err)
	}
	for _, place := range []string{":5: ", ":7: ", ":8: "} {
		f.wantLog("command failed", config+place)
	}
	f.wantLog(config+":9: ", "echo done")
}

func TestConfigFileIsMissing(t *testing.T) {
	b := newBed(t, time.Minute)
	f := b.launch(b.mounts+"/m", append(b.handlers, "--config", b.mounts+"/nosuch.conf")...)
	f.wantExit(1)
	f.wantLog("nosuch.conf", "no such file")
}

// TestRestoreWithBackEndOutOfReach: 50 devices come back within two seconds, though one of them lets its handler wait
// for ever.
func TestRestoreWithBackEndOutOfReach(t *testing.T) {
	const devices = 50
	b := newBed(t, time.Minute, "fault")
	lines := []string{"load fault\n", "load file\n", "load ram\n", "add 0 /fault/open=hang\n"}
	for i := 1; i < devices; i++ {
		if i%2 == 0 {
			lines = append(lines, fmt.Sprintf("add %d /ram/@/%dK\n", i, 64*i))
			continue
		}
		lines = append(lines, fmt.Sprintf("add %d size=1M /file/%s/%d.img\n", i, b.mounts, i))
	}
	config := writeConfig(t, lines...)
	began := time.Now()
	f := b.launch(b.mounts+"/m", append(b.handlers, "--config", config)...)
	var there int
	for there < devices-1 {
		nodes, _ := filepath.Glob(f.mount + "/dev/*[0-9]")
		there = len(nodes)
		if time.Since(began) > graceful {
			t.Fatalf("%d of %d devices after %v", there, devices-1, graceful)
		}
		time.Sleep(10 * time.Millisecond) // this is what is measured
	}
	restored := time.Since(began)
	f.awaitServing()
	t.Logf("%d devices after %v, serving after %v", there, restored, time.Since(began))
	f.wantLog("going on without waiting", "/fault/open=hang")
	if file, err := os.ReadFile(f.path("file001")); err != nil || len(file) != 1<<20 {
		t.Errorf("read of a restored device: %d bytes, %v", len(file), err)
	}
	f.must("add 60 /ram/@/5M\nremove 60")
	f.signal(syscall.SIGTERM)
	f.wantExit(0)
}

// TestRestoreIsInterrupted: a stop during the restore is no reason to wait for a back end.
func TestRestoreIsInterrupted(t *testing.T) {
	b := newBed(t, time.Minute, "fault")
	f := b.launch(b.mounts+"/m", append(b.handlers, "--config",
		writeConfig(t, "load fault\n", "load ram\n", "add 0 /fault/open=hang\n", "add 1 /ram/@\n"))...)
	f.wantLog("device added", "ram001")
	f.signal(syscall.SIGTERM)
	select {
	case <-f.exited:
	case <-time.After(graceful):
		t.Fatal("does not end")
	}
}

// writeConfig writes a config file and returns its path.
func writeConfig(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tcmur.conf")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// awaitFile waits until a file has a text.
func awaitFile(t *testing.T, path, text string) {
	t.Helper()
	for deadline := time.Now().Add(graceful); ; time.Sleep(10 * time.Millisecond) {
		contents, err := os.ReadFile(path)
		if err == nil && bytes.Contains(contents, []byte(text)) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s (%v) does not have %q:\n%s", path, err, text, contents)
		}
	}
}

// TestLogFile: SIGHUP opens the log file anew, as logrotate(8) wants it, and does not end the program.
func TestLogFile(t *testing.T) {
	b := newBed(t, time.Minute)
	path := filepath.Join(t.TempDir(), "log")
	f := b.start("--log-file", path, "-c", "echo before")
	awaitFile(t, path, "before")
	for round := range 3 {
		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		f.signal(syscall.SIGHUP)
		awaitFile(t, path, "log file opened anew")
		text := fmt.Sprintf("after %d", round)
		f.must("echo " + text)
		awaitFile(t, path, text)
		if old, _ := os.ReadFile(path + ".old"); bytes.Contains(old, []byte(text)) {
			t.Errorf("the old log file has %q", text)
		}
	}
	if text := f.log.String(); strings.Contains(text, "before") {
		t.Errorf("standard error has the log too:\n%s", text)
	}
	f.stop()
	b.launch(b.mounts+"/x", "--log-file", "/nonexistent/dir/log").wantExit(1)
	b.launch(b.mounts+"/x", "--log-file", b.mounts+"/x/log").wantExit(2)
}

// TestNotifications: systemd hears when the program is ready, that it lives, and that it stops; SIGHUP does not end it.
func TestNotifications(t *testing.T) {
	b := newBed(t, time.Minute)
	dir, err := os.MkdirTemp("", "notify") // with a name that is short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "socket")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	await := func(want string) {
		t.Helper()
		_ = socket.SetReadDeadline(time.Now().Add(graceful))
		for {
			message := make([]byte, 1024)
			n, err := socket.Read(message)
			if err != nil {
				t.Fatalf("no %s: %v", want, err)
			}
			if string(message[:n]) == want {
				return
			}
		}
	}
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "200000")
	f := b.launch(b.mounts+"/m", append(b.handlers, "-c", "load ram", "-c", "add 0 /ram/@")...)
	await("READY=1")
	if _, err := os.Stat(f.path("ram000")); err != nil {
		t.Errorf("ready, but %v", err)
	}
	await("WATCHDOG=1")
	f.signal(syscall.SIGHUP)
	await("WATCHDOG=1")
	await("WATCHDOG=1")
	f.must("echo still there")
	f.signal(syscall.SIGTERM)
	await("STOPPING=1")
	f.wantExit(0)
}

// daemon runs the program with --daemon and returns what it printed.
func (b *bed) daemon(mount string, flags ...string) (string, error) {
	flags = append(append(b.handlers, "--daemon", "--config=", "--mountpoint", mount), flags...)
	cmd := b.command(testbed.Program(b, "fuse_tcmur"), flags...)
	cmd.Env = append(os.Environ(), b.mark, "TMPDIR="+b.sockets)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestDaemon: with --daemon the program returns when the mount is ready, and tells by its exit status if that failed.
func TestDaemon(t *testing.T) {
	b := newBed(t, time.Minute)
	dir := t.TempDir()
	mount, pidFile := b.mounts+"/m", dir+"/pid"
	flags := []string{"--log-file", dir + "/log", "--pid-file", pidFile}
	if out, err := b.daemon(mount, append(flags, "-c", "load ram", "-c", "add 0 /ram/@")...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := os.Stat(mount + "/dev/ram000"); err != nil {
		t.Errorf("it has returned, but %v", err)
	}
	text, err := os.ReadFile(pidFile)
	pid, convErr := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || convErr != nil {
		t.Fatalf("pid file %q, %v", text, err)
	}
	if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) != "fuse_tcmur\n" {
		t.Errorf("process %d is %q", pid, comm)
	}
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); fields[3] != strconv.Itoa(pid) {
		t.Errorf("the daemon %d is in session %s, not its own", pid, fields[3])
	}
	for fd, want := range []string{"/dev/null", "/dev/null", dir + "/log"} {
		if got, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); got != want {
			t.Errorf("descriptor %d of the daemon is %q, want %q", fd, got, want)
		}
	}
	// A second one for the same mount point fails, with its reason where the user sees it.
	out, err := b.daemon(mount, "--log-file", dir+"/log2", "--pid-file", dir+"/pid2")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "another fuse_tcmur serves") {
		t.Errorf("second daemon: %v, %q", err, out)
	}
	out, err = b.daemon(b.mounts+"/n", append(flags, "-c", "load nosuch")...)
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "nosuch") {
		t.Errorf("start with a command that fails: %v, %q", err, out)
	}
	if now, _ := os.ReadFile(pidFile); !bytes.Equal(now, text) {
		t.Errorf("a daemon that failed has changed the pid file from %q to %q", text, now)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.wantNothingLeft()
	if _, err := os.Stat(pidFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pid file is left: %v", err)
	}
	awaitFile(t, dir+"/log", "stopped")
}
