// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

const (
	statusTimeout  = 10 * time.Second
	statusInterval = 500 * time.Millisecond
)

const statusLong = `status shows what a running fuse_tcmur serves: handlers, devices, rates, latencies, the last errors.
Rates are those of a short interval; latencies are from the issue of a request to the handler's process
to its end, of all requests since the device was added.
`

// rateStatus is how fast an operation went on between two reports.
type rateStatus struct {
	Requests float64 `json:"requests_per_second"`
	Bytes    float64 `json:"bytes_per_second"`
}

func newStatusCommand() *cobra.Command {
	var mountpoint string
	var asJSON bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "status [flags]",
		Short: "show the handlers and devices of a running fuse_tcmur",
		Long:  statusLong,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			server, err := findInstance("/proc", mountpoint)
			if err != nil {
				return err
			}
			report, err := server.statusWithRates(cmd.Context(), interval)
			if err != nil {
				return err
			}
			if asJSON {
				text, err := json.MarshalIndent(report, "", "  ")
				if err == nil {
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", text)
				}
				return err
			}
			return report.print(cmd.OutOrStdout())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&mountpoint, "mountpoint", defaultMountpoint, "`directory` of the mount to ask")
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	flags.DurationVar(&interval, "interval", statusInterval, "`time` that rates are measured over; 0: do not measure any")
	return cmd
}

// statusWithRates takes two reports and compares them.
func (i *instance) statusWithRates(ctx context.Context, interval time.Duration) (*statusReport, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout+interval)
	defer cancel()
	first, err := i.status(ctx)
	if err != nil || interval <= 0 {
		return first, err
	}
	select {
	case <-time.After(interval):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	second, err := i.status(ctx)
	if err == nil {
		second.addRates(first)
	}
	return second, err
}

// addRates computes what went on since an earlier report.
func (r *statusReport) addRates(earlier *statusReport) {
	seconds := r.Time.Sub(earlier.Time).Seconds()
	if seconds <= 0 {
		return
	}
	before := map[string]deviceStatus{}
	for _, d := range earlier.Devices {
		before[d.Name] = d
	}
	for _, d := range r.Devices {
		old, ok := before[d.Name]
		if !ok || !old.Since.Equal(d.Since) {
			continue // another device since then
		}
		for name, op := range d.Operations {
			op.Rate = &rateStatus{
				Requests: float64(op.Count-old.Operations[name].Count) / seconds,
				Bytes:    float64(op.Bytes-old.Operations[name].Bytes) / seconds,
			}
			d.Operations[name] = op
		}
	}
}

// print shows the report to people.
func (r *statusReport) print(out io.Writer) error {
	table := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(cells ...any) {
		texts := make([]string, len(cells))
		for i, cell := range cells {
			texts[i] = fmt.Sprint(cell)
		}
		_, _ = io.WriteString(table, strings.Join(texts, "\t")+"\n")
	}
	row(fmt.Sprintf("fuse_tcmur %s, process %d, serves %s", r.Version, r.PID, r.Mountpoint))
	if r.Command != "" {
		row("running: " + r.Command)
	}
	if len(r.Handlers) > 0 {
		row("")
		row("HANDLER", "STATE", "PROCESS", "RESTARTS", "LOADED", "LAYOUT", "PATH")
	}
	for _, h := range r.Handlers {
		row(h.Subtype, h.State, h.PID, h.Restarts, ago(r.Time, h.Since), h.Layout, h.Path)
	}
	if len(r.Devices) > 0 {
		row("")
		row("DEVICE", "STATE", "OPEN", "SIZE", "IN FLIGHT", "READ/s", "WRITE/s", "READ p50/p99", "WRITE p50/p99", "CONFIG")
	}
	for _, d := range r.Devices {
		read, write := d.Operations["read"], d.Operations["write"]
		row(d.Name, d.State, d.OpenCount, formatBytes(d.Size), d.InFlight, read.Rate, write.Rate, read.Latency,
			write.Latency, strings.Join(append(d.Options, d.Config), " "))
	}
	for _, problem := range r.problems() {
		row("")
		row(problem)
	}
	return table.Flush()
}

// String is requests and bytes in a second, "-" without a measurement.
func (r *rateStatus) String() string {
	if r == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f (%sB)", r.Requests, formatBytes(int64(r.Bytes)))
}

// String is the median and the 99th percentile, "-" where nothing was measured.
func (l latencyStatus) String() string {
	if l.P50 == 0 {
		return "-"
	}
	return formatTime(l.P50) + "/" + formatTime(l.P99)
}

// formatTime is a time of ns with three digits.
func formatTime(ns int64) string {
	unit := time.Duration(1)
	for int64(unit)*1000 <= ns {
		unit *= 10
	}
	return time.Duration(ns).Round(unit).String()
}

// ago says how long before now something was.
func ago(now, then time.Time) string {
	return now.Sub(then).Round(time.Second).String() + " ago"
}

// problems says what is not as it should be.
func (r *statusReport) problems() []string {
	var list []string
	for _, h := range r.Handlers {
		if h.Failure != "" {
			list = append(list, fmt.Sprintf("handler %s has failed: %s", h.Subtype, h.Failure))
		}
	}
	for _, d := range r.Devices {
		if d.Failure != "" {
			list = append(list, fmt.Sprintf("%s (remove %d, and add it again)", d.Failure, d.Minor))
		}
		if d.ReplayLeft > 0 {
			list = append(list, fmt.Sprintf("%s: %s are being sent to a new process", d.Name, formatBytes(d.ReplayLeft)))
		}
		if e := d.LastError; e != nil {
			var failed uint64
			for _, op := range d.Operations {
				failed += op.Errors
			}
			list = append(list, fmt.Sprintf("%d request(s) failed, the last one %s: %s", failed, ago(r.Time, e.Time), e.Text))
		}
	}
	if r.Failure != "" {
		list = append(list, "last command that failed: "+r.Failure)
	}
	return list
}
