// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/conformance"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// The flags are for a handler of somebody else: make conformance sets them.
var (
	handlerPath = flag.String("handler", "", "path of a handler's shared object: test that one, and no other")
	config      = flag.String("config", "", "the configuration string of its device: /SUBTYPE/...")
	reopen      = flag.String("reopen", "", "the one to add the device again with, if -config makes a new device")
	size        = flag.Int64("size", 0, "size of its device in bytes, if the handler has to be told")
	span        = flag.Int64("span", 0, "bytes at the start of the device that may be used, if not all")
	volatile    = flag.Bool("volatile", false, "the device's contents are gone when it is removed")
	kills       = flag.String("kills", "any", "when the handler's process may be killed: any, idle, never")
	count       = flag.Int("operations", 0, "number of random operations")
	seed        = flag.Uint64("seed", 0, "seed of the random operations; 0: another one each time")
)

// kind is a handler with one kind of device.
type kind struct {
	name    string
	so      string // prefix of the shared object's path, or all of it
	config  string // %s is the path of a file that is not there yet
	make    string // shell command that makes the file
	reopen  string
	size    int64
	span    int64
	kills   conformance.Kills
	vanish  bool // the contents are gone when the device is removed
	divisor int  // of the number of operations, for those that are slow
	long    bool // only with build tag soak
}

const qemuCreate = "qemu-img create -q -f "

// kinds is every handler within reach. rbd needs a cluster: see TestE2ERbd.
func kinds(t *testing.T) []kind {
	shipped, system := testbed.ShippedHandlers(), testbed.SystemHandlers(t)
	own := testbed.BuildHandlers(t, "faultasync")
	all := []kind{
		{name: "ram", so: shipped + "ram.so", config: "/ram/@/64M", vanish: true},
		{name: "ram-file", so: shipped + "ram.so", config: "/ram%s", make: "truncate -s 16M %s"},
		{name: "file", so: shipped + "file.so", config: "/file/%s", size: 64 << 20},
		{name: "async", so: own + "faultasync.so", config: "/faultasync/size=0x1000000,store=%s"},
		{name: "fbo", so: system + "file_optical.so", config: "/fbo/%s", make: "truncate -s 16M %s", divisor: 2},
		// The last zone is one that is written in sequence only.
		{
			name: "zbc", so: system + "file_zbc.so", config: "/zbc/zsize-1/conv-16@%s", reopen: "/zbc/%s", size: 17 << 20,
			span: 16 << 20, divisor: 2,
		},
	}
	for _, image := range []struct {
		name, options string
		long          bool
	}{
		{"qcow2", "qcow2", false},
		{"qcow2-4k", "qcow2 -o cluster_size=4096", false},
		{"qcow2-v2", "qcow2 -o compat=0.10", false},
		{"qcow2-lazy", "qcow2 -o lazy_refcounts=on", true},
		{"qcow2-metadata", "qcow2 -o preallocation=metadata", false},
		{"qcow2-falloc", "qcow2 -o preallocation=falloc", true},
		{"qcow2-refcount", "qcow2 -o refcount_bits=8", true},
		{"qcow2-backing", "qcow2 -F qcow2 -b %s.base", false},
		{"qcow1", "qcow", true}, // moves a cluster with each write
		{"qcow-raw", "raw", false},
	} {
		k := kind{
			name: image.name, so: system + "qcow.so", config: "/qcow/%s", long: image.long,
			make: qemuCreate + image.options + " %s 4M", divisor: 5,
		}
		if strings.Contains(image.options, "base") {
			k.make = qemuCreate + "qcow2 %s.base 4M && qemu-io -c 'write -q -P 7 0 3M' %s.base && " + k.make
		}
		all = append(all, k)
	}
	return all
}

// handler is what Run needs to know, and the path of the file that the device is made of.
func (k kind) handler(t *testing.T) (h conformance.Handler, image string) {
	t.Helper()
	h = conformance.Handler{
		Path: k.so, HostBinary: testbed.Program(t, "tcmur-host"), Config: k.config,
		Reopen: k.reopen, Options: plugin.DeviceOptions{Size: k.size}, Span: k.span, Volatile: k.vanish, Kills: k.kills,
		Operations: operations / max(1, k.divisor), Seed: seedOrTime(),
	}
	image = filepath.Join(t.TempDir(), "image")
	for _, s := range []*string{&h.Config, &h.Reopen, &k.make} {
		*s = strings.ReplaceAll(*s, "%s", image)
	}
	if out, err := exec.Command("sh", "-c", k.make).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", k.make, err, out)
	}
	return h, image
}

func seedOrTime() uint64 {
	if *seed != 0 {
		return *seed
	}
	return uint64(time.Now().UnixNano())
}

// TestConformance runs every handler within reach, or the one that the flags name.
func TestConformance(t *testing.T) {
	if *handlerPath != "" {
		given, ok := map[string]conformance.Kills{
			"any": conformance.KillAny, "idle": conformance.KillIdle, "never": conformance.KillNever,
		}[*kills]
		if !ok {
			t.Fatalf("-kills=%s: want any, idle or never", *kills)
		}
		conformance.Run(t, conformance.Handler{
			Path: *handlerPath, HostBinary: testbed.Program(t, "tcmur-host"), Config: *config, Reopen: *reopen,
			Options: plugin.DeviceOptions{Size: *size}, Span: *span, Volatile: *volatile, Kills: given,
			Operations: *count, Seed: seedOrTime(),
		})
		return
	}
	for _, k := range kinds(t) {
		if k.long && !long {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			testbed.NothingLeft(t)
			h, image := k.handler(t)
			conformance.Run(t, h)
			if strings.HasPrefix(k.name, "qcow2") {
				if out, err := exec.Command("qemu-img", "check", image).CombinedOutput(); err != nil {
					t.Errorf("qemu-img check: %v\n%s", err, out)
				}
			}
		})
	}
}

// TestFindsMistakes has handlers that make mistakes, each of which has to be found, and told with what led to it.
func TestFindsMistakes(t *testing.T) {
	prefix := testbed.BuildHandlers(t, "mistaken")
	for mistake, says := range map[string][]string{
		"lost":      {"there is        what operation", "the last operations on bytes", "write of", "(seed 1)"},
		"misplaced": {"there is        what operation", "the last operations on bytes", "write of 512 bytes"},
		"short":     {"1 bytes are wrong", "the last operations on bytes"},
		"forgotten": {"kill of the host"},
		"flush":     {"flush", "input/output error"},
	} {
		t.Run(mistake, func(t *testing.T) {
			testbed.NothingLeft(t)
			self := exec.Command(os.Args[0], "-test.run=^TestConformance$", "-handler="+prefix+"mistaken.so",
				fmt.Sprintf("-config=/mistaken/%s/%s", mistake, filepath.Join(t.TempDir(), "store")),
				"-operations=20000", "-seed=1")
			out, err := self.CombinedOutput()
			if err == nil {
				t.Fatalf("not found:\n%s", out)
			}
			for _, text := range says {
				if !strings.Contains(string(out), text) {
					t.Errorf("the report does not say %q:\n%s", text, out)
				}
			}
		})
	}
}
