// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

func TestMountpointIsMadeAndRemoved(t *testing.T) {
	base := t.TempDir()
	if err := os.Symlink("real", filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(base, "real"), 0o755); err != nil {
		t.Fatal(err)
	}
	point, err := prepareMountpoint("/proc", filepath.Join(base, "link/a/b"), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(base, "real/a/b")
	if info, err := os.Stat(want); err != nil || !info.IsDir() || point.path != want {
		t.Errorf("mount point %q, %v; want %q", point.path, err, want)
	}
	point.remove(hclog.NewNullLogger())
	entries, err := os.ReadDir(filepath.Join(base, "real"))
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestMountpointThatIsThereStays(t *testing.T) {
	dir := t.TempDir()
	point, err := prepareMountpoint("/proc", dir, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	point.remove(hclog.NewNullLogger())
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

func TestMountpointThatCannotBe(t *testing.T) {
	file := writeFile(t, t.TempDir(), "file", "")
	for _, path := range []string{file, file + "/below"} {
		_, err := prepareMountpoint("/proc", path, hclog.NewNullLogger())
		wantErrno(t, err, syscall.ENOTDIR)
	}
}

// mountUnserved mounts a FUSE file system on dir that nobody serves, and returns its connection.
func mountUnserved(t *testing.T, dir string) int {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("no /dev/fuse: ", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount(fsName, dir, "fuse."+fsName, 0, data); err != nil {
		_ = unix.Close(fd)
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return fd
}

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	mounts, err := readMounts("/proc")
	if err != nil {
		t.Fatal(err)
	}
	return topMount(mounts, dir) != nil
}

// TestStaleMountIsReplaced: dead mounts, one upon another, are detached.
func TestStaleMountIsReplaced(t *testing.T) {
	dir := t.TempDir()
	first := mountUnserved(t, dir)
	_ = unix.Close(first)
	if err := detachIfDead(dir, hclog.NewNullLogger()); err != nil || isMounted(t, dir) {
		t.Fatalf("still mounted, or %v", err)
	}
	_ = unix.Close(mountUnserved(t, dir))
	point, err := prepareMountpoint("/proc", dir, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if isMounted(t, dir) || point.path != dir || len(point.created) != 0 {
		t.Errorf("mounted %v, mount point %+v", isMounted(t, dir), point)
	}
}

// oneDirectory is an empty file system whose attributes the kernel may keep for an hour.
type oneDirectory struct{ fuse.RawFileSystem }

func (oneDirectory) GetAttr(_ <-chan struct{}, _ *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Mode = syscall.S_IFDIR | 0o755
	out.SetTimeout(time.Hour)
	return fuse.OK
}

// TestStaleMountWithCacheIsReplaced: the kernel answers stat(2) on a dead mount as long as it has the attributes.
func TestStaleMountWithCacheIsReplaced(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a forced unmount needs root")
	}
	dir := t.TempDir()
	fs := oneDirectory{fuse.NewDefaultRawFileSystem()}
	server, err := fuse.NewServer(fs, dir, &fuse.MountOptions{FsName: fsName, Name: fsName, DirectMount: true})
	if err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	served := make(chan struct{})
	go func() {
		server.Serve()
		close(served)
	}()
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		t.Fatal(err)
	}
	// A forced unmount ends the connection, but what is in use stays mounted.
	hold, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(hold) }()
	if err := unix.Unmount(dir, unix.MNT_FORCE); !errors.Is(err, syscall.EBUSY) {
		t.Fatalf("forced unmount: %v", err)
	}
	<-served
	if err := unix.Stat(dir, &stat); err != nil {
		t.Errorf("this test means nothing, the kernel has not cached: %v", err)
	}
	if _, err := prepareMountpoint("/proc", dir, hclog.NewNullLogger()); err != nil || isMounted(t, dir) {
		t.Errorf("still mounted, or %v", err)
	}
}

// TestLiveMountIsLeftAlone: a mount that has a server, even one that does not answer, is not replaced, and nothing
// waits for it for long.
func TestLiveMountIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	fd := mountUnserved(t, dir)
	// Closing the connection also ends the stat(2) that was left waiting.
	defer func() { _ = unix.Close(fd) }()
	_, err := prepareMountpoint("/proc", dir, hclog.NewNullLogger())
	wantErrno(t, err, syscall.EBUSY)
	if !isMounted(t, dir) {
		t.Error("a mount with a server was detached")
	}
}
