// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestE2ESave saves the state of one server and starts another one with it.
func TestE2ESave(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start("-c", "load ram", "-c", "load file")
	f.must("add 3 size=4M timeout=7 block_size=4096 /file/" + b.TempDir() + "/image\n" +
		"add 0 size=1M /ram/@\nadd 1 ro /ram/@/2M")
	file := b.TempDir() + "/state"
	f.must("save " + file)
	f.refused("save "+f.mount+"/dev/state", syscall.EDEADLK, "own mount")
	tree := func(f *front) string {
		text, _, _ := strings.Cut(f.must("dump"), "HANDLER")
		// How often the command node is open depends on when a close arrives.
		return regexp.MustCompile(`(?m)^.* tcmur\n`).ReplaceAllString(text, "")
	}
	before, states := tree(f), f.status().Devices
	f.must("exit")
	f.wantExit(0)

	again := b.start("--source", file)
	if diff := cmp.Diff(before, tree(again)); diff != "" {
		t.Errorf("the dump differs (-saved +restored):\n%s", diff)
	}
	for i, d := range again.status().Devices {
		if i < len(states) && strings.Join(d.Options, " ") != strings.Join(states[i].Options, " ") {
			t.Errorf("%s has options %q, had %q", d.Name, d.Options, states[i].Options)
		}
	}
}
