// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// fio runs fio on a device.
func (f *front) fio(device string, args ...string) string {
	f.Helper()
	all := []string{
		"--name=e2e", "--filename=" + f.path(device), "--allow_file_create=0", "--group_reporting", "--eta=never",
		"--verify_state_save=0",
	}
	out, err := f.try("fio", append(all, args...)...)
	if err != nil {
		f.Errorf("fio on %s %s: %v\n%s", device, strings.Join(args, " "), err, out)
	}
	return out
}

// TestE2EFioVerify has fio write at random, deep queues from several jobs, and verify every block: as it goes, and
// once more past the page cache when all is written.
func TestE2EFioVerify(t *testing.T) {
	const jobs = 4
	for _, device := range []struct {
		subtype string
		mib     int // a job's part of the device
	}{{"ram", 16}, {"file", 16}, {"qcow", 4}} {
		t.Run(device.subtype, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, 180*time.Second)
			f := b.start()
			size := fmt.Sprintf("%dM", jobs*device.mib)
			image := b.TempDir() + "/image"
			switch device.subtype {
			case "qcow":
				b.run("qemu-img", "create", "-q", "-f", "qcow2", image, size)
				f.must("load qcow\nadd 0 /qcow/" + image)
			case "file":
				f.must("load file\nadd 0 size=" + size + " /file/" + image)
			default:
				f.must("load ram\nadd 0 /ram/@/" + size)
			}
			for seed, engine := range []string{"psync", "io_uring"} {
				for _, direct := range []string{"0", "1"} {
					work := []string{
						"--rw=randwrite", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1",
						"--iodepth=16", fmt.Sprint("--numjobs=", jobs), fmt.Sprintf("--size=%dM", device.mib),
						fmt.Sprintf("--offset_increment=%dM", device.mib), fmt.Sprint("--randseed=", seed+1),
						"--ioengine=" + engine,
					}
					f.fio(device.subtype+"000", append(work, "--direct="+direct, "--do_verify=1")...)
					f.fio(device.subtype+"000", append(work, "--direct=1", "--verify_only=1")...)
				}
			}
			f.must("remove 0")
			if device.subtype == "qcow" {
				b.run("qemu-img", "check", "-q", image)
			}
		})
	}
}

// TestE2EInFlight: as many requests reach a handler at the same time as a user keeps under way. How many that are is
// told by what they amount to per second when each of them takes 50 ms.
func TestE2EInFlight(t *testing.T) {
	const delay = 50 * time.Millisecond
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	f.must(fmt.Sprintf("load fault\nadd 0 /fault/size=0x4000000,delay=%d", delay.Microseconds()))
	const tries = 3 // a busy machine delays requests further
	for _, rw := range []string{"randread", "randwrite"} {
		for _, depth := range []int{8, 32} {
			enough := 0.875 * float64(depth) // 28 of 32
			best := 0.0
			for i := 0; i < tries && best < enough; i++ {
				out := f.fio("fault000", "--rw="+rw, "--bs=4k", "--ioengine=io_uring", "--direct=1",
					fmt.Sprint("--iodepth=", depth), "--time_based", "--runtime=2", "--output-format=json")
				best = max(best, iops(f, out, strings.TrimPrefix(rw, "rand"))*delay.Seconds())
			}
			t.Logf("%s at depth %d: %.1f requests in flight", rw, depth, best)
			if best < enough {
				t.Errorf("%s at depth %d: %.1f requests in flight, want %d", rw, depth, best, depth)
			}
		}
	}
}

// iops is the rate in fio's report.
func iops(f *front, report, direction string) float64 {
	f.Helper()
	var parsed struct {
		Jobs []map[string]json.RawMessage
	}
	var rate struct{ IOPS float64 }
	err := json.Unmarshal([]byte(report[max(0, strings.IndexByte(report, '{')):]), &parsed)
	if err == nil && len(parsed.Jobs) == 1 {
		err = json.Unmarshal(parsed.Jobs[0][direction], &rate)
	}
	if err != nil || rate.IOPS == 0 {
		f.Fatalf("no rate in what fio reports (%v):\n%s", err, report)
	}
	return rate.IOPS
}
