// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bufio"
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
)

// resizeSoon is within what time users of a device are to see its new size. On an idle machine it takes a millisecond.
const resizeSoon = 100 * time.Millisecond

// qemuIO is a qemu-io(1) that has a node open.
type qemuIO struct {
	*bed
	in  io.Writer
	out *bufio.Reader
}

// qemu starts one.
func (b *bed) qemu(path string) *qemuIO {
	b.Helper()
	cmd := b.command("qemu-io", "-f", "raw", path)
	in, inErr := cmd.StdinPipe()
	out, outErr := cmd.StdoutPipe()
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	q := &qemuIO{b, in, bufio.NewReader(out)}
	q.answer()
	return q
}

// ask gives a command, and returns what it answers. The next one has to wait for that: of two at once the second would
// be left in a buffer of qemu-io's.
func (q *qemuIO) ask(command string) string {
	q.Helper()
	if _, err := fmt.Fprintln(q.in, command); err != nil {
		q.Fatal(err)
	}
	return q.answer()
}

// answer is everything up to the prompt.
func (q *qemuIO) answer() string {
	q.Helper()
	const prompt = "qemu-io> "
	for text := ""; ; {
		part, err := q.out.ReadString(' ')
		if text += part; err != nil {
			q.Fatalf("qemu-io said %q: %v", text, err)
		}
		if before, ok := strings.CutSuffix(text, prompt); ok {
			return strings.TrimSpace(before)
		}
	}
}

// TestE2EResize makes a device larger and smaller while a loop device and qemu have it open.
func TestE2EResize(t *testing.T) {
	for _, tt := range []struct{ subtype, cache string }{
		{"ram", "readahead"}, {"file", "readahead"}, {"ram", "none"}, {"ram", "writeback"},
	} {
		t.Run(tt.subtype+"-"+tt.cache, func(t *testing.T) {
			subtype := tt.subtype
			t.Parallel()
			b := newBed(t, 120*time.Second)
			f := b.start()
			device := subtype + "000"
			hostPID := f.load(subtype)
			config := map[string]string{"ram": "/ram/@", "file": "/file/" + b.TempDir() + "/image"}[subtype]
			f.must("add 0 size=8M cache=" + tt.cache + " " + config)
			loop := b.attach(f.path(device))
			file := f.open(device, os.O_RDWR)
			qemu := b.qemu(f.path(device))
			if got := qemu.ask("length"); got != "8 MiB" {
				t.Fatalf("qemu sees %q", got)
			}

			resize := func(command string, size int64) {
				t.Helper()
				f.must(command)
				began := time.Now()
				info, err := file.Stat()
				if err != nil || info.Size() != size {
					t.Errorf("after %q fstat shows %d bytes (%v)", command, info.Size(), err)
				}
				b.run("losetup", "-c", loop)
				if got := strings.TrimSpace(b.run("blockdev", "--getsize64", loop)); got != fmt.Sprint(size) {
					t.Errorf("after %q the loop device has %s bytes", command, got)
				}
				// Two processes had to be started for that.
				if took := time.Since(began); took > resizeSoon {
					t.Logf("it took the loop device %v to see it", took)
				} else {
					t.Logf("seen by the loop device after %v", took)
				}
				began = time.Now()
				mib := size >> 20
				// As block_resize does; else it never asks for the size anew.
				if got := qemu.ask(fmt.Sprintf("truncate %dM", mib)); got != "" {
					t.Errorf("after %q qemu says %q", command, got)
				}
				if got := qemu.ask("length"); got != fmt.Sprintf("%d MiB", mib) {
					t.Errorf("after %q qemu sees %q", command, got)
				}
				t.Logf("seen by qemu after %v", time.Since(began))
			}
			mustWriteAt(t, file, pattern(4096, 1), 0)
			resize("resize 0 16M", 16<<20)
			mustWriteAt(t, file, pattern(4096, 2), 16<<20-4096)
			if err := file.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(hostPID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			f.awaitRecovery(subtype, 1)
			b.dropCache(f.path(device))
			wantAt(t, file, pattern(4096, 2), 16<<20-4096)

			f.refused("resize 0 4M", syscall.EBUSY, loop)
			resize("resize --force 0 4M", 4<<20)
			if n, err := file.ReadAt(make([]byte, 8192), 4<<20-4096); n != 4096 || err != io.EOF {
				t.Errorf("read across the new end: %d, %v", n, err)
			}
			if n, err := file.ReadAt(make([]byte, 4096), 8<<20); n != 0 || err != io.EOF {
				t.Errorf("read beyond the new end: %d, %v", n, err)
			}
			direct := f.open(device, os.O_RDWR|syscall.O_DIRECT)
			if _, err := direct.WriteAt(pattern(4096, 3), 4<<20); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("write beyond the new end: %v", err)
			}
			direct.Close()
			resize("resize 0 8M", 8<<20)
			wantAt(t, file, make([]byte, 4<<20), 4<<20) // what was cut off is gone
			wantAt(t, file, pattern(4096, 1), 0)
			file.Close()
			b.run("losetup", "-d", loop)
			_, _ = fmt.Fprintln(qemu.in, "quit")
		})
	}
}

