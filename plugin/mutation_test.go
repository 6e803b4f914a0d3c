// SPDX-License-Identifier: Apache-2.0

//go:build mutation

package plugin_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// mutations switch off what recovery consists of, one thing at a time, by a change of the source that only the compiler
// sees. Each has a test that must notice.
var mutations = []struct {
	mechanism, file, text, changed, test string
}{
	{
		"nothing", "op.go", "", "", "", // all of these tests pass
	},
	{
		"requests in flight are sent again", "op.go",
		"o.d.handler.park(o)\n\t\treturn", "o.end(errDied)\n\t\treturn", "TestReplayInFlight",
	},
	{
		"completed writes are retained", "retention.go",
		"if !d.retains.Load() {\n\t\treturn\n", "if d.retains.Load() {\n\t\treturn\n", "TestRetentionOrder",
	},
	{
		"of retained writes to the same place the last one counts", "replay.go",
		"e := &entries[n]\n", "e := &entries[len(entries)-1-n]\n", "TestRetentionOrder",
	},
	{
		"a flush covers what had completed when it was issued, and no more", "op.go",
		"d.unflushed.release(o.mark)", "d.unflushed.release(d.unflushed.position())", "TestFlushBoundary",
	},
	{
		"a flush gives up what it covers", "op.go",
		"d.unflushed.release(o.mark)", "_ = o.mark", "TestRetentionOrder",
	},
	{
		"memory that is still being copied to is not used again", "retention.go",
		"if b.copies.Load() == 0 && len(r.spare)", "if len(r.spare)", "TestRetentionCopyUnderWay",
	},
	{
		"retention is bounded", "retention.go",
		"if !d.retains.Load() {\n\t\treturn nil\n", "if d.retains.Load() {\n\t\treturn nil\n", "TestRetentionBound",
	},
	{
		"writers are told when what is retained cannot be flushed", "retention.go",
		"r.failed = err\n", "_ = err\n", "TestFailingFlush",
	},
	{
		"poison is given up", "recovery.go",
		"if o.alone >= poisonDeaths {", "if o.alone < 0 {", "TestPoison",
	},
	{
		"only who is alone in flight is condemned", "recovery.go",
		"if len(inFlight)+len(lost) == 1 {", "if true {", "TestTwoPoisons",
	},
	{
		"suspects are sent one at a time", "recovery.go",
		"case o.deaths >= suspectDeaths:", "case o.deaths < 0:", "TestTwoPoisons",
	},
	{
		"a kill from outside condemns nothing", "recovery.go",
		"outside = dead.process.killedFromOutside()", "outside = false", "TestKillsFromOutside",
	},
	{
		"the number of deaths in a row is bounded", "recovery.go",
		"if h.deathsInRow > h.lib.cfg.DeathBudget {", "if h.deathsInRow < 0 {", "TestDeathBudget",
	},
	{
		"progress gives the budget back", "recovery.go",
		"if h.progress.Swap(false) {", "if false {", "TestContentsModel/store",
	},
	{
		"a device whose contents are gone fails", "recovery.go",
		"d.fail(fmt.Errorf(\"cannot be recovered: %w\", err))", "", "TestReopenRefused",
	},
	{
		"hosts that hang are killed", "watchdog.go",
		"in != nil && in.channel.Tick()", "in != nil && in.channel.Tick() && false", "TestHang/hang-fault",
	},
	{
		"the first request in a while is watched", "watchdog.go",
		"l.busy <- struct{}{}", "(chan struct{})(nil) <- struct{}{}", "TestHangAfterRest",
	},
	{
		"a successor that hangs is killed too", "watchdog.go",
		"h.successor.Load(), h.current()", "h.current()", "TestHangsEachTime",
	},
	{
		"a forced removal reaches the successor", "recovery.go",
		"if next := h.successor.Load(); next != nil {", "if next := h.successor.Load(); next != nil && false {",
		"TestForceRemove/reopen-hangs",
	},
	{
		"a process is ready", "spare.go",
		"h := l.spare\n", "h := (*host)(nil)\n", "TestSpare",
	},
	{
		"who fails fast is not sent again", "recovery.go",
		"if o.req.Sent && o.d.opts.FailFast {", "if false {", "TestFailFast",
	},
	{
		"what takes over is what was loaded", "handler.go",
		"replaced := from.isReplaced()", "replaced := false", "TestObjectIsKept",
	},
	{
		"who fails fast is in the story of the death", "recovery.go",
		"h.noteLost(o)\n", "", "TestFailFast",
	},
	{
		"deaths in a reopen are the device's", "recovery.go",
		"culprit = dead.reopening\n", "culprit = nil\n", "TestReopenDies",
	},
	{
		"a device whose reopen is deadly fails", "recovery.go",
		"culprit.reopenDeaths >= reopenDeaths {", "culprit.reopenDeaths < 0 {", "TestReopenDies",
	},
	{
		"a device whose reopen hangs is put off", "recovery.go",
		"patience = min(patience, max(patience/patientShare, leastPatience))", "", "TestReopenHangs",
	},
	{
		"writes that nothing guards are reported", "device.go",
		"case held == 0 && d.unguarded:", "case false:", "TestRemoveDiesInClose",
	},
	{
		"a host that breaks the protocol is killed", "host.go",
		"Fault:  h.violated,", "", "TestBlastRadius",
	},
	{
		"a host without a control connection is killed", "host.go",
		"\tgo h.listen()\n", "", "TestBlastRadius",
	},
}

