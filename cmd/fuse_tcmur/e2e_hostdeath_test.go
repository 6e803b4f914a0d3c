// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestE2EHostDeath kills a host under load. I/O on its devices ends with EIO within a second; the mount and the devices
// of other handlers go on without an error; the handler can be loaded again.
func TestE2EHostDeath(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load ram\nload file")
	victim := f.load("fault")
	f.must("add 0 /fault/delay=2000\nadd 1 /fault/delay=2000,n=1\nadd 2 /ram/@/300M\nadd 3 size=1M /file/" +
		b.TempDir() + "/image")
	mountpoint := b.mkfsAndMount(f, "ram002")

	stop := make(chan struct{})
	var bystanders, victims sync.WaitGroup
	goOn := func(path string, flags int) {
		file, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		bystanders.Go(func() {
			defer file.Close()
			buf := make([]byte, 4096)
			for i := int64(0); ; i++ {
				if _, err := file.WriteAt(buf, i%200*4096); err != nil {
					t.Errorf("bystander: %v", err)
					return
				}
				if err := file.Sync(); err != nil {
					t.Errorf("bystander: %v", err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	goOn(f.path("file003"), os.O_RDWR|syscall.O_DIRECT)
	goOn(f.path("file003"), os.O_RDWR)
	goOn(mountpoint+"/file", os.O_RDWR|os.O_CREATE)

	const clients = 16
	failed := make(chan time.Time, clients)
	working := make(chan struct{}, clients)
	for c := range clients {
		flags := os.O_RDWR
		if c%2 == 1 {
			flags |= syscall.O_DIRECT
		}
		file := f.open([]string{"fault000", "fault001"}[c/2%2], flags)
		victims.Go(func() {
			defer file.Close()
			buf := make([]byte, 4096)
			for i := 0; ; i++ {
				_, err := file.WriteAt(buf, int64(c)*4096)
				if err == nil && c%4 == 3 {
					_, err = file.ReadAt(buf, int64(c)*4096)
				}
				if err == nil && c%4 == 2 {
					err = file.Sync()
				}
				if i == 0 {
					working <- struct{}{}
				}
				if err == nil {
					continue
				}
				failed <- time.Now()
				if !errors.Is(err, syscall.EIO) {
					t.Errorf("I/O on a device whose host was killed: %v", err)
				}
				if err := file.Sync(); !errors.Is(err, syscall.EIO) {
					t.Errorf("fsync on a device whose host was killed: %v", err)
				}
				return
			}
		})
	}
	for range clients {
		<-working
	}
	if len(failed) > 0 {
		t.Fatal("I/O failed before the host was killed")
	}
	killed := time.Now()
	if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var slowest time.Duration
	for range clients {
		slowest = max(slowest, (<-failed).Sub(killed))
	}
	t.Logf("the last of %d clients had its error %v after the kill", clients, slowest)
	if slowest > time.Second {
		t.Error("that is more than a second")
	}
	victims.Wait()

	f.wantLog("ERROR", "handler process died", "fault", "signal 9")
	f.refused("add 4 /fault/n=4", syscall.EIO, "fault")
	f.refused("unload fault", syscall.EBUSY, "fault000")
	f.refused("remove 0", syscall.EIO, "removed")
	f.refused("remove 1", syscall.EIO, "removed")
	if victim == f.reload("fault") {
		t.Error("the handler is in the process that was killed")
	}
	f.must("add 0 /fault/")
	f.writeAndCheck("fault000", 0, 4096, 1)

	close(stop)
	bystanders.Wait()
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", f.path("ram002"))
}

// reload unloads a handler and loads it again, and returns the process id of its host.
func (f *front) reload(subtype string) int {
	f.Helper()
	f.must("unload " + subtype)
	return f.load(subtype)
}

// TestE2EHandlerCrash has a handler end its process by itself: whoever waits gets EIO, and the mount goes on.
func TestE2EHandlerCrash(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must("load ram\nadd 9 /ram/@")
	for _, effect := range []string{"segv", "abort", "exit"} {
		f.load("fault")
		f.must("add 0 /fault/write=" + effect)
		file := f.open("fault000", os.O_RDWR)
		if _, err := file.Write(make([]byte, 4096)); !errors.Is(err, syscall.EIO) {
			t.Errorf("write that crashes the handler by %s: %v", effect, err)
		}
		file.Close()
		f.writeAndCheck("ram009", 0, 4096, 1)
		f.refused("remove 0", syscall.EIO)
		f.must("unload fault")
	}
	f.load("fault")
	f.refused("add 0 /fault/open=segv", syscall.EIO, "open")
	f.refused("add 0 /fault/", syscall.EIO)
	f.must("unload fault")
	f.writeAndCheck("ram009", 0, 4096, 2)
}
