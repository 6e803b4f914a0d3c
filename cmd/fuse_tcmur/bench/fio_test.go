// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

const fioMixed = `fio: a warning that is no JSON
{
  "fio version" : "fio-3.33",
  "jobs" : [ {
    "jobname" : "job0", "error" : 0,
    "read" : { "total_ios" : 700, "iops" : 70.5, "bw_bytes" : 2000,
      "clat_ns" : { "percentile" : { "50.000000" : 1500, "99.000000" : 9000 } } },
    "write" : { "total_ios" : 300, "iops" : 30.25, "bw_bytes" : 1000,
      "clat_ns" : { "percentile" : { "50.000000" : 1, "99.000000" : 2 } } }
  } ]
}`

func TestParseFio(t *testing.T) {
	got, err := parseFio([]byte(fioMixed))
	if err != nil {
		t.Fatal(err)
	}
	want := fioResult{
		Requests: 1000, IOPS: 100.75, BytesPerSec: 3000, P50: 1500 * time.Nanosecond, P99: 9 * time.Microsecond,
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestParseFioWrites: without reads, the latency is that of the writes.
func TestParseFioWrites(t *testing.T) {
	got, err := parseFio([]byte(`{"jobs": [{"error": 0, "read": {"total_ios": 0, "iops": 0},
		"write": {"total_ios": 5, "iops": 2, "clat_ns": {"percentile": {"50.000000": 7, "99.000000": 8}}}}]}`))
	if err != nil || got.P50 != 7 || got.P99 != 8 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestParseFioErrors(t *testing.T) {
	for _, test := range []struct{ out, want string }{
		{"fio: no such file", "no JSON"},
		{"{ \"jobs\": [", "output of fio"},
		{`{"jobs": []}`, "0 groups"},
		{`{"jobs": [{"error": 5, "read": {"total_ios": 1}}]}`, "error 5"},
		{`{"jobs": [{"error": 0}]}`, "no request"},
	} {
		if _, err := parseFio([]byte(test.out)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: error %v, want one with %q", test.out, err, test.want)
		}
	}
}

func TestFioArguments(t *testing.T) {
	argv := fioRun{files: []string{"/a", "/b"}, size: 4096, options: fioOptions{"rw": "read", "thread": "0"}}.argv()
	for _, want := range []string{"--rw=read", "--thread=0", "--size=4096"} {
		if !slices.Contains(argv, want) {
			t.Errorf("no %s in %v", want, argv)
		}
	}
	if slices.Contains(argv, "--thread=1") {
		t.Errorf("an option of the run does not override the usual one: %v", argv)
	}
	// What stands before the first name holds for all jobs.
	want := []string{"--name=job0", "--filename=/a", "--name=job1", "--filename=/b"}
	if got := argv[len(argv)-len(want):]; !slices.Equal(got, want) {
		t.Errorf("the jobs are %v, want %v", got, want)
	}
}
