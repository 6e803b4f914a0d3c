// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// manPageExamples returns the blocks of a page's section EXAMPLES as they are typed.
func manPageExamples(t *testing.T, page string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(testbed.Root(), "docs", "man", page))
	if err != nil {
		t.Fatal(err)
	}
	_, examples, _ := strings.Cut(string(text), "\n.SH EXAMPLES\n")
	examples, _, _ = strings.Cut(examples, "\n.SH ")
	var blocks []string
	for _, block := range regexp.MustCompile(`(?s)\n\.EX\n(.*?)\n\.EE`).FindAllStringSubmatch(examples, -1) {
		blocks = append(blocks, strings.NewReplacer(`\-`, "-", `\(aq`, "'", `\e`, `\`, `\(ga`, "`").Replace(block[1]))
	}
	if len(blocks) == 0 {
		t.Fatalf("%s has no examples", page)
	}
	return blocks
}

// TestManPageExamples runs the examples of fuse_tcmur(1) line by line in a shell, with paths of the test's own.
func TestManPageExamples(t *testing.T) {
	for i, example := range manPageExamples(t, "fuse_tcmur.1") {
		t.Run(fmt.Sprint(i+1), func(t *testing.T) {
			b := newBed(t, time.Minute)
			dir := t.TempDir()
			mount := b.mounts + "/tcmur"
			// The program that the examples find is this one, told where to mount.
			wrapper := fmt.Sprintf("#!/bin/sh\nexec %s --config= --mountpoint %s \"$@\"\n",
				testbed.Program(t, "fuse_tcmur"), mount)
			if err := os.WriteFile(dir+"/fuse_tcmur", []byte(wrapper), 0o755); err != nil {
				t.Fatal(err)
			}
			script := strings.NewReplacer(
				"/tcmur/", mount+"/", "/var/tmp/", dir+"/", "/mnt", dir+"/mnt", "/etc/tcmur", dir+"/etc",
			).Replace(example)
			cmd := b.command("bash", "-euc", "mkdir "+dir+"/mnt "+dir+"/etc; "+script)
			cmd.Env = append(os.Environ(), b.mark, "TMPDIR="+b.sockets, "PATH="+dir+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s\n%s", err, script, out)
			}
		})
	}
}

// TestLibraryManPageExamples builds and runs the programs in fuse_tree(3) and libtcmur(3).
func TestLibraryManPageExamples(t *testing.T) {
	build := func(t *testing.T, page string) string {
		t.Helper()
		dir := t.TempDir()
		program := manPageExamples(t, page)[0]
		if err := os.WriteFile(dir+"/main.go", []byte(program), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("go", "build", "-o", dir+"/example", dir+"/main.go")
		cmd.Dir = testbed.Root()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return dir + "/example"
	}
	t.Run("libtcmur.3", func(t *testing.T) {
		b := newBed(t, 3*time.Minute)
		cmd := b.command(build(t, "libtcmur.3"), testbed.ShippedHandlers(), testbed.Program(t, "tcmur-host"))
		cmd.Env = append(os.Environ(), b.mark, "TMPDIR="+b.sockets)
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "ram000: Hello.\n" {
			t.Errorf("printed %q, %v", out, err)
		}
	})
	t.Run("fuse_tree.3", func(t *testing.T) {
		b := newBed(t, 3*time.Minute)
		script := `mkdir $W/m; $0 $W/m & until [ -e $W/m/hello ]; do sleep 0.01; done
			cat $W/m/hello; umount $W/m; wait $!`
		cmd := b.command("bash", "-euc", script, build(t, "fuse_tree.3"))
		cmd.Env = append(os.Environ(), b.mark, "TMPDIR="+b.sockets, "W="+b.mounts)
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "Hello.\n" {
			t.Errorf("printed %q, %v", out, err)
		}
	})
}
