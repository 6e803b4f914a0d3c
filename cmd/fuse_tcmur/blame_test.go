// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// TestBlame: deaths are told with what was in flight, for all devices or for one.
func TestBlame(t *testing.T) {
	r := newRig(t)
	if out := r.mustRun(t, "blame"); out != "no handler has died\n" {
		t.Errorf("without a death: %q", out)
	}
	r.lib.deaths = []plugin.Death{
		{
			Time: time.Unix(0, 0), Handler: "ram", PID: 17, Reason: "was killed by signal 11 (segmentation fault)",
			Requests: []plugin.RequestInfo{{Device: "ram003", Minor: 3, Op: shared.OpWrite, Offset: 8192, Length: 4096}},
			Output:   "died of SIGSEGV\nbacktrace: handler_ram.so+0x1 ram_write\n",
		},
		{Time: time.Unix(1, 0), Handler: "file", PID: 18, Reason: "exited with status 3"},
	}
	out := r.mustRun(t, "blame 3")
	for _, want := range []string{
		"handler ram", "process 17", "signal 11", "write of 4096 bytes at 8192 on ram003", "ram_write",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("blame 3 does not tell %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "process 18") || !strings.Contains(r.mustRun(t, "blame"), "process 18") {
		t.Errorf("blame 3 printed\n%s", out)
	}
	if out := r.mustRun(t, "blame 4"); !strings.Contains(out, "device 4") {
		t.Errorf("blame of a device without a death: %q", out)
	}
}

// TestStates: the dump tells of handlers, and of devices that have failed.
func TestStates(t *testing.T) {
	r := newRig(t)
	if out := r.mustRun(t, "dump"); strings.Contains(out, "HANDLER") {
		t.Errorf("without a handler:\n%s", out)
	}
	r.mustRun(t, "load ram\nadd 2 /ram/@")
	if out := r.mustRun(t, "dump"); !strings.Contains(out, "HANDLER") || strings.Contains(out, "failed") {
		t.Errorf("with a handler:\n%s", out)
	}
	r.lib.devices[2].failure = errors.New("its contents are gone")
	r.lib.deaths = []plugin.Death{{Handler: "ram", Reason: "exited with status 3"}}
	out := r.mustRun(t, "dump")
	for _, want := range []string{"device failed: ram002: its contents are gone", "last death: ", "exited with status 3"} {
		if !strings.Contains(out, want) {
			t.Errorf("the dump does not tell %q:\n%s", want, out)
		}
	}
}
