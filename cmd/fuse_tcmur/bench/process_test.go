// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	pid, parent, err := parseStat("42 (a b) S 1) R 17 42 42 0")
	if err != nil || pid != 42 || parent != 17 {
		t.Errorf("got %d, %d, %v", pid, parent, err)
	}
	for _, bad := range []string{"", "42", "42 (x)", "42 (x) R", "x (x) R 1", "42 (x) R y"} {
		if _, _, err := parseStat(bad); err == nil {
			t.Errorf("%q was taken for a process status", bad)
		}
	}
}

func TestParsePss(t *testing.T) {
	kib, err := parsePss("00400000-7ffd [rollup]\nRss:   100 kB\nPss:    64 kB\nPss_Anon:   1 kB\n")
	if err != nil || kib != 64 {
		t.Errorf("got %d, %v", kib, err)
	}
	if _, err := parsePss("Rss: 100 kB\n"); err == nil {
		t.Error("no error without a Pss line")
	}
}

func TestCPUTime(t *testing.T) {
	pids := []int{os.Getpid()}
	before, err := cpuTime(pids)
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; {
		continue
	}
	after, err := cpuTime(pids)
	if err != nil || after <= before || after-before > time.Minute {
		t.Errorf("%v of CPU time, then %v, %v", before, after, err)
	}
}

// TestCommandTimeout: a command that does not end is ended, with all that it started.
func TestCommandTimeout(t *testing.T) {
	begin := time.Now()
	_, _, err := command{argv: []string{"sh", "-c", "sleep 60; true"}, timeout: 100 * time.Millisecond}.run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "did not end within 100ms") {
		t.Errorf("error %v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestCommandCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := command{argv: []string{"sleep", "60"}, timeout: time.Minute}.run(ctx)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestCommandFails(t *testing.T) {
	fail := command{argv: []string{"sh", "-c", "echo out; echo the reason >&2; exit 3"}, timeout: time.Minute}
	_, _, err := fail.run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("error %v does not say why", err)
	}
}

// TestProcess: what a server starts is found, and ends with it.
func TestProcess(t *testing.T) {
	p, err := startProcess("sh", "-c", "sleep 60 & echo started; wait")
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); len(p.pids()) < 2; {
		if time.Now().After(deadline) {
			t.Fatalf("processes %v: no child; output %q", p.pids(), p.output.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := p.ended(); err != nil {
		t.Error(err)
	}
	child := p.pids()[1]
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.stop()
	if p.ended() == nil {
		t.Error("it has not ended")
	}
	for deadline := time.Now().Add(10 * time.Second); parentOfEach()[child] != 0; {
		// Whoever adopted it may leave a zombie for a moment.
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(child) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("its child is still there")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestTail(t *testing.T) {
	var out tail
	for range 3 {
		_, _ = out.Write([]byte(strings.Repeat("x", tailLength)))
	}
	_, _ = out.Write([]byte("end\n"))
	if s := out.String(); len(s) >= tailLength || !strings.HasSuffix(s, "xend") {
		t.Errorf("%d bytes, ending in %q", len(s), s[len(s)-5:])
	}
}
