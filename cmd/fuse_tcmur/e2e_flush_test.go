// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// recording is a device of the handler "record" (plugin/testdata/record.c) with the file it records its callouts in.
type recording struct {
	*front
	minor  int
	device string
	file   string
	seen   int // lines that news has returned
}

// record adds a recording device with options of add.
func (f *front) record(minor int, options ...string) *recording {
	f.Helper()
	r := &recording{
		front: f, minor: minor, device: fmt.Sprintf("record%03d", minor), file: filepath.Join(f.TempDir(), "record"),
	}
	f.must(fmt.Sprintf("add %d %s /record/%s", minor, strings.Join(options, " "), r.file))
	return r
}

// lines are all callouts so far.
func (r *recording) lines() []string {
	text, err := os.ReadFile(r.file)
	if err != nil {
		r.Error(err)
	}
	return strings.Fields(strings.ReplaceAll(string(text), " ", ":"))
}

// news are the callouts since the last call, as "write:4096:512".
func (r *recording) news() []string {
	all := r.lines()
	news := all[r.seen:]
	r.seen = len(all)
	return news
}

// wantFlushed checks that the callouts write the n bytes at off, and flush after the last of these writes.
func (r *recording) wantFlushed(lines []string, off, n int) {
	r.Helper()
	written := make([]bool, n)
	last := -1
	for i, line := range lines {
		var at, length int
		if _, err := fmt.Sscanf(line, "write:%d:%d", &at, &length); err != nil || at >= off+n || at+length <= off {
			continue
		}
		last = i
		for j := max(at, off); j < min(at+length, off+n); j++ {
			written[j-off] = true
		}
	}
	switch {
	case slices.Contains(written, false):
		r.Errorf("not all of the %d bytes at %d were written: %v", n, off, lines)
	case !slices.Contains(lines[last:], "flush"):
		r.Errorf("no flush after the write: %v", lines)
	}
}

// wantFlushes checks how many flushes there are among the callouts: each costs a real device milliseconds.
func (r *recording) wantFlushes(what string, lines []string, want int) {
	r.Helper()
	got := 0
	for _, line := range lines {
		if line == "flush" {
			got++
		}
	}
	if got != want {
		r.Errorf("%s: %d flushes, want %d: %v", what, got, want, lines)
	}
}

// TestE2EFlush: what users do to make data durable reaches the handler's flush, after the writes it is to cover,
// whatever the kernel caches.
func TestE2EFlush(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "record")
	f := b.start()
	f.must("load record")
	for minor, mode := range cacheModes {
		f.record(minor, "cache="+mode).wantFlushCalls(mode)
	}
}

// wantFlushCalls tries every way to make data durable on a device with a cache mode, and removes it.
func (r *recording) wantFlushCalls(mode string) {
	r.Helper()
	t, f := r.T, r.front
	write := func(file *os.File, off, n int) error {
		_, err := file.WriteAt(pattern(n, byte(off)), int64(off))
		return err
	}
	dsyncWrite := func(file *os.File, off, n int) error {
		const rwfDSync = 2
		_, err := unix.Pwritev2(int(file.Fd()), [][]byte{pattern(n, 1)}, int64(off), rwfDSync)
		return err
	}
	then := func(sync func(fd int) error) func(file *os.File, off, n int) error {
		return func(file *os.File, off, n int) error {
			return errors.Join(write(file, off, n), sync(int(file.Fd())))
		}
	}
	for i, tt := range []struct {
		name  string
		flags int
		do    func(file *os.File, off, n int) error
	}{
		{"O_SYNC", unix.O_SYNC, write},
		{"O_DSYNC", unix.O_DSYNC, write},
		{"O_DIRECT and O_SYNC", unix.O_DIRECT | unix.O_SYNC, write},
		{"O_DIRECT and O_DSYNC", unix.O_DIRECT | unix.O_DSYNC, write},
		{"RWF_DSYNC", 0, dsyncWrite},
		{"O_DIRECT and RWF_DSYNC", unix.O_DIRECT, dsyncWrite},
		{"fsync", 0, then(unix.Fsync)},
		{"fdatasync", 0, then(unix.Fdatasync)},
		{"O_DIRECT and fsync", unix.O_DIRECT, then(unix.Fsync)},
		{"O_DIRECT and fdatasync", unix.O_DIRECT, then(unix.Fdatasync)},
		{"mmap and msync", 0, mmapAndSync},
		{"fsync of another descriptor", 0, func(file *os.File, off, n int) error {
			other := r.open(r.device, os.O_RDONLY)
			defer other.Close()
			return errors.Join(write(file, off, n), other.Sync())
		}},
	} {
		// Pieces of pages, whole pages, and more than one request to the server holds.
		for j, n := range []int{100, 4096, 600 << 10} {
			off := (2*i + 30*j) * 4096
			file := r.open(r.device, os.O_RDWR|tt.flags)
			r.news()
			if err := tt.do(file, off, n); err != nil {
				t.Errorf("%s, %s: %v", mode, tt.name, err)
			}
			lines := r.news()
			r.wantFlushed(lines, off, n)
			r.wantFlushes(mode+", "+tt.name, lines, 1)
			file.Close()
		}
	}

	// Flushing is not simply done always.
	for _, flags := range []int{0, unix.O_DIRECT} {
		file := r.open(r.device, os.O_RDWR|flags)
		r.news()
		if err := write(file, 0, 4096); err != nil {
			t.Error(err)
		}
		if news := r.news(); slices.Contains(news, "flush") {
			t.Errorf("a write that did not ask for it was flushed: %v", news)
		}
		file.Close()
	}

	f.must(fmt.Sprint("remove ", r.minor))
	if lines := r.lines(); !slices.Equal(lines[len(lines)-2:], []string{"flush", "close"}) {
		t.Errorf("remove ended with %v, want a flush and a close", lines[len(lines)-2:])
	}
}

