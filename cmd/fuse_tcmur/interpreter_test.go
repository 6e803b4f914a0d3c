// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"strings"
	"syscall"
	"testing"
)

// TestLinesAfterFailureRun: the first failing line decides the errno, and the lines after it still run.
func TestLinesAfterFailureRun(t *testing.T) {
	r := newRig(t)
	out, err := r.run(t, "load nosuch\nload ram # works\n\n# nothing\nadd 0 /nosuch/x\nADD 1 /ram/@\nbogus\n")
	wantErrno(t, err, syscall.ENOENT)
	for _, path := range []string{"/sys/modules/ram", "/dev/ram001"} {
		if !r.exists(path) {
			t.Errorf("%s is missing", path)
		}
	}
	for _, want := range []string{
		"line 1: load nosuch: no file handler_nosuch.so", "ram: loaded /lib/handler_ram.so into process 42",
		"line 5: add: /nosuch/x: no handler \"nosuch\" is loaded",
		"ram001: /test/mount/dev/ram001, 1048576 bytes",
		"line 7: bogus: there is no command",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
	for _, want := range []string{"no file handler_nosuch.so", "into process 42", "errno=ENXIO", "no command"} {
		if !strings.Contains(r.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, r.log)
		}
	}
	if !strings.Contains(err.Error(), "line 1: ") {
		t.Errorf("the error %q is not the first line's", err)
	}
}

func TestStopAtFailure(t *testing.T) {
	r := newRig(t)
	var out bytes.Buffer
	err := r.interp.run(t.Context(), script{text: "load nosuch\nload ram", stopAtFailure: true}, &out)
	wantErrno(t, err, syscall.ENOENT)
	if r.exists("/sys/modules/ram") {
		t.Error("the line after the failure was run")
	}
}

func TestOutputAndLog(t *testing.T) {
	r := newRig(t)
	if out := r.mustRun(t, "echo  a  b "); out != "a  b\n" {
		t.Errorf("echo printed %q", out)
	}
	if !strings.Contains(r.log.String(), "a  b") {
		t.Errorf("the log lacks what was printed: %s", r.log)
	}
	if out := r.mustRun(t, "dump"); out != r.tree.Format() {
		t.Errorf("dump printed %q", out)
	}
	if out := r.mustRun(t, "\n \n# nothing\n"); out != "" {
		t.Errorf("nothing printed %q", out)
	}
}

func TestSnapshotNamesLastFailure(t *testing.T) {
	r := newRig(t)
	if got := r.interp.snapshot(); got != r.tree.Format() {
		t.Errorf("snapshot before any failure: %q", got)
	}
	_, _ = r.run(t, "load nosuch")
	r.mustRun(t, "load ram")
	if got := r.interp.snapshot(); !strings.HasSuffix(got, "last failure: load nosuch: no file handler_nosuch.so: "+
		"no such file or directory\n") {
		t.Errorf("snapshot: %q", got)
	}
}

func TestNothingRunsAfterExit(t *testing.T) {
	r := newRig(t)
	_, err := r.run(t, "exit\nload ram")
	wantErrno(t, err, syscall.ESHUTDOWN)
	select {
	case <-r.front.exitRequested:
	default:
		t.Error("exit was not requested")
	}
	if r.exists("/sys/modules/ram") {
		t.Error("a command was run after exit")
	}
}

// TestOneCommandAtATime: a second script waits for the first, and gives up when its own context ends.
func TestOneCommandAtATime(t *testing.T) {
	r := newRig(t)
	r.lib.entered, r.lib.proceed = make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		first <- r.interp.run(t.Context(), script{text: "load slow"}, &bytes.Buffer{})
	}()
	<-r.lib.entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := r.interp.run(ctx, script{text: "echo x"}, &bytes.Buffer{})
	wantErrno(t, err, syscall.EINTR)
	if !strings.Contains(err.Error(), "load slow") {
		t.Errorf("%q does not name the command that runs", err)
	}
	if got := r.interp.snapshot(); got != r.tree.Format() {
		t.Error("a snapshot was not to be had while a command runs")
	}
	close(r.lib.proceed)
	if err := <-first; err != nil {
		t.Error(err)
	}
}
