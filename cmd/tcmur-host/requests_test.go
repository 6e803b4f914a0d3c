// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// openBehave starts a host with testdata/behave.c and opens device 0, 1 MiB, with the words given.
func openBehave(t *testing.T, async bool, words string) *front {
	t.Helper()
	f := startHost(t)
	subtype, flags := "sync", []string(nil)
	if async {
		subtype, flags = "async", []string{"-DASYNC"}
	}
	f.mustLoad(buildHandler(t, "behave.c", flags...), subtype)
	f.mustOpen(&hostpb.OpenRequest{Config: subtype + "/" + words, Size: 1 << 20, RetryMs: 1})
	return f
}

// TestRefusedRequests submits what must not reach the handler.
func TestRefusedRequests(t *testing.T) {
	f := openBehave(t, false, "")
	f.mustOpen(&hostpb.OpenRequest{Device: 1, Name: "ro", Config: "sync/", Size: 1 << 20, ReadOnly: true})
	for _, c := range []struct {
		name string
		sqe  sqe
		want syscall.Errno
	}{
		{"unknown operation", sqe{op: 77, length: 512}, syscall.EINVAL},
		{"unknown device", sqe{op: opRead, device: 5, length: 512}, syscall.ENODEV},
		{"device beyond the table", sqe{op: opRead, device: 1 << 31, length: 512}, syscall.ENODEV},
		{"read beyond the end", sqe{op: opRead, offset: 1 << 20, length: 1}, syscall.EINVAL},
		{"read across the end", sqe{op: opRead, offset: 1<<20 - 1, length: 2}, syscall.EINVAL},
		{"write beyond the end", sqe{op: opWrite, offset: 1 << 20, length: 1}, syscall.ENOSPC},
		{"offset that wraps", sqe{op: opRead, offset: 1<<64 - 1, length: 2}, syscall.EINVAL},
		{"length that wraps", sqe{op: opZero, offset: 4096, length: 1<<64 - 1}, syscall.ENOSPC},
		{"length above the limit", sqe{op: opRead, length: 1<<20 + 1}, syscall.EINVAL},
		{"payload outside the arena", sqe{op: opRead, length: 512, payload: testArena - 511}, syscall.EINVAL},
		{"payload that wraps", sqe{op: opWrite, length: 512, payload: 1<<64 - 1}, syscall.EINVAL},
		{"payload at the end", sqe{op: opRead, length: 512, payload: testArena - 512}, 0},
		{"nothing", sqe{op: opRead, offset: 1 << 20}, 0},
		{"write, read-only", sqe{op: opWrite, device: 1, length: 512}, syscall.EROFS},
		{"zero, read-only", sqe{op: opZero, device: 1, length: 512}, syscall.EROFS},
		{"unmap, read-only", sqe{op: opUnmap, device: 1, length: 512}, syscall.EROFS},
		{"read, read-only", sqe{op: opRead, device: 1, length: 512}, 0},
		{"flush, read-only", sqe{op: opFlush, device: 1}, 0},
	} {
		if got := f.wait(f.push(c.sqe)); got.err != int32(c.want) || (got.sts == 0) != (c.want == 0) {
			t.Errorf("%s: got errno %d, status %d, want errno %d", c.name, got.err, got.sts, c.want)
		}
	}
}

// TestStatus has the handler return each status and compares the errno.
func TestStatus(t *testing.T) {
	for _, async := range []bool{false, true} {
		f := openBehave(t, async, "status")
		for sts, want := range map[int]syscall.Errno{
			0: 0, 1: syscall.ENOMEM, 3: syscall.EBUSY, 4: syscall.EIO, 5: syscall.EIO, 6: syscall.EILSEQ,
			7: syscall.EOPNOTSUPP, 8: syscall.EINVAL, 11: syscall.ETIMEDOUT, 12: syscall.ESHUTDOWN, 14: syscall.ENOSPC,
			18: syscall.EROFS, 22: syscall.ENOLCK, 28: syscall.E2BIG, 99: syscall.EIO, 100: syscall.EOPNOTSUPP,
		} {
			c := f.wait(f.push(sqe{op: opWrite, offset: uint64(4096 + sts*512), length: 512}))
			wantSts := sts
			if sts == 100 {
				wantSts = -1
			}
			if c.sts != int32(wantSts) || c.err != int32(want) {
				t.Errorf("async %v, status %d: got status %d, errno %d, want errno %d", async, sts, c.sts, c.err, want)
			}
		}
	}
}

