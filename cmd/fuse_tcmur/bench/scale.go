// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	scaleSize   = 32 << 20 // bytes of a device
	scaleBusy   = 8        // devices at most that are used at once
	idleTime    = 10 * time.Second
	idleDevices = 256
	idleLimit   = 0.002 // of a core
	scaleLoads  = 24    // handlers for the cost of load
)

// scaleSetup is a front with so many devices in so many hosts.
type scaleSetup struct {
	Hosts   int `json:"hosts"`
	Devices int `json:"devices"`

	server *server
	one    []float64 // IOPS of each round, with one busy device
	all    []float64 // and with up to scaleBusy
}

// scaleResult is what was found for a setup.
type scaleResult struct {
	scaleSetup
	OneBusy       float64 `json:"one_busy_iops"` // medians
	OneBusySpread float64 `json:"one_busy_spread"`
	AllBusy       float64 `json:"all_busy_iops"`
	AllBusySpread float64 `json:"all_busy_spread"`
	IdleCores     float64 `json:"idle_cores,omitempty"` // CPU seconds per second with nothing to do
	MiB           float64 `json:"mib"`                  // memory of front and hosts, mapped contents included
}

// cost is how long a command took when few and when many of its kind had run before.
type cost struct {
	Command string  `json:"command"`
	Present int     `json:"present"` // at the time of the last ones
	First   float64 `json:"first_ms"`
	Last    float64 `json:"last_ms"`
}

// scale is the mode with many devices and hosts.
func scale(ctx context.Context, b *bed, opts *options) (err error) {
	subtypes, err := b.buildRams(ctx, scaleLoads)
	if err != nil {
		return err
	}
	var setups []*scaleSetup
	for _, hosts := range []int{1, 8} {
		for _, devices := range []int{1, 2, 4, 8, 64, idleDevices} {
			if devices >= hosts {
				setups = append(setups, &scaleSetup{Hosts: hosts, Devices: devices})
			}
		}
	}
	defer func() {
		for _, s := range setups {
			if s.server != nil {
				err = errors.Join(err, s.server.stop())
			}
		}
	}()
	// All are there at once and take turns, like peers.
	for _, s := range setups {
		fmt.Fprintf(os.Stderr, "start %d hosts, %d devices\n", s.Hosts, s.Devices)
		if err := s.start(ctx, b, subtypes); err != nil {
			return err
		}
	}
	for round := range opts.rounds {
		fmt.Fprintf(os.Stderr, "round %d\n", round+1)
		for _, s := range setups {
			if err := s.measure(ctx, opts.runtime); err != nil {
				return err
			}
		}
	}
	results, err := scaleResults(ctx, setups)
	if err != nil {
		return err
	}
	costs, err := commandCosts(ctx, b, subtypes)
	if err != nil {
		return err
	}
	fmt.Print(scaleReport(results, costs))
	return writeJSON(opts.jsonPath(b, "scale"), struct {
		Machine machine       `json:"machine"`
		Notes   []string      `json:"notes,omitempty"`
		Results []scaleResult `json:"results"`
		Costs   []cost        `json:"costs"`
	}{thisMachine(), opts.notes(), results, costs})
}

// start starts the front with all devices, neighbours in different hosts, and fills those that will be busy.
func (s *scaleSetup) start(ctx context.Context, b *bed, subtypes []string) (err error) {
	s.server, err = startServer(ctx, b, peer{ours, "", func(ctx context.Context, b *bed, server *server) error {
		var script strings.Builder
		for _, subtype := range subtypes[:s.Hosts] {
			fmt.Fprintf(&script, "load %s\n", subtype)
		}
		for i := range s.Devices {
			fmt.Fprintln(&script, scaleAdd(b, i, subtypes[i%s.Hosts]))
		}
		commands := server.dir + "/commands"
		if err := os.WriteFile(commands, []byte(script.String()), 0o600); err != nil {
			return err
		}
		last := fmt.Sprintf("%s%03d", subtypes[(s.Devices-1)%s.Hosts], s.Devices-1)
		flags := append([]string{"--handler-prefix", b.handlerPrefix(), "--source", commands}, b.oursFlags...)
		return server.runOurs(ctx, b, []string{last}, nil, flags...)
	}})
	if err != nil {
		return err
	}
	for i := range min(s.Devices, scaleBusy) {
		file := s.server.device(fmt.Sprintf("%s%03d", subtypes[i%s.Hosts], i))
		if err := fill(ctx, file, scaleSize, 1, s.server.unblock); err != nil {
			return err
		}
	}
	return nil
}

// scaleAdd is the command that adds a device. No two have the same configuration string: that is one device.
func scaleAdd(b *bed, minor int, subtype string) string {
	return fmt.Sprintf("add %d %s /%s/@/%d", minor, b.addDirect, subtype, scaleSize+minor*4096)
}

