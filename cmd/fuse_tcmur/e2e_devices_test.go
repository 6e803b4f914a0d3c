// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// writeAndCheck writes a pattern to a device past the page cache and reads it back the same way.
func (f *front) writeAndCheck(device string, off int64, n int, seed byte) {
	f.Helper()
	file, err := os.OpenFile(f.path(device), os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		f.Error(err)
		return
	}
	defer file.Close()
	want := pattern(n, seed)
	if _, err := file.WriteAt(want, off); err != nil {
		f.Errorf("%s: %v", device, err)
		return
	}
	got := make([]byte, n)
	if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		f.Errorf("%s: reading at %d what was written there: equal %v, error %v", device, off, bytes.Equal(got, want), err)
	}
}

// pattern makes n bytes that differ with the seed and with their place.
func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i) ^ byte(i>>8)*31 ^ seed
	}
	return p
}

// TestE2ETwoHandlers uses two handlers at once and moves data from one to the other.
func TestE2ETwoHandlers(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := filepath.Join(b.TempDir(), "an image.img")
	if ramHost, fileHost := f.load("ram"), f.load("file"); ramHost == fileHost {
		t.Errorf("both handlers are in process %d", ramHost)
	}
	f.must("add 0 /ram/@/8M\nadd 1 size=8M /file/" + image)
	f.writeAndCheck("ram000", 12345, 1<<20, 1)
	f.writeAndCheck("file001", 54321, 1<<20, 2)
	b.run("dd", "if="+f.path("ram000"), "of="+f.path("file001"), "bs=64k", "conv=notrunc,fsync", "status=none")
	b.run("cmp", f.path("ram000"), f.path("file001"))
	f.must("remove 0\nunload ram")
	f.writeAndCheck("file001", 4<<20, 100, 3)
	f.must("remove 1\nunload file\nload ram\nadd 1 /ram" + image)
	f.writeAndCheck("ram001", 100, 100, 4)
}

// TestE2ETimes prints how long the things take that a user waits for, and fails when they take absurdly long.
func TestE2ETimes(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start()
	var loads, adds []time.Duration
	for i := range 5 {
		start := time.Now()
		f.must("load ram")
		f.must("add 0 /ram/@")
		file := f.open("ram000", os.O_RDONLY)
		if _, err := file.ReadAt(make([]byte, 4096), 4096*int64(i)); err != nil {
			t.Fatal(err)
		}
		loads = append(loads, time.Since(start))
		file.Close()
		for minor := 1; minor <= 20; minor++ {
			start := time.Now()
			f.must(fmt.Sprintf("add %d /ram/@/%dM", minor, minor))
			adds = append(adds, time.Since(start))
		}
		for minor := 1; minor <= 20; minor++ {
			f.must(fmt.Sprintf("remove %d", minor))
		}
		f.must("remove 0\nunload ram")
	}
	load, add := median(loads), median(adds)
	t.Logf("load of ram to the end of the first read: median %v, longest %v", load, slices.Max(loads))
	t.Logf("add of a ram device: median %v, longest %v", add, slices.Max(adds))
	if load > 2*time.Second {
		t.Errorf("load to first read takes %v, want 300ms", load)
	}
	if add > 200*time.Millisecond {
		t.Errorf("add takes %v, want 20ms", add)
	}
}

func median(durations []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(durations))[len(durations)/2]
}

// TestE2E256Devices fills all minors.
func TestE2E256Devices(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second)
	f := b.start()
	f.must("load ram\nload file")
	dir := b.TempDir()
	const minors = 256
	name := func(minor int) string { return fmt.Sprintf("%s%03d", []string{"ram", "file"}[minor%2], minor) }
	for minor := range minors {
		if minor%2 == 0 {
			f.must(fmt.Sprintf("add %d /ram/@/%d", minor, 1<<20+minor*4096))
		} else {
			f.must(fmt.Sprintf("add %d size=1M /file/%s/%d", minor, dir, minor))
		}
	}
	f.refused("add 256 /ram/@/9M", syscall.ENODEV, "255")
	for minor := range minors {
		f.writeAndCheck(name(minor), int64(minor)*512, 4096, byte(minor))
	}
	// Each has kept its own.
	for minor := range minors {
		got := make([]byte, 4096)
		file := f.open(name(minor), os.O_RDONLY)
		if _, err := file.ReadAt(got, int64(minor)*512); err != nil || !bytes.Equal(got, pattern(4096, byte(minor))) {
			t.Errorf("%s has other contents than were written (%v)", name(minor), err)
		}
		file.Close()
	}
	if lines := strings.Count(b.run("ls", "-l", f.mount+"/dev"), "\n"); lines != 1+minors+1 {
		t.Errorf("ls -l shows %d lines, want a total, %d devices and tcmur", lines, minors)
	}
	for minor := range minors {
		f.must(fmt.Sprintf("remove %d", minor))
	}
	if entries, err := os.ReadDir(f.mount + "/dev"); err != nil || len(entries) != 1 {
		t.Errorf("after all were removed: %v, %v", entries, err)
	}
	f.must("unload ram\nunload file")
}
