// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree/uringtest"
)

// fileTree is a mounted tree that is one file.
type fileTree struct {
	*served
	*memory
	file   string
	writes atomic.Int64
}

// serveFile mounts one on a new file.
func serveFile(t *testing.T, size int, opts Options) *fileTree {
	t.Helper()
	if opts.Logger == nil {
		opts.Logger = hclog.New(&hclog.LoggerOptions{Name: t.Name(), Output: testWriter{t}})
	}
	if uringtest.Wanted() {
		opts.IOUring = IOUringOn
	}
	f := &fileTree{
		memory: &memory{data: make([]byte, size)}, file: filepath.Join(t.TempDir(), "file"),
	}
	ok(t, "make a file to mount on", os.WriteFile(f.file, []byte("below"), 0o600))
	ops := f.memory.ops()
	open, write := ops.Open, ops.Write
	ops.Open = func(file *File) error {
		file.KeepCache = true
		err := open(file)
		file.DirectIO = file.Flags&unix.O_DIRECT != 0
		return err
	}
	ops.Write = func(file *File, p []byte, off int64, flags WriteFlags) (int, error) {
		f.writes.Add(1)
		return write(file, p, off, flags)
	}
	tree := must(InitFile(f.file, 0o640, ops, f, opts))(t)
	f.served = &served{Tree: tree, dir: f.file, run: make(chan error, 1)}
	f.memory.node = tree.Root()
	f.memory.node.UpdateSize(int64(size))
	f.start(t)
	return f
}

// open opens the file in a way that the Go runtime does not poll it, which for the process that serves it could mean to
// wait for itself.
func (f *fileTree) open(t *testing.T, flags int) *os.File {
	t.Helper()
	file := os.NewFile(uintptr(must(unix.Open(f.file, flags|unix.O_CLOEXEC, 0))(t)), f.file)
	t.Cleanup(func() { _ = file.Close() })
	return file
}

// resize changes the size of the contents and of the file.
func (f *fileTree) resize(size int) {
	f.mu.Lock()
	f.data = append(f.data, make([]byte, max(0, size-len(f.data)))...)[:size]
	f.mu.Unlock()
	f.memory.node.UpdateSize(int64(size))
}

// TestInitFile: a tree can be one file.
func TestInitFile(t *testing.T) {
	for _, writeback := range []bool{false, true} {
		f := serveFile(t, 10000, Options{WritebackCache: writeback})
		st := stat(t, f.file)
		if st.Size != 10000 || st.Mode != unix.S_IFREG|0o640 {
			t.Errorf("size %d, mode %o", st.Size, st.Mode)
		}
		file := f.open(t, os.O_RDWR)
		wantErr(t, "Unmount with an open file", f.Unmount(false), syscall.EBUSY)
		must(file.WriteAt([]byte("hello"), 5000))(t)
		ok(t, "close", file.Close())
		if got := f.bytes(5000, 5); string(got) != "hello" {
			t.Errorf("close leaves %q", got)
		}
		if got := must(os.ReadFile("/proc/mounts"))(t); !bytes.Contains(got, []byte(f.file+" fuse.fusetree ")) {
			t.Error("it is not in the table of mounts")
		}
		_, err := f.Add("name", f.Root(), 0o600, nil, nil)
		wantErr(t, "Add", err, syscall.ENOTDIR)
		if f.Lookup("/name") != nil || f.Lookup("/") != f.Root() || f.Root().IsDir() || f.Root().Data() != f {
			t.Error("the root is not what it should be")
		}
		f.unmount(t)
		f.wantRun(t, nil)
		if got := must(os.ReadFile(f.file))(t); string(got) != "below" {
			t.Errorf("below it there is %q", got)
		}
		ok(t, "Exit", f.Exit())
	}
	_, err := InitFile("/f", unix.S_IFDIR, nil, nil, Options{})
	wantErr(t, "InitFile as a directory", err, syscall.EINVAL)
	_, err = InitFile("f", 0o600, nil, nil, Options{})
	wantErr(t, "InitFile somewhere", err, syscall.EINVAL)
	tree := must(InitFile(t.TempDir(), 0o600, nil, nil, Options{}))(t)
	wantErr(t, "a file on a directory", tree.Run(), syscall.EINVAL)
}

