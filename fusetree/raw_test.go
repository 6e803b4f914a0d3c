// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func stat(t testing.TB, path string) *unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("stat %s: %v", path, err)
	}
	return &st
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func TestReadAndWrite(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	newMemory(t, s.Tree, "cached", 10000)
	newDirectMemory(t, s.Tree, "direct", 10000)
	for _, name := range []string{"cached", "direct"} {
		f := open(t, s.path(name), os.O_RDWR)
		must(f.WriteAt([]byte("hello"), 4094))(t)
		must(f.WriteAt([]byte("end"), 9997))(t)
		got := make([]byte, 7)
		must(f.ReadAt(got, 4093))(t)
		if string(got) != "\x00hello\x00" {
			t.Errorf("%s: read %q", name, got)
		}
		all := must(io.ReadAll(f))(t)
		if len(all) != 10000 || string(all[9997:]) != "end" {
			t.Errorf("%s: read %d bytes to the end", name, len(all))
		}
		n, err := f.ReadAt(got, 9997)
		if n != 3 || !errors.Is(err, io.EOF) {
			t.Errorf("%s: read over the end: %d, %v", name, n, err)
		}
		n, err = f.ReadAt(got, 20000)
		if n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%s: read beyond the end: %d, %v", name, n, err)
		}
		_, err = f.WriteAt(got, 20000)
		wantErr(t, name+": write beyond the end", err, syscall.ENOSPC)
		if st := stat(t, s.path(name)); st.Size != 10000 {
			t.Errorf("%s: size after a failed write: %d", name, st.Size)
		}
	}
}

// The tools that people try first.
func TestTools(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	m := newMemory(t, s.Tree, "file", 1<<20)
	must(s.Mkdir("dir", s.Root()))(t)
	path := s.path("file")

	run(t, "sh", "-c", "echo hello > "+path)
	if got := run(t, "head", "-n1", path); got != "hello\n" {
		t.Errorf("head: %q", got)
	}
	run(t, "dd", "if=/dev/zero", "of="+path, "bs=64k", "count=16", "conv=fsync,notrunc")
	if got := m.bytes(0, 5); !bytes.Equal(got, make([]byte, 5)) {
		t.Errorf("after dd: %q", got)
	}
	if m.fsyncs.Load() == 0 {
		t.Error("dd conv=fsync did not fsync")
	}
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "cp", path, copied)
	run(t, "cmp", path, copied)
	run(t, "touch", path)
	if got := run(t, "find", s.dir, "-type", "f", "-size", "1048576c", "-printf", "%f %m\n"); got != "file 600\n" {
		t.Errorf("find: %q", got)
	}
	if got := run(t, "ls", "-lA", s.dir); !strings.Contains(got, "1048576") || !strings.Contains(got, "dir") {
		t.Errorf("ls: %q", got)
	}
}

func TestStat(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	dir := must(s.Mkdir("dir", s.Root()))(t)
	must(s.Mkdir("sub", dir))(t)
	before := time.Now()
	node := must(s.Add("file", dir, 0o640, nil, nil))(t)
	node.UpdateSize(1000)
	node.UpdateBlockSize(3000)

	st := stat(t, s.path("dir", "file"))
	if st.Mode != syscall.S_IFREG|0o640 || st.Size != 1000 || st.Blocks != 2 || st.Blksize != 2048 || st.Nlink != 1 {
		t.Errorf("file: %+v", st)
	}
	if int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() || st.Ino != node.id {
		t.Errorf("file: %+v", st)
	}
	if age := time.Unix(st.Mtim.Unix()).Sub(before); age < 0 || age > deadline {
		t.Errorf("mtime is off by %v", age)
	}
	st = stat(t, s.path("dir"))
	if st.Mode != syscall.S_IFDIR|0o755 || st.Nlink != 3 {
		t.Errorf("dir: %+v", st)
	}
	if _, err := os.Stat(s.path("dir", "file", "x")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file is not a directory: %v", err)
	}
}

func TestBlockSizeLimits(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	node := must(s.Add("file", s.Root(), 0o600, nil, nil))(t)
	for set, want := range map[int]int64{-1: 512, 0: 512, 512: 512, 4096: 4096, 65535: 32768, 1 << 40: 1 << 30} {
		node.UpdateBlockSize(set)
		if st := stat(t, s.path("file")); st.Blksize != want {
			t.Errorf("block size %d: st_blksize %d, want %d", set, st.Blksize, want)
		}
	}
}

