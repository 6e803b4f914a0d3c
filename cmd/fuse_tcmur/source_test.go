// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestSource(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	inner := writeFile(t, dir, "inner file", "add 0 /ram/@\nload nosuch\nadd 1 /ram/@1")
	outer := writeFile(t, dir, "outer", "# set-up\nload ram\r\nsource "+inner+"\necho done\n")
	out, err := r.run(t, "source "+outer)
	wantErrno(t, err, syscall.ENOENT)
	if want := inner + ":2: load nosuch"; !strings.Contains(out, want) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%q is not in the output, or does not begin the error %q:\n%s", want, err, out)
	}
	if strings.Count(out, "nosuch:") != 1 {
		t.Errorf("the failure is reported more than once:\n%s", out)
	}
	if !r.exists("/dev/ram001") || !strings.HasSuffix(out, "done\n") {
		t.Errorf("the lines after the failure were not run:\n%s", out)
	}
}

func TestSourceStopsAtFailure(t *testing.T) {
	r := newRig(t)
	path := writeFile(t, t.TempDir(), "cmds", "load nosuch\nload ram\n")
	commands := script{text: "source " + path + "\nload qcow", stopAtFailure: true}
	err := r.interp.run(t.Context(), commands, &bytes.Buffer{})
	wantErrno(t, err, syscall.ENOENT)
	if r.exists("/sys/modules/ram") || r.exists("/sys/modules/qcow") {
		t.Error("lines after the failure were run")
	}
}

func TestSourceNestedTooDeep(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	self := filepath.Join(dir, "self")
	writeFile(t, dir, "self", "echo again\nsource "+self+"\n")
	out, err := r.run(t, "source "+self)
	wantErrno(t, err, syscall.ELOOP)
	if got := strings.Count(out, "again"); got != maxSourceDepth {
		t.Errorf("%d files were read, want %d", got, maxSourceDepth)
	}
}

func TestSourceRefusesWhatIsNoCommandFile(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	big := writeFile(t, dir, "big", strings.Repeat("# comment\n", maxSourceSize/10+1))
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink("loop", loop); err != nil {
		t.Fatal(err)
	}
	for path, errno := range map[string]syscall.Errno{
		filepath.Join(dir, "missing"):           syscall.ENOENT,
		filepath.Join(dir, "missing/../x"):      syscall.ENOENT,
		dir:                                     syscall.EINVAL,
		fifo:                                    syscall.EINVAL, // and does not wait for a writer
		"/dev/null":                             syscall.EINVAL,
		big:                                     syscall.EINVAL,
		writeFile(t, dir, "nul", "echo a\x00b"): syscall.EINVAL,
		"relative":                              syscall.EINVAL,
		loop:                                    syscall.ELOOP,
		writeFile(t, dir, "file", "") + "/x":    syscall.ENOTDIR,
	} {
		_, err := r.run(t, "source "+path)
		wantErrno(t, err, errno)
	}
}

// TestSourceNeverTouchesOwnMount: by name, through links and "..", and at other places the mount is bound to. Nothing
// exists at these names, so that touching them would say ENOENT.
func TestSourceNeverTouchesOwnMount(t *testing.T) {
	r := newRig(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	mount, bound := filepath.Join(dir, "mount"), filepath.Join(dir, "bound")
	r.front.mountpoint = mount
	writeFile(t, r.front.sys.proc, "self/mountinfo",
		fmt.Sprintf("100 1 0:77 / %s rw - fuse.fuse_tcmur fuse_tcmur rw\n", mount)+
			fmt.Sprintf("101 1 0:77 /dev %s rw - fuse.fuse_tcmur fuse_tcmur rw\n", bound))
	links := map[string]string{"link": mount + "/dev", "relative": "sub/../mount", "sub/up": "../link"}
	for name, target := range links {
		if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{
		mount, mount + "/dev/tcmur", dir + "//./mount/x", "/etc/.." + mount + "/x", dir + "/link/tcmur",
		dir + "/relative/dev/tcmur", dir + "/sub/up/tcmur", bound + "/tcmur", "/proc/self/root" + mount + "/x",
		mount + "/../file",
	} {
		_, err := r.run(t, "source "+path)
		wantErrno(t, err, syscall.EDEADLK)
	}
}

// TestSourceComparesDevice: a file that turns out to lie on the own mount after all is not read.
func TestSourceComparesDevice(t *testing.T) {
	path := writeFile(t, t.TempDir(), "file", "echo x")
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	_, err := readCommandFile(path, ownMount{device: stat.Dev, mounted: true})
	wantErrno(t, err, syscall.EDEADLK)
	if _, err := readCommandFile(path, ownMount{device: stat.Dev + 1, mounted: true}); err != nil {
		t.Error(err)
	}
}
