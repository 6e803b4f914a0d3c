// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dirty opens a device and writes to it, 4 KiB at a time, without waiting for anything to be written back.
func (f *front) dirty(device string, size int, seed byte) (file *os.File, model []byte) {
	f.Helper()
	file, model = f.open(device, os.O_RDWR), pattern(size, seed)
	for off := 0; off < size; off += 4096 {
		mustWriteAt(f.T, file, model[off:off+4096], int64(off))
	}
	return file, model
}

// wantDirect checks a device's contents as they are past the page cache.
func (f *front) wantDirect(device, what string, model []byte) {
	f.Helper()
	direct := f.open(device, os.O_RDONLY|unix.O_DIRECT)
	defer direct.Close()
	got := make([]byte, len(model))
	if _, err := direct.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		f.Errorf("%s: the device has other contents (%v)", what, err)
	}
}

// TestE2EWritebackRecovery: the death of the host under pages that are yet to be written back loses none of them, nor
// does the change of the handler's file.
func TestE2EWritebackRecovery(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	f := b.start()
	pid := f.load("file")
	f.must("add 0 size=64M cache=writeback /file/" + b.TempDir() + "/image")
	const size = 8 << 20
	for round := range 3 {
		file, model := f.dirty("file000", size, byte(round))
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := file.Sync(); err != nil {
			t.Errorf("fsync: %v", err)
		}
		pid = f.awaitRecovery("file", round+1)
		file.Close()
		f.wantDirect("file000", "after the death of the host", model)
	}
	file, model := f.dirty("file000", size, 9)
	f.must("reload file")
	if err := file.Sync(); err != nil {
		t.Errorf("fsync: %v", err)
	}
	f.wantDirect("file000", "after reload", model)
	f.refused("remove 0", syscall.EBUSY, "file000 is open once", "process")
	file.Close()
	f.must("remove 0")
}

// TestE2EWritebackErrors: a write that the handler refuses later fails the fsync of everybody who has the device open,
// once.
func TestE2EWritebackErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load fault\nadd 0 cache=writeback /fault/size=0x100000,write@3=4")
	one, two := f.open("fault000", os.O_RDWR), f.open("fault000", os.O_RDWR)
	var failed bool
	for page := range int64(8) {
		mustWriteAt(t, one, pattern(4096, 1), page*4096)
		err := one.Sync()
		if err != nil && !errors.Is(err, syscall.EIO) || err != nil && failed {
			t.Errorf("fsync: %v", err)
		}
		failed = failed || err != nil
	}
	if !failed {
		t.Error("no fsync has failed")
	}
	if err := two.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync of the other descriptor: %v", err)
	}
	if err := two.Sync(); err != nil {
		t.Errorf("and once more: %v", err)
	}
}

// TestE2EWritebackEnd: who writes until the device is full is told so, and the device keeps its size.
func TestE2EWritebackEnd(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram\nadd 0 cache=writeback /ram/@/4M")
	out, status := b.shell(f, "dd if=/dev/zero of=$M/dev/ram000 bs=64k")
	if status != 1 || !strings.Contains(out, "No space left on device") {
		t.Errorf("dd until the device is full: status %d\n%s", status, out)
	}
	out, status = b.shell(f, "head -c 4M /dev/urandom > $W/image && cp $W/image $M/dev/ram000 &&"+
		" cmp $W/image $M/dev/ram000")
	if status != 0 {
		t.Errorf("cp of a file that fits: status %d\n%s", status, out)
	}
	out, status = b.shell(f, "head -c 5M /dev/urandom > $W/image; cp $W/image $M/dev/ram000")
	if status == 0 || !strings.Contains(out, "No space left on device") {
		t.Errorf("cp of a file that does not fit: status %d\n%s", status, out)
	}
	for end := time.Now().Add(graceful); ; time.Sleep(time.Millisecond) {
		info, err := os.Stat(f.path("ram000"))
		if err == nil && info.Size() == 4<<20 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d bytes (%v)", info.Size(), err)
		}
	}
}

// wantMounts checks how many mounts there are at mount and below: that of the tree, and one for each device that writes
// back.
func (b *bed) wantMounts(mount string, want int) {
	b.Helper()
	if n := len(b.mountsBelow(mount)); n != want {
		b.Errorf("%d mounts, want %d", n, want)
	}
}

// wantImage checks that the file at path begins with what was written.
func (b *bed) wantImage(path string, want []byte) {
	b.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(got, want) {
		b.Errorf("%s does not have what was written (%v)", path, err)
	}
}

// TestE2EWritebackMounts: the mount of a device comes and goes with the device and with the front, however that ends.
func TestE2EWritebackMounts(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		stop func(f *front)
	}{
		{"exit", func(f *front) { f.must("exit") }},
		{"SIGTERM", func(f *front) { f.signal(syscall.SIGTERM) }},
		{"umount -R", func(f *front) { f.run("umount", "-R", f.mount) }},
		{"umount -l", func(f *front) { f.run("umount", "-l", f.mount) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, 60*time.Second)
			f := b.start()
			image := b.TempDir() + "/image"
			f.must("load file\nadd 0 size=8M cache=writeback /file/" + image +
				"\nadd 1 size=8M cache=writeback ro /file/" + image + "2\nadd 2 size=1M cache=writeback /file/" + image + "3")
			b.wantMounts(f.mount, 3)
			f.must("remove 2")
			b.wantMounts(f.mount, 2)
			file, model := f.dirty("file000", 4<<20, 1)
			f.refused("exit", syscall.EBUSY, "file000 is open once")
			mustWriteAt(t, file, pattern(4096, 2), 0)
			file.Close() // after which all is written back
			copy(model, pattern(4096, 2))
			tt.stop(f)
			f.wantExit(0)
			b.wantNothingLeft()
			b.wantImage(image, model)
		})
	}
}

