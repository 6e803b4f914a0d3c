// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLaneOf(t *testing.T) {
	for line, want := range map[string]string{
		"load ram": "ram", "l ram": "ram", "add 0 /ram/@": "ram", "add 1 size=1M /file//x/y z": "file",
		"unload ram": "", "add x /ram/@": "", "add 0": "", "echo load ram": "", "nosuch": "", "source /ram": "",
	} {
		name, args := splitCommand(line)
		if got := laneOf(name, args); got != want {
			t.Errorf("laneOf(%q) = %q, want %q", line, got, want)
		}
	}
}

// TestLanes: one lane keeps its order, another goes on without it, and what does not end is named.
func TestLanes(t *testing.T) {
	l := newLanes()
	var mu sync.Mutex
	var ran []string
	note := func(name string) func() {
		return func() {
			mu.Lock()
			defer mu.Unlock()
			ran = append(ran, name)
		}
	}
	stuck := make(chan struct{})
	l.run("slow", "the one that hangs", func() { <-stuck })
	l.run("slow", "the one behind it", note("behind"))
	var want []string
	for i := range 20 {
		name := string(rune('a' + i))
		want = append(want, name)
		l.run("fast", name, note(name))
	}
	if slow := l.settle(t.Context(), 50*time.Millisecond); !slices.Equal(slow, []string{"the one that hangs"}) {
		t.Errorf("settle names %q", slow)
	}
	mu.Lock()
	if !slices.Equal(ran, want) {
		t.Errorf("ran %q, want %q", ran, want)
	}
	mu.Unlock()
	close(stuck)
	if slow := l.settle(t.Context(), 10*time.Second); len(slow) > 0 {
		t.Errorf("settle names %q when all has ended", slow)
	}
	if last := ran[len(ran)-1]; last != "behind" {
		t.Errorf("the last to run was %q", last)
	}
}

// TestRestoreRunsEverything: a failing line stops nothing, and what is no load or add waits for what is before it.
func TestRestoreRunsEverything(t *testing.T) {
	r := newRig(t)
	var out strings.Builder
	script := &script{file: "/conf", text: "load nosuch\nload ram # one\nadd 0 /ram/@\nadd 1 /nosuch/x\n\necho here\n"}
	if err := r.interp.restore(t.Context(), script, newLanes(), &out); err != nil {
		t.Fatal(err)
	}
	if !r.exists("/dev/ram000") || r.exists("/dev/nosuch001") {
		t.Errorf("the tree is\n%s", r.tree.Format())
	}
	if text := out.String(); !strings.HasSuffix(text, "here\n") || !strings.Contains(text, "/conf:1: load nosuch") {
		t.Errorf("printed %q", text)
	}
}
