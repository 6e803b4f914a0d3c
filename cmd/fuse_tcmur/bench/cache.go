// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// What users do with devices, in each mode of the option cache= of add: the reason why the default is what it is.

// slowRequest is how long a request takes at the handler that stands for storage, not memory.
const slowRequest = 200 * time.Microsecond

// shellSize is the size in bytes of the devices that commands go over from one end to the other.
const shellSize = 64 << 20

// cacheBase is the mode that the others are compared with.
const cacheBase = "readahead"

// cachePeers is a server of ours for each mode.
func cachePeers(slow bool) []peer {
	var list []peer
	for _, mode := range []string{"none", cacheBase, "writeback"} {
		list = append(list, peer{mode, "cache=" + mode, func(ctx context.Context, b *bed, s *server) error {
			return startMode(ctx, b, s, mode, slow)
		}})
	}
	return list
}

// startMode starts fuse_tcmur with a device of the usual size and one of shellSize.
func startMode(ctx context.Context, b *bed, s *server, mode string, slow bool) error {
	handler, flags := "ram", b.oursFlags
	if slow {
		if err := b.buildFault(ctx); err != nil {
			return err
		}
		handler, flags = "fault", append([]string{"--handler-prefix", b.handlerPrefix()}, flags...)
	}
	commands := []string{"load " + handler}
	files := []string{handler + "000", handler + "001"}
	for minor, size := range []int64{b.size, shellSize} {
		config := fmt.Sprintf("/ram/@/%d", size)
		if slow {
			config = fmt.Sprintf("/fault/size=%d,delay=%d", size, slowRequest.Microseconds())
		}
		commands = append(commands, fmt.Sprintf("add %d cache=%s %s", minor, mode, config))
	}
	err := s.runOurs(ctx, b, files, commands, flags...)
	s.direct, s.cached, s.small = s.device(files[0]), s.device(files[0]), s.device(files[1])
	if mode == "writeback" {
		for _, file := range files {
			s.onStop(func() error { return unmount(s.device(file)) }) // it has a mount of its own
		}
	}
	return err
}

// shellWorkload is a command that users run on a device, by bash. $DEV is the small device's file, $IMG a file in
// memory of the same size, and $OUT a place in memory for another one.
type shellWorkload struct {
	script string
	warm   bool // what the kernel has cached of the device is left there
}

const shellTimeout = 3 * time.Minute

// run returns how long the command took.
func (w *shellWorkload) run(ctx context.Context, b *bed, s *server) (time.Duration, error) {
	image, err := b.image(ctx)
	if err != nil {
		return 0, err
	}
	do := func(script string) error {
		script = fmt.Sprintf("set -e; DEV=%s IMG=%s OUT=%s; %s", s.small, image, filepath.Join(filepath.Dir(image), "out"),
			script)
		_, _, err := command{argv: []string{"bash", "-c", script}, timeout: shellTimeout, unblock: s.unblock}.run(ctx)
		return err
	}
	prepare := "rm -f $OUT; sync $DEV"
	if w.warm {
		prepare += "; cat $DEV > /dev/null"
	} else {
		prepare += "; dd of=$DEV oflag=nocache conv=notrunc,fdatasync count=0 status=none"
	}
	if err := do(prepare); err != nil {
		return 0, err
	}
	begin := time.Now()
	err = do(w.script)
	return time.Since(begin), err
}

// image is a file in memory, of the small devices' size, with contents that nothing takes for zeroes.
func (b *bed) image(ctx context.Context) (string, error) {
	const memory = "/dev/shm"
	if path, ok := b.built["image"]; ok {
		return path, nil
	}
	dir, err := os.MkdirTemp(memory, "tcmur-bench-")
	if err != nil {
		return "", err
	}
	b.onClose(func() error { return os.RemoveAll(dir) })
	path := filepath.Join(dir, "image")
	script := fmt.Sprintf("head -c %d /dev/urandom > %s", shellSize, path)
	_, _, err = command{argv: []string{"bash", "-c", script}, timeout: shellTimeout}.run(ctx)
	b.built["image"] = path
	return path, err
}