// mmapAndSync writes through a mapping.
func mmapAndSync(file *os.File, off, n int) error {
	mapping, err := unix.Mmap(int(file.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(mapping[off:off+n], pattern(n, 3))
	return errors.Join(unix.Msync(mapping, unix.MS_SYNC), unix.Munmap(mapping))
}

// TestE2EFlushConcurrent: no writer's flush is left to another's that has begun before the write was complete.
func TestE2EFlushConcurrent(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	f.must("load record")
	r := f.record(0)
	var writers sync.WaitGroup
	for w := range 8 {
		file := r.open(r.device, os.O_RDWR|unix.O_DSYNC|[]int{0, unix.O_DIRECT}[w%2])
		writers.Go(func() {
			defer file.Close()
			for i := range 15 {
				off := (w*15 + i) * 4096
				if _, err := file.WriteAt(pattern(4096, byte(i)), int64(off)); err != nil {
					t.Error(err)
					return
				}
				r.wantFlushed(r.lines(), off, 4096)
			}
		})
	}
	writers.Wait()
}

// TestE2EFlushOfLoopDevice: what is durable on a loop device is so on the device below it.
func TestE2EFlushOfLoopDevice(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	f.must("load record")
	r := f.record(0)
	for _, directIO := range []string{"off", "on"} {
		loop := strings.TrimSpace(b.run("losetup", "--show", "-f", "--direct-io="+directIO, f.path(r.device)))
		for i, flags := range []int{0, unix.O_DIRECT, unix.O_DSYNC} {
			off := (10 + i) * 4096
			r.news()
			open := map[int]string{0: "", unix.O_DIRECT: "direct", unix.O_DSYNC: "dsync"}[flags]
			args := []string{"if=/dev/urandom", "of=" + loop, "bs=4096", "count=1", fmt.Sprintf("seek=%d", 10+i),
				"conv=notrunc,fsync", "status=none"}
			if open != "" {
				args = append(args, "oflag="+open)
			}
			b.run("dd", args...)
			lines := r.news()
			r.wantFlushed(lines, off, 4096)
		}
		// An fsync is one flush, and so is an O_DSYNC write. (Of a direct one the block layer makes two: a write with FUA,
		// which on loop devices is a flush, and then a flush.)
		for i, flags := range []int{0, unix.O_DSYNC} {
			file, err := os.OpenFile(loop, os.O_WRONLY|flags, 0)
			if err != nil {
				t.Fatal(err)
			}
			off := (20 + i) * 4096
			r.news()
			if _, err := file.WriteAt(pattern(4096, 1), int64(off)); err != nil {
				t.Error(err)
			}
			if flags == 0 {
				if err := file.Sync(); err != nil {
					t.Error(err)
				}
			}
			lines := r.news()
			r.wantFlushed(lines, off, 4096)
			r.wantFlushes(fmt.Sprintf("loop device with flags %#x and direct-io=%s", flags, directIO), lines, 1)
			file.Close()
		}
		b.run("losetup", "-d", loop)
	}
}

// TestE2EFlushFails: a flush that fails is told to whoever asked for it.
func TestE2EFlushFails(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load fault\nadd 0 /fault/flush=4\nadd 1 /fault/flush@1=4\nadd 2 /fault/write=4")
	buf := make([]byte, 4096)
	wantEIO := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v, want EIO", what, err)
		}
	}
	for name, flags := range map[string]int{"buffered": 0, "O_DIRECT": unix.O_DIRECT} {
		file := f.open("fault000", os.O_RDWR|flags)
		if _, err := file.WriteAt(buf, 0); err != nil {
			t.Errorf("%s write without a flush: %v", name, err)
		}
		wantEIO(name+" fsync", file.Sync())
		wantEIO(name+" fdatasync", unix.Fdatasync(int(file.Fd())))
		file.Close()
		for _, sync := range []int{unix.O_DSYNC, unix.O_SYNC} {
			file = f.open("fault000", os.O_RDWR|flags|sync)
			_, err := file.WriteAt(buf, 0)
			wantEIO(name+" synchronous write", err)
			file.Close()
		}
		file = f.open("fault002", os.O_RDWR|flags)
		_, err := file.WriteAt(buf, 0)
		if err == nil {
			err = file.Sync()
		}
		wantEIO(name+" write that the handler refuses", err)
		file.Close()
	}
	// A failure is neither remembered for ever nor swallowed.
	file := f.open("fault001", os.O_RDWR)
	if _, err := file.WriteAt(buf, 0); err != nil {
		t.Error(err)
	}
	wantEIO("first fsync", file.Sync())
	if err := file.Sync(); err != nil {
		t.Errorf("second fsync: %v", err)
	}
	file.Close()
	out, status := b.shell(f, "dd if=/dev/zero of=$M/dev/fault000 bs=4k count=1 conv=notrunc,fsync")
	if status == 0 || !strings.Contains(out, "Input/output error") {
		t.Errorf("dd conv=fsync: status %d, %q", status, out)
	}
	f.refused("remove 0", syscall.EIO, "flush")
}

