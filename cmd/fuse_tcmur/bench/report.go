// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
)

// report is the results as text for people.
func report(r *results) string {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "%s, %d CPUs (%s), %d MiB, FUSE over io_uring %s, %s, %s\n", m.Kernel, m.CPUs, m.Processor,
		m.MemoryMiB, orDash(m.FuseURing), m.Go, m.Time.Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(&b, "Medians of %d interleaved rounds of %g s, devices of %d MiB. Spread is (max-min)/median.\n",
		r.Rounds, r.Runtime, r.SizeMiB)
	for _, note := range r.Notes {
		fmt.Fprintln(&b, note)
	}
	b.WriteString("Peers:\n")
	for _, p := range peers() {
		fmt.Fprintf(&b, "  %-8s %s\n", p.name, p.label)
	}
	for _, w := range r.Workloads {
		b.WriteString("\n" + workloadTable(w))
	}
	if len(r.Memory) > 0 {
		b.WriteString("\nMemory besides the device's contents (PSS, MiB):")
		for _, m := range r.Memory {
			fmt.Fprintf(&b, "  %s %.0f", m.Peer, m.MiB)
		}
		b.WriteString("\n")
	}
	b.WriteString("\n" + ratioTable(r))
	b.WriteString("\n" + targetSummary(r))
	for _, failure := range r.Failures {
		fmt.Fprintln(&b, "FAILED:", failure)
	}
	return b.String()
}

// workloadTable is a workload with a line for each peer.
func workloadTable(w workloadResult) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s (%s)\n", w.Title, w.Name)
	fmt.Fprintf(&b, "  %-8s %9s %7s %8s %8s %10s   %-9s %-13s %s\n", "", w.Unit, "spread", "p50 us", "p99 us",
		"CPU s/100k", "ours/peer", "", "in CPU")
	own := w.find(ours)
	for _, p := range w.Peers {
		if len(p.Samples) == 0 {
			fmt.Fprintf(&b, "  %-8s    failed\n", p.Peer)
			continue
		}
		line := fmt.Sprintf("  %-8s %9s %6.0f%% %8s %8s %10s", p.Peer, figure(p.Median.Value), 100*p.Spread,
			figure(p.Median.P50), figure(p.Median.P99), figure(p.Median.CPU))
		if own != nil && p.Peer != ours {
			speed := ratio(own.Median.Value, p.Median.Value)
			work := ratio(own.Median.CPU, p.Median.CPU)
			line += fmt.Sprintf("   %-9s %-13s %-9s %s", figure(speed), verdict(w.Name, p.Peer, value, speed),
				figure(work), verdict(w.Name, p.Peer, cpu, work))
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

// verdict says what a ratio should be and whether it is, if there is a target.
func verdict(workload, peer string, m metric, ratio float64) string {
	t := targetFor(workload, peer, m)
	switch {
	case t == nil:
		return ""
	case t.met(ratio):
		return t.String() + " ok"
	default:
		return t.String() + " MISS"
	}
}

// ratioTable is all ratios at a glance.
func ratioTable(r *results) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-20s", "ours/peer")
	for _, p := range peers()[1:] {
		fmt.Fprintf(&b, " %14s", p.name)
	}
	b.WriteString("\n")
	for _, w := range r.Workloads {
		own := w.find(ours)
		if own == nil {
			continue
		}
		line := fmt.Sprintf("%-20s", w.Name)
		for _, p := range peers()[1:] {
			cell := "-"
			if other := w.find(p.name); other != nil {
				speed := ratio(own.Median.Value, other.Median.Value)
				cell = figure(speed)
				if t := targetFor(w.Name, p.name, value); t != nil {
					cell += map[bool]string{true: " ok  ", false: " MISS"}[t.met(speed)]
				} else {
					cell += "     "
				}
			}
			line += fmt.Sprintf(" %14s", cell)
		}
		if w.Unit == seconds {
			line += "   (time: less is better)"
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

// targetSummary counts the targets that were met.
func targetSummary(r *results) string {
	met, all := 0, 0
	for _, w := range r.Workloads {
		own := w.find(ours)
		for peer, list := range targets[w.Name] {
			other := w.find(peer)
			if own == nil || other == nil {
				continue
			}
			for _, t := range list {
				a, b := own.Median.Value, other.Median.Value
				if t.metric == cpu {
					a, b = own.Median.CPU, other.Median.CPU
				}
				all++
				if t.met(ratio(a, b)) {
					met++
				}
			}
		}
	}
	if all == 0 {
		return "No target was measured.\n"
	}
	return fmt.Sprintf("%d of %d targets are met.\n", met, all)
}

// figure writes a number with three significant digits and a suffix for thousands; 0, which is unknown, as a dash.
func figure(x float64) string {
	switch {
	case x == 0:
		return "-"
	case x >= 99_950:
		return fmt.Sprintf("%.0fk", x/1e3)
	case x >= 9_995:
		return fmt.Sprintf("%.1fk", x/1e3)
	case x >= 99.95:
		return fmt.Sprintf("%.0f", x)
	case x >= 9.995:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
