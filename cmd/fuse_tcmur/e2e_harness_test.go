// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree/uringtest"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// The e2e tests drive the built program on mounts of their own, with what users drive it with: writes to the command
// node, system calls, shells, mkfs, mount and fio. This file is what they stand on: a bed starts fronts, and whatever
// becomes of the test, takes them down and looks for what they left behind.

const (
	// graceful is how long a front may take for anything it should do at once.
	graceful = 20 * time.Second
	// markVariable names a bed's processes. Hosts inherit it, and keep it when their front has died.
	markVariable = "TCMUR_TEST_MARK"
)

// bed is one test's place: its deadline, its fronts, its handlers.
type bed struct {
	*testing.T
	ctx      context.Context // ends at the deadline
	mark     string          // "TCMUR_TEST_MARK=..." as in the environment of every process of the bed
	sockets  string          // TMPDIR of the fronts and hosts
	handlers []string        // arguments of the fronts: --handler-prefix ...
	mounts   string          // the directory of all mount points
	// environment is more variables for the fronts.
	environment []string

	mu     sync.Mutex // guards fronts
	fronts []*front
}

var beds atomic.Int64

// newBed makes a bed whose test fails when it has not ended within the deadline: then everything it waits for is taken
// away, so that it ends and cleans up. The fronts find the shipped handlers, the distribution's, and those named, which
// are built from plugin/testdata.
func newBed(t *testing.T, deadline time.Duration, handlers ...string) *bed {
	t.Helper()
	// Sockets have short names, unlike tests.
	sockets, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	mounts, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{
		T: t, mounts: mounts, sockets: sockets,
		mark: fmt.Sprintf("%s=%d-%d", markVariable, os.Getpid(), beds.Add(1)),
	}
	for _, prefix := range []string{testbed.ShippedHandlers(), testbed.SystemHandlers(t)} {
		b.handlers = append(b.handlers, "--handler-prefix", prefix)
	}
	if len(handlers) > 0 {
		b.handlers = append(b.handlers, "--handler-prefix", testbed.BuildHandlers(t, handlers...))
	}
	ctx, cancel := context.WithCancel(context.Background())
	b.ctx = ctx
	expiry := time.AfterFunc(deadline, func() {
		t.Errorf("not done within %v; taking everything down. Goroutines:\n%s", deadline, allStacks())
		cancel()
		b.takeDown()
	})
	hopeless := time.AfterFunc(deadline+time.Minute, func() { panic(t.Name() + " does not end even so") })
	t.Cleanup(func() {
		expiry.Stop()
		cancel()
		b.cleanUp()
		hopeless.Stop()
	})
	return b
}

func allStacks() string {
	text := make([]byte, 1<<20)
	return string(text[:runtime.Stack(text, true)])
}

// cleanUp ends the test's fronts, politely if the test has passed, and reports what is left then.
func (b *bed) cleanUp() {
	if !b.Failed() {
		for _, f := range b.fronts {
			if f.running() {
				f.stop()
			}
		}
	}
	if b.Failed() {
		b.takeDown()
	}
	if left := b.awaitNothingLeft(); len(left) > 0 {
		b.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
		b.takeDown()
	}
	if b.Failed() {
		for _, f := range b.fronts {
			b.Logf("%v printed:\n%s\nand logged:\n%s", f.cmd.Args, f.stdout.tail(), f.log.tail())
		}
	}
}

// takeDown removes everything by force, in the order that lets nothing hang.
func (b *bed) takeDown() {
	for _, mount := range b.mountsBelow(b.mounts) {
		// MNT_FORCE ends the connection of a FUSE mount and with it every request; other mounts ignore it.
		if mount.isFuse {
			_ = os.WriteFile(fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", mount.minor), []byte("1"), 0)
			_ = unix.Unmount(mount.path, unix.MNT_FORCE|unix.MNT_DETACH)
		}
	}
	for _, pid := range b.processes() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, mount := range b.mountsBelow(b.mounts) {
		_ = unix.Unmount(mount.path, unix.MNT_DETACH)
	}
	for _, loop := range loopsBelow(b.mounts) {
		_ = exec.Command("losetup", "-d", loop).Run()
	}
	os.RemoveAll(b.sockets) // fronts and hosts that are killed leave theirs behind
}

// awaitNothingLeft gives what ends by itself the time to do so, and lists what does not.
func (b *bed) awaitNothingLeft() []string {
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := b.leftovers()
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		time.Sleep(10 * time.Millisecond) // no event tells of all of these
	}
}

