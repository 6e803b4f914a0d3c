// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// openFlaky starts a host with testdata/flaky.c and opens device 0 with the words given, and device 1, whose storage is
// fine.
func openFlaky(t *testing.T, async bool, words string, retry time.Duration) *front {
	t.Helper()
	f := startHost(t)
	subtype, flags := "sync", []string(nil)
	if async {
		subtype, flags = "async", []string{"-DASYNC"}
	}
	f.mustLoad(buildHandler(t, "flaky.c", flags...), subtype)
	f.mustOpen(&hostpb.OpenRequest{
		Config: subtype + "/" + words, Size: 1 << 20, RetryMs: uint32(retry.Milliseconds()),
	})
	f.mustOpen(&hostpb.OpenRequest{Device: 1, Name: "other", Config: subtype + "/other", Size: 1 << 20})
	return f
}

func bothKinds(t *testing.T, test func(t *testing.T, async bool)) {
	for _, async := range []bool{false, true} {
		t.Run(fmt.Sprintf("async %v", async), func(t *testing.T) { test(t, async) })
	}
}

// TestBusy: a refusal is tried again until it ends, and not for ever.
func TestBusy(t *testing.T) {
	bothKinds(t, func(t *testing.T, async bool) {
		for sts, giveUp := range map[int]syscall.Errno{
			1: syscall.ENOMEM, 3: syscall.EBUSY, 19: syscall.EAGAIN, 20: syscall.EAGAIN,
		} {
			f := openFlaky(t, async, fmt.Sprintf("sts=%d busy=5", sts), 0)
			data := pattern(byte(sts), 4096)
			start := time.Now()
			if err := f.write(0, 4096, data); err != nil {
				t.Errorf("status %d, five times: %v", sts, err)
			}
			if d := time.Since(start); d < 31*time.Millisecond {
				t.Errorf("status %d: five pauses took %v", sts, d)
			}
			if got, err := f.read(0, 4096, 4096); err != nil || !bytes.Equal(got, data) {
				t.Errorf("status %d: read back: %v, data equal: %v", sts, err, bytes.Equal(got, data))
			}

			const limit = 300 * time.Millisecond
			f = openFlaky(t, async, fmt.Sprintf("sts=%d busy=1000000", sts), limit)
			start = time.Now()
			stuck := f.push(sqe{op: opWrite, offset: 4096, length: 512})
			for i := 0; i < 50; i++ { // the device itself is not blocked either
				if err := f.do(sqe{op: opRead, device: uint32(i % 2), length: 512, payload: 8192}); err != nil {
					t.Fatal(err)
				}
			}
			c := f.wait(stuck)
			if d := time.Since(start); c.sts != int32(sts) || c.err != int32(giveUp) || d < limit {
				t.Errorf("status %d, for ever: %+v after %v", sts, c, d)
			}
			f.awaitLog("given up")
			if err := f.close(callCtx(t), 0); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestLost has the back end go away in each of the ways that a handler can tell, with two attempts of reopening
// refused, under requests. All of them succeed in the end, and the other device's do meanwhile.
func TestLost(t *testing.T) {
	for name, c := range map[string]struct {
		words string
		at    uint64
	}{
		"connection": {"lost=1 refuse=2", 4096},
		"lock":       {"refuse=2", 8192},
		"time-out":   {"slow=1 refuse=2", 4096},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bothKinds(t, func(t *testing.T, async bool) {
				f := openFlaky(t, async, c.words, 0)
				start := time.Now()
				var tags []uint32
				const n, first = 64, 64 << 10 // beyond the special offsets
				place := func(i uint64) uint64 {
					switch i {
					case 0:
						return 24576 // still inside when the back end goes
					case n / 2:
						return c.at
					}
					return first + i*4096
				}
				for i := uint64(0); i < n; i++ {
					copy(f.submit[arenaOffset+i*4096:], pattern(byte(i), 4096))
					tags = append(tags, f.push(sqe{op: opWrite, offset: place(i), length: 4096, payload: i * 4096}))
				}
				for range 100 {
					if err := f.do(sqe{op: opRead, device: 1, length: 512}); err != nil {
						t.Fatal(err)
					}
				}
				if _, done := f.early[tags[n/2]]; done && time.Since(start) < 2*time.Second {
					t.Error("the request that lost the back end ended before the reopen")
				} else if done {
					t.Error("the other device had to wait for the reopen")
				}
				for i, tag := range tags {
					if got := f.wait(tag); got.err != 0 {
						t.Errorf("write %d: %+v", i, got)
					}
				}
				if d := time.Since(start); d < 2*time.Second {
					t.Errorf("three attempts to reopen took %v", d)
				}
				f.awaitLog("storage is still away")
				f.awaitLog("opened again after 2 failed attempts")
				for i := uint64(0); i < n; i++ {
					got, err := f.read(0, place(i), 4096)
					if err != nil || !bytes.Equal(got, pattern(byte(i), 4096)) {
						t.Fatalf("write %d read back: %v", i, err)
					}
				}
				if err := f.close(callCtx(t), 0); err != nil {
					t.Error(err)
				}
				f.awaitLog("closing after 4 opens")
			})
		})
	}
}

// TestTimeOut: a request that timed out is sent once more, not for ever.
func TestTimeOut(t *testing.T) {
	bothKinds(t, func(t *testing.T, async bool) {
		f := openFlaky(t, async, "slow=1000000", 0)
		wantErrno(t, f.write(0, 4096, pattern(1, 512)), syscall.ETIMEDOUT)
		f.awaitLog("opened again after 0 failed attempts")
		if err := f.write(0, 0, pattern(1, 512)); err != nil {
			t.Error(err)
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Error(err)
		}
		f.awaitLog("and 3 writes")
	})
}

// TestLostForEver: each try loses the connection again. The request ends when its time is up.
func TestLostForEver(t *testing.T) {
	bothKinds(t, func(t *testing.T, async bool) {
		f := openFlaky(t, async, "lost=1000000", 200*time.Millisecond)
		wantErrno(t, f.write(0, 4096, pattern(1, 512)), syscall.EBUSY)
		if err := f.write(0, 0, pattern(1, 512)); err != nil {
			t.Error(err)
		}
	})
}

// TestLostWhileIdle: the connection goes when the device has no requests. It is opened again all the same, and a close
// does not wait for that.
func TestLostWhileIdle(t *testing.T) {
	bothKinds(t, func(t *testing.T, async bool) {
		f := openFlaky(t, async, "", 0)
		if err := f.write(0, 16384, pattern(1, 512)); err != nil {
			t.Fatal(err)
		}
		f.awaitLog("opened again after 0 failed attempts")
		if err := f.write(0, 0, pattern(1, 512)); err != nil {
			t.Error(err)
		}
	})
}

// TestCloseWhileLost: a device whose back end stays away can be closed if nothing has to be flushed, and opened anew;
// with a request that waits the close ends in time.
func TestCloseWhileLost(t *testing.T) {
	bothKinds(t, func(t *testing.T, async bool) {
		f := openFlaky(t, async, "refuse=1000000", 0)
		held := f.push(sqe{op: opWrite, offset: 8192, length: 512})
		f.awaitLog("cannot be opened again yet, trying every second: storage is still away (No route to host)")
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if err := f.close(ctx, 0); !errors.Is(err, syscall.ETIMEDOUT) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("close with a request that waits: %v", err)
		}
		if _, done := f.early[held]; done {
			t.Error("the request ended")
		}

		f = openFlaky(t, async, "", 0)
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}
		subtype := map[bool]string{false: "sync", true: "async"}[async]
		readOnly := &hostpb.OpenRequest{Config: subtype + "/refuse=1000000", Size: 1 << 20, ReadOnly: true}
		f.mustOpen(readOnly)
		if err := f.do(sqe{op: opRead, offset: 16384, length: 512}); err != nil {
			t.Fatal(err)
		}
		f.awaitLog("cannot be opened again yet")
		if err := f.close(callCtx(t), 0); err != nil {
			t.Error(err)
		}
		f.mustOpen(readOnly)
		if err := f.do(sqe{op: opRead, length: 512}); err != nil {
			t.Error(err)
		}
	})
}
