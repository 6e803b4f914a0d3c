// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// TestMetricsLint: the metrics follow Prometheus' rules for names and help texts.
func TestMetricsLint(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustRun(t, "load ram\nadd 0 /ram/@")
	problems, err := testutil.GatherAndLint(newMetricsRegistry(r.front))
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("%s: %s", problem.Metric, problem.Text)
	}
}

// TestDashboard: the dashboard is JSON and asks for metrics that there are.
func TestDashboard(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(testbed.Root(), "docs", "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var parsed struct {
		Panels []struct {
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &parsed); err != nil || len(parsed.Panels) == 0 {
		t.Fatalf("%d panels: %v", len(parsed.Panels), err)
	}
	known := map[string]bool{}
	for _, desc := range []*prometheus.Desc{
		buildMetric, waitingMetric, requestsMetric, errorsMetric, bytesMetric, inFlightMetric, durationMetric, sizeMetric,
		failedMetric, openMetric, retainedMetric, limitMetric, keptMetric, replayedMetric, resentMetric, replayLeftMetric,
		flushesMetric, restartsMetric, stateMetric, channelMetric, usedMetric,
	} {
		known[regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(desc.String())[1]] = true
	}
	histogramPart := regexp.MustCompile(`_(bucket|sum|count)$`)
	for _, panel := range parsed.Panels {
		for _, target := range panel.Targets {
			for _, name := range regexp.MustCompile(`tcmur_\w+`).FindAllString(target.Expr, -1) {
				if !known[name] && !known[histogramPart.ReplaceAllString(name, "")] {
					t.Errorf("there is no metric %s", name)
				}
			}
		}
	}
	docs, err := os.ReadFile(filepath.Join(testbed.Root(), "docs", "METRICS.md"))
	if err != nil {
		t.Fatal(err)
	}
	for name := range known {
		short := regexp.MustCompile(`^tcmur_[a-z]+`).ReplaceAllString(name, "")
		if !strings.Contains(string(docs), name+"`") && !strings.Contains(string(docs), "`"+short+"`") {
			t.Errorf("METRICS.md does not have %s", name)
		}
	}
}

// TestMetricsAddress: without a host nobody else can connect.
func TestMetricsAddress(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		":9100": "127.0.0.1:9100", "0.0.0.0:1": "0.0.0.0:1", "[::]:80": "[::]:80", "host:http": "host:http",
		"9100": "", "": "",
	} {
		if got, err := metricsAddress(given); got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", given, got, err, want)
		}
	}
}