// Every stat(2) after an update must see it, though the kernel caches attributes for a minute.
func TestUpdatesAreVisibleAtOnce(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	node := must(s.Add("file", s.Root(), 0o600, nil, nil))(t)
	var others sync.WaitGroup
	stop := make(chan struct{})
	for range 2 { // keep replies to LOOKUP and GETATTR under way
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_, _ = os.Stat(s.path("file"))
				}
			}
		})
	}
	for i := range int64(1000) {
		if i%10 == 0 { // a name that the kernel has not seen
			ok(t, "Remove", s.Remove("file", s.Root()))
			node = must(s.Add("file", s.Root(), 0o600, nil, nil))(t)
		}
		node.UpdateSize(i * 512)
		node.UpdateMode(uint32(i % 0o1000))
		node.UpdateOwner(uint32(i), uint32(i+1))
		right := func(st *unix.Stat_t) bool {
			return st.Size == i*512 && st.Mode&0o7777 == uint32(i%0o1000) && st.Ino == node.id &&
				st.Uid == uint32(i) && st.Gid == uint32(i+1)
		}
		st := stat(t, s.path("file"))
		if !right(st) {
			// The kernel takes attributes from a reply one by one, the size last, and others may see them half way. What is
			// out of date stays so.
			st = stat(t, s.path("file"))
		}
		if !right(st) {
			t.Errorf("round %d: size %d, mode %o, owner %d:%d, inode %d (%d)", i, st.Size, st.Mode, st.Uid, st.Gid, st.Ino,
				node.id)
			break
		}
	}
	mtime := stat(t, s.path("file")).Mtim
	node.UpdateMTime()
	if got := stat(t, s.path("file")).Mtim; got == mtime {
		t.Error("mtime has not changed")
	}
	s.Root().UpdateMode(0o700)
	if st := stat(t, s.dir); st.Mode&0o7777 != 0o700 {
		t.Errorf("mode of the root: %o", st.Mode)
	}
	close(stop)
	others.Wait()
}

func TestAddAndRemoveAreVisibleAtOnce(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	path := s.path("dir", "file")
	for range 100 {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("before Add: %v", err)
		}
		dir := must(s.Mkdir("dir", s.Root()))(t)
		must(s.Add("file", dir, 0o600, nil, nil))(t)
		stat(t, path)
		if st := stat(t, s.dir); st.Nlink != 3 {
			t.Errorf("link count of the root: %d", st.Nlink)
		}
		ok(t, "Remove", s.Remove("file", dir))
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("after Remove: %v", err)
		}
		ok(t, "Rmdir", s.Rmdir("dir", s.Root()))
		if _, err := os.Stat(s.path("dir")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("after Rmdir: %v", err)
		}
	}
}

// Contents that change behind the page cache are seen after UpdateMTime, also by a file that is open.
func TestUpdateMTimeDropsCachedPages(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	m := newMemory(t, s.Tree, "file", 4096)
	f := open(t, s.path("file"), os.O_RDONLY)
	got := make([]byte, 3)
	must(f.ReadAt(got, 0))(t)
	m.put(0, "new")
	m.node.UpdateMTime()
	must(f.ReadAt(got, 0))(t)
	if string(got) != "new" {
		t.Errorf("read %q", got)
	}
}

func TestKeepCache(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	for _, keep := range []bool{true, false} {
		reads := make(chan struct{}, 10)
		name := fmt.Sprint("keep-", keep)
		must(s.Add(name, s.Root(), 0o600, &Ops{
			Open: func(f *File) error { f.KeepCache = keep; return nil },
			Read: func(_ *File, p []byte, _ int64) (int, error) {
				reads <- struct{}{}
				return len(p), nil
			},
		}, nil))(t).UpdateSize(4096)
		for range 2 {
			must(os.ReadFile(s.path(name)))(t)
		}
		if n := len(reads); keep && n != 1 || !keep && n != 2 {
			t.Errorf("KeepCache %v: %d reads", keep, n)
		}
	}
}