// TestE2EResizeErrors: what cannot be resized says so.
func TestE2EResizeErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := filepath.Join(b.TempDir(), "image")
	b.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
	f.must("load ram\nload qcow\nadd 0 block_size=4096 /ram/@/4M\nadd 1 ro /ram/@/8M\nadd 2 /qcow/" + image)
	f.refused("resize 0 4097K", syscall.EINVAL, "4096")
	f.refused("resize 0", syscall.EINVAL, "resize MINOR SIZE")
	f.refused("resize 0 1M 2", syscall.EINVAL, "resize MINOR SIZE")
	f.refused("resize 0 much", syscall.EINVAL)
	f.refused("resize 1 16M", syscall.EROFS, "read-only")
	f.refused("resize 2 8M", syscall.EOPNOTSUPP, "cannot")
	f.refused("resize 7 8M", syscall.ENODEV, "7")
	f.must("res 0 2M") // nobody has it open
	if info, err := os.Stat(f.path("ram000")); err != nil || info.Size() != 2<<20 {
		t.Errorf("%d bytes (%v)", info.Size(), err)
	}
	file := f.open("ram000", os.O_RDWR)
	if err := file.Truncate(4 << 20); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("truncate to more than it has: %v", err)
	}
	if err := file.Truncate(1 << 20); err != nil {
		t.Errorf("truncate to less than it has: %v", err)
	}
	if info, err := file.Stat(); err != nil || info.Size() != 2<<20 {
		t.Errorf("after that %d bytes (%v)", info.Size(), err)
	}
}

// TestE2EGrowFileSystem: a file system grows with its device.
func TestE2EGrowFileSystem(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	f.must("load ram\nadd 0 /ram/@/32M")
	loop := b.attach(f.path("ram000"))
	b.run("mkfs.ext4", "-q", "-F", loop)
	f.must("resize 0 96M")
	b.run("losetup", "-c", loop)
	b.run("e2fsck", "-fp", loop)
	b.run("resize2fs", loop) // not while mounted, which takes privileges that a container may not have
	mountpoint := b.mountDevice(loop)
	content := pattern(48<<20, 5)
	if err := os.WriteFile(mountpoint+"/file", content, 0o600); err != nil {
		t.Fatal(err)
	}
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", loop)
	b.mountDevice(loop)
	if got, err := os.ReadFile(mountpoint + "/file"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file came back otherwise (%v)", err)
	}
	b.run("umount", mountpoint)
	b.run("losetup", "-d", loop)
}

// TestE2EHandlerChangesSize: a size that the handler sets by itself is the node's.
func TestE2EHandlerChangesSize(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load fault\nadd 0 /fault/grow=3145728")
	file := f.open("fault000", os.O_RDWR)
	began := time.Now()
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
	for {
		info, err := file.Stat()
		if err == nil && info.Size() == 3<<20 {
			break
		}
		if time.Since(began) > graceful {
			t.Fatalf("%d bytes (%v)", info.Size(), err)
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("seen after %v", time.Since(began))
	mustWriteAt(t, file, pattern(4096, 1), 3<<20-4096)
	wantAt(t, file, pattern(4096, 1), 3<<20-4096)
}

func mustWriteAt(t testing.TB, file *os.File, p []byte, off int64) {
	t.Helper()
	if _, err := file.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func wantAt(t testing.TB, file *os.File, want []byte, off int64) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes at %d are not what they should be (%v)", len(want), off, err)
	}
}
