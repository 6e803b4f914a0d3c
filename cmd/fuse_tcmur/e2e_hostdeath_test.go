// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// awaitRecovery waits until the front has replaced a handler's host for the nth time, and returns the process id of the
// new one.
func (f *front) awaitRecovery(subtype string, n int) int {
	f.Helper()
	f.wantLog("handler recovered", "handler="+subtype+" ", fmt.Sprintf("restarts=%d\n", n))
	line := regexp.MustCompile(fmt.Sprintf(`handler recovered: handler=%s pid=(\d+) .*restarts=%d\n`, subtype, n))
	match := line.FindStringSubmatch(f.log.String())
	if match == nil {
		f.Fatalf("the log does not name the new process:\n%s", f.log.tail())
	}
	pid, _ := strconv.Atoi(match[1])
	return pid
}

// clients are goroutines that work on devices until they are told to stop, and for which every error is one too many.
type clients struct {
	*front
	stop    chan struct{}
	running sync.WaitGroup
	first   sync.WaitGroup // of each one's rounds
}

func (f *front) startClients() *clients {
	return &clients{front: f, stop: make(chan struct{})}
}

// writer has one client write to a file, check what it has written before, and sync: a part of the file of span bytes
// from start belongs to it. The file is closed in the end.
func (c *clients) writer(path string, flags int, start, span int64) {
	c.Helper()
	file, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		c.Fatal(err)
	}
	c.first.Add(1)
	c.running.Go(func() {
		told := sync.OnceFunc(c.first.Done)
		defer told()
		defer file.Close()
		const block = 4096
		blocks := span / block
		got := make([]byte, block)
		for round := int64(0); ; round++ {
			off := start + round%blocks*block
			if round >= blocks {
				want := pattern(block, byte(round-blocks))
				if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					c.Errorf("%s: round %d, offset %d: wrong contents (%v)", path, round, off, err)
					return
				}
			}
			if _, err := file.WriteAt(pattern(block, byte(round)), off); err != nil {
				c.Errorf("%s: round %d: %v", path, round, err)
				return
			}
			if round%16 == 15 {
				if err := file.Sync(); err != nil {
					c.Errorf("%s: round %d: %v", path, round, err)
					return
				}
			}
			told()
			select {
			case <-c.stop:
				return
			default:
			}
		}
	})
}

// end stops the clients.
func (c *clients) end() {
	close(c.stop)
	c.running.Wait()
}

// TestE2EHostDeath kills a host under load, again and again. Nobody has an error, on its devices or elsewhere; what was
// written is there; the handler goes on in other processes.
func TestE2EHostDeath(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second, "fault")
	f := b.start()
	f.must("load ram\nload file")
	victim := f.load("fault")
	dir := b.TempDir()
	f.must(fmt.Sprintf(`
		add 0 /fault/size=0x200000,delay=1000,store=%[1]s/store
		add 1 /fault/size=0x200000,delay=1000,lazy=%[1]s/lazy
		add 2 /ram/@/300M
		add 3 size=1M /file/%[1]s/image`, dir))
	mountpoint := b.mkfsAndMount(f, "ram002")

	c := f.startClients()
	c.writer(f.path("file003"), os.O_RDWR|syscall.O_DIRECT, 0, 512<<10)
	c.writer(f.path("file003"), os.O_RDWR, 512<<10, 512<<10)
	c.writer(mountpoint+"/file", os.O_RDWR|os.O_CREATE, 0, 1<<20)
	for i := range 16 {
		flags := os.O_RDWR
		if i%2 == 1 {
			flags |= syscall.O_DIRECT
		}
		c.writer(f.path([]string{"fault000", "fault001"}[i/2%2]), flags, int64(i)*(64<<10), 64<<10)
	}
	c.first.Wait()
	const kills = 5
	for n := range kills {
		if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		next := f.awaitRecovery("fault", n+1)
		if next == victim {
			t.Error("the handler is in the process that was killed")
		}
		victim = next
	}
	c.end()
	f.wantLog("ERROR", "handler process died", "fault", "signal 9")
	f.must("remove 0\nremove 1\nunload fault")
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", f.path("ram002"))
}

// TestE2EPoison has a request that its handler dies of each time. It fails, alone, with EIO and an entry in the log
// that names it; whoever else is on the device, or on others, goes on.
func TestE2EPoison(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second, "fault")
	f := b.start()
	f.must("load ram\nadd 9 /ram/@\nload fault")
	const poisoned = 256 << 10 // the byte that no write may touch; neighbours stay away from its block
	for i, effect := range []string{"segv", "abort", "exit"} {
		f.must(fmt.Sprintf("add %d /fault/write:%d=%s,delay=500,store=%s/%s", i, poisoned, effect, b.TempDir(), effect))
		name := fmt.Sprintf("fault%03d", i)
		c := f.startClients()
		c.writer(f.path(name), os.O_RDWR|syscall.O_DIRECT, 0, 128<<10)
		c.writer(f.path(name), os.O_RDWR, 512<<10, 128<<10)
		c.writer(f.path("ram009"), os.O_RDWR|syscall.O_DIRECT, 0, 1<<20)
		c.first.Wait()
		file := f.open(name, os.O_RDWR|syscall.O_DIRECT)
		if _, err := file.WriteAt(pattern(4096, 1), poisoned); !errors.Is(err, syscall.EIO) {
			t.Errorf("write that crashes the handler by %s: %v", effect, err)
		}
		f.wantLog("ERROR", "request is given up", name, fmt.Sprintf("write of 4096 bytes at %d", poisoned))
		if _, err := file.WriteAt(pattern(4096, 1), poisoned+4096); err != nil {
			t.Errorf("write to the next block: %v", err)
		}
		file.Close()
		c.end()
		f.must(fmt.Sprintf("remove %d", i))
	}
	f.must("unload fault")
}

// TestE2EOpenCrash: a handler that ends its process in open is there for the next device.
func TestE2EOpenCrash(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load fault")
	f.refused("add 0 /fault/open=segv", syscall.EIO, "open")
	f.awaitRecovery("fault", 1)
	f.must("add 0 /fault/")
	f.writeAndCheck("fault000", 0, 4096, 1)
	f.must("remove 0\nunload fault")
}

// TestE2EContentsGone: a handler whose memory died with its process refuses to reopen the device. That one fails, with
// EIO and one error of fsync for each open file; it can be removed, and added again.
func TestE2EContentsGone(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	victim := f.load("fault")
	f.must("add 0 /fault/\nadd 1 /fault/volatile")
	file := f.open("fault000", os.O_RDWR|syscall.O_DIRECT)
	if _, err := file.WriteAt(pattern(4096, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.awaitRecovery("fault", 1)
	if _, err := file.ReadAt(make([]byte, 4096), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of contents that are gone: %v", err)
	}
	if err := file.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync of a device with acknowledged writes that are gone: %v", err)
	}
	file.Close()
	f.wantLog("ERROR", "device has failed", "fault000")
	f.writeAndCheck("fault001", 0, 4096, 1)
	if out, err := f.ctl("remove 0"); err != nil && !errors.Is(err, syscall.EIO) {
		t.Errorf("remove: %v\n%s", err, out)
	}
	f.must("add 0 /fault/")
	f.writeAndCheck("fault000", 0, 4096, 1)
}