// TestZeroAndUnmap checks that ranges are cut as the handler wants them, whatever they begin and end at.
func TestZeroAndUnmap(t *testing.T) {
	for _, c := range []struct {
		async bool
		words string
	}{{false, ""}, {false, "blind"}, {true, ""}, {true, "blind"}, {true, "inside"}, {true, "inside blind"}} {
		t.Run(fmt.Sprintf("async %v %s", c.async, c.words), func(t *testing.T) {
			f := openBehave(t, c.async, c.words)
			before := pattern(3, 1<<20)
			for _, op := range []struct {
				op   uint32
				fill byte
			}{{opZero, 0}, {opUnmap, 0xee}} {
				if err := f.write(0, 0, before); err != nil {
					t.Fatal(err)
				}
				const offset, length = 1536, 700 * 1000
				if err := f.do(sqe{op: op.op, offset: offset, length: length}); err != nil {
					t.Fatalf("operation %d: %v", op.op, err)
				}
				want := append([]byte(nil), before...)
				for i := range want[offset : offset+length] {
					want[offset+i] = op.fill
				}
				got, err := f.read(0, 0, 1<<20)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("operation %d: error %v, contents right: %v", op.op, err, bytes.Equal(got, want))
				}
			}
		})
	}
}

// TestManyInFlight keeps the ring full, out of order and from few doorbells.
func TestManyInFlight(t *testing.T) {
	for _, async := range []bool{false, true} {
		for _, spin := range []string{"--spin-us=0", "--spin-us=50"} {
			t.Run(fmt.Sprintf("async %v %s", async, spin), func(t *testing.T) {
				f := startHost(t, spin)
				subtype, flags := "sync", []string(nil)
				if async {
					subtype, flags = "async", []string{"-DASYNC"}
				}
				f.mustLoad(buildHandler(t, "behave.c", flags...), subtype)
				for i := uint32(0); i < 4; i++ {
					f.mustOpen(&hostpb.OpenRequest{Device: i, Name: fmt.Sprint("d", i), Config: subtype + "/", Size: 1 << 20})
				}
				const n = 512
				for round := 0; round < 40; round++ {
					op := uint32(opWrite)
					if round%2 == 1 {
						op = opRead
					}
					tags := map[uint32]int{}
					for i := 0; i < n; i++ {
						at := uint64(i) * 4096
						if op == opWrite {
							copy(f.submit[arenaOffset+at:], pattern(byte(i+round), 4096))
						}
						s := sqe{op: op, device: uint32(i % 4), offset: uint64(i/4) * 4096, length: 4096, payload: at,
							withoutDoorbell: i%32 != 31}
						tags[f.push(s)] = i
					}
					for tag, i := range tags {
						if c := f.wait(tag); c.err != 0 {
							t.Fatalf("round %d, request %d: errno %d", round, i, c.err)
						}
						at := arenaOffset + i*4096
						if op == opRead && !bytes.Equal(f.complete[at:at+4096], pattern(byte(i+round-1), 4096)) {
							t.Fatalf("round %d, request %d: wrong data", round, i)
						}
					}
				}
				for i := uint32(0); i < 4; i++ {
					if err := f.close(callCtx(t), i); err != nil {
						t.Error(err)
					}
				}
				want := "at most 2 callouts at once"
				if async {
					want = "at most 1 callouts at once"
				}
				f.awaitLog(want)
				if strings.Contains(f.log.String(), "at most 3") {
					t.Error("more callouts at once than nr_threads")
				}
			})
		}
	}
}

