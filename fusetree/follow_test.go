// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFollow moves this thread to where another one sleeps, on each processor that there is.
func TestFollow(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var f follower
	for _, tid := range []int{0, 1 << 30} {
		known, sleeps := false, false
		for deadline := time.Now().Add(10 * time.Second); !known && time.Now().Before(deadline); {
			_, known, sleeps = f.sleepsOn(uint32(tid))
			runtime.Gosched()
		}
		if sleeps || !known {
			t.Errorf("thread %d: known: %t, sleeps: %t", tid, known, sleeps)
		}
	}

	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := range runtime.NumCPU() {
		if !all.IsSet(cpu) {
			continue
		}
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(cmd.Process.Pid, &one); err != nil {
			t.Fatal(err)
		}
		// A thread that sleeps stays where it was until it is woken, and the stopped one wakes there.
		for _, s := range []os.Signal{unix.SIGSTOP, unix.SIGCONT} {
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
		}
		there := false
		for deadline := time.Now().Add(10 * time.Second); !there; f.due = (time.Time{}) {
			if time.Now().After(deadline) {
				t.Fatalf("this thread does not get to processor %d", cpu)
			}
			f.follow(uint32(cmd.Process.Pid))
			here, ok := processor()
			there = ok && here == cpu
		}
		var after unix.CPUSet
		if err := unix.SchedGetaffinity(0, &after); err != nil || after != all {
			t.Errorf("the thread may run on %d processors now, before on %d (%v)", after.Count(), all.Count(), err)
		}
	}
}

func TestFollowSeldom(t *testing.T) {
	t.Parallel()
	var f follower
	for i := range followMoves {
		if d := f.wait(true); d != followOften {
			t.Errorf("after move %d the next look follows after %v", i+1, d)
		}
	}
	for range 10 {
		f.wait(true)
	}
	if d := f.wait(true); d != followSeldom {
		t.Errorf("who is moved away all the time looks again after %v", d)
	}
	f.wait(false)
	if d := f.wait(true); d != followOften {
		t.Errorf("after a time in the right place and one move the next look follows after %v", d)
	}
	for range 10 {
		f.wait(false)
	}
	if d := f.wait(false); d != followSeldom {
		t.Errorf("who is in the right place looks again after %v", d)
	}
}
