// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// readRecord lists the entries of a record as "flags@sector+sectors", with the text of marks, and ends the test where
// it is not in the format of dm-log-writes.
func readRecord(t *testing.T, path string) []string {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	number := func(at int) uint64 { return binary.LittleEndian.Uint64(p[at:]) }
	if len(p) < 512 || number(0) != 0x6a736677736872 || number(8) != 1 || binary.LittleEndian.Uint32(p[24:]) != 512 {
		t.Fatalf("no record: % x", p[:min(len(p), 32)])
	}
	var entries []string
	at := 512
	for range number(16) {
		if at+512 > len(p) {
			t.Fatalf("%d entries, but the file ends at %d", number(16), len(p))
		}
		text := string(p[at+32 : at+32+int(number(at+24))])
		entries = append(entries, strings.TrimSpace(
			fmt.Sprintf("%d@%d+%d %s", number(at+16), number(at), number(at+8), text)))
		if number(at+16) == 0 {
			at += int(number(at+8)) * 512
		}
		at += 512
	}
	if at != len(p) {
		t.Errorf("the entries end at %d, the file at %d", at, len(p))
	}
	return entries
}

func TestRecord(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	path := filepath.Join(t.TempDir(), "record")
	d := add(t, l, 0, "/ram/@/1M", plugin.DeviceOptions{Record: path})
	write := func(off int64, n int) {
		t.Helper()
		if _, err := d.WriteAt(make([]byte, n), off); err != nil {
			t.Error(err)
		}
	}
	write(4096, 1024)
	write(700, 10) // not a whole sector
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	if err := d.Discard(64<<10, 128<<10); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt(make([]byte, 512), 1<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write beyond the end: %v", err)
	}
	write(1<<20-512, 512)
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
	want := []string{"0@8+2", "0@1+1", "1@0+0", "4@128+256", "0@2047+1", "1@0+0"}
	if got := readRecord(t, path); !slices.Equal(got, want) {
		t.Errorf("the record is %q, want %q", got, want)
	}

	// A record is never overwritten, and what cannot be recorded is not added.
	_, err := l.AddDevice(t.Context(), 0, "/ram/@/1M", plugin.DeviceOptions{Record: path})
	if !errors.Is(err, syscall.EEXIST) {
		t.Errorf("add with a record that exists: %v, want EEXIST", err)
	}
	for record, errno := range map[string]syscall.Errno{"relative": syscall.EINVAL, "/nowhere/record": syscall.ENOENT} {
		_, err = l.AddDevice(t.Context(), 0, "/ram/@/1M", plugin.DeviceOptions{Record: record})
		if !errors.Is(err, errno) {
			t.Errorf("add with record %q: %v, want %v", record, err, errno)
		}
	}
	other := path + "-other"
	_, err = l.AddDevice(t.Context(), 0, "/nosuch/@", plugin.DeviceOptions{Record: other})
	if _, statErr := os.Stat(other); err == nil || statErr == nil {
		t.Errorf("an add that failed (%v) has left a record behind (%v)", err, statErr)
	}
}

// TestRecordOfFailures: neither what failed nor a flush that failed counts.
func TestRecordOfFailures(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	path := filepath.Join(t.TempDir(), "record")
	d := add(t, l, 0, "/fault/flush@1=4,write@2=4", plugin.DeviceOptions{Record: path})
	buf := make([]byte, 512)
	for i, fails := range []bool{false, true, false} {
		if _, err := d.WriteAt(buf, int64(i)*512); (err != nil) != fails {
			t.Errorf("write %d: %v", i, err)
		}
	}
	for i, fails := range []bool{true, false} {
		if err := d.Flush(); (err != nil) != fails {
			t.Errorf("flush %d: %v", i, err)
		}
	}
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
	want := []string{"0@0+1", "0@2+1", "8@0+0 flush begun", "1@0+0", "1@0+0"}
	if got := readRecord(t, path); !slices.Equal(got, want) {
		t.Errorf("the record is %q, want %q", got, want)
	}
}

// TestRecordOfRecovery: what is sent again after a death is in the record once.
func TestRecordOfRecovery(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	path := filepath.Join(t.TempDir(), "record")
	d := add(t, l, 0, "/ram/@/1M", plugin.DeviceOptions{Record: path, Timeout: time.Minute})
	for i := range 4 {
		if i == 2 {
			if err := syscall.Kill(l.Handlers()[0].PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.WriteAt(make([]byte, 512), int64(i)*512); err != nil {
			t.Error(err)
		}
	}
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
	want := []string{"0@0+1", "0@1+1", "0@2+1", "0@3+1", "1@0+0"}
	if got := readRecord(t, path); !slices.Equal(got, want) {
		t.Errorf("the record is %q, want %q", got, want)
	}
}