// leftovers lists the bed's processes with their memfds, mounts, loop devices and sockets.
func (b *bed) leftovers() []string {
	var left []string
	for _, pid := range b.processes() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		// A memfd lives no longer than the processes that have it, and none but the bed's have.
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if target, _ := os.Readlink(fd); strings.HasPrefix(target, "/memfd:") {
				left = append(left, fd+": "+target)
			}
		}
	}
	for _, mount := range b.mountsBelow(b.mounts) {
		left = append(left, "mount "+mount.path)
	}
	for _, loop := range loopsBelow(b.mounts) {
		left = append(left, "loop device "+loop)
	}
	sockets, _ := filepath.Glob(b.sockets + "/*")
	return append(left, sockets...)
}

// processes lists the bed's processes that are no zombies.
func (b *bed) processes() []int {
	environments, _ := filepath.Glob("/proc/[0-9]*/environ")
	var pids []int
	for _, path := range environments {
		environ, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(append(environ, 0), []byte(b.mark+"\x00")) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		pids = append(pids, pid)
	}
	return pids
}

// mounted is one mount.
type mounted struct {
	path   string
	isFuse bool
	minor  int // of its st_dev: the name of a FUSE connection
}

// mountsBelow lists the mounts at or below dir, the last made first. It touches none of them.
func (b *bed) mountsBelow(dir string) []mounted {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		b.Error(err)
		return nil
	}
	var found []mounted
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 5 || (fields[4] != dir && !strings.HasPrefix(fields[4], dir+"/")) {
			continue
		}
		_, minorText, _ := strings.Cut(fields[2], ":")
		minor, _ := strconv.Atoi(minorText)
		mount := mounted{path: fields[4], isFuse: strings.Contains(line, " - fuse."), minor: minor}
		found = append([]mounted{mount}, found...)
	}
	return found
}

// loopsBelow lists the loop devices whose file is below dir.
func loopsBelow(dir string) []string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	var loops []string
	for _, file := range files {
		if backing, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(backing), dir+"/") {
			loops = append(loops, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(file))))
		}
	}
	return loops
}

// command prepares a program that ends with the test's deadline.
func (b *bed) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(b.ctx, name, args...)
	cmd.WaitDelay = time.Second
	return cmd
}

// try runs a program and returns everything it printed.
func (b *bed) try(name string, args ...string) (string, error) {
	out, err := b.command(name, args...).CombinedOutput()
	return string(out), err
}