func TestTruncateIsIgnoredWithoutOp(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	m := newMemory(t, s.Tree, "file", 8192)
	m.put(4096, "kept")
	path := s.path("file")

	f := open(t, path, os.O_RDWR|os.O_TRUNC|os.O_CREATE)
	got := make([]byte, 4)
	must(f.ReadAt(got, 4096))(t)
	if string(got) != "kept" {
		t.Errorf("after O_TRUNC: %q", got)
	}
	ok(t, "ftruncate", f.Truncate(100))
	ok(t, "truncate", os.Truncate(path, 1<<20))
	if st := stat(t, path); st.Size != 8192 {
		t.Errorf("size %d", st.Size)
	}
	must(f.ReadAt(got, 4096))(t)
	if string(got) != "kept" {
		t.Errorf("after truncate: %q", got)
	}
}

func TestTruncateOp(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	type call struct {
		open bool
		size int64
	}
	calls := make(chan call, 3)
	must(s.Add("file", s.Root(), 0o600, &Ops{
		Truncate: func(f *File, size int64) error {
			calls <- call{f != nil, size}
			if size > 1000 {
				return fmt.Errorf("too large: %w", syscall.EFBIG)
			}
			s.Lookup("/file").UpdateSize(size)
			return nil
		},
	}, nil))(t).UpdateSize(77)
	path := s.path("file")
	f := open(t, path, os.O_WRONLY|os.O_TRUNC)
	ok(t, "ftruncate", f.Truncate(500))
	if st := stat(t, path); st.Size != 500 {
		t.Errorf("size %d", st.Size)
	}
	wantErr(t, "truncate", os.Truncate(path, 2000), syscall.EFBIG)
	if st := stat(t, path); st.Size != 500 {
		t.Errorf("size %d", st.Size)
	}
	for _, want := range []call{{false, 0}, {true, 500}, {false, 2000}} {
		if got := await(t, "Truncate", calls); got != want {
			t.Errorf("called with %v, want %v", got, want)
		}
	}
}

func TestMissingOps(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	must(s.Add("file", s.Root(), 0o600, nil, nil))(t).UpdateSize(4096)
	f := open(t, s.path("file"), os.O_RDWR)
	_, err := f.ReadAt(make([]byte, 10), 0)
	wantErr(t, "read", err, syscall.EINVAL)
	_, err = f.WriteAt(make([]byte, 10), 0)
	wantErr(t, "write", err, syscall.EINVAL)
	ok(t, "fsync", f.Sync())
	ok(t, "close", f.Close())
}

func TestErrorsOfOps(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	for _, c := range []struct {
		name string
		err  error
		want syscall.Errno
	}{
		{"errno", syscall.EREMOTEIO, syscall.EREMOTEIO},
		{"wrapped", fmt.Errorf("no room: %w", syscall.ENOSPC), syscall.ENOSPC},
		{"other", errors.New("no errno"), syscall.EIO},
		{"zero", syscall.Errno(0), syscall.EIO},
		{"huge", syscall.Errno(512), syscall.EIO},
		{"enosys", syscall.ENOSYS, syscall.EOPNOTSUPP},
	} {
		var opens, releases atomic.Int64
		must(s.Add(c.name, s.Root(), 0o600, &Ops{
			Open: func(f *File) error {
				f.DirectIO = true
				if opens.Add(1) == 1 {
					return c.err
				}
				return nil
			},
			Release:  func(*File) { releases.Add(1) },
			Read:     func(*File, []byte, int64) (int, error) { return 0, c.err },
			Write:    func(*File, []byte, int64, WriteFlags) (int, error) { return 0, c.err },
			Fsync:    func(*File, bool) error { return c.err },
			Truncate: func(*File, int64) error { return c.err },
		}, nil))(t)
		_, err := os.OpenFile(s.path(c.name), os.O_RDWR, 0)
		wantErr(t, c.name+": open", err, c.want)
		f := open(t, s.path(c.name), os.O_RDWR)
		_, err = f.ReadAt(make([]byte, 10), 0)
		wantErr(t, c.name+": read", err, c.want)
		_, err = f.WriteAt(make([]byte, 10), 0)
		wantErr(t, c.name+": write", err, c.want)
		wantErr(t, c.name+": truncate", f.Truncate(1), c.want)
		wantErr(t, c.name+": fsync", f.Sync(), c.want)
		ok(t, "close", f.Close())
		ok(t, "Remove", s.Remove(c.name, s.Root()))
		if n := releases.Load(); n != 1 {
			t.Errorf("%s: %d releases for one open that failed and one that did not", c.name, n)
		}
	}
	// After all that, the kernel must still send FSYNC.
	m := newMemory(t, s.Tree, "good", 4096)
	f := open(t, s.path("good"), os.O_RDWR)
	ok(t, "fsync", f.Sync())
	ok(t, "fdatasync", unix.Fdatasync(int(f.Fd())))
	if m.fsyncs.Load() != 2 || m.datasyncs.Load() != 1 {
		t.Errorf("%d fsyncs, %d of them fdatasync", m.fsyncs.Load(), m.datasyncs.Load())
	}
}

