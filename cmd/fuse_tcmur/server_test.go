// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serverRig is a server on fakes with its own signals.
type serverRig struct {
	*rig
	server  *server
	signals chan os.Signal
	stdout  *firstWrite
	result  chan error
	err     error // what serve returned, set by wantStatus
}

// firstWrite tells when something was written, and keeps it.
type firstWrite struct {
	text    strings.Builder
	written chan struct{}
}

func (w *firstWrite) Write(p []byte) (int, error) {
	defer func() {
		if strings.Contains(w.text.String(), "serving ") {
			close(w.written)
		}
	}()
	return w.text.Write(p)
}

// newServerRig makes a server on fakes that has not started yet.
func newServerRig(t *testing.T) *serverRig {
	t.Helper()
	r := &serverRig{rig: newRig(t), signals: make(chan os.Signal, 4), result: make(chan error, 1)}
	r.stdout = &firstWrite{written: make(chan struct{})}
	r.server = &server{
		log: r.front.log, stdout: r.stdout, lib: r.lib, tree: r.tree, front: r.front, interp: r.interp,
		point: &mountpoint{path: "/test/mount"}, signals: r.signals, ended: make(chan struct{}),
		stopTimeout: defaultStopTimeout, service: &service{},
	}
	r.server.ctx, r.server.abandon = context.WithCancel(t.Context())
	return r
}

// startServer serves on fakes; wantStatus must follow.
func startServer(t *testing.T, start ...startItem) *serverRig {
	t.Helper()
	r := newServerRig(t)
	go func() { r.result <- r.server.serve(start) }()
	return r
}

// ready waits until the server takes commands.
func (r *serverRig) ready(t *testing.T) {
	t.Helper()
	select {
	case <-r.stdout.written:
	case err := <-r.result:
		t.Fatalf("ended early: %v", err)
	case <-time.After(10 * time.Second):
		t.Fatal("never ready")
	}
}

// wantStatus waits for the end and checks the exit status, and that everything was taken down.
func (r *serverRig) wantStatus(t *testing.T, status int) {
	t.Helper()
	select {
	case r.err = <-r.result:
		err := r.err
		var out strings.Builder
		if got := report(err, &out); got != status {
			t.Errorf("exit status %d (%v), want %d\n%s", got, err, status, r.log)
		}
		if r.lib.shutdowns != 1 {
			t.Errorf("the library was shut down %d times", r.lib.shutdowns)
		}
		if err := r.tree.Exit(); err != nil {
			t.Errorf("the tree was not taken down: %v", err)
		}
		if r.exists("/dev") || r.exists("/sys") {
			t.Errorf("nodes are left:\n%s", r.tree.Format())
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("did not end\n%s", r.log)
	}
}

func TestServeUntilExit(t *testing.T) {
	file := writeFile(t, t.TempDir(), "start", "add 0 /ram/@\n")
	r := startServer(t, startItem{command: "load ram"}, startItem{file: file}, startItem{command: "echo hello"})
	r.ready(t)
	if got := r.stdout.text.String(); !strings.Contains(got, "hello\nserving /test/mount ") {
		t.Errorf("stdout: %q", got)
	}
	if !r.exists("/dev/ram000") {
		t.Error("the start commands did not run")
	}
	ctl := r.tree.Lookup("/dev/tcmur")
	if ctl == nil {
		t.Fatal("no command node")
	}
	f := r.openCtl(t)
	if err := f.write("exit\n"); err != nil {
		t.Error(err)
	}
	f.Release(f.file)
	r.wantStatus(t, exitClean)
	if r.tree.aborted {
		t.Error("an idle mount was aborted")
	}
}

// TestExitWithCommandNodeHeldOpen: whoever keeps the command node open cannot keep the program from ending.
func TestExitWithCommandNodeHeldOpen(t *testing.T) {
	r := startServer(t)
	r.ready(t)
	r.tree.setBusy(true)
	if err := r.openCtl(t).write("exit\n"); err != nil {
		t.Error(err)
	}
	r.wantStatus(t, exitClean)
	if !r.tree.aborted {
		t.Error("not aborted")
	}
}

func TestStartCommandExit(t *testing.T) {
	r := startServer(t, startItem{command: "load ram"}, startItem{command: "exit"}, startItem{command: "load qcow"})
	r.wantStatus(t, exitClean)
	if got := r.stdout.text.String(); strings.Contains(got, "serving") || strings.Contains(got, "qcow") {
		t.Errorf("stdout: %q", got)
	}
}

func TestFailingStartCommand(t *testing.T) {
	file := writeFile(t, t.TempDir(), "start", "# two\nload nosuch\nload qcow\n")
	for _, item := range []startItem{{command: "load nosuch\nload qcow"}, {file: file}} {
		r := startServer(t, startItem{command: "load ram"}, item, startItem{command: "load qcow"})
		r.wantStatus(t, exitStartFailed)
		wantErrno(t, r.err, syscall.ENOENT)
		if item.file != "" && !strings.Contains(r.err.Error(), file+":2: load nosuch") {
			t.Errorf("%q does not say where", r.err)
		}
		if strings.Contains(r.log.String(), "qcow") {
			t.Error("a command after the failing one was run")
		}
	}
}

func TestMissingStartFile(t *testing.T) {
	r := startServer(t, startItem{file: "/nonexistent/file"})
	r.wantStatus(t, exitStartFailed)
	wantErrno(t, r.err, syscall.ENOENT)
}

func TestSignalWhenIdle(t *testing.T) {
	r := startServer(t, startItem{command: "load ram\nadd 0 /ram/@"})
	r.ready(t)
	r.signals <- syscall.SIGTERM
	r.wantStatus(t, exitClean)
	if r.tree.aborted {
		t.Error("an idle mount was aborted")
	}
}

// TestSignalDuringStart: a start command that does not end is given up.
func TestSignalDuringStart(t *testing.T) {
	r := newServerRig(t)
	r.lib.entered, r.lib.proceed = make(chan struct{}), make(chan struct{})
	go func() { r.result <- r.server.serve(startList{{command: "load ram"}}) }()
	<-r.lib.entered
	r.signals <- syscall.SIGINT
	r.wantStatus(t, exitStartFailed)
	if !strings.Contains(r.err.Error(), "interrupt") {
		t.Errorf("%q does not name the signal", r.err)
	}
}

// TestSignalWhileBusy: a signal, even if it arrives twice at once, is answered with a report, and serving goes on.
func TestSignalWhileBusy(t *testing.T) {
	r := newServerRig(t)
	r.server.forceDelay = time.Minute
	go func() { r.result <- r.server.serve(startList{{command: "load ram\nadd 0 /ram/@"}}) }()
	r.ready(t)
	node, file := r.open(t, 0, syscall.O_RDWR)
	r.tree.setBusy(true)
	r.signals <- syscall.SIGTERM
	r.signals <- syscall.SIGTERM
	for start := time.Now(); !strings.Contains(r.log.String(), "cannot stop"); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("not reported:\n%s", r.log)
		}
	}
	f := r.openCtl(t)
	if err := f.write("echo still here"); err != nil || f.cat(t) != "still here\n" {
		t.Errorf("commands are not taken any more: %v", err)
	}
	wantErrno(t, f.write("exit"), syscall.EBUSY)
	node.ops().Release(file)
	r.tree.setBusy(false)
	if err := f.write("exit"); err != nil {
		t.Error(err)
	}
	f.Release(f.file)
	r.wantStatus(t, exitClean)
	if r.tree.aborted {
		t.Errorf("aborted:\n%s", r.log)
	}
}

