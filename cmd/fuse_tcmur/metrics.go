// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// Metrics for Prometheus, computed from the statistics of devices and handlers when somebody asks. docs/METRICS.md
// describes them.

// metricsName is the node below /sys that shows them.
const metricsName = "metrics"

// The latencies that the histograms tell apart; what is shorter or longer goes into the outermost buckets.
const (
	shortestLatency = 1 << 10 * time.Nanosecond
	longestLatency  = 1 << 34 * time.Nanosecond
)

// metrics is the front as a prometheus.Collector.
type metrics struct{ front *front }

func describeMetric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tcmur_"+name, help, labels, nil)
}

var (
	buildMetric    = describeMetric("build_info", "1, with the version as a label.", "version")
	waitingMetric  = describeMetric("fuse_requests_waiting", "Requests that the kernel has not had answered.")
	requestsMetric = describeMetric("device_requests_total",
		"Requests that have ended, as the handler gets them.", "device", "operation")
	errorsMetric   = describeMetric("device_request_errors_total", "Requests that have failed.", "device", "operation")
	bytesMetric    = describeMetric("device_bytes_total", "Bytes of requests that did not fail.", "device", "operation")
	inFlightMetric = describeMetric("device_in_flight", "Requests that have not ended.", "device", "operation")
	durationMetric = describeMetric("device_request_duration_seconds",
		"Time that requests took, by stage: total, from the issue to the end; queue, before it; of one read or write in "+
			"eight and all others also channel, to the handler's process and back, and handler.",
		"device", "operation", "stage")
	sizeMetric     = describeMetric("device_size_bytes", "Size of the device.", "device")
	failedMetric   = describeMetric("device_failed", "1 if the device has failed for good.", "device")
	openMetric     = describeMetric("device_open_files", "How often the device is open.", "device")
	retainedMetric = describeMetric("device_retained_bytes", "Unflushed writes that are kept for a replay.", "device")
	limitMetric    = describeMetric("device_retained_limit_bytes", "Bound of device_retained_bytes.", "device")
	keptMetric     = describeMetric("device_kept_memory_bytes",
		"Memory of the device that survives the handler's process.", "device")
	replayedMetric = describeMetric("device_replayed_changes_total",
		"Unflushed changes that were sent again after a death of the handler's process.", "device")
	resentMetric = describeMetric("device_resent_requests_total",
		"Requests in flight that were sent again after a death of the handler's process.", "device")
	replayLeftMetric = describeMetric("device_replay_left_bytes", "Bytes that a replay has still to send.", "device")
	flushesMetric    = describeMetric("device_own_flushes_total", "Flushes that nobody has asked for.", "device")
	restartsMetric   = describeMetric("handler_restarts_total", "Restarts of the handler's process.", "handler")
	stateMetric      = describeMetric("handler_state", "1 for the state that the handler is in.", "handler", "state")
	channelMetric    = describeMetric("handler_channel_memory_bytes",
		"Shared memory for the data of requests.", "handler")
	usedMetric = describeMetric("handler_channel_used_bytes", "Shared memory for requests that is in use.", "handler")
)

// Describe implements prometheus.Collector: which metrics there are depends on the devices.
func (m metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m metrics) Collect(out chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	counter := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, value, labels...)
	}
	gauge(buildMetric, 1, versionString())
	if waiting, ok := m.front.fuseWaiting(); ok {
		gauge(waitingMetric, float64(waiting))
	}
	for _, h := range m.front.lib.Handlers() {
		counter(restartsMetric, float64(h.Restarts), h.Subtype)
		for _, state := range []plugin.HandlerState{
			plugin.HandlerRunning, plugin.HandlerRecovering, plugin.HandlerFailed,
		} {
			gauge(stateMetric, number(h.State == state), h.Subtype, string(state))
		}
		gauge(channelMetric, float64(h.ChannelMemory), h.Subtype)
		gauge(usedMetric, float64(h.ChannelUsed), h.Subtype)
	}
	for _, node := range m.front.sortedNodes() {
		d := node.device
		name, stats := d.Name(), d.Stats()
		gauge(sizeMetric, float64(d.Size()), name)
		gauge(failedMetric, number(d.Failure() != nil), name)
		gauge(openMetric, float64(node.file().OpenCount()), name)
		gauge(retainedMetric, float64(stats.Retained), name)
		gauge(limitMetric, float64(stats.RetainedLimit), name)
		gauge(keptMetric, float64(stats.Memory), name)
		gauge(replayLeftMetric, float64(stats.ReplayLeft), name)
		counter(replayedMetric, float64(stats.Replayed), name)
		counter(resentMetric, float64(stats.Resent), name)
		counter(flushesMetric, float64(stats.OwnFlushes), name)
		for _, kind := range plugin.Operations() {
			op, operation := &stats.Ops[kind], operationName(kind)
			counter(requestsMetric, float64(op.Count), name, operation)
			counter(errorsMetric, float64(op.Errors), name, operation)
			counter(bytesMetric, float64(op.Bytes), name, operation)
			gauge(inFlightMetric, float64(op.InFlight), name, operation)
			if op.Count == 0 {
				continue
			}
			out <- durations(&op.Total, op.Total.Count, name, operation, "total")
			// Requests that did not have to wait were not looked at.
			out <- durations(&op.Queue, max(op.Count, op.Queue.Count), name, operation, "queue")
			out <- durations(&op.Channel, op.Channel.Count, name, operation, "channel")
			out <- durations(&op.Handler, op.Handler.Count, name, operation, "handler")
		}
	}
}

// durations makes a histogram of a distribution; count is how many there are, with those that took no time.
func durations(l *plugin.Latency, count uint64, labels ...string) prometheus.Metric {
	buckets := map[float64]uint64{}
	for below, n := range l.Octaves {
		if below >= shortestLatency && below <= longestLatency {
			buckets[below.Seconds()] = n + count - l.Count
		}
	}
	return prometheus.MustNewConstHistogram(durationMetric, count, l.Sum.Seconds(), buckets, labels...)
}

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// fuseWaiting is how many requests of our mounts the kernel has not had answered, those included that no server has
// fetched yet. False: the kernel does not show it.
func (f *front) fuseWaiting() (int, bool) {
	mounts, err := readMounts(f.sys.proc)
	sum, known := 0, err == nil && f.ownMount().mounted
	for _, mount := range mounts {
		if !known || !isOwnType(&mount) || !isAtOrBelow(mount.mountpoint, f.mountpoint) {
			continue
		}
		text, err := os.ReadFile(fmt.Sprintf("%s/fs/fuse/connections/%d/waiting", f.sys.sys, unix.Minor(mount.device)))
		if err != nil {
			return 0, false
		}
		waiting, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			return 0, false
		}
		sum += waiting
	}
	return sum, known
}

// newMetricsRegistry has the metrics of a front and nothing else.
func newMetricsRegistry(front *front) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics{front})
	return registry
}

// metricsText is all metrics in the text format of Prometheus.
func metricsText(from prometheus.Gatherer) string {
	families, err := from.Gather()
	var text strings.Builder
	if err != nil {
		fmt.Fprintf(&text, "# %v\n", err)
	}
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&text, family); err != nil {
			fmt.Fprintf(&text, "# %v\n", err)
		}
	}
	return text.String()
}