// unmutated lists all tests of mutations as one pattern for -test.run.
func unmutated() string {
	var tests []string
	for _, m := range mutations {
		if name, _, _ := strings.Cut(m.test, "/"); name != "" && !slices.Contains(tests, name) {
			tests = append(tests, name)
		}
	}
	return "(" + strings.Join(tests, "|") + ")"
}

// pattern is a test's name, or several, as -test.run takes it.
func pattern(test string) string { return "^" + strings.ReplaceAll(test, "/", "$/^") + "$" }

// TestMutations sees that each mechanism's test fails without the mechanism.
func TestMutations(t *testing.T) {
	dir := filepath.Join(testbed.Root(), "plugin")
	for _, m := range mutations {
		t.Run(strings.ReplaceAll(m.mechanism, " ", "-"), func(t *testing.T) {
			path := filepath.Join(dir, m.file)
			source, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(source), m.text); n != 1 && m.test != "" {
				t.Fatalf("%s has %q %d times: this mutation is out of date", m.file, m.text, n)
			}
			sockets, err := os.MkdirTemp("", "m") // their paths must be short
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = os.RemoveAll(sockets) }()
			mutant, overlay := filepath.Join(t.TempDir(), "mutant.go"), filepath.Join(t.TempDir(), "overlay.json")
			replace, err := json.Marshal(map[string]map[string]string{"Replace": {path: mutant}})
			if err != nil {
				t.Fatal(err)
			}
			mutated := strings.Replace(string(source), m.text, m.changed, 1)
			for file, text := range map[string]string{mutant: mutated, overlay: string(replace)} {
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			binary := filepath.Join(t.TempDir(), "mutant.test")
			out, err := exec.Command("go", "test", "-c", "-vet=off", "-overlay", overlay, "-o", binary, dir).CombinedOutput()
			if err != nil {
				t.Fatalf("does not compile: %v\n%s", err, out)
			}
			tests := m.test
			if tests == "" {
				tests = unmutated()
			}
			cmd := exec.Command(binary, "-test.run", pattern(tests), "-test.timeout", "30s")
			if m.test == "" {
				cmd = exec.Command(binary, "-test.run", pattern(tests))
			}
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "TMPDIR="+sockets)
			out, err = cmd.CombinedOutput()
			switch {
			case m.test == "" && err != nil:
				t.Fatalf("%v:\n%s", err, out)
			case m.test != "" && err == nil:
				t.Errorf("%s passes without it:\n%s", m.test, out)
			}
			if strings.Contains(string(out), "no tests to run") {
				t.Errorf("there is no %s", m.test)
			}
		})
	}
}
