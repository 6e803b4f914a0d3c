// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strings"
	"syscall"
	"testing"
)

// TestSave: what is saved restores the same state, and a file that cannot be replaced stays as it was.
func TestSave(t *testing.T) {
	t.Parallel()
	const commands = `load file
load ram
add 0 size=1M ro timeout=0 /ram/@
add 7 mode=0640 /file//a b = c.img
add 200 recovery=fail retain=1M /ram/@/x
`
	r := newRig(t)
	r.mustRun(t, "load ram\nload file\nadd 0xc8 recovery=fail retain=1M /ram/@/x\n"+
		"add 7 mode=0640 format /file//a b = c.img\nadd 0 size=1M ro timeout=0 /ram/@")
	if got := r.front.commands(); got != commands {
		t.Errorf("commands:\n%s\nwant:\n%s", got, commands)
	}
	dir := t.TempDir()
	path := writeFile(t, dir, "state", "old")
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	r.mustRun(t, "save "+dir+"/link")
	text, err := os.ReadFile(path)
	if err != nil || !strings.HasSuffix(string(text), commands) || !strings.HasPrefix(string(text), "# ") {
		t.Errorf("saved %q (%v)", text, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	again := newRig(t)
	again.mustRun(t, "source "+path)
	if got := again.front.commands(); got != commands {
		t.Errorf("restored:\n%s", got)
	}
	for target, errno := range map[string]syscall.Errno{
		"relative": syscall.EINVAL, "/dev/null": syscall.EINVAL,
		dir: syscall.EINVAL, dir + "/no/such": syscall.ENOENT, "/proc/state": syscall.ENOENT,
	} {
		_, err := r.run(t, "save "+target)
		wantErrno(t, err, errno)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestSaveAfterResize: the size that is saved is the present one.
func TestSaveAfterResize(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 size=1M ro /ram/@")
	d := r.lib.devices[0]
	d.data = make([]byte, 2<<20)
	if got := r.front.commands(); got != "load ram\nadd 0 ro size=2097152 /ram/@\n" {
		t.Errorf("%q", got)
	}
}