// TestWritebackCache: writes are gathered, and reach the node before what waits for them goes on.
func TestWritebackCache(t *testing.T) {
	t.Parallel()
	const pages = 256
	f := serveFile(t, pages*4096, Options{WritebackCache: true})
	fill := func(file *os.File, with byte) {
		for page := range int64(pages) {
			must(file.WriteAt(bytes.Repeat([]byte{with}, 4096), page*4096))(t)
		}
	}
	reached := func(what string, with byte) {
		t.Helper()
		if !bytes.Equal(f.bytes(0, pages*4096), bytes.Repeat([]byte{with}, pages*4096)) {
			t.Errorf("%s did not wait for the data", what)
		}
		if n := f.writes.Swap(0); n == 0 || n > pages/8 {
			t.Errorf("%s: %d writes for %d pages", what, n, pages)
		}
	}
	file := f.open(t, os.O_RDWR)
	fill(file, 1)
	ok(t, "fsync", file.Sync())
	reached("fsync", 1)
	if n := f.fsyncs.Load(); n != 1 {
		t.Errorf("%d fsyncs", n)
	}
	fill(file, 2)
	if !f.memory.node.WriteBack() {
		t.Error("WriteBack failed")
	}
	if got := f.bytes(0, pages*4096); !bytes.Equal(got, bytes.Repeat([]byte{2}, pages*4096)) {
		t.Error("WriteBack did not wait for the data")
	}
	f.writes.Store(0)
	fill(file, 3)
	ok(t, "close", file.Close())
	reached("close", 3)

	// Past the cache, both ways.
	file, direct := f.open(t, os.O_RDWR), f.open(t, os.O_RDWR|unix.O_DIRECT)
	got := make([]byte, 4096)
	fill(file, 4)
	must(direct.ReadAt(got, 8192))(t)
	if !bytes.Equal(got, bytes.Repeat([]byte{4}, 4096)) {
		t.Error("a direct read does not see what was written before")
	}
	must(direct.WriteAt(bytes.Repeat([]byte{5}, 4096), 8192))(t)
	must(file.ReadAt(got, 8192))(t)
	if !bytes.Equal(got, bytes.Repeat([]byte{5}, 4096)) {
		t.Error("a read does not see what was written directly before")
	}
	// Synchronous.
	before := f.fsyncs.Load()
	sync := f.open(t, os.O_WRONLY|unix.O_DSYNC)
	must(sync.WriteAt([]byte("now"), 100))(t)
	if got := f.bytes(100, 3); string(got) != "now" || f.fsyncs.Load() != before+1 {
		t.Errorf("after an O_DSYNC write the node has %q and %d fsyncs more", got, f.fsyncs.Load()-before)
	}
}

// TestWritebackSizes: the kernel follows the size that the program sets, with files open and data not yet sent.
func TestWritebackSizes(t *testing.T) {
	t.Parallel()
	f := serveFile(t, 64<<10, Options{WritebackCache: true})
	file := f.open(t, os.O_RDWR)
	must(file.WriteAt([]byte("kept"), 4096))(t)
	must(file.WriteAt([]byte("lost"), 60<<10))(t)
	for _, size := range []int{1 << 20, 32 << 10, 100, 1 << 20} {
		f.resize(size)
		if st := stat(t, f.file); st.Size != int64(size) {
			t.Errorf("stat: %d bytes, want %d", st.Size, size)
		}
		if end := must(file.Seek(0, 2))(t); end != int64(size) {
			t.Errorf("SEEK_END: %d, want %d", end, size)
		}
		if size == 32<<10 {
			ok(t, "fsync", file.Sync())
		}
	}
	// What truncates to more or less than there is has no effect, as without the cache.
	ok(t, "truncate", file.Truncate(0))
	if st := stat(t, f.file); st.Size != 1<<20 {
		t.Errorf("after truncate there are %d bytes", st.Size)
	}
	got := make([]byte, 4)
	must(file.ReadAt(got, 60<<10))(t)
	if string(got) == "lost" {
		t.Error("what was cut off is still there")
	}
}

// TestWritebackWithoutRoom: who writes beyond the end learns of it by fsync, close, and before long by write; the size
// stays. The users are other processes: what is open in this one is flushed when the size is put right (see apart).
func TestWritebackWithoutRoom(t *testing.T) {
	t.Parallel()
	const size = 1<<20 + 512
	f := serveFile(t, size, Options{WritebackCache: true})

	// Across the end, in the middle of a page: what there is room for arrives.
	f.dd(t, "fsync failed", "bs=4096", "seek=256", "count=1", "conv=notrunc,fsync")
	if got := f.bytes(1<<20, 512); !bytes.Equal(got, bytes.Repeat([]byte{1}, 512)) {
		t.Error("what there was room for did not arrive")
	}
	f.wantSize(t, size)
	f.dd(t, "fsync failed", "bs=1", fmt.Sprint("seek=", size), "count=1", "conv=notrunc,fsync")
	f.wantSize(t, size)

	// Who comes later is none of those who went too far.
	f.memory.node.UpdateMode(0o600) // so that the kernel asks for attributes when it writes
	f.dd(t, "", "bs=1", "count=1", "conv=notrunc,fsync")

	f.dd(t, "error writing", "bs=256k", "conv=notrunc") // until it is full
	f.wantSize(t, size)

	f.dd(t, "closing output file", "bs=1", fmt.Sprint("seek=", size), "count=1", "conv=notrunc")
	f.wantSize(t, size)
}

// dd runs dd(1) with bytes of 1 as its input. It has to report ENOSPC, with that text, or no error if that is "".
func (f *fileTree) dd(t *testing.T, failure string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dd", append(args, "status=none", "of="+f.file)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = ones{}
	out, err := cmd.CombinedOutput()
	text := string(out)
	if failed := err != nil; failed != (failure != "") || !strings.Contains(text, failure) ||
		failed && !strings.Contains(text, "No space left on device") {
		t.Errorf("dd %v: %v: %q, want %q", args, err, text, failure)
	}
}

// ones reads as bytes of 1, without end.
type ones struct{}

func (ones) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 1
	}
	return len(p), nil
}

// wantSize waits for the size to be put right, which happens soon after a write had no room.
func (f *fileTree) wantSize(t *testing.T, want int64) {
	t.Helper()
	end := time.Now().Add(deadline)
	for stat(t, f.file).Size != want {
		if time.Now().After(end) {
			t.Fatalf("there are %d bytes, want %d", stat(t, f.file).Size, want)
		}
		time.Sleep(time.Millisecond)
	}
}
