// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree/uringtest"
)

// deadline bounds everything a test waits for.
const deadline = 20 * time.Second

func TestMain(m *testing.M) {
	flag.Parse()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		// The tests that need it skip themselves; examples cannot.
		if err := flag.Set("test.skip", "^Example"); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

// served is a tree that is mounted for the duration of a test.
type served struct {
	*Tree
	dir string
	run chan error // what Run returned
}

// serve mounts an empty tree. The test's cleanup checks that Run ends without error, unless wantRun took its result.
func serve(t testing.TB, opts Options) *served {
	t.Helper()
	s := newServed(t, opts)
	s.start(t)
	return s
}

func newServed(t testing.TB, opts Options) *served {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("no FUSE on this machine: %v", err)
	}
	if opts.Logger == nil {
		opts.Logger = hclog.New(&hclog.LoggerOptions{Name: t.Name(), Output: testWriter{t}})
	}
	if opts.IOUring == "" && uringtest.Wanted() {
		opts.IOUring = IOUringOn
	}
	dir := t.TempDir()
	tree, err := Init(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return &served{Tree: tree, dir: dir, run: make(chan error, 1)}
}

// background calls Run in a goroutine; done is closed when it has returned.
func (s *served) background(t testing.TB) (done chan struct{}) {
	t.Helper()
	restore := func() {}
	if s.opts.IOUring == IOUringOn {
		restore = uringtest.Enable(t)
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		s.run <- s.Run()
	}()
	go func() {
		defer restore()
		select {
		case <-s.Mounted():
		case <-done:
		}
	}()
	return done
}

func (s *served) start(t testing.TB) {
	t.Helper()
	done := s.background(t)
	// A process that dies while a thread of it waits for its own mount never ends. So no test may come to the point
	// where the test binary's own time-out ends it.
	watchdog := time.AfterFunc(2*deadline, func() {
		t.Errorf("test takes too long, aborting its mount: %v", s.Abort())
	})
	t.Cleanup(func() {
		watchdog.Stop()
		if err := s.Abort(); err != nil {
			t.Errorf("Abort: %v", err)
		}
		select {
		case <-done:
		case <-time.After(deadline):
			t.Fatal("Run did not return after Abort")
		}
		select {
		case err := <-s.run:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		default: // the test has looked at it
		}
	})
	select {
	case <-s.Mounted():
	case err := <-s.run:
		t.Fatalf("Run: %v", err)
	case <-time.After(deadline):
		t.Fatal("not mounted in time")
	}
}

// wantRun waits until Run has returned and checks its result.
func (s *served) wantRun(t testing.TB, want error) {
	t.Helper()
	select {
	case err := <-s.run:
		if !errors.Is(err, want) {
			t.Errorf("Run: %v, want %v", err, want)
		}
	case <-time.After(deadline):
		t.Fatal("Run did not return")
	}
}

// unmount removes a mount that nothing uses, except perhaps a child process that another test is starting: until its
// exec(2) it has everything open that this process had.
func (s *served) unmount(t testing.TB) {
	t.Helper()
	end := time.Now().Add(deadline)
	err := s.Unmount(false)
	for errors.Is(err, syscall.EBUSY) && time.Now().Before(end) {
		time.Sleep(time.Millisecond)
		err = s.Unmount(false)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// path returns the path of name below the mount point.
func (s *served) path(name ...string) string {
	return filepath.Join(append([]string{s.dir}, name...)...)
}

// testWriter sends a log to the test.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// must returns the value of a call that has to succeed: must(os.ReadFile(name))(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// ok checks that a call succeeded.
func ok(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// wantErr checks that a call failed with the errno want.
func wantErr(t testing.TB, what string, got error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// await waits for a channel to be closed, or for a value from it.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(deadline):
		t.Fatalf("waited in vain: %s", what)
		panic("unreachable")
	}
}

func open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func umountByHand(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("umount", args...).CombinedOutput(); err != nil {
		t.Fatalf("umount %v: %v: %s", args, err, out)
	}
}

func TestRunAndUnmount(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{FsName: "the-name", FsType: "the-type"})

	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type != unix.FUSE_SUPER_MAGIC || st.Bsize != 4096 || st.Namelen != 255 {
		t.Errorf("statfs: %+v", st)
	}
	mounts := string(must(os.ReadFile("/proc/mounts"))(t))
	want := fmt.Sprintf("the-name %s fuse.the-type rw,", s.dir)
	if !strings.Contains("\n"+mounts, "\n"+want) {
		t.Errorf("/proc/mounts has no line beginning with %q:\n%s", want, mounts)
	}

	wantErr(t, "second Run", s.Run(), syscall.EALREADY)
	wantErr(t, "Exit while mounted", s.Exit(), syscall.EBUSY)
	for range 2 {
		s.unmount(t)
	}
	s.wantRun(t, nil)
	if err := s.Unmount(false); err != nil {
		t.Errorf("Unmount after Run: %v", err)
	}
	wantErr(t, "Run again", s.Run(), syscall.EALREADY)
	if err := s.Exit(); err != nil {
		t.Error(err)
	}
}

func TestUnmountBeforeRun(t *testing.T) {
	t.Parallel()
	s := newServed(t, Options{})
	ok(t, "Unmount", s.Unmount(false))
	ok(t, "Run", s.Run())
	ok(t, "Exit", s.Exit())
}

func TestMountErrors(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want syscall.Errno
	}{
		{filepath.Join(filepath.Dir(file), "missing"), syscall.ENOENT},
		{file, syscall.ENOTDIR},
	} {
		tree := must(Init(c.path, Options{}))(t)
		wantErr(t, c.path, tree.Run(), c.want)
		ok(t, "Unmount after a failed Run", tree.Unmount(true))
		ok(t, "Exit after a failed Run", tree.Exit())
		select {
		case <-tree.Mounted():
			t.Error("Mounted after a failed Run")
		default:
		}
	}
}

// The kernel escapes such names in its tables.
func TestMountPointWithBlanks(t *testing.T) {
	t.Parallel()
	s := newServed(t, Options{})
	dir := filepath.Join(s.dir, "a b\tc\\d\ne#f")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s.Tree = must(Init(dir, Options{IOUring: s.opts.IOUring}))(t)
	s.start(t)
	if !s.mnt.present() || !s.mnt.inPlace() {
		t.Errorf("present %v, in place %v", s.mnt.present(), s.mnt.inPlace())
	}
	s.unmount(t)
	s.wantRun(t, nil)
	if s.mnt.present() {
		t.Error("still present")
	}
}

func TestMountPointIsSymlink(t *testing.T) {
	t.Parallel()
	s := newServed(t, Options{})
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(s.dir, link); err != nil {
		t.Fatal(err)
	}
	s.Tree = must(Init(link, Options{IOUring: s.opts.IOUring}))(t)
	s.start(t)
	s.unmount(t)
	s.wantRun(t, nil)
}

func TestUnmountFromOutside(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	umountByHand(t, s.dir)
	s.wantRun(t, nil)
	ok(t, "Unmount", s.Unmount(false))
}

func TestUnmountBusy(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	m := newMemory(t, s.Tree, "file", 4096)
	f := open(t, s.path("file"), os.O_RDWR)

	wantErr(t, "Unmount while a file is open", s.Unmount(false), syscall.EBUSY)
	must(f.WriteAt([]byte("served"), 0))(t)

	ok(t, "forced Unmount", s.Unmount(true))
	if _, err := os.Stat(s.path("file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after a forced unmount: %v", err)
	}
	must(f.WriteAt([]byte("detach"), 0))(t)
	ok(t, "Unmount of a detached mount", s.Unmount(false))
	wantErr(t, "Run again", s.Run(), syscall.EALREADY)

	ok(t, "close", f.Close())
	s.wantRun(t, nil)
	if got := string(m.bytes(0, 6)); got != "detach" {
		t.Errorf("last write: %q", got)
	}
}

// An outsider aborts the connection of a mount that is in use: the mount stays, dead, and Run must not.
func TestAbortFromOutside(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	released := make(chan *File, 1)
	node := must(s.Add("file", s.Root(), 0o600, &Ops{Release: func(f *File) { released <- f }}, nil))(t)
	f := open(t, s.path("file"), os.O_RDWR)

	wantErr(t, "umount -f of a busy mount", unix.Unmount(s.dir, unix.MNT_FORCE), syscall.EBUSY)
	s.wantRun(t, syscall.ECONNABORTED)
	wantErr(t, "fsync after abort", f.Sync(), syscall.ENOTCONN)
	if got := await(t, "Release", released); got.Node != node {
		t.Errorf("released %v", got)
	}
	if n := node.OpenCount(); n != 0 {
		t.Errorf("%d open files after Run", n)
	}
	if id, err := mountAt(s.dir); err != nil || id == s.mnt.id {
		t.Errorf("dead mount is still there: %v, %v", id, err)
	}
}

func TestAbort(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	newMemory(t, s.Tree, "file", 4096)
	f := open(t, s.path("file"), os.O_RDWR)
	ok(t, "Abort", s.Abort())
	s.wantRun(t, nil)
	if _, err := f.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("read after Abort succeeded")
	}
	ok(t, "Abort again", s.Abort())
}