// TestE2EFlushFailureIsEverybodys: a flush that fails may lose the writes of any file, so the next fsync of each one
// that is open fails, once. Who opens the device later does not hear of it.
func TestE2EFlushFailureIsEverybodys(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load fault\nadd 0 /fault/flush@2=4")
	var files []*os.File
	for i, flags := range []int{0, unix.O_DIRECT, 0, unix.O_DIRECT | unix.O_DSYNC, 0} {
		file := f.open("fault000", os.O_RDWR|flags)
		if flags&unix.O_DSYNC == 0 {
			mustWriteAt(t, file, pattern(4096, byte(i)), int64(i)*4096)
		}
		files = append(files, file)
	}
	first, second := files[0], files[1]
	if err := first.Sync(); err != nil { // the first flush
		t.Fatal(err)
	}
	if err := second.Sync(); !errors.Is(err, syscall.EIO) { // the second one fails
		t.Errorf("fsync that fails: %v", err)
	}
	if err := second.Sync(); err != nil {
		t.Errorf("the same file's next fsync: %v", err)
	}
	for i, file := range []*os.File{first, files[2], files[4]} {
		if err := unix.Fdatasync(int(file.Fd())); !errors.Is(err, syscall.EIO) {
			t.Errorf("fsync of other file %d: %v, want EIO", i, err)
		}
		if err := file.Sync(); err != nil {
			t.Errorf("second fsync of other file %d: %v", i, err)
		}
	}
	_, err := files[3].WriteAt(pattern(4096, 9), 0)
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("O_DSYNC write to another file: %v, want EIO", err)
	}
	mustWriteAt(t, files[3], pattern(4096, 9), 0)
	late := f.open("fault000", os.O_RDWR)
	if err := late.Sync(); err != nil {
		t.Errorf("fsync of a file that was opened later: %v", err)
	}
}
