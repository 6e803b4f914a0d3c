// SPDX-License-Identifier: Apache-2.0

// Package testbed is what tests of several packages need: the built programs, handlers compiled for the test, and a
// check that a test leaves nothing behind. It is imported by tests only.
package testbed

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Root is the top of the source tree.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// Program returns the path of a program that make has built in bin/. It fails the test if it is not there: a test of
// the real thing is not skipped.
func Program(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(Root(), "bin", name)
	if dir := os.Getenv("TCMUR_BIN"); dir != "" {
		path = filepath.Join(dir, name)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make first", err)
	}
	return path
}

// ShippedHandlers is the prefix of the handlers that make has built.
func ShippedHandlers() string { return filepath.Join(Root(), "lib", "tcmu-runner", "handler_") }

// SystemHandlers is the prefix of the handlers of the distribution's package tcmu-runner.
func SystemHandlers(t testing.TB) string {
	t.Helper()
	triplet := map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[runtime.GOARCH]
	prefix := "/usr/lib/" + triplet + "/tcmu-runner/handler_"
	if _, err := os.Stat(prefix + "qcow.so"); err != nil {
		t.Fatalf("%v: install the package tcmu-runner (make test does)", err)
	}
	return prefix
}

// BuildHandlers compiles plugin/testdata/NAME.c for each name and returns the prefix that finds them by name.
func BuildHandlers(t testing.TB, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		src := filepath.Join(Root(), "plugin", "testdata", name+".c")
		out, err := exec.Command("gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-shared",
			"-I"+filepath.Join(Root(), "plugin", "handlers"), "-o", filepath.Join(dir, "handler_"+name+".so"), src,
			"-lpthread").CombinedOutput()
		if err != nil {
			t.Fatalf("compile %s: %v\n%s", src, err, out)
		}
	}
	return filepath.Join(dir, "handler_")
}

// Deadline fails the test by a panic with all stacks if it has not ended in time: a test that hangs is killed with its
// cause in sight. Call it first, so that the other cleanups count.
func Deadline(t testing.TB, d time.Duration) {
	t.Helper()
	timer := time.AfterFunc(d, func() { panic(t.Name() + " did not end within " + d.String()) })
	t.Cleanup(func() { timer.Stop() })
}

// NothingLeft registers a check that runs when the test has ended: no process below this one, no memfd and no go-plugin
// socket directory may be left that was not there before. Tests that use it do not run in parallel with others that
// start hosts in this process.
func NothingLeft(t testing.TB) {
	t.Helper()
	before := leftovers()
	t.Cleanup(func() {
		for deadline := time.Now().Add(5 * time.Second); ; {
			var found []string
			for _, what := range leftovers() {
				if !slices.Contains(before, what) {
					found = append(found, what)
				}
			}
			if len(found) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left behind:\n  %s", strings.Join(found, "\n  "))
				return
			}
			time.Sleep(10 * time.Millisecond) // processes end by themselves; there is no event for all of them
		}
	})
}

// leftovers lists the descendants of this process, its memfds, and the sockets below its temporary directory.
func leftovers() []string {
	var found []string
	for _, pid := range Descendants(os.Getpid()) {
		if cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err == nil {
			found = append(found, "process "+strconv.Itoa(pid)+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "/memfd:tcmur-") {
			found = append(found, fd+" "+target)
		}
	}
	sockets, _ := filepath.Glob(filepath.Join(os.TempDir(), "plugin-dir*"))
	return append(found, sockets...)
}

// Descendants lists the processes below pid, not counting zombies.
func Descendants(pid int) []int {
	children := make(map[int][]int)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// pid (comm) state ppid ...; comm may hold anything, so look behind the last ')'.
		s := string(b)
		fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
		id, _ := strconv.Atoi(s[:strings.IndexByte(s, ' ')])
		if len(fields) < 2 || fields[0] == "Z" {
			continue
		}
		parent, _ := strconv.Atoi(fields[1])
		children[parent] = append(children[parent], id)
	}
	var all []int
	for queue := []int{pid}; len(queue) > 0; queue = queue[1:] {
		all = append(all, children[queue[0]]...)
		queue = append(queue, children[queue[0]]...)
	}
	return all
}
