// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE
	zeroKeep  = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// attach makes a loop device on a device's node; the test's end detaches it if nothing else does.
func (b *bed) attach(path string, options ...string) (loop string) {
	b.Helper()
	loop = strings.TrimSpace(b.run("losetup", append(append([]string{"--show", "-f"}, options...), path)...))
	b.Cleanup(func() { _, _ = b.try("losetup", "-d", loop) })
	return loop
}

// allocated is how many bytes the memory of anonymous ram devices takes, those of one host.
func (b *bed) allocated(hostPID int) (total int64) {
	b.Helper()
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", hostPID))
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); !strings.Contains(target, "-contents") {
			continue
		}
		total += blocks(b.T, fd)
	}
	return total
}

// blocks is how many bytes of disk or memory a file takes.
func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestE2EPunchAndZero: punched holes and zeroed ranges of any alignment read back zeroes, past the page cache and
// through it, and nothing around them changes; whether the handler can unmap or not.
func TestE2EPunchAndZero(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "record")
	f := b.start()
	dir := b.TempDir()
	b.run("qemu-img", "create", "-q", "-f", "qcow2", dir+"/qcow", "4M")
	f.must("load ram\nload file\nload qcow\nload record\n" +
		"add 0 /ram/@/4M\nadd 1 size=4M /file/" + dir + "/file\nadd 2 /qcow/" + dir + "/qcow\n" +
		"add 3 /record/" + dir + "/record\nadd 4 size=4M block_size=4096 max_xfer=64K /ram/@")
	for _, device := range []string{"ram000", "file001", "qcow002", "record003", "ram004"} {
		cached, direct := f.open(device, os.O_RDWR), f.open(device, os.O_RDWR|syscall.O_DIRECT)
		info, err := cached.Stat()
		if err != nil {
			t.Fatal(err)
		}
		model := pattern(int(info.Size()), 7)
		if _, err := cached.WriteAt(model, 0); err != nil {
			t.Fatal(err)
		}
		end := len(model)
		for i, r := range [][2]int{
			{0, 4096}, {8192, 65536}, {100000, 1}, {131072 + 511, 2}, {200000, 77777}, {262144, 4097}, {end - 5000, 5000},
			{end - 100, 100}, {500000, 300000},
		} {
			mode := []uint32{punchHole, zeroRange, zeroKeep}[i%3]
			if err := unix.Fallocate(int(cached.Fd()), mode, int64(r[0]), int64(r[1])); err != nil {
				t.Fatalf("%s: fallocate mode %#x of %d bytes at %d: %v", device, mode, r[1], r[0], err)
			}
			clear(model[r[0] : r[0]+r[1]])
			for name, file := range map[string]*os.File{"the page cache": cached, "O_DIRECT": direct} {
				got, err := io.ReadAll(io.NewSectionReader(file, 0, info.Size()))
				if err != nil || !bytes.Equal(got, model) {
					t.Fatalf("%s: after clearing %d bytes at %d, %s shows something else (%v)", device, r[1], r[0], name, err)
				}
			}
		}
		cached.Close()
		direct.Close()
	}
	if text, _ := os.ReadFile(dir + "/record"); !strings.Contains(string(text), "write ") {
		t.Error("the handler without unmap was given no zeroes to write")
	}
}

// TestE2EFallocateErrors: what a device cannot do is refused as a block device refuses it, and nothing is cached of
// that.
func TestE2EFallocateErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	const size = 1 << 20
	image := filepath.Join(b.TempDir(), "image")
	f.must("load ram\nload file\nadd 0 /ram/@/1M\nadd 1 discard=off size=1M /file/" + image)
	f.refused("add 2 discard=maybe /ram/@/2M", syscall.EINVAL, "on or off")
	file, off := f.open("ram000", os.O_RDWR), f.open("file001", os.O_RDWR)
	for _, tt := range []struct {
		file    *os.File
		mode    uint32
		at, len int64
		want    error
	}{
		{file, 0, 0, 4096, syscall.EOPNOTSUPP},
		{file, 0, 0, 2 * size, syscall.EOPNOTSUPP},
		{file, unix.FALLOC_FL_KEEP_SIZE, 0, 4096, syscall.EOPNOTSUPP},
		{file, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096, syscall.EOPNOTSUPP},
		{file, unix.FALLOC_FL_INSERT_RANGE, 0, 4096, syscall.EOPNOTSUPP},
		{file, zeroRange, 0, size + 1, syscall.EINVAL},
		{file, zeroRange, size, 1, syscall.EINVAL},
		{file, punchHole, size, 4096, syscall.EINVAL},
		{file, punchHole, size - 4096, 8192, nil},
		{file, zeroKeep, size - 4096, 8192, nil},
		{off, punchHole, 0, 4096, syscall.EOPNOTSUPP},
		{off, zeroRange, 0, 4096, nil},
		{file, punchHole, 0, 4096, nil}, // the refusal above was the other device's only
	} {
		err := unix.Fallocate(int(tt.file.Fd()), tt.mode, tt.at, tt.len)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: mode %#x, %d bytes at %d: %v, want %v", tt.file.Name(), tt.mode, tt.len, tt.at, err, tt.want)
		}
	}
	if info, err := file.Stat(); err != nil || info.Size() != size {
		t.Errorf("the device has %d bytes now (%v)", info.Size(), err)
	}
}

