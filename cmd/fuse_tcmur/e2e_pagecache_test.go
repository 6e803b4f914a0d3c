// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestE2ESharedContents: all descriptors see the same bytes, with and without O_DIRECT, mapped or not, whatever the
// kernel caches.
func TestE2ESharedContents(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram")
	for _, mode := range cacheModes {
		f.must("add 0 cache=" + mode + " /ram/@/1M")
		f.wantSharedContents(mode)
		f.must("remove 0")
	}
}

// wantSharedContents has descriptors of ram000 read what others write, and adds the device anew in between.
func (f *front) wantSharedContents(mode string) {
	f.Helper()
	t := f.T
	var files []*os.File
	for _, flags := range []int{0, 0, unix.O_DIRECT, unix.O_DIRECT} {
		files = append(files, f.open("ram000", os.O_RDWR|flags))
	}
	mapping, err := unix.Mmap(int(files[0].Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10000)
	for i, writer := range files {
		want := pattern(len(got), byte(10+i))
		off := int64(4096*i + 100*i)
		if _, err := writer.WriteAt(want, off); err != nil {
			t.Fatal(err)
		}
		for j, reader := range files {
			if _, err := reader.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: descriptor %d reads something else than %d wrote (%v)", mode, j, i, err)
			}
		}
		if !bytes.Equal(mapping[off:off+int64(len(want))], want) {
			t.Errorf("%s: the mapping has something else than descriptor %d wrote", mode, i)
		}
	}
	// The kernel writes pages of a mapping back before it reads past them.
	for j, reader := range files {
		text := fmt.Sprintf("through the mapping, for %d", j)
		copy(mapping[500_000:], text)
		if _, err := reader.ReadAt(got[:len(text)], 500_000); err != nil || string(got[:len(text)]) != text {
			t.Errorf("%s: descriptor %d reads %q (%v)", mode, j, got[:len(text)], err)
		}
	}
	if err := unix.Munmap(mapping); err != nil {
		t.Error(err)
	}
	for _, file := range files {
		file.Close()
	}

	// What a device of the same name held before is not seen on its successor.
	f.must("remove 0\nadd 0 cache=" + mode + " /ram/@/1M")
	file := f.open("ram000", os.O_RDONLY)
	if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Errorf("%s: a new device is not all zeroes (%v)", mode, err)
	}
	file.Close()
}

// TestE2EOddAccess reads and writes at any offset and length, also on a handler that itself takes whole sectors only.
func TestE2EOddAccess(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	const size = 1<<20 + 512 // ends in the middle of a page
	image := filepath.Join(b.TempDir(), "image")
	b.run("qemu-img", "create", "-q", "-f", "qcow2", image, fmt.Sprint(size))
	f.must(fmt.Sprintf("load ram\nload file\nload qcow\nadd 0 /ram/@/%d\nadd 1 size=%d /file/%s\nadd 2 /qcow/%s",
		size, size, image+".raw", image))
	for _, device := range []string{"ram000", "file001", "qcow002"} {
		for _, flags := range []int{0, unix.O_DIRECT} {
			file := f.open(device, os.O_RDWR|flags)
			model := make([]byte, size)
			if _, err := file.WriteAt(model, 0); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(5, uint64(flags)))
			for range 50 {
				off := rng.IntN(size)
				n := 1 + rng.IntN(min(20000, size-off))
				copy(model[off:off+n], pattern(n, byte(rng.Uint32())))
				if _, err := file.WriteAt(model[off:off+n], int64(off)); err != nil {
					t.Fatalf("%s: write of %d at %d: %v", device, n, off, err)
				}
				off = rng.IntN(size)
				got := make([]byte, 1+rng.IntN(min(20000, size-off)))
				if _, err := file.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, model[off:off+len(got)]) {
					t.Fatalf("%s: read of %d at %d: equal %v, %v", device, len(got), off,
						bytes.Equal(got, model[off:off+len(got)]), err)
				}
			}
			file.Close()
			expected := b.writeText("model", string(model))
			b.dropCache(f.path(device))
			b.run("cmp", expected, f.path(device))
			// dd, in pieces that fit nothing.
			for _, flag := range []string{"", "direct"} {
				args := []string{"if=" + expected, "of=" + f.path(device), "bs=100", "skip=3", "seek=7", "count=500",
					"conv=notrunc", "status=none"}
				if flag != "" {
					args = append(args, "oflag="+flag)
				}
				b.run("dd", args...)
				copy(model[700:50700], bytes.Clone(model[300:50300]))
				out := filepath.Join(b.TempDir(), "out")
				b.run("dd", "if="+f.path(device), "of="+out, "bs=100", "skip=7", "count=500", "status=none")
				if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, model[700:50700]) {
					t.Errorf("%s: dd bs=100 %s reads something else than it wrote (%v)", device, flag, err)
				}
				expected = b.writeText("model", string(model))
			}
			b.dropCache(f.path(device))
			b.run("cmp", expected, f.path(device))
		}
	}
	f.must("remove 2")
	b.run("qemu-img", "check", "-q", image)
}

