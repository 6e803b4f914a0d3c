// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// What uses block devices besides file systems. The long versions have the build tag soak.

// addAnyDevice loads one of ram, file and qcow and adds device 0 of a size in MiB to it. It returns the node's name,
// and the file behind the device, "" for ram.
func (f *front) addAnyDevice(subtype string, mib int) (device, image string) {
	f.Helper()
	f.must("load " + subtype)
	image = filepath.Join(f.TempDir(), "image")
	switch subtype {
	case "ram":
		f.must(fmt.Sprintf("add 0 /ram/@/%dM", mib))
		image = ""
	case "file":
		f.must(fmt.Sprintf("add 0 size=%dM /file/%s", mib, image))
	case "qcow":
		f.run("qemu-img", "create", "-q", "-f", "qcow2", image, fmt.Sprintf("%dM", mib))
		f.must("add 0 /qcow/" + image)
	}
	return subtype + "000", image
}

// TestE2EQemu: qemu-img converts to and from devices, compares and benchmarks them, with each way it has to do I/O.
func TestE2EQemu(t *testing.T) {
	t.Parallel()
	for _, subtype := range []string{"ram", "file"} {
		b := newBed(t, 90*time.Second)
		f := b.start()
		device, _ := f.addAnyDevice(subtype, 16)
		node := f.path(device)
		source := filepath.Join(b.TempDir(), "source")
		text := pattern(12<<20, 5)
		copy(text[3<<20:], make([]byte, 4<<20)) // a hole
		if err := os.WriteFile(source, append(text, make([]byte, 4<<20)...), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, cache := range []string{"writeback", "none", "directsync"} {
			for _, aio := range []string{"threads", "native", "io_uring"} {
				if aio == "native" && cache == "writeback" {
					continue // qemu has it past the page cache only
				}
				b.run("qemu-img", "bench", "-q", "-w", "-f", "raw", "-t", cache, "-i", aio, "-c", "200", "-d", "16", "-s",
					"4k", node)
				b.run("qemu-img", "bench", "-q", "-f", "raw", "-t", cache, "-i", aio, "-c", "200", "-d", "16", "-s", "64k",
					node)
			}
			b.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-t", cache, "-T", cache, source, node)
			b.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", "-T", cache, source, node)
			f.dropCache(node)
			b.run("cmp", source, node)
		}
		out := filepath.Join(b.TempDir(), "out.qcow2")
		b.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", node, out)
		b.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", out, source)
		f.stop()
	}
}

// TestE2EBadblocks: badblocks writes patterns everywhere and finds them again.
func TestE2EBadblocks(t *testing.T) {
	t.Parallel()
	for _, subtype := range []string{"ram", "file", "qcow"} {
		b := newBed(t, 90*time.Second)
		f := b.start()
		device, image := f.addAnyDevice(subtype, 16)
		out, err := b.try("badblocks", "-w", "-b", "4096", "-t", "random", "-t", "0xaa", f.path(device), "4095")
		if err != nil || len(bytes.TrimSpace([]byte(out))) != 0 {
			t.Errorf("%s: badblocks: %v, %s", device, err, out)
		}
		f.must("remove 0")
		if subtype == "qcow" {
			b.run("qemu-img", "check", "-q", image)
		}
		f.stop()
	}
}
