// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestForceRemove: by force a device goes that is open, and its node with it; what the library says of lost writes is
// told.
func TestForceRemove(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@\nadd 1 /ram/a\nadd 2 /ram/b")
	node, file := r.open(t, 0, syscall.O_RDWR)
	r.mustRun(t, "remove --force 0")
	if r.exists("/dev/ram000") || r.lib.HasDevice(0) {
		t.Error("the device is still there")
	}
	node.ops().Release(file)
	r.lib.removeErr = syscall.EIO
	_, err := r.run(t, "remove --force 1")
	wantErrno(t, err, syscall.EIO)
	if r.exists("/dev/ram001") {
		t.Error("the node of the device is still there")
	}
	_, err = r.run(t, "remove --force 1")
	wantErrno(t, err, syscall.ENODEV)
	r.lib.removeErr = nil
	r.mustRun(t, "unload --force ram")
	if r.exists("/dev/ram002") || r.exists("/sys/modules/ram") {
		t.Error("the handler or its device is still there")
	}
	_, err = r.run(t, "unload --force ram")
	wantErrno(t, err, syscall.ENOENT)
}

// TestForceInterrupts: a forced command does not wait for one that does not end; others do.
func TestForceInterrupts(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	r.lib.entered, r.lib.proceed = make(chan struct{}, 1), make(chan struct{})
	stuck := make(chan error, 1)
	go func() {
		_, err := r.run(t, "load file\necho not any more")
		stuck <- err
	}()
	<-r.lib.entered
	began := time.Now()
	r.mustRun(t, "remove --force 0")
	if took := time.Since(began); took < forceGrace || took > forceGrace+5*time.Second {
		t.Errorf("the forced command took %v", took)
	}
	wantErrno(t, <-stuck, syscall.EINTR)
}

// TestForcedExit: the gate is shut, and the server is told, also when a device is in use.
func TestForcedExit(t *testing.T) {
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	r.open(t, 0, syscall.O_RDONLY)
	r.mustRun(t, "exit --force")
	select {
	case <-r.front.exitForced:
	default:
		t.Error("the server is not told")
	}
	_, err := r.run(t, "exit --force")
	wantErrno(t, err, syscall.ESHUTDOWN)
}

func TestIsForced(t *testing.T) {
	for text, want := range map[string]bool{
		"remove --force 0": true, "dump\nUNL --force ram": true, "exit --force": true,
		"remove 0": false, "echo --force": false, "bogus --force": false, "# remove --force 0": false, "": false,
	} {
		if got := isForced(text); got != want {
			t.Errorf("isForced(%q) = %v", text, got)
		}
	}
}

func TestReload(t *testing.T) {
	r := newRig(t)
	_, err := r.run(t, "reload ram")
	wantErrno(t, err, syscall.ENOENT)
	if out := r.mustRun(t, "load ram\nreload ram"); !strings.Contains(out, "into process 42") || r.lib.reloads != 1 {
		t.Errorf("reload printed %q, and %d handlers were reloaded", out, r.lib.reloads)
	}
}