// TestE2EFstrim: what is deleted from a file system returns to whoever lent it.
func TestE2EFstrim(t *testing.T) {
	for _, fs := range []struct {
		name string
		mkfs []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f", "-m", "single"}},
	} {
		for _, subtype := range []string{"ram", "file"} {
			t.Run(fs.name+"-"+subtype, func(t *testing.T) {
				t.Parallel()
				b := newBed(t, 120*time.Second)
				f := b.start()
				image := filepath.Join(b.TempDir(), "image")
				host := f.load(subtype)
				if subtype == "ram" {
					f.must("add 0 /ram/@/512M")
				} else {
					f.must("add 0 size=512M /file/" + image)
				}
				used := func() int64 {
					if subtype == "ram" {
						return b.allocated(host)
					}
					return blocks(t, image)
				}
				loop := b.attach(f.path(subtype + "000"))
				b.run(fs.mkfs[0], append(fs.mkfs[1:], loop)...)
				mountpoint := b.mountDevice(loop)
				const size = 64 << 20
				if err := os.WriteFile(mountpoint+"/file", pattern(size, 1), 0o600); err != nil {
					t.Fatal(err)
				}
				b.run("sync", "-f", mountpoint)
				full := used()
				if full < size {
					t.Fatalf("%d bytes are in use after %d were written", full, size)
				}
				if err := os.Remove(mountpoint + "/file"); err != nil {
					t.Fatal(err)
				}
				// Mounted anew, so that no file system still holds on to what it has freed.
				b.run("umount", mountpoint)
				b.mountDevice(loop)
				b.run("fstrim", mountpoint)
				if back := full - used(); back < size*95/100 {
					t.Errorf("fstrim returned %d of %d bytes", back, size)
				} else {
					t.Logf("fstrim returned %d of %d bytes (%.1f %%)", back, size, 100*float64(back)/size)
				}
				b.run("umount", mountpoint)
				b.run("losetup", "-d", loop)
			})
		}
	}
}

// TestE2ELoopDiscard: discards and zeroing of a loop device reach the device below it, also over more than one request
// may cover, and the loop device's discard granularity is what the node says.
func TestE2ELoopDiscard(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	f := b.start()
	host := f.load("ram")
	const size = 512 << 20
	f.must("add 0 /ram/@/512M\nadd 1 block_size=65536 /ram/@/4M")
	wide := b.attach(f.path("ram001"))
	for loop, want := range map[string]string{b.attach(f.path("ram000")): "4096", wide: "65536"} {
		got, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/queue/discard_granularity")
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("discard granularity of %s: %q (%v), want %s", loop, got, err, want)
		}
		b.run("losetup", "-d", loop)
	}
	loop := b.attach(f.path("ram000"))
	for _, how := range [][]string{nil, {"-z"}} {
		b.run("dd", "if=/dev/urandom", "of="+loop, "bs=1M", "count=200", "conv=fsync", "status=none")
		if used := b.allocated(host); used < 200<<20 {
			t.Fatalf("%d bytes are in use", used)
		}
		b.run("blkdiscard", append(how, loop)...)
		if used := b.allocated(host); len(how) == 0 && used > 1<<20 {
			t.Errorf("after blkdiscard %d bytes are still in use", used)
		}
		b.run("cmp", "-n", fmt.Sprint(size), loop, "/dev/zero")
	}
	// mkfs discards what it is about to use.
	b.run("dd", "if=/dev/urandom", "of="+loop, "bs=1M", "count=200", "conv=fsync", "status=none")
	b.run("mkfs.ext4", "-q", "-F", "-E", "discard", loop)
	if used := b.allocated(host); used > 64<<20 {
		t.Errorf("after mkfs.ext4 %d bytes are in use", used)
	}
	b.run("losetup", "-d", loop)
}