// What was transferred before an error counts.
func TestPartialTransfers(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	must(s.Add("file", s.Root(), 0o600, &Ops{
		Open: func(f *File) error { f.DirectIO = true; return nil },
		Read: func(_ *File, p []byte, _ int64) (int, error) { return copy(p, "part"), syscall.EIO },
		Write: func(*File, []byte, int64, WriteFlags) (int, error) {
			return 3, syscall.EIO
		},
	}, nil))(t)
	f := open(t, s.path("file"), os.O_RDWR)
	n, err := unix.Pread(int(f.Fd()), make([]byte, 10), 0)
	if n != 4 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	n, err = unix.Pwrite(int(f.Fd()), make([]byte, 10), 0)
	if n != 3 || err != nil {
		t.Errorf("write: %d, %v", n, err)
	}
}

func TestPanicInOp(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	node := must(s.Add("file", s.Root(), 0o600, &Ops{
		Fsync:   func(*File, bool) error { panic("on purpose") },
		Read:    func(_ *File, p []byte, _ int64) (int, error) { return len(p) + 1, nil },
		Release: func(*File) { panic("on purpose") },
	}, nil))(t)
	node.UpdateSize(4096)
	f := open(t, s.path("file"), os.O_RDWR)
	wantErr(t, "fsync", f.Sync(), syscall.EIO)
	_, err := f.ReadAt(make([]byte, 10), 0)
	wantErr(t, "read", err, syscall.EIO)
	ok(t, "close", f.Close())
	ok(t, "Remove", s.Remove("file", s.Root()))
}

