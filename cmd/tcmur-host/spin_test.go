// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// oneCPU has the calling thread, and the processes that it starts, run on one CPU only until the test ends.
func oneCPU(t *testing.T) {
	t.Helper()
	var before, one unix.CPUSet
	runtime.LockOSThread()
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !before.IsSet(cpu) {
		cpu++
	}
	one.Set(cpu)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &before); err == nil {
			runtime.UnlockOSThread() // otherwise the thread ends with the test's goroutine
		}
	})
}

// cpuTime is how long the threads of the process have run.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	var sum time.Duration
	for _, task := range tasks {
		var ns int64
		if b, err := os.ReadFile(task); err == nil {
			if _, err := fmt.Sscan(string(b), &ns); err != nil {
				t.Fatal(err)
			}
		}
		sum += time.Duration(ns)
	}
	return sum
}

// TestSpinNeedsTwoCPUs: a worker that watches the ring where there is only one CPU keeps from running whoever it waits
// for. There it costs no more with leave to watch than without.
func TestSpinNeedsTwoCPUs(t *testing.T) {
	oneCPU(t)
	cost := func(spin string) time.Duration {
		f := startHost(t, spin)
		f.mustLoad(buildHandler(t, "behave.c"), "sync")
		f.mustOpen(&hostpb.OpenRequest{Config: "sync/", Size: 1 << 20})
		best := time.Hour // of several, because others use the machine too
		for range 8 {
			const requests = 50
			start := cpuTime(t, f.cmd.Process.Pid)
			for range requests {
				if err := f.do(sqe{op: opRead, length: 512}); err != nil {
					t.Fatal(err)
				}
			}
			best = min(best, (cpuTime(t, f.cmd.Process.Pid)-start)/requests)
		}
		return best
	}
	without, with := cost("--spin-us=0"), cost("--spin-us=1000")
	if with > 2*without {
		t.Errorf("CPU time per request: %v without, %v with", without, with)
	}
}
