// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestE2EGeometry: the block size that a device was given is what stat(2) and loop devices on it show.
func TestE2EGeometry(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second)
	f := b.start()
	f.must("load ram")
	for minor, block := range []int{512, 1024, 2048, 4096, 8192, 16384, 32768, 65536} {
		size := int64(4+minor) << 20
		f.must(fmt.Sprintf("add %d block_size=%d /ram/@/%d", minor, block, size))
		name := fmt.Sprintf("ram%03d", minor)
		var st unix.Stat_t
		if err := unix.Stat(f.path(name), &st); err != nil || int(st.Blksize) != block || st.Size != size {
			t.Errorf("block_size=%d: st_blksize %d, st_size %d (%v)", block, st.Blksize, st.Size, err)
		}
		f.writeAndCheck(name, 12345, 54321, byte(minor)) // no multiple of anything
		if block > os.Getpagesize() {
			continue // sectors of loop devices are no larger than a page everywhere
		}
		loop := b.attach(f.path(name), "--sector-size", fmt.Sprint(block), "--direct-io=on")
		if got := strings.Fields(b.run("blockdev", "--getss", "--getsize64", loop)); got[0] != fmt.Sprint(block) ||
			got[1] != fmt.Sprint(size) {
			t.Errorf("blockdev --getss --getsize64 of a loop device with sectors of %d: %v", block, got)
		}
		if got := strings.Fields(b.run("lsblk", "-bdno", "LOG-SEC,SIZE,RO", loop)); strings.Join(got, " ") !=
			fmt.Sprintf("%d %d 0", block, size) {
			t.Errorf("lsblk of a loop device with sectors of %d: %v", block, got)
		}
		b.run("losetup", "-d", loop)
	}
	f.refused("add 9 block_size=131072 /ram/@/32M", syscall.EINVAL, "65536")
	f.refused("add 9 block_size=256 /ram/@/32M", syscall.EINVAL, "512")
	f.refused("add 9 block_size=1000 /ram/@/32M", syscall.EINVAL, "1000")
}

// TestE2EMaxXfer: what is longer than max_xfer= reaches the handler in pieces, and ends for the user as one.
func TestE2EMaxXfer(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	record := filepath.Join(b.TempDir(), "record")
	f.must("load record\nadd 0 max_xfer=64K /record/" + record)
	f.writeAndCheck("record000", 1000, 300<<10, 1)
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	total := map[string]int{}
	for line := range strings.Lines(string(text)) {
		var op string
		var off, n int
		if _, err := fmt.Sscanf(line, "%s %d %d", &op, &off, &n); err != nil {
			continue
		}
		if n > 64<<10 {
			t.Errorf("the handler got %q", line)
		}
		total[op] += n
	}
	if total["write"] != 300<<10 || total["read"] != 300<<10 {
		t.Errorf("%v bytes reached the handler, want %d each way", total, 300<<10)
	}
}

// TestE2EUnevenWriters: a handler that takes whole blocks is given them read, modified and written, without a loss of
// what others write to the same blocks at that time.
func TestE2EUnevenWriters(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second)
	f := b.start()
	image := filepath.Join(b.TempDir(), "image")
	b.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
	f.must("load qcow\nadd 0 /qcow/" + image)
	const writers, piece, pieces = 8, 100, 60 // the writers' pieces lie next to each other
	model := make([]byte, writers*piece*pieces)
	var all sync.WaitGroup
	for w := range writers {
		file := f.open("qcow000", os.O_RDWR|syscall.O_DIRECT)
		all.Go(func() {
			defer file.Close()
			for round := range 3 {
				for i := range pieces {
					off := (i*writers + w) * piece
					p := model[off : off+piece]
					copy(p, pattern(piece, byte(w*31+i+round)|1))
					if w == 3 { // the one who punches
						clear(p)
						if err := unix.Fallocate(int(file.Fd()), punchHole, int64(off), piece); err != nil {
							t.Error(err)
							return
						}
						continue
					}
					if _, err := file.WriteAt(p, int64(off)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	file := f.open("qcow000", os.O_RDONLY|syscall.O_DIRECT)
	wantAt(t, file, model, 0)
}

// TestE2EReadOnlyLoop: nothing gets through to a device that was added read-only, and a loop device on it is read-only
// without being told.
func TestE2EReadOnlyLoop(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := filepath.Join(b.TempDir(), "image")
	f.must("load file\nload ram\nadd 0 size=64M /file/" + image + "\nadd 1 ro /ram/@/1M")
	b.run("mkfs.ext4", "-q", "-F", f.path("file000"))
	f.must("remove 0\nadd 0 ro /file/" + image)
	file := f.open("ram001", os.O_RDONLY)
	if _, err := file.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("write: %v", err)
	}
	for _, mode := range []uint32{punchHole, zeroRange} {
		if err := unix.Fallocate(int(file.Fd()), mode, 0, 4096); !errors.Is(err, syscall.EBADF) {
			t.Errorf("fallocate: %v", err)
		}
	}
	if _, err := unix.Mmap(int(file.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		t.Error("it can be mapped for writing")
	}
	if _, err := f.ctl("remove 1"); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("remove of an open device: %v, want EBUSY", err)
	}
	file.Close()
	f.must("remove 1")

	mountpoint := b.mountDevice(f.path("file000"), "-o", "loop") // not told that it is read-only
	if err := os.WriteFile(mountpoint+"/file", nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("creating a file on it: %v, want EROFS", err)
	}
	loops := loopsBelow(b.mounts)
	if len(loops) != 1 {
		t.Fatalf("loop devices: %v", loops)
	}
	if got := strings.TrimSpace(b.run("blockdev", "--getro", loops[0])); got != "1" {
		t.Errorf("blockdev --getro: %s", got)
	}
	if out, err := b.try("blkdiscard", loops[0]); err == nil {
		t.Errorf("blkdiscard works: %s", out)
	}
	if _, err := f.ctl("remove 0"); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("remove of a mounted device: %v, want EBUSY", err)
	}
	b.run("umount", mountpoint)
	f.must("remove 0")
}