// TestHangDelaysNobody has one callout hang in device 0 and uses that device's other thread and other devices.
func TestHangDelaysNobody(t *testing.T) {
	f := openBehave(t, false, "hang")
	f.mustOpen(&hostpb.OpenRequest{Device: 1, Name: "other", Config: "sync/", Size: 1 << 20})
	first := f.push(sqe{op: opRead, offset: 4096, length: 512})
	second := f.push(sqe{op: opRead, offset: 4096, length: 512, payload: 4096})
	f.awaitLog("callout 2 hangs")                                           // as many as nr_threads
	third := f.push(sqe{op: opRead, offset: 0, length: 512, payload: 8192}) // has to wait for device 0
	for i := 0; i < 100; i++ {
		if err := f.do(sqe{op: opRead, device: 1, offset: uint64(i) * 512, length: 512, payload: 65536}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tag := range []uint32{first, second, third} {
		if _, done := f.early[tag]; done {
			t.Errorf("request %d completed while it should hang", tag)
		}
	}
	// A close of the hanging device ends in time and leaves it without new requests; the other one goes on.
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := f.close(ctx, 0); !errors.Is(err, syscall.ETIMEDOUT) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close of a hanging device: %v", err)
	}
	wantErrno(t, f.do(sqe{op: opRead, offset: 0, length: 512, payload: 128 << 10}), syscall.ENODEV)
	if err := f.do(sqe{op: opRead, device: 1, offset: 0, length: 512, payload: 128 << 10}); err != nil {
		t.Errorf("the other device: %v", err)
	}
}

// TestMisbehaviour: what a host survives.
func TestMisbehaviour(t *testing.T) {
	t.Run("completes twice", func(t *testing.T) {
		f := openBehave(t, true, "twice")
		for i := 0; i < 200; i++ {
			if err := f.do(sqe{op: opWrite, offset: 512, length: 512}); err != nil {
				t.Fatal(err)
			}
		}
		f.awaitLog("completed a command twice")
		if c, ok := f.next(100 * time.Millisecond); ok {
			t.Errorf("a completion too many: %+v", c)
		}
	})
	t.Run("completes what it is still at", func(t *testing.T) {
		f := openBehave(t, false, "early")
		for i := range 20 {
			if err := f.write(0, 512, pattern(byte(i), 512)); err != nil {
				t.Fatal(err)
			}
			if got, err := f.read(0, 512, 512); err != nil || !bytes.Equal(got, pattern(byte(i), 512)) {
				t.Fatalf("round %d: read %v, data equal: %v", i, err, bytes.Equal(got, pattern(byte(i), 512)))
			}
		}
		f.awaitLog("completed a command and also returned 0")
	})
	t.Run("prints a lot", func(t *testing.T) {
		f := openBehave(t, false, "noisy")
		if err := f.do(sqe{op: opFlush}); err != nil {
			t.Error(err)
		}
		f.awaitLog("handler printed: chatty handler")
		if n := strings.Count(f.log.String(), "chatty handler"); n > 2000 {
			t.Errorf("%d lines reached the log", n)
		}
	})
	t.Run("logs a lot", func(t *testing.T) {
		f := openBehave(t, false, "flood")
		start := time.Now()
		if err := f.do(sqe{op: opRead, offset: 4096, length: 512}); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("I/O waited %v for the log", d)
		}
		f.awaitLog("flood 0")
	})
	t.Run("fails the last flush", func(t *testing.T) {
		f := openBehave(t, false, "noflush")
		wantErrno(t, f.do(sqe{op: opFlush}), syscall.EIO)
		wantErrno(t, f.close(callCtx(t), 0), syscall.EIO)
		wantErrno(t, f.close(callCtx(t), 0), syscall.ENODEV)
		f.awaitLog("closing; at most")
	})
}

// TestDeathInOpen: the control thread's callouts are reported as well.
func TestDeathInOpen(t *testing.T) {
	f := startHost(t)
	f.mustLoad(buildHandler(t, "behave.c"), "sync")
	_, err := f.open(&hostpb.OpenRequest{Config: "sync/die-in-open", Size: 4096})
	if !errors.Is(err, control.ErrHostGone) {
		t.Errorf("got %v, want %v", err, control.ErrHostGone)
	}
	f.awaitLog("handler died of SIGSEGV in open(device test000)")
}

// TestDeath looks at what is left when a handler takes the process down: the reason in the log, the signal in the exit
// status.
func TestDeath(t *testing.T) {
	for _, c := range []struct {
		words  string
		says   []string
		signal syscall.Signal // 0: exits
		status int
	}{
		{"crash", []string{"handler died of SIGSEGV in read(device test000, offset 4096, length 512), address 0x0",
			"handler backtrace: handler_test.so+0x"}, syscall.SIGSEGV, 0},
		{"abort", []string{"handler is at a loss",
			"handler died of SIGABRT in read(device test000, offset 4096, length 512)"}, syscall.SIGABRT, 0},
		{"thread", []string{"handler died of SIGSEGV in a thread of its own"}, syscall.SIGSEGV, 0},
		{"exit", []string{"handler called exit() in read(device test000, offset 4096, length 512)"}, 0, 3},
	} {
		t.Run(c.words, func(t *testing.T) {
			if c.words == "thread" && builtWith("-asan") {
				t.Skip("AddressSanitizer reports it itself, in its own words")
			}
			f := openBehave(t, false, c.words)
			f.push(sqe{op: opRead, offset: 4096, length: 512})
			for _, text := range c.says {
				f.awaitLog(text)
			}
			deadline := time.After(testDeadline)
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for !f.client.Exited() {
				select {
				case <-tick.C:
				case <-deadline:
					t.Fatal("the process did not end")
				}
			}
			ws := f.cmd.ProcessState.Sys().(syscall.WaitStatus)
			if c.signal != 0 && (!ws.Signaled() || ws.Signal() != c.signal) || c.signal == 0 && ws.ExitStatus() != c.status {
				t.Errorf("the process ended with %v", f.cmd.ProcessState)
			}
		})
	}
}