// TestE2EWritebackDetached: who has a device open when the mount is detached can go on, and nothing of it is lost.
func TestE2EWritebackDetached(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := b.TempDir() + "/image"
	f.must("load file\nadd 0 size=8M cache=writeback /file/" + image)
	file, model := f.dirty("file000", 4<<20, 1)
	b.run("umount", "-l", f.mount)
	mustWriteAt(t, file, pattern(4096, 2), 0)
	if err := file.Sync(); err != nil {
		t.Errorf("fsync: %v", err)
	}
	mustWriteAt(t, file, pattern(4096, 3), 4096)
	if !f.running() {
		t.Error("the front did not wait")
	}
	if err := file.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	f.wantExit(0)
	copy(model, pattern(4096, 2))
	copy(model[4096:], pattern(4096, 3))
	b.wantImage(image, model)
}

// TestE2EWritebackRefusedStop: a front that cannot stop because a device or only its mount is in use has all devices
// afterwards.
func TestE2EWritebackRefusedStop(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram\nadd 0 size=1M cache=writeback /ram/@\nadd 1 cache=writeback /ram/@/2M")
	file := f.open("ram001", os.O_RDWR)
	f.signal(syscall.SIGTERM)
	f.wantLog("cannot stop", "ram001")
	mustWriteAt(t, file, pattern(4096, 2), 0)
	file.Close()
	f.writeAndCheck("ram000", 0, 4096, 1)
	b.wantMounts(f.mount, 3)
	f.must("exit")
	f.wantExit(0)

	f = b.start()
	f.must("load ram\nadd 0 size=1M cache=writeback /ram/@")
	user := b.command("sleep", "60")
	user.Dir = f.mount + "/sys"
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	f.signal(syscall.SIGTERM)
	f.wantLog("cannot stop", "sleep")
	f.writeAndCheck("ram000", 0, 4096, 1)
	b.wantMounts(f.mount, 2)
	_ = user.Process.Kill()
	_ = user.Wait()
	f.must("exit") // another signal would be an order to stop by force
	f.wantExit(0)
}

// TestE2EWritebackKilled: what a killed front leaves behind is out of the way of the next one.
func TestE2EWritebackKilled(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	mount := b.mounts + "/m"
	image := b.TempDir() + "/image"
	add := "load file\nadd 0 size=8M cache=writeback /file/" + image
	f := b.startAt(mount)
	f.must(add)
	file, _ := f.dirty("file000", 1<<20, 1)
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
	f.signal(syscall.SIGKILL)
	<-f.exited
	if err := file.Sync(); err == nil {
		t.Error("fsync succeeds without a server")
	}
	file.Close()

	f = b.startAt(mount)
	f.must(add)
	f.wantDirect("file000", "after a new start", pattern(1<<20, 1))
	b.wantMounts(mount, 2)
}

// TestE2EWritebackForced: a device that is taken away by force has what was written to it, if its handler works.
func TestE2EWritebackForced(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := b.TempDir() + "/image"
	for i, command := range []string{"remove --force 0", "unload --force file", "exit --force"} {
		f.must("load file\nadd 0 size=8M cache=writeback /file/" + image)
		file, model := f.dirty("file000", 4<<20, byte(i))
		f.must(command)
		if command == "exit --force" {
			f.wantExit(3)
		}
		if _, err := file.ReadAt(make([]byte, 4096), 0); err == nil {
			t.Errorf("%s: the device can still be read", command)
		}
		file.Close()
		b.wantImage(image, model)
		if i == 0 {
			f.must("unload file")
		}
	}
	b.wantNothingLeft()
}

// TestE2ECacheVerify has fio write and verify in each mode, through the page cache and past it at the same time.
func TestE2ECacheVerify(t *testing.T) {
	t.Parallel()
	b := newBed(t, 180*time.Second)
	f := b.start()
	f.must("load ram")
	for minor, mode := range cacheModes {
		device := fmt.Sprintf("ram%03d", minor)
		f.must(fmt.Sprintf("add %d size=%d cache=%s /ram/@", minor, 48<<20, mode))
		f.fio(device, "--rw=randwrite", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1", "--iodepth=16",
			"--ioengine=io_uring", "--numjobs=3", "--size=8M", "--offset_increment=16M", "--do_verify=1", "--verify_backlog=64")
		f.fio(device, "--rw=randwrite", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1", "--iodepth=16",
			"--ioengine=io_uring", "--numjobs=3", "--size=8M", "--offset_increment=16M", "--direct=1", "--do_verify=1")
		f.fio(device, "--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--ioengine=mmap",
			"--size=8M", "--do_verify=1")
		f.must(fmt.Sprint("remove ", minor))
	}
}
