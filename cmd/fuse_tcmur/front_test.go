// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestLoadUnload(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram")
	if !r.exists("/sys/modules/ram") {
		t.Error("no directory for the handler")
	}
	_, err := r.run(t, "load ram")
	wantErrno(t, err, syscall.EEXIST)
	r.mustRun(t, "add 0 /ram/@")
	_, err = r.run(t, "unload ram")
	wantErrno(t, err, syscall.EBUSY)
	if !r.exists("/sys/modules/ram") {
		t.Error("the directory went although the handler stayed")
	}
	r.mustRun(t, "remove 0\nunload ram")
	if r.exists("/sys/modules/ram") {
		t.Error("the directory stayed")
	}
	_, err = r.run(t, "unload ram")
	wantErrno(t, err, syscall.ENOENT)
}

// TestLoadUndone: a handler without its directory is unloaded again.
func TestLoadUndone(t *testing.T) {
	r := newRig(t)
	r.tree.mkdirErr = syscall.EINVAL
	_, err := r.run(t, "load ram")
	wantErrno(t, err, syscall.EINVAL)
	if handlers := r.lib.Handlers(); len(handlers) != 0 {
		t.Errorf("still loaded: %v", handlers)
	}
}

func TestAddRemove(t *testing.T) {
	r := newRig(t)
	out := r.mustRun(t, "load ram\nadd 0x0a ro size=1M /ram/@")
	if !strings.Contains(out, "ram010: /test/mount/dev/ram010, 1048576 bytes in blocks of 512, read-only\n") {
		t.Errorf("add printed %q", out)
	}
	node := r.tree.Lookup("/dev/ram010")
	if node == nil || node.Size() != 1<<20 {
		t.Fatalf("node: %+v", node)
	}
	_, err := r.run(t, "add 10 /ram/@2")
	wantErrno(t, err, syscall.EBUSY)
	r.mustRun(t, "remove 012")
	if r.exists("/dev/ram010") || r.lib.HasDevice(10) {
		t.Error("the device is still there")
	}
	_, err = r.run(t, "remove 10")
	wantErrno(t, err, syscall.ENODEV)
}

// TestAddUndone: a device that cannot have a node is removed again.
func TestAddUndone(t *testing.T) {
	r := newRig(t)
	if _, err := r.tree.Mkdir("ram000", r.front.devDir); err != nil {
		t.Fatal(err)
	}
	_, err := r.run(t, "load ram\nadd 0 /ram/@")
	wantErrno(t, err, syscall.EEXIST)
	if r.lib.HasDevice(0) || r.front.node(0) != nil {
		t.Error("the device is still there")
	}
}

func TestRemoveOpenDevice(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	r.tree.removeErr = syscall.EBUSY
	begin := time.Now()
	_, err := r.run(t, "remove 0")
	wantErrno(t, err, syscall.EBUSY)
	if waited := time.Since(begin); waited < releaseGrace {
		t.Errorf("gave up after %v, before a release can have come", waited)
	}
	if !r.exists("/dev/ram000") || !r.lib.HasDevice(0) || !strings.Contains(err.Error(), "ram000 is open") {
		t.Errorf("the device is gone, or the reason is not said: %v", err)
	}
	r.tree.removeErr = nil
	r.mustRun(t, "remove 0")
}

// TestRemoveWithFailingFlush: the device is gone, and its user hears about the data.
func TestRemoveWithFailingFlush(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	r.lib.removeErr = syscall.EIO
	_, err := r.run(t, "remove 0")
	wantErrno(t, err, syscall.EIO)
	if r.exists("/dev/ram000") || r.front.node(0) != nil {
		t.Error("the node stayed")
	}
}

// TestRemoveThatDidNot: a device that the library could not let go of stays reachable.
func TestRemoveThatDidNot(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	r.lib.removeErr, r.lib.keepDevice = syscall.ETIMEDOUT, true
	_, err := r.run(t, "remove 0")
	wantErrno(t, err, syscall.ETIMEDOUT)
	if !r.exists("/dev/ram000") {
		t.Error("the node of a device that is still there is gone")
	}
	r.lib.removeErr, r.lib.keepDevice = nil, false
	r.mustRun(t, "remove 0")
}

func TestExitWhileOpen(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 3 /ram/@")
	node, file := r.open(t, 3, syscall.O_RDWR)
	_, err := r.run(t, "exit")
	wantErrno(t, err, syscall.EBUSY)
	if !strings.Contains(err.Error(), "ram003 is open once") {
		t.Errorf("%q does not name the device", err)
	}
	r.mustRun(t, "echo still working")
	node.ops().Release(file)
	r.mustRun(t, "exit")
	if err := node.ops().Open(file); errnoOf(err) != syscall.ESHUTDOWN {
		t.Errorf("open after exit: %v", err)
	}
}