// cacheWorkloads is what is measured in each mode.
func cacheWorkloads() []workload {
	shell := func(name, title, script string, warm bool) workload {
		return workload{name: name, title: title, unit: seconds, shell: &shellWorkload{script, warm}}
	}
	return []workload{
		shell("dd-read-4k", "dd bs=4k from the device", "dd if=$DEV of=/dev/null bs=4k status=none", false),
		shell("dd-read-1m", "dd bs=1M from the device", "dd if=$DEV of=/dev/null bs=1M status=none", false),
		shell("dd-again-4k", "dd bs=4k from the device, once more", "dd if=$DEV of=/dev/null bs=4k status=none", true),
		shell("dd-write-4k", "dd bs=4k conv=fsync to the device",
			"dd if=$IMG of=$DEV bs=4k conv=notrunc,fsync status=none", false),
		shell("dd-write-1m", "dd bs=1M conv=fsync to the device",
			"dd if=$IMG of=$DEV bs=1M conv=notrunc,fsync status=none", false),
		shell("dd-direct-1m", "dd bs=1M oflag=direct to the device",
			"dd if=$IMG of=$DEV bs=1M conv=notrunc,fsync oflag=direct status=none", false),
		shell("cp-to", "cp of an image to the device, and sync", "cp $IMG $DEV; sync $DEV", false),
		shell("cp-from", "cp of the device", "cp $DEV $OUT", false),
		shell("qemu-to", "qemu-img convert of an image to the device",
			"qemu-img convert -n -f raw -O raw $IMG $DEV; sync $DEV", false),
		shell("qemu-from", "qemu-img convert of the device to qcow2", "qemu-img convert -f raw -O qcow2 $DEV $OUT", false),
		{name: "fio-write-4k", title: "4k random write, page cache, fsync at the end", unit: mbps, whole: true, cached: true,
			fio: fioOptions{"rw": "randwrite", "bs": "4k", "ioengine": "psync", "direct": "0", "end_fsync": "1", "size": "32m"}},
		{name: "fio-sync-4k", title: "4k random write, page cache, fdatasync after each 8", unit: mbps, cached: true,
			fio: fioOptions{"rw": "randwrite", "bs": "4k", "ioengine": "psync", "direct": "0", "fdatasync": "8"}},
		{name: "fio-read-4k", title: "4k random read, page cache", unit: mbps, cached: true,
			fio: fioOptions{"rw": "randread", "bs": "4k", "ioengine": "psync", "direct": "0", "invalidate": "1"}},
		{name: "loop-tar", title: "ext4 on loop: tar -x of Go's source + sync", unit: seconds,
			ext4: &ext4Workload{extractTar, false}, cached: true},
		{name: "loop-direct-tar", title: "ext4 on loop with direct I/O: the same", unit: seconds,
			ext4: &ext4Workload{extractTar, true}},
	}
}

// cacheModes is the mode of the benchmark that compares them, with memory and with slow storage behind the device.
func cacheModes(ctx context.Context, b *bed, opts *options) error {
	packages := command{
		argv: []string{filepath.Join(b.root, ".ci", "packages"), "qemu-utils"}, timeout: 15 * time.Minute,
	}
	if _, _, err := packages.run(ctx); err != nil {
		return err
	}
	found := map[string]*results{}
	var errs []error
	for _, slow := range []bool{false, true} {
		name := map[bool]string{false: "ram", true: fmt.Sprintf("storage that takes %v for each request", slowRequest)}[slow]
		c := &comparison{
			bed: b, peers: cachePeers(slow), workloads: opts.workloads, rounds: opts.rounds, runtime: opts.runtime,
			progress: os.Stderr,
		}
		r, err := c.run(ctx)
		found[name] = r
		fmt.Print(cacheTable(name, r))
		if len(r.Failures) > 0 {
			err = errors.Join(err, fmt.Errorf("%d failures: %s", len(r.Failures), strings.Join(r.Failures, "; ")))
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, writeJSON(opts.jsonPath(b, "cache"), found))...)
}

// cacheTable is the results for people: medians, and what they are of those of cacheBase in speed.
func cacheTable(name string, r *results) string {
	var text strings.Builder
	fmt.Fprintf(&text, "\nHandler: %s. Medians of %d interleaved rounds, devices of %d MiB, for commands of %d MiB; in "+
		"brackets the speed as a multiple of %s's.\n\n", name, r.Rounds, r.SizeMiB, shellSize>>20, cacheBase)
	fmt.Fprintf(&text, "| workload | none | %s | writeback | spread |\n|---|---|---|---|---|\n", cacheBase)
	for _, w := range r.Workloads {
		base := w.find(cacheBase)
		cells := []string{w.Title}
		widest := 0.0
		for _, p := range cachePeers(false) {
			other := w.find(p.name)
			if other == nil || base == nil {
				cells = append(cells, "failed")
				continue
			}
			widest = max(widest, other.Spread)
			cell := figure(other.Median.Value) + " " + string(w.Unit)
			if p.name != cacheBase {
				speed := ratio(other.Median.Value, base.Median.Value)
				if w.Unit == seconds {
					speed = ratio(base.Median.Value, other.Median.Value)
				}
				cell += fmt.Sprintf(" (%.2f)", speed)
			}
			cells = append(cells, cell)
		}
		fmt.Fprintf(&text, "| %s | %.0f%% |\n", strings.Join(cells, " | "), 100*widest)
	}
	return text.String()
}
