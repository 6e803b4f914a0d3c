// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/conformance"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// TestE2EWritingHandlers takes docs/writing-handlers.md at its word: the handler on the page compiles with the command
// on the page and conforms, and the round of edit, load, crash and fix goes as it is told there.
func TestE2EWritingHandlers(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	page, err := os.ReadFile(filepath.Join(testbed.Root(), "docs", "writing-handlers.md"))
	if err != nil {
		t.Fatal(err)
	}
	code := regexp.MustCompile("(?s)```c\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	if len(code) != 2 {
		t.Fatalf("%d pieces of C, want the handler and the bug", len(code))
	}
	source, bug := code[0][1], code[1][1]
	if n := strings.Count(source, "\n"); n != 40 {
		t.Errorf("forty lines are %d", n)
	}

	dir := b.TempDir()
	if err := os.Symlink(filepath.Join(testbed.Root(), "plugin"), filepath.Join(dir, "plugin")); err != nil {
		t.Fatal(err)
	}
	gcc := strings.Fields(regexp.MustCompile(`(?m)^    (gcc .*)$`).FindStringSubmatch(string(page))[1])
	compile := func(source string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "tiny.c"), []byte(source), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := b.command(gcc[0], gcc[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%v: %v\n%s", gcc, err, out)
		}
	}
	compile(source)
	conformance.Run(t, conformance.Handler{
		Path: filepath.Join(dir, "handler_tiny.so"), HostBinary: testbed.Program(t, "tcmur-host"),
		Config: "/tiny/" + filepath.Join(dir, "conformance"), Options: plugin.DeviceOptions{Size: 16 << 20},
		Operations: 2000, Seed: 1,
	})

	f := b.start("--handler-prefix", filepath.Join(dir, "handler_"))
	f.must("load tiny\nadd 0 size=64M /tiny/" + filepath.Join(dir, "disk"))
	c := f.startClients()
	c.writer(f.path("tiny000"), os.O_RDWR|unix.O_DIRECT, 32<<20, 1<<20)
	c.first.Wait()
	good := regexp.MustCompile(`(?m)^static int tiny_read.*\n`)
	compile(good.ReplaceAllLiteralString(source, bug))
	if out := f.must("reload tiny"); !strings.Contains(out, "tiny: reloaded "+dir+"/handler_tiny.so (Regular file) into") {
		t.Errorf("reload says %q", out)
	}
	file := f.open("tiny000", os.O_RDONLY|unix.O_DIRECT)
	defer file.Close()
	if _, err := file.ReadAt(make([]byte, 4096), 1<<20); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of what the handler dies of: %v", err)
	}

	blame := f.must("blame 0")
	told := withoutNumbers(blame)
	_, sample, _ := strings.Cut(string(page), "echo blame 0 >&3; cat <&3\n")
	sample, after, _ := strings.Cut(sample, "\n\n")
	for line := range strings.Lines(sample) {
		if want := withoutNumbers(strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "    ")); !strings.Contains(told, want) {
			t.Errorf("blame does not tell %q as the page says, but\n%s", want, blame)
		}
	}
	t.Logf("blame 0:\n%s", blame)
	address := regexp.MustCompile(`backtrace: handler_tiny\.so\+(0x[0-9a-f]+)`).FindStringSubmatch(blame)
	if address == nil {
		t.Fatalf("no place in the handler:\n%s", blame)
	}
	where := b.run("addr2line", "-f", "-e", filepath.Join(dir, "handler_tiny.so"), address[1])
	for line := range strings.Lines(where) {
		if line = filepath.Base(strings.TrimSpace(line)); !strings.Contains(after, line+"\n") {
			t.Errorf("addr2line says %q, the page does not:\n%s", line, after[:min(200, len(after))])
		}
	}

	compile(source)
	f.must("reload tiny")
	if _, err := file.ReadAt(make([]byte, 4096), 1<<20); err != nil {
		t.Errorf("after the bug is mended: %v", err)
	}
	c.end()
	file.Close()
	f.must("remove 0\nunload tiny")
}

// runPage runs the commands of a section of docs/handlers.md: lines that are indented by four blanks. Its names are
// replaced: those of the mount point and of the directory for files, and what else is given, old and new by turns.
func (f *front) runPage(heading, dir string, others ...string) {
	f.Helper()
	page, err := os.ReadFile(filepath.Join(testbed.Root(), "docs", "handlers.md"))
	if err != nil {
		f.Fatal(err)
	}
	_, section, ok := strings.Cut(string(page), "\n## "+heading+"\n")
	if !ok {
		f.Fatalf("docs/handlers.md has no section %s", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	names := strings.NewReplacer(append(others, "/tcmur/", f.mount+"/", "/var/tmp", dir)...)
	commands := 0
	for _, line := range regexp.MustCompile(`(?m)^    \S.*$`).FindAllString(section, -1) {
		commands++
		if out, err := f.try("bash", "-c", names.Replace(line)); err != nil {
			f.Fatalf("section %s, %s: %v\n%s", heading, strings.TrimSpace(line), err, out)
		}
	}
	if commands == 0 {
		f.Errorf("section %s has no commands", heading)
	}
}

// TestE2EHandlersPage runs what docs/handlers.md tells to type. Its section rbd is for TestE2ERbd.
func TestE2EHandlersPage(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	f := b.start()
	for _, heading := range []string{"ram", "file", "qcow", "fbo", "zbc"} {
		f.runPage(heading, b.TempDir())
	}
}

// withoutNumbers makes texts comparable that differ in times, process ids and addresses.
func withoutNumbers(text string) string {
	return regexp.MustCompile(`0x[0-9a-f]+|\d+`).ReplaceAllString(text, "N")
}