func TestUnmountFromOutside(t *testing.T) {
	for _, runErr := range []error{nil, syscall.ECONNABORTED} {
		r := startServer(t, startItem{command: "load ram\nadd 0 /ram/@"})
		r.ready(t)
		r.tree.runErr = runErr
		_ = r.tree.Unmount(false)
		r.wantStatus(t, exitClean)
	}
}

func TestCannotMount(t *testing.T) {
	r := newRig(t)
	s := &server{
		log: r.front.log, lib: r.lib, tree: failingTree{r.tree}, front: r.front, interp: r.interp,
		point: &mountpoint{path: "/test/mount"}, ended: make(chan struct{}),
		ctx: t.Context(), abandon: func() {}, stopTimeout: defaultStopTimeout, service: &service{},
	}
	err := s.serve(nil)
	wantErrno(t, err, syscall.EPERM)
	got := report(err, &strings.Builder{})
	if got != exitStartFailed || !strings.Contains(err.Error(), "cannot mount") {
		t.Errorf("exit status %d, %v", got, err)
	}
}

// failingTree cannot be mounted.
type failingTree struct{ *fakeTree }

func (failingTree) Run() error { return syscall.EPERM }

func TestSecondSignalForces(t *testing.T) {
	failFlush := func(r *serverRig) { r.lib.devices[0].flushErr = syscall.EIO }
	failClose := func(r *serverRig) { r.lib.shutdownErr = errors.New("a close failed") }
	for _, test := range []struct {
		name   string
		flags  uint32
		fail   func(*serverRig)
		status int
	}{
		{"reader", syscall.O_RDONLY, func(*serverRig) {}, exitClean},
		{"writer", syscall.O_RDWR, func(*serverRig) {}, exitDataAtRisk},
		{"failing flush", syscall.O_RDONLY, failFlush, exitDataAtRisk},
		{"failing close", syscall.O_RDONLY, failClose, exitDataAtRisk},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := startServer(t, startItem{command: "load ram\nadd 0 /ram/@"})
			r.ready(t)
			r.open(t, 0, test.flags)
			test.fail(r)
			device := r.lib.devices[0]
			r.tree.setBusy(true)
			r.signals <- syscall.SIGTERM
			r.signals <- syscall.SIGTERM
			r.wantStatus(t, test.status)
			if !r.tree.aborted || device.flushCount() != 1 {
				t.Errorf("aborted %v, %d flushes", r.tree.aborted, device.flushCount())
			}
			if !strings.Contains(r.log.String(), "ram000 is open once") {
				t.Errorf("the log does not say who uses the mount:\n%s", r.log)
			}
		})
	}
}

func TestReadyText(t *testing.T) {
	r := newRig(t)
	got := readyText(r.front, false)
	if strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "serving /test/mount ") {
		t.Errorf("without hints: %q", got)
	}
	if got := readyText(r.front, true); !strings.Contains(got, "echo load ram > /test/mount/dev/tcmur\n") {
		t.Errorf("without devices: %q", got)
	}
	r.mustRun(t, "load ram\nadd 7 /ram/@\nadd 2 /ram/@/1M")
	if got := readyText(r.front, true); !strings.Contains(got, "mkfs.ext4 /test/mount/dev/ram002\n") {
		t.Errorf("with devices: %q", got)
	}
}