// TestE2EEnds: at the end of a device, reads are short and writes too, and beyond it there is nothing, as on a block
// device.
func TestE2EEnds(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	for i, size := range []int64{1 << 20, 1<<20 + 512} {
		device := fmt.Sprintf("ram%03d", i)
		if i == 0 {
			f.must("load ram")
		}
		f.must(fmt.Sprintf("add %d /ram/@/%d", i, size))
		for _, flags := range []int{0, unix.O_DIRECT} {
			f.readAndWriteAtEnd(device, flags, size)
		}
		file := f.open(device, os.O_RDWR|os.O_APPEND)
		if _, err := file.WriteString("more"); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("append: %v, want ENOSPC", err)
		}
		if end, err := file.Seek(0, io.SeekEnd); end != size || err != nil {
			t.Errorf("seek to the end: %d, %v", end, err)
		}
		if err := file.Truncate(0); err != nil {
			t.Errorf("truncate: %v", err)
		}
		file.Close()
		out, status := b.shell(f, "dd if=/dev/zero of=$M/dev/"+device+" bs=64k")
		if status != 1 || !strings.Contains(out, "No space left on device") ||
			!strings.Contains(out, fmt.Sprintf("%d bytes", size)) {
			t.Errorf("dd until the device is full: status %d\n%s", status, out)
		}
		// This way it is full as well, but the last write does not count.
		out, status = b.shell(f, "tr '\\0' x < /dev/zero | dd of=$M/dev/"+device+" bs=64k oflag=direct iflag=fullblock")
		if status != 1 || !strings.Contains(out, "No space left on device") {
			t.Errorf("dd oflag=direct until the device is full: status %d\n%s", status, out)
		}
		if out, status = b.shell(f, "tr -d x < $M/dev/"+device+" | wc -c"); strings.TrimSpace(out) != "0" {
			t.Errorf("dd oflag=direct did not fill the device: %s (%d)", out, status)
		}
		if out, status := b.shell(f, "printf x > $M/dev/"+device+" && wc -c < $M/dev/"+device); status != 0 ||
			strings.TrimSpace(out) != fmt.Sprint(size) {
			t.Errorf("the device has %q bytes after a shell's >", out)
		}
	}
}

func (f *front) readAndWriteAtEnd(device string, flags int, size int64) {
	f.Helper()
	file := f.open(device, os.O_RDWR|flags)
	defer file.Close()
	fd := int(file.Fd())
	buf := make([]byte, 8192)
	for _, tt := range []struct {
		off  int64
		want int
	}{{size - 8192, 8192}, {size - 100, 100}, {size - 1, 1}, {size, 0}, {size + 1, 0}, {size + 1<<30, 0}} {
		if n, err := unix.Pread(fd, buf, tt.off); n != tt.want || err != nil {
			f.Errorf("%s, flags %#x: read at end%+d: %d, %v; want %d", device, flags, tt.off-size, n, err, tt.want)
		}
		// FUSE has no short count for a write with O_DIRECT.
		short := tt.want > 0 && tt.want < len(buf)
		n, err := unix.Pwrite(fd, buf, tt.off)
		switch {
		case tt.want == 0 || short && flags == unix.O_DIRECT:
			if !errors.Is(err, syscall.ENOSPC) {
				f.Errorf("%s, flags %#x: write at end%+d: %d, %v; want ENOSPC", device, flags, tt.off-size, n, err)
			}
		case n != tt.want || err != nil:
			f.Errorf("%s, flags %#x: write at end%+d: %d, %v; want %d", device, flags, tt.off-size, n, err, tt.want)
		}
		if info, err := file.Stat(); err != nil || info.Size() != size {
			f.Fatalf("%s, flags %#x: size %d after a write at end%+d (%v)", device, flags, info.Size(), tt.off-size, err)
		}
	}
}

// TestE2EReadOnlyDevice: a device that was added read-only can be read, and not be written to.
func TestE2EReadOnlyDevice(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := b.writeText("image", strings.Repeat("0123456789abcdef", 4096))
	f.must("load file\nadd 0 ro /file/" + image)
	for _, flags := range []int{os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND} {
		if file, err := os.OpenFile(f.path("file000"), flags, 0); !errors.Is(err, syscall.EROFS) {
			t.Errorf("open with flags %#x: %v, want EROFS", flags, err)
			file.Close()
		}
	}
	if out, status := b.shell(f, "echo x > $M/dev/file000"); status == 0 ||
		!strings.Contains(out, "Read-only file system") {
		t.Errorf("a shell's >: status %d, %q", status, out)
	}
	b.run("cmp", image, f.path("file000"))
}
