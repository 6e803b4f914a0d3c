// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// ctlFile is an open command node.
type ctlFile struct {
	*fusetree.Ops
	file *fusetree.File
	off  int64
}

func (r *rig) openCtl(t *testing.T) *ctlFile {
	t.Helper()
	ops := (&ctlNode{ctx: t.Context(), interp: r.interp, gate: r.front.gate}).ops()
	f := &ctlFile{Ops: ops, file: &fusetree.File{}}
	if err := ops.Open(f.file); err != nil {
		t.Fatal(err)
	}
	return f
}

// write writes as the kernel does, at the offset where the last write or read ended.
func (f *ctlFile) write(text string) error {
	n, err := f.Write(f.file, []byte(text), f.off, 0)
	f.off += int64(n)
	return err
}

// cat reads to the end of file, in small pieces.
func (f *ctlFile) cat(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	p := make([]byte, 7)
	for {
		n, err := f.Read(f.file, p, f.off)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return text.String()
		}
		text.Write(p[:n])
		f.off += int64(n)
	}
}

func TestCtlReadsBackItsOwnOutput(t *testing.T) {
	r := newRig(t)
	one, other := r.openCtl(t), r.openCtl(t)
	if !one.file.DirectIO {
		t.Error("the node is not opened for direct I/O")
	}
	if err := one.write("echo first\n"); err != nil {
		t.Error(err)
	}
	if err := other.write("echo other\n"); err != nil {
		t.Error(err)
	}
	wantErrno(t, one.write("load nosuch\necho second\n"), syscall.ENOENT)
	want := "first\nline 1: load nosuch: no file handler_nosuch.so: no such file or directory\nsecond\n"
	if got := one.cat(t); got != want {
		t.Errorf("read %q, want %q", got, want)
	}
	if got := one.cat(t); got != "" {
		t.Errorf("read twice: %q", got)
	}
	if got := other.cat(t); got != "other\n" {
		t.Errorf("the other descriptor read %q", got)
	}
}

func TestCtlFreshDescriptorReadsTree(t *testing.T) {
	r := newRig(t)
	f := r.openCtl(t)
	before := r.tree.Format()
	p := make([]byte, 4)
	n, _ := f.Read(f.file, p, 0)
	r.mustRun(t, "load ram")
	f.off = int64(n)
	if got := string(p[:n]) + f.cat(t); got != before {
		t.Errorf("not one snapshot: %q, want %q", got, before)
	}
	if got := r.openCtl(t).cat(t); got != r.front.dump() {
		t.Errorf("a new descriptor read %q", got)
	}
	// Having read does not keep a descriptor from giving commands.
	if err := f.write("echo x"); err != nil {
		t.Error(err)
	}
	if got := f.cat(t); got != "x\n" {
		t.Errorf("read %q", got)
	}
}

func TestCtlRefusesWhatIsNoCommand(t *testing.T) {
	r := newRig(t)
	f := r.openCtl(t)
	wantErrno(t, f.write("load ram\x00"), syscall.EINVAL)
	wantErrno(t, f.write(strings.Repeat("load ram\n", maxCtlWrite/9+1)), syscall.EINVAL)
	if r.exists("/sys/modules/ram") {
		t.Error("a refused write was run")
	}
	if got := f.cat(t); strings.Count(got, "\n") != 2 {
		t.Errorf("the reasons cannot be read: %q", got)
	}
}

func TestCtlOutputIsBounded(t *testing.T) {
	r := newRig(t)
	f := r.openCtl(t)
	line := "echo " + strings.Repeat("x", 10000)
	for range maxCtlOutput/10000 + 10 {
		if err := f.write(line); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.write("echo last"); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 2*maxCtlOutput)
	n, err := f.Read(f.file, p, 0)
	if err != nil || n != maxCtlOutput || !strings.HasSuffix(string(p[:n]), "x\nlast\n") {
		t.Errorf("kept %d bytes, %v", n, err)
	}
}

func TestCtlCountsOpens(t *testing.T) {
	r := newRig(t)
	f := r.openCtl(t)
	if r.front.gate.waitCtlClosed(0) {
		t.Error("an open command node counts as closed")
	}
	f.Release(f.file)
	if !r.front.gate.waitCtlClosed(0) {
		t.Error("a closed command node counts as open")
	}
	r.front.gate.shut()
	wantErrno(t, f.Open(&fusetree.File{}), syscall.ESHUTDOWN)
}
