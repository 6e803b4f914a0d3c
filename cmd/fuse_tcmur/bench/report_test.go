// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func samples(cpu float64, values ...float64) []sample {
	var s []sample
	for _, v := range values {
		s = append(s, sample{Value: v, CPU: cpu, P50: 10, P99: 20})
	}
	return s
}

func exampleResults() *results {
	return &results{
		Machine: machine{Kernel: "6.18", CPUs: 2, Processor: "a processor", Go: "go1.26"},
		Rounds:  3, Runtime: 1.5, SizeMiB: 1024,
		Workloads: []workloadResult{
			{"randread-4jobs", "4k random read, 4 jobs", iops, []peerResult{
				sum(ours, samples(1.2, 90_000, 100_000, 110_000)), sum(gofuse, samples(1, 80_000, 80_000, 80_000)),
				sum(nbdfuse, samples(2.5, 50_000)), sum(loop, samples(0, 150_000)),
			}},
			{"ext4-cp", "cp & sync", seconds, []peerResult{
				sum(ours, samples(0, 2)), sum(gofuse, samples(0, 1.95)), sum(loop, samples(0, 1)), sum(nbdfuse, nil),
			}},
		},
		Memory:   []memoryResult{{ours, 12.4}},
		Failures: []string{"ext4-cp on nbdfuse: it is tired"},
	}
}

func TestReport(t *testing.T) {
	text := report(exampleResults())
	want := `
4k random read, 4 jobs (randread-4jobs)
                IOPS  spread   p50 us   p99 us CPU s/100k   ours/peer               in CPU
  ours          100k     20%     10.0     20.0       1.20
  gofuse       80.0k      0%     10.0     20.0       1.00   1.25      >= 1.00 ok    1.20      <= 1.30 ok
  nbdfuse      50.0k      0%     10.0     20.0       2.50   2.00      >= 4.00 MISS  0.48      <= 0.35 MISS
  loop          150k      0%     10.0     20.0          -   0.67                    -

cp & sync (ext4-cp)
                   s  spread   p50 us   p99 us CPU s/100k   ours/peer               in CPU
  ours          2.00      0%     10.0     20.0          -
  gofuse        1.95      0%     10.0     20.0          -   1.03      <= 1.05 ok    -
  loop          1.00      0%     10.0     20.0          -   2.00      <= 1.25 MISS  -
  nbdfuse     failed

Memory besides the device's contents (PSS, MiB):  ours 12

ours/peer                    gofuse        libfuse        nbdfuse           loop
randread-4jobs            1.25 ok                -      2.00 MISS      0.67
ext4-cp                   1.03 ok                -              -      2.00 MISS   (time: less is better)

3 of 6 targets are met.
FAILED: ext4-cp on nbdfuse: it is tired
`
	_, got, _ := strings.Cut(text, "no FUSE)\n")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestResultsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "results.json")
	want := exampleResults()
	if err := writeJSON(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := readResults(path)
	if err != nil {
		t.Fatal(err)
	}
	if report(got) != report(want) {
		t.Errorf("another report:\n%s", report(got))
	}
}

// TestTargets: each target belongs to a workload and a peer that exist.
func TestTargets(t *testing.T) {
	known := map[string]bool{}
	for _, w := range workloads() {
		if known[w.name] {
			t.Errorf("two workloads are called %s", w.name)
		}
		known[w.name] = true
		if (w.fio == nil) == (w.ext4 == nil) {
			t.Errorf("%s: not exactly one kind", w.name)
		}
	}
	for name, byPeer := range targets {
		if !known[name] {
			t.Errorf("target for %s, which is no workload", name)
		}
		for peer := range byPeer {
			if labelOf(peer) == peer || peer == ours {
				t.Errorf("target for %s against %s, which is no peer", name, peer)
			}
		}
	}
	if atLeast(1).met(0) || atMost(1).met(0) || !atLeast(1).met(1) || !atMost(1).met(1) || atMost(1).met(1.01) {
		t.Error("met is wrong")
	}
}

func TestFigure(t *testing.T) {
	for x, want := range map[float64]string{
		0: "-", 0.123: "0.12", 9.994: "9.99", 9.996: "10.0", 99.96: "100", 1234: "1234", 9996: "10.0k", 99_951: "100k",
		262_400: "262k",
	} {
		if got := figure(x); got != want {
			t.Errorf("%v is written %s, want %s", x, got, want)
		}
	}
}

// TestChart: the chart is XML, and where time is measured, less is longer.
func TestChart(t *testing.T) {
	svg := chart(exampleResults(), gofuse)
	for decoder := xml.NewDecoder(strings.NewReader(svg)); ; {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
	}
	for _, want := range []string{
		">1.25</text>", ">1.95</text>", ">cp &amp; sync</text>",
		"<title>fuse_tcmur, handler ram in its host process: 100k IOPS</title>",
	} {
		if !strings.Contains(svg, want) {
			t.Errorf("no %s in\n%s", want, svg)
		}
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"-quick", "-workload", "^read-", "-peers", "ours,loop"})
	if err != nil {
		t.Fatal(err)
	}
	if len(o.peers) != 2 || len(o.workloads) != 3 || o.rounds != 1 {
		t.Errorf("%d peers, %d workloads, %d rounds", len(o.peers), len(o.workloads), o.rounds)
	}
	for _, bad := range [][]string{
		{"-peers", "ours,x"}, {"-workload", "("}, {"-workload", "nosuch"}, {"-rounds", "0"}, {"more"},
	} {
		if _, err := parseOptions(bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}
