// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// Death is the end of a host process that nobody asked for, and what it was doing.
type Death struct {
	Time    time.Time
	Handler string // subtype
	PID     int
	Reason  string // how the process ended: "was killed by signal 11 (segmentation fault)"
	Outside bool   // by SIGKILL or SIGTERM from outside: it says nothing against the requests
	// Reopening is the name of the device that the process died of, in its open or with a write that was sent again,
	// when it was to take over from another one; "" at other deaths.
	Reopening string
	// Requests were in flight; for a hang, those that took too long.
	Requests []RequestInfo
	// Poison: the only request in flight was given up, because the handler dies of it each time.
	Poison bool
	// Output is what the process said of its death: for a crash, the place and the handler's backtrace. It is complete
	// a moment after the death.
	Output string

	reopening *Device
	output    *tail // of the process; nil when it is in Output already
}

// RequestInfo names a request.
type RequestInfo struct {
	Device         string
	Minor          int
	Op             shared.Op
	Offset, Length int64 // bytes
	Deaths         int   // of hosts, not from outside, with this request in flight
}

// String is "write of 4096 bytes at 8192 on ram000".
func (r RequestInfo) String() string {
	if r.Op == shared.OpFlush {
		return "flush of " + r.Device
	}
	return fmt.Sprintf("%s of %d bytes at %d on %s", r.Op, r.Length, r.Offset, r.Device)
}

// String tells the whole story in a few lines.
func (d Death) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s handler %s, process %d, %s\n", d.Time.Format(time.RFC3339), d.Handler, d.PID, d.Reason)
	if d.Reopening != "" {
		fmt.Fprintf(&b, "  while reopening %s\n", d.Reopening)
	}
	for _, r := range d.Requests {
		fmt.Fprintf(&b, "  in flight: %s", r)
		if r.Deaths > 1 {
			fmt.Fprintf(&b, " (at %d deaths)", r.Deaths)
		}
		b.WriteByte('\n')
	}
	if d.Poison {
		b.WriteString("  this request failed with EIO; the handler dies of it each time\n")
	}
	for line := range strings.Lines(d.Output) {
		b.WriteString("  | " + line)
	}
	return b.String()
}

const (
	keptDeaths   = 64
	namedInDeath = 16 // requests
	keptOutput   = 8 << 10
)

// deathLog keeps the latest deaths.
type deathLog struct {
	mu   sync.Mutex
	list []Death
}

func (l *deathLog) add(d Death) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) == keptDeaths {
		l.list = append(l.list[:0], l.list[1:]...)
	}
	l.list = append(l.list, d)
}

// Deaths returns the latest deaths of host processes, oldest first: all, or with minor not negative those at which a
// request of that minor was in flight, or its device was being reopened.
func (l *Library) Deaths(minor int) []Death {
	l.deaths.mu.Lock()
	defer l.deaths.mu.Unlock()
	var some []Death
	for _, d := range l.deaths.list {
		found := minor < 0 || d.reopening != nil && d.reopening.minor == minor
		for _, r := range d.Requests {
			found = found || r.Minor == minor
		}
		if found {
			d.Output, d.output, d.reopening = crashReport(d.output.String()), nil, nil
			some = append(some, d)
		}
	}
	return some
}

// info names the op's request.
func (o *op) info() RequestInfo {
	return RequestInfo{
		Device: o.d.name, Minor: o.d.minor, Op: o.req.Op,
		Offset: int64(o.req.Offset), Length: int64(o.req.Length), Deaths: o.deaths,
	}
}

// report records a death and logs it.
func (h *handler) report(
	dead *host, culprit *Device, inFlight []*op, lost []lostRequest, outside, poison bool,
) {
	d := Death{
		Time: time.Now(), Handler: h.subtype, PID: dead.pid(), Reason: dead.process.exitReason(), Outside: outside,
		Poison: poison, output: &dead.output,
	}
	switch dead.killedFor.Load() {
	case killedForHang:
		d.Reason = "did not come back from the handler in time and was killed"
	case killedForRemoval:
		h.log.Warn("handler process was killed for a removal by force", "handler", h.subtype, "pid", d.PID)
		return
	case killedForSilence:
		d.Reason = "closed its descriptors and was killed"
	case killedForViolation:
		d.Reason = "broke the protocol of the memory channel and was killed"
	}
	for _, o := range inFlight[:min(len(inFlight), namedInDeath)] {
		d.Requests = append(d.Requests, o.info())
	}
	for _, r := range lost[:min(len(lost), namedInDeath-len(d.Requests))] {
		d.Requests = append(d.Requests, r.RequestInfo)
	}
	fields := []any{"handler", h.subtype, "pid", d.PID, "reason", d.Reason, "in_flight", len(inFlight) + len(lost)}
	if culprit != nil {
		d.Reopening, d.reopening = culprit.name, culprit
		fields = append(fields, "reopening", culprit.name)
	}
	h.lib.deaths.add(d)
	if len(d.Requests) > 0 {
		fields = append(fields, "request", d.Requests[0].String())
	}
	h.log.Error("handler process died", fields...)
	if poison {
		h.log.Error("request is given up: the handler dies of it each time", "handler", h.subtype,
			"device", d.Requests[0].Device, "request", d.Requests[0].String(), "reason", d.Reason)
	}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - keptOutput; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