func TestWhatTheMountDoesNotPermit(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	newMemory(t, s.Tree, "file", 4096)
	must(s.Mkdir("dir", s.Root()))(t)
	file, fresh := s.path("file"), s.path("new")
	_, err := os.Create(fresh)
	wantErr(t, "create", err, syscall.EPERM)
	wantErr(t, "mkdir", os.Mkdir(fresh, 0o700), syscall.EPERM)
	wantErr(t, "mknod", unix.Mknod(fresh, unix.S_IFIFO|0o600, 0), syscall.EPERM)
	wantErr(t, "symlink", os.Symlink("x", fresh), syscall.EPERM)
	wantErr(t, "link", os.Link(file, fresh), syscall.EPERM)
	wantErr(t, "rename", os.Rename(file, fresh), syscall.EPERM)
	wantErr(t, "unlink", os.Remove(file), syscall.EPERM)
	wantErr(t, "rmdir", unix.Rmdir(s.path("dir")), syscall.EPERM)
	wantErr(t, "chmod", os.Chmod(file, 0o644), syscall.EPERM)
	wantErr(t, "chown", os.Chown(file, 12, 34), syscall.EPERM)
	ok(t, "chmod to what it is", os.Chmod(file, 0o600))
	ok(t, "chown to what it is", os.Chown(file, os.Geteuid(), os.Getegid()))
	_, err = os.OpenFile(s.dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	wantErr(t, "O_TMPFILE", err, syscall.EOPNOTSUPP)
	_, err = unix.Getxattr(file, "user.x", nil)
	wantErr(t, "getxattr", err, syscall.EOPNOTSUPP)
	wantErr(t, "setxattr", unix.Setxattr(file, "user.x", nil, 0), syscall.EOPNOTSUPP)
	_, err = os.Readlink(file)
	wantErr(t, "readlink", err, syscall.EINVAL)

	f := open(t, file, os.O_RDWR)
	for range 2 { // ENOSYS would show the second time
		wantErr(t, "fallocate", unix.Fallocate(int(f.Fd()), 0, 0, 4096), syscall.EOPNOTSUPP)
		_, err = unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
		wantErr(t, "ioctl", err, syscall.ENOTTY)
	}
}

func TestTimesAndLocks(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	newMemory(t, s.Tree, "file", 4096)
	at, mt := time.Unix(1000, 5), time.Unix(2000, 7)
	ok(t, "utimes", os.Chtimes(s.path("file"), at, mt))
	st := stat(t, s.path("file"))
	if st.Atim.Nano() != at.UnixNano() || st.Mtim.Nano() != mt.UnixNano() || st.Size != 4096 {
		t.Errorf("%+v", st)
	}
	f, g := open(t, s.path("file"), os.O_RDWR), open(t, s.path("file"), os.O_RDWR)
	ok(t, "flock", unix.Flock(int(f.Fd()), unix.LOCK_EX))
	wantErr(t, "second flock", unix.Flock(int(g.Fd()), unix.LOCK_EX|unix.LOCK_NB), syscall.EWOULDBLOCK)
}

func TestSeekAndCopyRange(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	from, to := newMemory(t, s.Tree, "from", 8192), newMemory(t, s.Tree, "to", 8192)
	from.put(0, "copied")
	f, g := open(t, s.path("from"), os.O_RDWR), open(t, s.path("to"), os.O_RDWR)
	for range 2 {
		for _, c := range []struct {
			off    int64
			whence int
			want   int64
		}{{5, unix.SEEK_DATA, 5}, {5, unix.SEEK_HOLE, 8192}, {0, unix.SEEK_END, 8192}} {
			got, err := unix.Seek(int(f.Fd()), c.off, c.whence)
			if got != c.want || err != nil {
				t.Errorf("lseek(%d, %d) = %d, %v; want %d", c.off, c.whence, got, err, c.want)
			}
		}
		_, err := unix.Seek(int(f.Fd()), 8192, unix.SEEK_DATA)
		wantErr(t, "SEEK_DATA at the end", err, syscall.ENXIO)

		var zero int64
		n, err := unix.CopyFileRange(int(f.Fd()), &zero, int(g.Fd()), new(int64), 6, 0)
		if n != 6 || err != nil {
			t.Errorf("copy_file_range: %d, %v", n, err)
		}
	}
	if got := string(to.bytes(0, 6)); got != "copied" {
		t.Errorf("copied %q", got)
	}
}

func TestReadDirectory(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	dir := must(s.Mkdir("dir", s.Root()))(t)
	const files = 3000 // several READDIR requests
	inodes := make(map[string]uint64)
	for i := range files {
		name := fmt.Sprintf("%0*d", 1+i%200, i)
		inodes[name] = must(s.Add(name, dir, 0o600, nil, nil))(t).id
	}
	if got := run(t, "find", s.dir, "-type", "f"); strings.Count(got, "\n") != files {
		t.Errorf("find sees %d files", strings.Count(got, "\n"))
	}
	if got := run(t, "ls", "-fi", s.path("dir")); strings.Count(got, "\n") != files+2 {
		t.Errorf("ls -fi:\n%.200s", got)
	}

	// Files come and go while a directory is read: those that stay are seen once, with their inode numbers.
	d := open(t, s.path("dir"), os.O_RDONLY)
	seen := make(map[string]bool)
	for n := 0; ; n++ {
		entries, err := d.ReadDir(100)
		for _, e := range entries {
			if seen[e.Name()] {
				t.Errorf("%q seen twice", e.Name())
			}
			seen[e.Name()] = true
		}
		if err != nil {
			break
		}
		if n < 20 { // not for ever: they are seen as well
			must(s.Add(fmt.Sprint("later", n), dir, 0o600, nil, nil))(t)
		}
		ok(t, "Remove", s.Remove(entries[0].Name(), dir))
		delete(inodes, entries[0].Name())
	}
	for name, inode := range inodes {
		if !seen[name] {
			t.Errorf("%q not seen", name)
		}
		if st := stat(t, s.path("dir", name)); st.Ino != inode {
			t.Errorf("inode of %q is %d, not %d", name, st.Ino, inode)
		}
	}
}

func TestRemovedCurrentDirectory(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	must(s.Mkdir("dir", s.Root()))(t)
	d := open(t, s.path("dir"), os.O_RDONLY)
	ok(t, "Rmdir", s.Rmdir("dir", s.Root()))
	names, err := d.Readdirnames(-1)
	if len(names) != 0 || err != nil {
		t.Errorf("removed directory: %v, %v", names, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil || st.Nlink != 0 {
		t.Errorf("removed directory: %+v, %v", st, err)
	}
	err = unix.Fstatat(int(d.Fd()), "x", &st, 0)
	wantErr(t, "lookup in a removed directory", err, syscall.ENOENT)
}

// Not parallel, nor is the next: other tests start processes, and until it calls exec(2) a child has every file open
// that its parent has.
func TestRemoveWhileOpen(t *testing.T) {
	s := serve(t, Options{})
	m := newMemory(t, s.Tree, "file", 4096)
	f, g := open(t, s.path("file"), os.O_RDWR), open(t, s.path("file"), os.O_RDONLY)
	start := time.Now()
	wantErr(t, "Remove", s.Remove("file", s.Root()), syscall.EBUSY)
	if waited := time.Since(start); waited >= closeGrace {
		t.Errorf("Remove of a file in use took %v", waited)
	}
	if n := m.node.OpenCount(); n != 2 {
		t.Errorf("open count %d", n)
	}
	if text := s.Format(); !strings.Contains(text, " 4096     2    file\n") {
		t.Errorf("Format:\n%s", text)
	}
	ok(t, "close", f.Close())
	wantErr(t, "Remove", s.Remove("file", s.Root()), syscall.EBUSY)

	// A duplicate keeps it open after a close.
	dup := must(unix.FcntlInt(g.Fd(), unix.F_DUPFD_CLOEXEC, 0))(t)
	ok(t, "close", g.Close())
	wantErr(t, "Remove", s.Remove("file", s.Root()), syscall.EBUSY)
	must(unix.Pread(dup, make([]byte, 1), 0))(t)
	ok(t, "close", unix.Close(dup))
	ok(t, "Remove", s.Remove("file", s.Root()))
	if o, r := m.opens.Load(), m.releases.Load(); o != 2 || r != 2 {
		t.Errorf("%d opens, %d releases", o, r)
	}
	_, err := os.Stat(s.path("file"))
	wantErr(t, "stat", err, syscall.ENOENT)
}

// close(2) does not wait for RELEASE, but a Remove that follows it must not fail for that.
func TestRemoveAfterClose(t *testing.T) {
	s := serve(t, Options{})
	for range 200 {
		m := newMemory(t, s.Tree, "file", 4096)
		must(os.ReadFile(s.path("file")))(t)
		ok(t, "Remove", s.Remove("file", s.Root()))
		if o, r := m.opens.Load(), m.releases.Load(); o != r {
			t.Fatalf("%d opens, %d releases", o, r)
		}
	}
}

func TestDetachWhileOpen(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	old := newDirectMemory(t, s.Tree, "file", 4096)
	f := open(t, s.path("file"), os.O_RDWR)
	must(f.WriteAt([]byte("old"), 0))(t)
	ok(t, "Detach", s.Detach("file", s.Root()))
	young := newDirectMemory(t, s.Tree, "file", 4096)

	_, err := f.ReadAt(make([]byte, 3), 0)
	wantErr(t, "read", err, syscall.ENODEV)
	_, err = f.WriteAt(make([]byte, 3), 0)
	wantErr(t, "write", err, syscall.ENODEV)
	wantErr(t, "fsync", f.Sync(), syscall.ENODEV)
	wantErr(t, "truncate", f.Truncate(0), syscall.ENODEV)
	var st unix.Stat_t
	ok(t, "fstat", unix.Fstat(int(f.Fd()), &st))
	if st.Ino != old.node.id || st.Nlink != 0 {
		t.Errorf("fstat: %+v", st)
	}
	_, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	wantErr(t, "open of what is gone", err, syscall.ESTALE)

	g := open(t, s.path("file"), os.O_RDWR)
	must(g.WriteAt([]byte("new"), 0))(t)
	ok(t, "close", f.Close())
	ok(t, "close", g.Close())
	ok(t, "Remove", s.Remove("file", s.Root()))
	s.unmount(t)
	s.wantRun(t, nil)
	if string(old.bytes(0, 3)) != "old" || string(young.bytes(0, 3)) != "new" {
		t.Errorf("contents: %q %q", old.bytes(0, 3), young.bytes(0, 3))
	}
	if old.fsyncs.Load() != 0 || old.releases.Load() != 1 || young.releases.Load() != 1 {
		t.Errorf("fsyncs %d, releases %d %d", old.fsyncs.Load(), old.releases.Load(), young.releases.Load())
	}
	if len(s.nodes) != 1 {
		t.Errorf("%d nodes remain", len(s.nodes))
	}
}

// Detach must not wait for a request that is stuck in a node's operation.
func TestDetachWhileStuck(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	entered, leave := make(chan struct{}), make(chan struct{})
	for _, direct := range []bool{true, false} {
		name := fmt.Sprint("direct-", direct)
		must(s.Add(name, s.Root(), 0o600, &Ops{
			Open: func(f *File) error { f.DirectIO = direct; return nil },
			Write: func(_ *File, p []byte, _ int64, _ WriteFlags) (int, error) {
				entered <- struct{}{}
				<-leave
				return len(p), nil
			},
		}, nil))(t)
		f := open(t, s.path(name), os.O_RDWR)
		written := make(chan error, 1)
		go func() {
			_, err := f.WriteAt([]byte("x"), 0)
			written <- err
		}()
		await(t, "Write", entered)
		start := time.Now()
		wantErr(t, "Remove", s.Remove(name, s.Root()), syscall.EBUSY)
		ok(t, "Detach", s.Detach(name, s.Root()))
		if waited := time.Since(start); waited >= noticePatience {
			t.Errorf("Detach took %v", waited)
		}
		if _, err := os.Stat(s.path(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after Detach: %v", err)
		}
		leave <- struct{}{}
		ok(t, "write", await(t, "the write's end", written))
	}
}

func TestSynchronousWrites(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	m := newDirectMemory(t, s.Tree, "direct", 1<<16)
	for _, c := range []struct {
		flags int
		want  int64
	}{{0, 0}, {unix.O_DSYNC, 1}, {unix.O_SYNC, 1}} {
		m.dsyncWrites.Store(0)
		f := open(t, s.path("direct"), os.O_RDWR|c.flags)
		must(f.WriteAt([]byte("x"), 0))(t)
		if got := m.dsyncWrites.Load(); got != c.want {
			t.Errorf("open flags %#x: %d synchronous writes, want %d", c.flags, got, c.want)
		}
	}
	m.dsyncWrites.Store(0)
	f := open(t, s.path("direct"), os.O_RDWR)
	must(unix.Pwritev2(int(f.Fd()), [][]byte{[]byte("x")}, 0, unix.RWF_DSYNC))(t)
	if got := m.dsyncWrites.Load(); got != 1 {
		t.Errorf("RWF_DSYNC: %d synchronous writes", got)
	}
	if m.fsyncs.Load() != 0 {
		t.Errorf("kernel sends %d FSYNC for DirectIO: the documentation is out of date", m.fsyncs.Load())
	}

	c := newMemory(t, s.Tree, "cached", 1<<16)
	f = open(t, s.path("cached"), os.O_RDWR|unix.O_DSYNC)
	must(f.WriteAt([]byte("x"), 0))(t)
	if c.fsyncs.Load() != 1 {
		t.Errorf("cached O_DSYNC write: %d fsyncs", c.fsyncs.Load())
	}
}

// Direct writes to one file reach the node side by side.
func TestParallelDirectWrites(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{})
	const writers = 8
	entered, leave := make(chan struct{}), make(chan struct{})
	node := must(s.Add("file", s.Root(), 0o600, &Ops{
		Open: func(f *File) error { f.DirectIO = true; return nil },
		Write: func(_ *File, p []byte, _ int64, _ WriteFlags) (int, error) {
			entered <- struct{}{}
			<-leave
			return len(p), nil
		},
	}, nil))(t)
	node.UpdateSize(1 << 20)
	f := open(t, s.path("file"), os.O_RDWR)
	var group sync.WaitGroup
	for i := range int64(writers) {
		group.Go(func() {
			_, err := f.WriteAt(make([]byte, 512), i*512)
			ok(t, "write", err)
		})
	}
	for range writers {
		await(t, "all writes to be under way at once", entered)
	}
	close(leave)
	group.Wait()
}

// Requests are as large as MaxWrite says.
func TestRequestSize(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{0, 64 << 10} {
		s := serve(t, Options{MaxWrite: limit})
		reads, writes := make(chan int, 1000), make(chan int, 1000)
		must(s.Add("file", s.Root(), 0o600, &Ops{
			Open: func(f *File) error { f.DirectIO = true; return nil },
			Read: func(_ *File, p []byte, _ int64) (int, error) {
				reads <- len(p)
				return len(p), nil
			},
			Write: func(_ *File, p []byte, _ int64, _ WriteFlags) (int, error) {
				writes <- len(p)
				return len(p), nil
			},
		}, nil))(t)
		f := open(t, s.path("file"), os.O_RDWR)
		buf := make([]byte, 4<<20)
		must(f.WriteAt(buf, 0))(t)
		must(f.ReadAt(buf, 0))(t)
		if limit == 0 {
			limit = defaultMaxWrite
		}
		for what, sizes := range map[string]chan int{"read": reads, "write": writes} {
			largest := 0
			for len(sizes) > 0 {
				largest = max(largest, <-sizes)
			}
			if largest > limit || largest < limit/2 {
				t.Errorf("limit %d: largest %s is %d", limit, what, largest)
			}
		}
	}
}

func TestWritevJoins(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	m := newMemory(t, tree, "file", 4096)
	f := &File{Node: m.node}
	if !tree.files.put(f) {
		t.Fatal("put")
	}
	r := &rawFS{tree}
	for _, data := range [][][]byte{{[]byte("one")}, {[]byte("o"), nil, []byte("ne")}} {
		n, st := r.Writev(nil, writeIn(f.handle, 8), data)
		if n != 3 || !st.Ok() || string(m.bytes(8, 3)) != "one" {
			t.Errorf("Writev: %d, %v, %q", n, st, m.bytes(8, 3))
		}
	}
}

// The kernel believes replies to LOOKUP and SETATTR even when an update has overtaken them: they must not be cached.
func TestRepliesThatCanBeOvertaken(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	node := must(tree.Add("file", tree.Root(), 0o600, nil, nil))(t)
	r := &rawFS{tree}
	var entry fuse.EntryOut
	st := r.Lookup(nil, &fuse.InHeader{NodeId: rootID}, "file", &entry)
	if !st.Ok() || entry.AttrTimeout() != 0 || entry.EntryTimeout() != cacheTimeout {
		t.Errorf("LOOKUP: %v, attributes for %v, name for %v", st, entry.AttrTimeout(), entry.EntryTimeout())
	}
	var attr fuse.AttrOut
	var set fuse.SetAttrIn
	set.NodeId = node.id
	if st := r.SetAttr(nil, &set, &attr); !st.Ok() || attr.Timeout() != 0 {
		t.Errorf("SETATTR: %v, attributes for %v", st, attr.Timeout())
	}
	var get fuse.GetAttrIn
	get.NodeId = node.id
	if st := r.GetAttr(nil, &get, &attr); !st.Ok() || attr.Timeout() != cacheTimeout {
		t.Errorf("GETATTR: %v, attributes for %v", st, attr.Timeout())
	}
}

func writeIn(handle, off uint64) *fuse.WriteIn {
	return &fuse.WriteIn{Fh: handle, Offset: off}
}

// Requests for nodes and files that do not exist are answered, not crashed on.
func TestRequestsOutOfNowhere(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	r := &rawFS{tree}
	header := fuse.InHeader{NodeId: 4711}
	stale := fuse.Status(syscall.ESTALE)
	for what, got := range map[string]fuse.Status{
		"LOOKUP":  r.Lookup(nil, &header, "x", &fuse.EntryOut{}),
		"GETATTR": r.GetAttr(nil, &fuse.GetAttrIn{InHeader: header}, &fuse.AttrOut{}),
		"SETATTR": r.SetAttr(nil, &fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{InHeader: header}}, &fuse.AttrOut{}),
		"OPEN":    r.Open(nil, &fuse.OpenIn{InHeader: header}, &fuse.OpenOut{}),
		"OPENDIR": r.OpenDir(nil, &fuse.OpenIn{InHeader: header}, &fuse.OpenOut{}),
		"READDIR": r.ReadDir(nil, &fuse.ReadIn{InHeader: header}, fuse.NewDirEntryList(nil, 0)),
	} {
		if got != stale {
			t.Errorf("%s: %v", what, got)
		}
	}
	r.Forget(4711, 1)
	r.Forget(rootID, 1)
	r.Release(nil, &fuse.ReleaseIn{Fh: 4711})
	_, read := r.Read(nil, &fuse.ReadIn{Fh: 4711}, nil)
	_, write := r.Write(nil, writeIn(4711, 0), nil)
	for what, got := range map[string]fuse.Status{
		"READ":  read,
		"WRITE": write,
		"FSYNC": r.Fsync(nil, &fuse.FsyncIn{Fh: 4711}),
		"FLUSH": r.Flush(nil, &fuse.FlushIn{Fh: 4711}),
		"LSEEK": r.Lseek(nil, &fuse.LseekIn{Fh: 4711}, &fuse.LseekOut{}),
	} {
		if got != fuse.EBADF {
			t.Errorf("%s: %v", what, got)
		}
	}
}
