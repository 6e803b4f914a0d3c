// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// TestStats: every request is counted once, with its bytes and its time in the handler.
func TestStats(t *testing.T) {
	const delay = 3 * time.Millisecond
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/size=0x100000,delay=3000,read:8192=5", plugin.DeviceOptions{MaxXfer: 65536})
	const reads, writes, jobs = 20, 15, 4
	var wg sync.WaitGroup
	for range jobs {
		wg.Go(func() {
			buf := make([]byte, 512)
			for range reads {
				if _, err := d.ReadAt(buf, 0); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range writes {
				if _, err := d.WriteAt(make([]byte, 4096), 4096); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if _, err := d.WriteAt(make([]byte, 3*65536), 65536); err != nil { // three requests
		t.Error(err)
	}
	if _, err := d.ReadAt(make([]byte, 4096), 8192); !errors.Is(err, syscall.EIO) {
		t.Errorf("read that the handler refuses: %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	stats := d.Stats()
	for _, want := range []struct {
		op                   shared.Op
		count, errors, bytes uint64
	}{
		{shared.OpRead, jobs*reads + 1, 1, jobs * reads * 512},
		{shared.OpWrite, jobs*writes + 3, 0, jobs*writes*4096 + 3*65536},
		{shared.OpFlush, 1, 0, 0},
		{shared.OpUnmap, 0, 0, 0},
		{shared.OpZero, 0, 0, 0},
	} {
		got := stats.Ops[want.op]
		if got.Count != want.count || got.Errors != want.errors || got.Bytes != want.bytes || got.InFlight != 0 {
			t.Errorf("%s: %d requests, %d failed, %d bytes, %d in flight; want %d, %d, %d, 0", want.op,
				got.Count, got.Errors, got.Bytes, got.InFlight, want.count, want.errors, want.bytes)
		}
		if got.Count > 0 && (got.Handler.Quantile(0.01) < delay || got.Total.Quantile(0.01) < delay) {
			t.Errorf("%s: %v in the handler, %v altogether; it takes %v", want.op,
				got.Handler.Quantile(0.01), got.Total.Quantile(0.01), delay)
		}
		if got.Channel.Count != got.Handler.Count || got.Handler.Count > got.Count ||
			got.Handler.Count < (got.Count+7)/8/2 {
			t.Errorf("%s: %d requests, of which %d and %d were measured", want.op, got.Count, got.Channel.Count,
				got.Handler.Count)
		}
	}
	if stats.LastError == nil || !strings.Contains(stats.LastError.Error(), "read of 4096 bytes at 8192") ||
		time.Since(stats.LastErrorTime) > time.Minute {
		t.Errorf("last error %v at %v", stats.LastError, stats.LastErrorTime)
	}
	if stats.Retained != 0 {
		t.Errorf("%d bytes are retained after a flush", stats.Retained)
	}
}

// TestStatsOfRecovery: what a death has sent again is counted.
func TestStatsOfRecovery(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/size=0x100000,read@1=segv,once="+t.TempDir()+"/once,lazy="+t.TempDir()+"/image",
		plugin.DeviceOptions{})
	for i := range 5 {
		if _, err := d.WriteAt(make([]byte, 4096), int64(i)<<12); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.Stats().Retained; got < 5*4096 {
		t.Errorf("%d bytes are retained after five writes of 4096", got)
	}
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	stats := d.Stats()
	if stats.Replayed != 5 || stats.Resent != 1 || stats.ReplayLeft != 0 {
		t.Errorf("%d changes replayed, %d requests sent again, %d bytes left; want 5, 1, 0",
			stats.Replayed, stats.Resent, stats.ReplayLeft)
	}
	if n := stats.Ops[shared.OpRead].Count; n != 1 {
		t.Errorf("a read that was sent again counts %d times", n)
	}
}

// TestErrorStorm: requests that all fail leave a handful of lines in the log, which tell how many there were, and each
// costs no more than one that succeeds.
func TestErrorStorm(t *testing.T) {
	l, log := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/size=0x100000,read=5", plugin.DeviceOptions{})
	good := add(t, l, 1, "/fault/size=0x100001,volatile", plugin.DeviceOptions{})
	const jobs, each = 4, 2500
	storm := func(d *plugin.Device, want error) time.Duration {
		began := time.Now()
		var wg sync.WaitGroup
		for range jobs {
			wg.Go(func() {
				for range each {
					if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, want) {
						t.Errorf("%v, want %v", err, want)
						return
					}
				}
			})
		}
		wg.Wait()
		return time.Since(began)
	}
	succeeding, failing := storm(good, nil), storm(d, syscall.EIO)
	t.Logf("%d requests took %v, and %v when they failed", jobs*each, succeeding, failing)
	if failing > 5*succeeding+time.Second {
		t.Errorf("requests that fail take %v, those that succeed %v", failing, succeeding)
	}
	if n := d.Stats().Ops[shared.OpRead].Errors; n != jobs*each {
		t.Errorf("%d errors counted, want %d", n, jobs*each)
	}
	text := log.String()
	if lines := strings.Count(text, "fault000"); lines > 10 || !strings.Contains(text, "request failed") {
		t.Errorf("%d lines about %d failures:\n%.2000s", lines, jobs*each, text)
	}
}
