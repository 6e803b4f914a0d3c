// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

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