// run runs a program that has to succeed.
func (b *bed) run(name string, args ...string) string {
	b.Helper()
	out, err := b.try(name, args...)
	if err != nil {
		b.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// shell runs a script as a user would type it; $M is the mount point and $W the directory that it is in. It returns
// what was printed and the exit status.
func (b *bed) shell(f *front, script string) (string, int) {
	b.Helper()
	cmd := b.command("bash", "-c", script)
	cmd.Env = append(os.Environ(), "M="+f.mount, "W="+b.mounts)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.Fatalf("bash: %v", err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// front is one run of fuse_tcmur.
type front struct {
	*bed
	mount  string // the mount point, without symbolic links
	cmd    *exec.Cmd
	stdout watched
	log    watched
	exited chan struct{} // closed when the process has ended; then cmd.ProcessState may be read
}

// starter starts processes for all tests, on one thread that lives as long as the test program: the kernel sends the
// parent's death signal when the thread that started a process ends.
var starter = sync.OnceValue(func() chan<- func() {
	starts := make(chan func())
	go func() {
		runtime.LockOSThread()
		for start := range starts {
			start()
		}
	}()
	return starts
})

// launch starts a front at the mount point and does not wait for anything. The flags come after the harness's own.
func (b *bed) launch(mount string, flags ...string) *front {
	b.Helper()
	return b.launchInheriting(nil, mount, flags...)
}

// launchInheriting is launch with files that the front gets without having asked for them.
func (b *bed) launchInheriting(files []*os.File, mount string, flags ...string) *front {
	b.Helper()
	f := &front{bed: b, mount: mount, exited: make(chan struct{})}
	// Not the config file of this machine.
	args := []string{"--mountpoint", mount, "--config="}
	if uringtest.Wanted() {
		args = append(args, "--fuse-io-uring=on")
		restore := uringtest.Enable(b)
		defer func() { go func() { f.stdout.await(0, f.exited, "serving"); restore() }() }()
	}
	f.cmd = exec.Command(testbed.Program(b, "fuse_tcmur"), append(args, flags...)...)
	f.cmd.Env = append(append(os.Environ(), b.mark, "TMPDIR="+b.sockets), b.environment...)
	f.cmd.Stdout, f.cmd.Stderr = &f.stdout, &f.log
	f.cmd.ExtraFiles = files
	// If the test program dies without a clean-up, at least nothing goes on running.
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f.cmd.WaitDelay = time.Second
	started := make(chan error)
	starter() <- func() { started <- f.cmd.Start() }
	if err := <-started; err != nil {
		b.Fatal(err)
	}
	b.mu.Lock()
	b.fronts = append(b.fronts, f)
	b.mu.Unlock()
	go func() {
		_ = f.cmd.Wait()
		close(f.exited)
	}()
	return f
}

// start starts a front with the bed's handlers on a new mount point and waits until it serves.
func (b *bed) start(flags ...string) *front {
	b.Helper()
	return b.startAt(filepath.Join(b.mounts, fmt.Sprintf("m%d", len(b.fronts))), flags...)
}

// startInheriting is start with a file that the front gets without having asked for it.
func (b *bed) startInheriting(file *os.File, flags ...string) *front {
	b.Helper()
	files := make([]*os.File, 10)
	files[len(files)-1] = file // with a number that hosts have no other use for
	f := b.launchInheriting(files, filepath.Join(b.mounts, "m"), append(b.handlers, flags...)...)
	f.awaitServing()
	return f
}

// startAt is start with a mount point.
func (b *bed) startAt(mount string, flags ...string) *front {
	b.Helper()
	f := b.launch(mount, append(b.handlers, flags...)...)
	f.awaitServing()
	return f
}

// awaitServing waits until the front takes commands.
func (f *front) awaitServing() {
	f.Helper()
	if !f.stdout.await(0, f.exited, "serving "+f.mount) {
		f.Fatalf("%v does not serve:\n%s", f.cmd.Args, f.log.tail())
	}
}

func (f *front) running() bool {
	select {
	case <-f.exited:
		return false
	default:
		return true
	}
}

// signal sends a signal to the front.
func (f *front) signal(sig os.Signal) {
	f.Helper()
	if err := f.cmd.Process.Signal(sig); err != nil {
		f.Fatal(err)
	}
}

// stop ends the front as a service manager would.
func (f *front) stop() {
	f.Helper()
	f.signal(syscall.SIGTERM)
	f.wantExit(0)
}

// wantExit waits for the end of the front and checks its status.
func (f *front) wantExit(status int) {
	f.Helper()
	select {
	case <-f.exited:
	case <-time.After(graceful):
		f.Fatalf("%v did not end within %v", f.cmd.Args, graceful)
	}
	if got := f.cmd.ProcessState.ExitCode(); got != status {
		f.Errorf("%v ended with %v, want status %d", f.cmd.Args, f.cmd.ProcessState, status)
	}
}

// wantNothingLeft checks, in the middle of a test, that nothing of any front of the bed is left.
func (b *bed) wantNothingLeft() {
	b.Helper()
	if left := b.awaitNothingLeft(); len(left) > 0 {
		b.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
}

// ctlPath is the command node.
func (f *front) ctlPath() string { return f.mount + "/dev/tcmur" }

// path is a device's node.
func (f *front) path(device string) string { return f.mount + "/dev/" + device }

// ctl writes commands to the node in one write(2), and reads what they printed on the same descriptor.
func (f *front) ctl(commands string) (string, error) {
	f.Helper()
	node, err := os.OpenFile(f.ctlPath(), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer node.Close()
	_, writeErr := node.WriteString(commands)
	out, err := io.ReadAll(node)
	if err != nil {
		f.Errorf("read after %.60q: %v", commands, err)
	}
	return string(out), writeErr
}

// must gives commands that have to succeed.
func (f *front) must(commands string) string {
	f.Helper()
	out, err := f.ctl(commands)
	if err != nil {
		f.Fatalf("%q: %v\n%s", commands, err, out)
	}
	return out
}

// refused gives commands that have to fail with an errno and a text that says what it should.
func (f *front) refused(commands string, errno syscall.Errno, texts ...string) {
	f.Helper()
	out, err := f.ctl(commands)
	if !errors.Is(err, errno) {
		f.Errorf("%.60q: error %v, want %v\n%s", commands, err, errno, out)
		return
	}
	for _, text := range texts {
		if !strings.Contains(out, text) {
			f.Errorf("%.60q: %q does not say %q", commands, out, text)
		}
	}
}

var loadedPID = regexp.MustCompile(`into process (\d+)`)

// load loads a handler and returns the process id of its host.
func (f *front) load(subtype string) int {
	f.Helper()
	out := f.must("load " + subtype)
	match := loadedPID.FindStringSubmatch(out)
	if match == nil {
		f.Fatalf("load %s does not name the process: %q", subtype, out)
	}
	pid, _ := strconv.Atoi(match[1])
	return pid
}

// open opens a device node with open(2) flags; the test's end closes it if nothing else does.
func (f *front) open(device string, flags int) *os.File {
	f.Helper()
	file, err := os.OpenFile(f.path(device), flags, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { file.Close() }) // before the bed's own clean-up, which wants it closed
	return file
}

// watched is a text that grows, such as a log, and wakes who waits for it to say something.
type watched struct {
	mu    sync.Mutex // guards the fields below
	text  bytes.Buffer
	grown chan struct{} // closed at the next write; nil while nobody waits
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.grown != nil {
		close(w.grown)
		w.grown = nil
	}
	return w.text.Write(p)
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

// tail is the end of the text, as much as is good for a failure message.
func (w *watched) tail() string {
	const most = 16 << 10
	text := w.String()
	return text[max(0, len(text)-most):]
}

// await waits until one line, of those behind so many bytes, has all of the texts; false: the process ended, or the
// time was up, before it came.
func (w *watched) await(behind int, ended <-chan struct{}, texts ...string) bool {
	timeout := time.After(graceful)
	for last := false; ; {
		w.mu.Lock()
		text := w.text.String()[behind:]
		if w.grown == nil {
			w.grown = make(chan struct{})
		}
		grown := w.grown
		w.mu.Unlock()
		switch {
		case hasLine(text, texts...):
			return true
		case last:
			return false
		}
		select {
		case <-grown:
		case <-ended:
			last = true
		case <-timeout:
			return false
		}
	}
}

// hasLine reports whether one line of text has all of the parts.
func hasLine(text string, parts ...string) bool {
	for line := range strings.Lines(text) {
		found := true
		for _, part := range parts {
			found = found && strings.Contains(line, part)
		}
		if found {
			return true
		}
	}
	return false
}

// wantLog waits until one line of the log has all of the texts.
func (f *front) wantLog(texts ...string) {
	f.Helper()
	f.wantLogSince(0, texts...)
}

// wantLogSince is wantLog for what is behind so many bytes of the log.
func (f *front) wantLogSince(behind int, texts ...string) {
	f.Helper()
	if !f.log.await(behind, f.exited, texts...) {
		f.Fatalf("the log has no line with all of %q:\n%s", texts, f.log.tail())
	}
}