// A mount over ours must be neither unmounted nor taken for ours.
func TestCoveredMount(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	if err := unix.Mount("none", s.dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	wantErr(t, "Unmount", s.Unmount(true), syscall.EBUSY)
	umountByHand(t, s.dir)
	s.unmount(t)
	s.wantRun(t, nil)
}

// An unmount from within an operation must not wait for that operation.
func TestUnmountFromOperation(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	result := make(chan error, 1)
	ops := &Ops{Release: func(*File) { result <- s.Unmount(false) }}
	must(s.Add("file", s.Root(), 0o600, ops, nil))(t)
	ok(t, "close", open(t, s.path("file"), os.O_RDONLY).Close())
	ok(t, "Unmount", await(t, "Release", result))
	s.wantRun(t, nil)
}

// A child process must not inherit the connection: it would keep the mount alive after this process.
func TestConnectionIsNotInherited(t *testing.T) {
	t.Parallel()
	serve(t, Options{})
	out := must(exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput())(t)
	if strings.Contains(string(out), "/dev/fuse") {
		t.Errorf("a child has the connection open:\n%s", out)
	}
}

// TestKilledWhileWaiting: a process that is killed while it waits for an answer of its own mount ends, and the
// connection with it.
func TestKilledWhileWaiting(t *testing.T) {
	if path := os.Getenv("FUSETREE_TEST_WAIT"); path != "" {
		waitUnanswered(t, path)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("no FUSE on this machine: %v", err)
	}
	for _, kind := range []string{"directory", "file", "served"} {
		t.Run(kind, func(t *testing.T) {
			if uringtest.Wanted() {
				t.Cleanup(uringtest.Enable(t))
			}
			path := t.TempDir()
			if kind == "file" {
				path = filepath.Join(path, "file")
				ok(t, "WriteFile", os.WriteFile(path, nil, 0o600))
			}
			cmd := exec.Command(must(os.Executable())(t), "-test.run=^TestKilledWhileWaiting$", "-test.v")
			cmd.Env = append(os.Environ(), "FUSETREE_TEST_WAIT="+path, "FUSETREE_TEST_KIND="+kind)
			out := must(cmd.StdoutPipe())(t)
			ok(t, "Start", cmd.Start())
			t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_FORCE|unix.MNT_DETACH) })
			watchdog := time.AfterFunc(deadline, func() {
				t.Error("the process has no request, or does not end")
				_ = cmd.Process.Kill()
				_ = unix.Unmount(path, unix.MNT_FORCE|unix.MNT_DETACH) // ends the connection, and so the process
			})
			defer watchdog.Stop()
			said := ""
			for line := bufio.NewScanner(out); said != requestReceived && line.Scan(); {
				said = line.Text()
			}
			if said != requestReceived {
				t.Errorf("the process ended with %q", said)
			}
			ok(t, "Kill", cmd.Process.Kill())
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait()
			if !watchdog.Stop() {
				return
			}
			_, err := os.Open(path)
			wantErr(t, "open of the dead mount", err, syscall.ENOTCONN)
		})
	}
}

