// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// What "fuse_tcmur status" shows: the node /sys/status has it as JSON. Fields are added; they
// never change their meaning.

// statusName is the node below /sys.
const statusName = "status"

type statusReport struct {
	Version    string          `json:"version"`
	PID        int             `json:"pid"`
	Mountpoint string          `json:"mountpoint"`
	Time       time.Time       `json:"time"`       // of the report
	IOFlusher  bool            `json:"io_flusher"` // PR_SET_IO_FLUSHER is in force
	Command    string          `json:"running_command,omitempty"`
	Failure    string          `json:"last_failed_command,omitempty"`
	Handlers   []handlerStatus `json:"handlers"`
	Devices    []deviceStatus  `json:"devices"`
}

type handlerStatus struct {
	Subtype       string    `json:"subtype"`
	Name          string    `json:"name"`
	Path          string    `json:"path"`
	Layout        string    `json:"layout"` // of the handler's structures
	PID           int       `json:"pid"`
	State         string    `json:"state"` // running, recovering, failed
	Failure       string    `json:"failure,omitempty"`
	Restarts      int       `json:"restarts"`
	Since         time.Time `json:"since"`          // of the load
	ChannelMemory int64     `json:"channel_memory"` // bytes
	ChannelUsed   int64     `json:"channel_used"`   // bytes
}

type deviceStatus struct {
	Name          string              `json:"name"`
	Minor         int                 `json:"minor"`
	Handler       string              `json:"handler"`
	Config        string              `json:"config"`
	Options       []string            `json:"options"` // as they were given to add
	Size          int64               `json:"size"`    // bytes
	BlockSize     int                 `json:"block_size"`
	State         string              `json:"state"` // running, recovering, failed
	Failure       string              `json:"failure,omitempty"`
	Cache         string              `json:"cache"` // none, readahead, writeback
	Since         time.Time           `json:"since"` // of the add
	OpenCount     int                 `json:"open_count"`
	InFlight      uint64              `json:"in_flight"`
	Operations    map[string]opStatus `json:"operations"` // by name; those that have been used
	Retained      int64               `json:"retained"`   // bytes of unflushed writes
	RetainedLimit int64               `json:"retained_limit"`
	KeptMemory    int64               `json:"kept_memory"` // bytes that survive the handler's process
	Replayed      int64               `json:"replayed"`    // changes sent again after a death
	Resent        int64               `json:"resent"`      // requests sent again after a death
	ReplayLeft    int64               `json:"replay_left"` // bytes that a replay has still to send
	OwnFlushes    int64               `json:"own_flushes"` // that nobody has asked for
	LastError     *errorStatus        `json:"last_error"`  // null: no request has failed
}

type opStatus struct {
	Count    uint64        `json:"count"`
	Errors   uint64        `json:"errors"`
	Bytes    uint64        `json:"bytes"`
	InFlight uint64        `json:"in_flight"`
	Latency  latencyStatus `json:"latency"`        // from the issue to the end
	Rate     *rateStatus   `json:"rate,omitempty"` // not in the node
}

// latencyStatus is in nanoseconds.
type latencyStatus struct {
	Mean int64 `json:"mean_ns"`
	P50  int64 `json:"p50_ns"`
	P95  int64 `json:"p95_ns"`
	P99  int64 `json:"p99_ns"`
	P999 int64 `json:"p999_ns"`
}

type errorStatus struct {
	Time  time.Time `json:"time"`
	Text  string    `json:"text"`
	Errno string    `json:"errno"`
}

// status gathers the report. It waits for nothing.
func (in *interpreter) status() statusReport {
	f := in.front
	report := statusReport{
		Version: versionString(), PID: os.Getpid(), Mountpoint: f.mountpoint, Time: time.Now(),
		IOFlusher: isIOFlusher(),
		Handlers:  []handlerStatus{}, Devices: []deviceStatus{},
	}
	in.mu.Lock()
	report.Command, report.Failure = in.running, in.lastFailure
	in.mu.Unlock()
	states := map[string]plugin.HandlerState{}
	for _, h := range f.lib.Handlers() {
		states[h.Subtype] = h.State
		report.Handlers = append(report.Handlers, handlerStatus{
			Subtype: h.Subtype, Name: h.Name, Path: h.Path, Layout: h.ABI, PID: h.PID, State: string(h.State),
			Failure: errorText(h.Failure), Restarts: h.Restarts, Since: h.Since,
			ChannelMemory: h.ChannelMemory, ChannelUsed: h.ChannelUsed,
		})
	}
	for _, node := range f.sortedNodes() {
		report.Devices = append(report.Devices, node.status(states[node.device.Handler()]))
	}
	return report
}

// statusText is the report as JSON.
func (in *interpreter) statusText() string {
	text, err := json.MarshalIndent(in.status(), "", "  ")
	if err != nil {
		return fmt.Sprintf("{\"error\": %q}\n", err)
	}
	return string(text) + "\n"
}

// sortedNodes lists the device nodes by minor.
func (f *front) sortedNodes() []*deviceNode {
	nodes := f.allNodes()
	slices.SortFunc(nodes, func(a, b *deviceNode) int { return a.device.Minor() - b.device.Minor() })
	return nodes
}

// status describes a device whose handler is in a state.
func (n *deviceNode) status(state plugin.HandlerState) deviceStatus {
	d := n.device
	stats := d.Stats()
	s := deviceStatus{
		Name: d.Name(), Minor: d.Minor(), Handler: d.Handler(), Config: d.Config(), Options: n.args.words,
		Size: d.Size(), BlockSize: d.BlockSize(), State: string(state), Since: stats.Since,
		Cache:     string(n.cache()),
		OpenCount: n.file().OpenCount(), Operations: map[string]opStatus{},
		Retained: stats.Retained, RetainedLimit: stats.RetainedLimit, KeptMemory: stats.Memory,
		Replayed: stats.Replayed, Resent: stats.Resent, ReplayLeft: stats.ReplayLeft, OwnFlushes: stats.OwnFlushes,
	}
	if s.Options == nil {
		s.Options = []string{}
	}
	if failure := d.Failure(); failure != nil {
		s.State, s.Failure = string(plugin.HandlerFailed), failure.Error()
	}
	for _, kind := range plugin.Operations() {
		op := &stats.Ops[kind]
		s.InFlight += op.InFlight
		if op.Count+op.InFlight > 0 {
			s.Operations[operationName(kind)] = describeOp(op)
		}
	}
	if stats.LastError != nil {
		s.LastError = &errorStatus{
			Time: stats.LastErrorTime, Text: stats.LastError.Error(), Errno: errnoName(stats.LastError),
		}
	}
	return s
}

func describeOp(op *plugin.OpStats) opStatus {
	s := opStatus{Count: op.Count, Errors: op.Errors, Bytes: op.Bytes, InFlight: op.InFlight}
	if total := &op.Total; total.Count > 0 {
		s.Latency = latencyStatus{
			Mean: int64(total.Sum) / int64(total.Count),
			P50:  int64(total.Quantile(0.5)), P95: int64(total.Quantile(0.95)),
			P99: int64(total.Quantile(0.99)), P999: int64(total.Quantile(0.999)),
		}
	}
	return s
}

// operationName is how users know an operation.
func operationName(kind shared.Op) string {
	if kind == shared.OpUnmap {
		return "discard"
	}
	return kind.String()
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// parseStatus reads a report.
func parseStatus(text []byte) (*statusReport, error) {
	var report statusReport
	if err := json.Unmarshal(text, &report); err != nil {
		return nil, failf(syscall.EPROTO, "the status cannot be understood: %w", err)
	}
	return &report, nil
}
