// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestE2EStressRuntime: deep queues of several clients neither hang nor read anything wrong where the Go runtime of the
// front collects garbage all the time, or has one, two or more processors than there are.
func TestE2EStressRuntime(t *testing.T) {
	for _, environment := range []string{"GOGC=1", "GOMAXPROCS=1", "GOMAXPROCS=2", "GOMAXPROCS=8"} {
		t.Run(environment, func(t *testing.T) {
			b := newBed(t, stressTime+3*time.Minute)
			b.environment = []string{environment}
			f := b.start()
			f.must("load ram\nadd 0 /ram/@/64M\nadd 1 cache=writeback /ram/@/65M")
			end := time.Now().Add(stressTime)
			for round := 0; round == 0 || time.Now().Before(end); round++ {
				for minor, direct := range []string{"1", "0"} {
					f.fio(fmt.Sprintf("ram%03d", minor), "--rw=randwrite", "--bsrange=4k-128k", "--verify=crc32c",
						"--verify_fatal=1", "--do_verify=1", "--ioengine=io_uring", "--iodepth=16", "--numjobs=4", "--size=4M",
						"--offset_increment=16M", "--direct="+direct, fmt.Sprint("--randseed=", round))
				}
			}
		})
	}
}

// TestE2EStressMemory: a mixed load on devices of all cache modes, for mixTime, leaves the memory of front and host
// what it was.
func TestE2EStressMemory(t *testing.T) {
	b := newBed(t, mixTime+3*time.Minute)
	f := b.start()
	host := f.load("ram")
	for minor, mode := range cacheModes {
		f.must(fmt.Sprintf("add %d cache=%s retain=1M /ram/@/%dM", minor, mode, 32+minor))
	}
	load := func(length time.Duration) {
		var clients sync.WaitGroup
		for minor := range cacheModes {
			clients.Go(func() {
				for _, direct := range []string{"0", "1"} {
					f.fio(fmt.Sprintf("ram%03d", minor), "--rw=randrw", "--bssplit=4k/60:64k/30:1m/10", "--ioengine=io_uring",
						"--iodepth=16", "--numjobs=2", "--size=32M", "--fsync=64", "--direct="+direct, "--time_based",
						fmt.Sprintf("--runtime=%dms", (length/2).Milliseconds()))
				}
			})
		}
		clients.Wait()
	}
	load(mixTime / 2)
	processes := []struct {
		name string
		pid  int
	}{{"front", f.cmd.Process.Pid}, {"host", host}}
	var before, after [2]int
	for i, p := range processes {
		before[i] = b.anonymousMemory(p.pid)
	}
	for range 2 {
		load(mixTime / 4)
		for i, p := range processes {
			after[i] = b.anonymousMemory(p.pid)
			t.Logf("%s: %d MiB, after the warm-up it was %d MiB", p.name, after[i]>>10, before[i]>>10)
		}
	}
	// A runtime takes more or less from one moment to the next; what leaks goes on growing.
	const tolerance = 16 << 10
	for i, p := range processes {
		if after[i] > before[i]*5/4+tolerance {
			t.Errorf("%s has grown from %d KiB to %d KiB", p.name, before[i], after[i])
		}
	}
}

// anonymousMemory is how much memory a process has besides what it shares, in KiB.
func (b *bed) anonymousMemory(pid int) int {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var size int
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &size); err == nil {
			return size
		}
	}
	b.Fatalf("no RssAnon for process %d", pid)
	return 0
}