const requestReceived = "request received"

// waitUnanswered mounts on path, uses the mount as this package does, receives the request for that, and does not
// answer.
func waitUnanswered(t *testing.T, path string) {
	kind := os.Getenv("FUSETREE_TEST_KIND")
	if kind == "served" {
		openUnanswered(t, path)
	}
	tree := must(Init(filepath.Dir(path), Options{}))(t) // a directory of its own would stay behind
	opts := tree.serverOptions()
	mnt, fd, err := newMount(path, kind == "file", opts)
	ok(t, "newMount", err)
	c := newConnection(tree, fd, opts)
	must(c.handshake(opts))(t)
	if kind == "file" {
		go mnt.probeFile()
	} else {
		go mnt.probe()
	}
	must(unix.Read(fd, make([]byte, headerSize+opts.MaxWrite)))(t)
	fmt.Println(requestReceived)
	select {}
}

// openUnanswered is waitUnanswered with a node that does not return from its Open.
func openUnanswered(t *testing.T, path string) {
	opts := Options{}
	if uringtest.Wanted() {
		opts.IOUring = IOUringOn
	}
	tree := must(Init(path, opts))(t)
	must(tree.Add("node", tree.Root(), 0o600, &Ops{
		Open: func(*File) error {
			fmt.Println(requestReceived)
			select {}
		},
	}, nil))(t)
	go func() { _ = apart(-1, func() error { return openWhenMounted(tree, path) }) }()
	ok(t, "Run", tree.Run())
}

func openWhenMounted(tree *Tree, path string) error {
	<-tree.Mounted()
	_, err := unix.Open(filepath.Join(path, "node"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	return err
}
