// SPDX-License-Identifier: Apache-2.0

package main

import (
	"syscall"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

func TestDeviceNodeIO(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 size=64K /ram/@")
	node, file := r.open(t, 0, syscall.O_RDWR)
	if file.DirectIO || !file.KeepCache {
		t.Errorf("opened with DirectIO %v, KeepCache %v", file.DirectIO, file.KeepCache)
	}
	ops := node.ops()
	if n, err := ops.Write(file, []byte("hello"), 100, 0); n != 5 || err != nil {
		t.Errorf("write: %d, %v", n, err)
	}
	p := make([]byte, 5)
	if n, err := ops.Read(file, p, 100); n != 5 || err != nil || string(p) != "hello" {
		t.Errorf("read: %d, %v, %q", n, err, p)
	}
	if n, err := ops.Write(file, []byte("hello"), 64<<10-2, 0); n != 2 || err != nil {
		t.Errorf("write across the end: %d, %v", n, err)
	}
	_, err := ops.Write(file, []byte("hello"), 64<<10, 0)
	wantErrno(t, err, syscall.ENOSPC)
	if n, err := ops.Read(file, p, 64<<10); n != 0 || err != nil {
		t.Errorf("read beyond the end: %d, %v", n, err)
	}
	if err := ops.Truncate(nil, 0); err != nil || node.node.Size() != 64<<10 {
		t.Errorf("truncate: %v, size %d", err, node.node.Size())
	}
}

// TestDeviceNodeHidesNoError: what was written before an error must not hide the error.
func TestDeviceNodeHidesNoError(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	node, file := r.open(t, 0, syscall.O_RDWR)
	node.device.(*fakeDevice).writeErr = syscall.EIO
	n, err := node.ops().Write(file, []byte("hello"), 0, 0)
	wantErrno(t, err, syscall.EIO)
	if n != 0 {
		t.Errorf("%d bytes were reported with the error", n)
	}
}

func TestDeviceNodeFlushes(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	node, file := r.open(t, 0, syscall.O_RDWR)
	device, ops := node.device.(*fakeDevice), node.ops()
	const dsync = fusetree.WriteFlags(syscall.O_DSYNC)
	for _, test := range []struct {
		what    string
		do      func() error
		flushes int
	}{
		{"fsync", func() error { return ops.Fsync(file, false) }, 1},
		{"fdatasync", func() error { return ops.Fsync(file, true) }, 1},
		{"write", func() error { _, err := ops.Write(file, []byte("x"), 0, 0); return err }, 0},
		{"O_DSYNC write, which the kernel follows by FSYNC", func() error {
			_, err := ops.Write(file, []byte("x"), 0, dsync)
			return err
		}, 0},
		{"O_DSYNC write past the page cache", func() error {
			direct := &fusetree.File{Node: file.Node, Flags: file.Flags, DirectIO: true, Data: file.Data}
			_, err := ops.Write(direct, []byte("x"), 0, dsync)
			return err
		}, 1},
	} {
		before := device.flushCount()
		if err := test.do(); err != nil {
			t.Errorf("%s: %v", test.what, err)
		}
		if flushes := device.flushCount() - before; flushes != test.flushes {
			t.Errorf("%s: %d flushes, want %d", test.what, flushes, test.flushes)
		}
	}
	device.flushErr = syscall.EIO
	wantErrno(t, ops.Fsync(file, false), syscall.EIO)
	file.DirectIO = true
	_, err := ops.Write(file, []byte("x"), 0, dsync)
	wantErrno(t, err, syscall.EIO)
}

func TestReadOnlyDevice(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 ro /ram/@")
	node := r.front.node(0)
	for _, flags := range []uint32{syscall.O_WRONLY, syscall.O_RDWR} {
		wantErrno(t, node.ops().Open(&fusetree.File{Flags: flags}), syscall.EROFS)
	}
	if open := r.front.gate.openDevices(); len(open) != 0 {
		t.Errorf("refused opens are counted: %v", open)
	}
	r.open(t, 0, syscall.O_RDONLY)
}
