// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cacheModes are the values of the option cache= of add.
var cacheModes = []string{"none", "readahead", "writeback"}

// TestE2ECacheModes: each mode lets just so many reads and writes through to the handler as it says, shows what it is,
// and is saved. A loop device works on each, with and without direct I/O.
func TestE2ECacheModes(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "record")
	f := b.start()
	f.must("load record\nload ram")
	for i, tt := range []struct {
		mode string
		// Requests that reach the handler for 64 times 4 KiB written, then read twice.
		writes, reads int
	}{{"none", 64, 128}, {"readahead", 64, 0}, {"writeback", 1, 0}} {
		r := f.record(i, "cache="+tt.mode)
		file := r.open(r.device, os.O_RDWR)
		r.news()
		for page := range int64(64) {
			if _, err := file.WriteAt(pattern(4096, byte(page)), page*4096); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			t.Error(err)
		}
		if got := count(r.news(), "write:"); got != tt.writes {
			t.Errorf("%s: %d writes reached the handler, want %d", tt.mode, got, tt.writes)
		}
		before := f.reads(r.device)
		for range 2 {
			got := make([]byte, 4096)
			for page := range int64(64) {
				if _, err := file.ReadAt(got, page*4096); err != nil || got[0] != pattern(1, byte(page))[0] {
					t.Fatalf("%s: page %d begins with %d (%v)", tt.mode, page, got[0], err)
				}
			}
		}
		if got := f.reads(r.device) - before; got != tt.reads {
			t.Errorf("%s: %d reads reached the handler, want %d", tt.mode, got, tt.reads)
		}
		file.Close()
		attribute, err := os.ReadFile(fmt.Sprintf("%s/sys/block/%s/cache", f.mount, r.device))
		if err != nil || string(attribute) != tt.mode+"\n" {
			t.Errorf("%s: /sys/block shows %q (%v)", tt.mode, attribute, err)
		}
		if text := f.must("describe record"); !strings.Contains(text, "cache "+tt.mode) {
			t.Errorf("%s: describe does not show it:\n%s", tt.mode, text)
		}
		saved := b.TempDir() + "/saved"
		f.must("save " + saved)
		if text, err := os.ReadFile(saved); err != nil || !strings.Contains(string(text), "cache="+tt.mode) {
			t.Errorf("%s: saved as\n%s(%v)", tt.mode, text, err)
		}
		f.must(fmt.Sprint("remove ", i))
		f.wantLoop(tt.mode)
	}
}

// wantLoop has a file system on a loop device on a device with a cache mode.
func (f *front) wantLoop(mode string) {
	f.Helper()
	f.must("add 9 cache=" + mode + " /ram/@/16M")
	for _, direct := range []string{"off", "on"} {
		out, status := f.shell(f, `set -e
			loop=$(losetup --direct-io=`+direct+` --show -f $M/dev/ram009)
			trap 'losetup -d $loop' EXIT
			mkfs.ext4 -q $loop
			mkdir -p $W/fs
			mount $loop $W/fs
			trap 'umount $W/fs; losetup -d $loop' EXIT
			cp -r /etc/apt $W/fs
			umount $W/fs
			e2fsck -fn $loop
			mount $loop $W/fs
			diff -r /etc/apt $W/fs/apt`)
		if status != 0 {
			f.Errorf("%s: a loop device with direct I/O %s: status %d\n%s", mode, direct, status, out)
		}
	}
	f.must("remove 9")
}

// reads is how many reads the device has given to its handler.
func (f *front) reads(device string) int {
	f.Helper()
	var count int
	text, err := os.ReadFile(fmt.Sprintf("%s/sys/block/%s/stat", f.mount, device))
	if err == nil {
		_, err = fmt.Sscan(string(text), &count)
	}
	if err != nil {
		f.Fatal(err)
	}
	return count
}

// count is how many of the lines begin with prefix.
func count(lines []string, prefix string) int {
	n := 0
	for _, line := range lines {
		if strings.HasPrefix(line, prefix) {
			n++
		}
	}
	return n
}