// measure adds the throughput of a round: the same eight jobs on one device, and on as many as can be.
func (s *scaleSetup) measure(ctx context.Context, runtime time.Duration) error {
	most := min(s.Devices, scaleBusy)
	for _, busy := range slices.Compact([]int{1, most}) {
		run := fioRun{
			size: scaleSize, timeout: runtime + time.Minute, unblock: s.server.unblock,
			options: random("randread", fioOptions{"time_based": "1", "runtime": fmt.Sprintf("%dms", runtime.Milliseconds())}),
		}
		for job := range scaleBusy {
			device := job % busy
			run.files = append(run.files, s.server.device(fmt.Sprintf("ram%c%03d", 'a'+device%s.Hosts, device)))
		}
		r, err := runFio(ctx, run)
		if err != nil {
			return fmt.Errorf("%d hosts, %d devices: %w", s.Hosts, s.Devices, err)
		}
		if busy == 1 {
			s.one = append(s.one, r.IOPS)
		}
		if busy == most {
			s.all = append(s.all, r.IOPS)
		}
	}
	return nil
}

// scaleResults sums up the rounds and measures what is used with nothing to do.
func scaleResults(ctx context.Context, setups []*scaleSetup) ([]scaleResult, error) {
	used := func(s *scaleSetup) (time.Duration, error) { return cpuTime(s.server.pids()) }
	before := make([]time.Duration, len(setups))
	var err error
	for i, s := range setups {
		if before[i], err = used(s); err != nil {
			return nil, err
		}
	}
	fmt.Fprintf(os.Stderr, "idle for %v\n", idleTime)
	begin := time.Now()
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(idleTime):
	}
	var results []scaleResult
	for i, s := range setups {
		after, err := used(s)
		if err != nil {
			return nil, err
		}
		r := scaleResult{
			scaleSetup: *s, OneBusy: median(s.one), OneBusySpread: spread(s.one), AllBusy: median(s.all),
			AllBusySpread: spread(s.all), IdleCores: (after - before[i]).Seconds() / time.Since(begin).Seconds(),
		}
		bytes, err := residentMemory(s.server.pids())
		if err != nil {
			return nil, err
		}
		r.MiB = float64(bytes) / (1 << 20)
		results = append(results, r)
	}
	return results, nil
}

// commandCosts measures load and add, each while more and more is present.
func commandCosts(ctx context.Context, b *bed, subtypes []string) (_ []cost, err error) {
	s, err := startServer(ctx, b, peer{ours, "", func(ctx context.Context, b *bed, s *server) error {
		return s.runOurs(ctx, b, nil, nil, append([]string{"--handler-prefix", b.handlerPrefix()}, b.oursFlags...)...)
	}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	var loads, adds []float64
	for _, subtype := range subtypes {
		took, err := s.command(ctx, "load "+subtype)
		if err != nil {
			return nil, err
		}
		loads = append(loads, took.Seconds()*1e3)
	}
	for i := range idleDevices {
		took, err := s.command(ctx, scaleAdd(b, i, subtypes[0]))
		if err != nil {
			return nil, err
		}
		adds = append(adds, took.Seconds()*1e3)
	}
	return []cost{costOf("load", loads), costOf("add", adds)}, nil
}

// costOf compares the first quarter with the last.
func costOf(command string, took []float64) cost {
	n := len(took) / 4
	return cost{command, len(took), median(took[:n]), median(took[len(took)-n:])}
}

// command has fuse_tcmur run a command and returns how long that took.
func (s *server) command(ctx context.Context, text string) (time.Duration, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	// This process waits for the server here, so somebody must be able to end that.
	watchdog := time.AfterFunc(30*time.Second, s.unblock)
	defer watchdog.Stop()
	fd, err := unix.Open(s.control(), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", s.control(), err)
	}
	begin := time.Now()
	_, err = unix.Write(fd, []byte(text+"\n"))
	took := time.Since(begin)
	_ = unix.Close(fd)
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", text, err, s.process.output.String())
	}
	return took, nil
}

// scaleReport is the figures as text for people.
func scaleReport(results []scaleResult, costs []cost) string {
	var b strings.Builder
	fmt.Fprintf(&b, "4k random reads, %d jobs; with nothing to do for %v; memory of front and hosts\n", scaleBusy,
		idleTime)
	fmt.Fprintf(&b, "%5s %8s %16s %8s %16s %8s %14s %8s\n", "hosts", "devices", "IOPS, one busy", "spread",
		fmt.Sprintf("IOPS, up to %d", scaleBusy), "spread", "idle, % core", "MiB")
	for _, r := range results {
		line := fmt.Sprintf("%5d %8d %16s %7.0f%% %16s %7.0f%% %14.3f %8.0f", r.Hosts, r.Devices, figure(r.OneBusy),
			100*r.OneBusySpread, figure(r.AllBusy), 100*r.AllBusySpread, 100*r.IdleCores, r.MiB)
		if r.Devices == idleDevices {
			line += fmt.Sprintf("   idle <= %.1f%% %s", 100*idleLimit,
				map[bool]string{true: "ok", false: "MISS"}[r.IdleCores <= idleLimit])
		}
		b.WriteString(line + "\n")
	}
	for _, c := range costs {
		fmt.Fprintf(&b, "%-5s %8.2f ms with few present, %8.2f ms with up to %d: ratio %.2f\n", c.Command, c.First, c.Last,
			c.Present, ratio(c.Last, c.First))
	}
	return b.String()
}
