// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestE2ESeekData: SEEK_DATA and SEEK_HOLE find what was written to, however it was, where the handler knows; otherwise
// everything is data.
func TestE2ESeekData(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	dir := b.TempDir()
	b.run("qemu-img", "create", "-q", "-f", "qcow2", dir+"/qcow", "64M")
	f.must("load ram\nload file\nload qcow\nadd 0 /ram/@/64M\nadd 1 size=64M /file/" + dir + "/file\n" +
		"add 2 /qcow/" + dir + "/qcow")
	const size = 64 << 20
	for _, device := range []string{"ram000", "file001"} {
		file := f.open(device, os.O_RDWR)
		fd := int(file.Fd())
		want := func(what string, off int64, whence int, want int64) {
			t.Helper()
			got, err := unix.Seek(fd, off, whence)
			if want < 0 && errors.Is(err, syscall.ENXIO) {
				return
			}
			if got != want || err != nil {
				t.Errorf("%s, %s: lseek(%d, %d) = %d, %v; want %d", device, what, off, whence, got, err, want)
			}
		}
		want("empty", 0, unix.SEEK_DATA, -1)
		want("empty", 0, unix.SEEK_HOLE, 0)
		mustWriteAt(t, file, pattern(8192, 1), 1<<20)
		want("written", 0, unix.SEEK_DATA, 1<<20)
		want("written", 1<<20, unix.SEEK_HOLE, 1<<20+8192)
		want("written", 1<<20+8192, unix.SEEK_DATA, -1)

		mapping, err := unix.Mmap(fd, 4<<20, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		mapping[4096] = 1 // and no msync
		want("mapped", 2<<20, unix.SEEK_DATA, 4<<20+4096)
		if err := unix.Munmap(mapping); err != nil {
			t.Error(err)
		}
		if err := unix.Fallocate(fd, punchHole, 1<<20, 8192); err != nil {
			t.Error(err)
		}
		want("punched", 0, unix.SEEK_DATA, 4<<20+4096)
		want("beyond", size, unix.SEEK_DATA, -1)
		file.Close()
	}
	file := f.open("qcow002", os.O_RDWR)
	if at, err := unix.Seek(int(file.Fd()), 4096, unix.SEEK_DATA); at != 4096 || err != nil {
		t.Errorf("SEEK_DATA where the handler does not know: %d, %v", at, err)
	}
	if at, err := unix.Seek(int(file.Fd()), 4096, unix.SEEK_HOLE); at != size || err != nil {
		t.Errorf("SEEK_HOLE where the handler does not know: %d, %v", at, err)
	}
	// What is copied sparsely is the same.
	b.run("dd", "if=/dev/urandom", "of="+f.path("ram000"), "bs=1M", "count=3", "seek=7", "conv=notrunc", "status=none")
	b.run("cp", "--sparse=always", f.path("ram000"), dir+"/copy")
	b.run("cmp", f.path("ram000"), dir+"/copy")
	b.run("qemu-img", "convert", "-f", "raw", "-O", "raw", f.path("ram000"), dir+"/converted")
	b.run("cmp", f.path("ram000"), dir+"/converted")
}
