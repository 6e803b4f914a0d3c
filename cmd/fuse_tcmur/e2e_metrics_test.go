// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// metrics reads a server's metrics as Prometheus would.
func (f *front) metrics(text string) map[string]*dto.MetricFamily {
	f.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		f.Fatalf("metrics: %v\n%s", err, text)
	}
	return families
}

// metric finds the one metric that has these labels.
func metric(families map[string]*dto.MetricFamily, name string, labels ...string) *dto.Metric {
	for _, m := range families["tcmur_"+name].GetMetric() {
		found := 0
		for i := 0; i < len(labels); i += 2 {
			for _, label := range m.GetLabel() {
				if label.GetName() == labels[i] && label.GetValue() == labels[i+1] {
					found += 2
				}
			}
		}
		if found == len(labels) {
			return m
		}
	}
	return nil
}

// fioCount is what fio says of one direction.
type fioCount struct {
	IOs   uint64 `json:"total_ios"`
	Bytes uint64 `json:"io_bytes"`
	Clat  struct {
		Percentile map[string]float64
	} `json:"clat_ns"`
}

// TestE2EMetrics: the metrics count exactly what fio says that it has done, and their 99th percentile is in fio's
// bucket or beside it.
func TestE2EMetrics(t *testing.T) {
	const tries = 3 // a busy machine delays requests on their way to us, where we cannot see it
	b := newBed(t, 90*time.Second, "fault")
	f := b.start()
	f.must("load fault\nadd 0 /fault/size=0x4000000,delay=6000")
	var want [2]fioCount
	for try := 1; ; try++ {
		out := f.fio("fault000", "--rw=randrw", "--bsrange=4k-64k", "--ioengine=io_uring", "--direct=1", "--iodepth=16",
			"--time_based", "--runtime=2", fmt.Sprint("--randseed=", try), "--output-format=json")
		var report struct {
			Jobs []struct{ Read, Write fioCount }
		}
		err := json.Unmarshal([]byte(out[max(0, strings.IndexByte(out, '{')):]), &report)
		if err != nil || len(report.Jobs) != 1 {
			t.Fatalf("%v in what fio reports:\n%s", err, out)
		}
		text, err := os.ReadFile(f.mount + "/sys/metrics")
		if err != nil {
			t.Fatal(err)
		}
		families := f.metrics(string(text))
		near := true
		for i, got := range []fioCount{report.Jobs[0].Read, report.Jobs[0].Write} {
			op := []string{"read", "write"}[i]
			want[i].IOs += got.IOs
			want[i].Bytes += got.Bytes
			labels := []string{"device", "fault000", "operation", op}
			counts := map[string]float64{
				"device_requests_total": float64(want[i].IOs), "device_bytes_total": float64(want[i].Bytes),
				"device_request_errors_total": 0,
			}
			for name, value := range counts {
				if m := metric(families, name, labels...); m == nil || m.GetCounter().GetValue() != value {
					t.Errorf("%s of %ss: %v, fio says %v", name, op, m.GetCounter(), value)
				}
			}
			total := metric(families, "device_request_duration_seconds", append(labels, "stage", "total")...)
			if n := total.GetHistogram().GetSampleCount(); n != want[i].IOs {
				t.Errorf("histogram of %d %ss, fio says %d", n, op, want[i].IOs)
			}
			fio := bucketOf(total.GetHistogram(), got.Clat.Percentile["99.000000"]/1e9)
			ours := percentile99(total.GetHistogram())
			t.Logf("%ss: p99 in bucket %d, fio's in %d", op, ours, fio)
			near = near && math.Abs(float64(ours-fio)) <= 1
		}
		if near || t.Failed() {
			break
		}
		if try == tries {
			t.Errorf("the 99th percentile is not near fio's:\n%s", text)
			break
		}
		f.must("remove 0\nadd 0 /fault/size=0x4000000,delay=6000")
		want = [2]fioCount{}
	}
}

// bucketOf is the index of the bucket that a time belongs to.
func bucketOf(h *dto.Histogram, seconds float64) int {
	for i, bucket := range h.GetBucket() {
		if seconds <= bucket.GetUpperBound() {
			return i
		}
	}
	return len(h.GetBucket())
}

// percentile99 is the index of the bucket with the 99th percentile.
func percentile99(h *dto.Histogram) int {
	for i, bucket := range h.GetBucket() {
		if float64(bucket.GetCumulativeCount()) >= 0.99*float64(h.GetSampleCount()) {
			return i
		}
	}
	return len(h.GetBucket())
}

// TestE2EMetricsListen: metrics over HTTP are the same, go to the loopback interface only unless told otherwise, and
// end with the server.
func TestE2EMetricsListen(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start("--metrics-listen", ":0", "-c", "load ram", "-c", "add 0 /ram/@/1M")
	f.wantLog("metrics", "url=http://127.0.0.1:")
	url := regexp.MustCompile(`http://127\.0\.0\.1:\d+/metrics`).FindString(f.log.String())
	client := http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	get := func() (string, error) {
		reply, err := client.Get(url)
		if err != nil {
			return "", err
		}
		defer reply.Body.Close()
		text, err := io.ReadAll(reply.Body)
		return string(text), err
	}
	text, err := get()
	if err != nil {
		t.Fatal(err)
	}
	families := f.metrics(text)
	for name, labels := range map[string][]string{
		"build_info": nil, "device_size_bytes": {"device", "ram000"}, "handler_restarts_total": {"handler", "ram"},
		"device_in_flight":      {"device", "ram000", "operation", "discard"},
		"handler_state":         {"handler", "ram", "state", "running"},
		"device_retained_bytes": {"device", "ram000"}, "handler_channel_used_bytes": {"handler", "ram"},
	} {
		if metric(families, name, labels...) == nil {
			t.Errorf("no metric %s %v in:\n%s", name, labels, text)
		}
	}
	f.must("exit")
	f.wantExit(0)
	if _, err := get(); err == nil {
		t.Error("metrics are served by a server that has ended")
	}
}

// TestE2EMetricsListenErrors: an address that is none, or taken, stops the start.
func TestE2EMetricsListenErrors(t *testing.T) {
	b := newBed(t, 60*time.Second)
	if _, errs, status := b.client("", "--metrics-listen", "9100"); status != 2 || !strings.Contains(errs, "[HOST]:PORT") {
		t.Errorf("status %d, %q", status, errs)
	}
	first := b.start("--metrics-listen", "localhost:0")
	first.wantLog("metrics", "url=http://127.0.0.1:")
	taken := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(first.log.String())
	_, errs, status := b.client("", "--mountpoint", b.mounts+"/second", "--metrics-listen", taken)
	if status != 1 || !strings.Contains(errs, "address already in use") {
		t.Errorf("status %d, %q", status, errs)
	}
}
