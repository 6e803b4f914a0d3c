// SPDX-License-Identifier: Apache-2.0

// Command bench compares fuse_tcmur with other ways to have a device in memory. It installs and builds what it compares
// with, runs everything in turn on this machine, prints a table, and writes the figures to docs/bench/latest.json.
//
// Run it as root in the source tree, after make:
//
//	go run ./cmd/fuse_tcmur/bench [-quick] [-workload REGEXP] [-peers ours,gofuse,...] [-svg FILE]
//	go run ./cmd/fuse_tcmur/bench -scale    many devices and hosts
//	go run ./cmd/fuse_tcmur/bench -delay    requests in flight at a slow handler
//	go run ./cmd/fuse_tcmur/bench -retention    cost of what is kept until a flush
//	go run ./cmd/fuse_tcmur/bench -cache    what users do, in each mode of the option cache= of add
//
// Only ratios within one run mean something. It exits with 1 if something could not be run, whatever the figures are.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:])
	stop()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	opts, err := parseOptions(args)
	if err != nil {
		return err
	}
	if opts.list {
		for _, w := range opts.workloads {
			fmt.Printf("%-20s %s, %s\n", w.name, w.title, w.unit)
		}
		return nil
	}
	if opts.from != "" {
		r, err := readResults(opts.from)
		if err != nil {
			return err
		}
		fmt.Print(report(r))
		return opts.writeChart(r)
	}
	return withBed(ctx, opts, func(b *bed) error {
		switch {
		case opts.scale:
			return scale(ctx, b, opts)
		case opts.delay:
			return delay(ctx, b, opts)
		case opts.retention:
			return retention(ctx, b, opts)
		case opts.cache:
			return cacheModes(ctx, b, opts)
		default:
			return compare(ctx, b, opts)
		}
	})
}

// withBed runs f with what all modes need, and removes that again.
func withBed(ctx context.Context, opts *options, f func(*bed) error) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("only root can mount, and make loop devices")
	}
	b, err := newBed(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	b.size = opts.size << 20
	b.writeback, b.addDirect, b.addCached, b.oursFlags = opts.writeback, opts.addDirect, opts.addCached, opts.oursFlags
	if err := b.installPackages(ctx); err != nil {
		return err
	}
	if b.fio, err = calibrateFio(ctx, b.dir); err != nil {
		return err
	}
	return f(b)
}

// compare is the main mode: workloads on peers.
func compare(ctx context.Context, b *bed, opts *options) error {
	c := &comparison{
		bed: b, peers: opts.peers, workloads: opts.workloads, rounds: opts.rounds, runtime: opts.runtime,
		progress: os.Stderr,
	}
	r, err := c.run(ctx)
	r.Notes = opts.notes()
	fmt.Print(report(r))
	err = errors.Join(err, writeJSON(opts.jsonPath(b, "latest"), r), opts.writeChart(r))
	if len(r.Failures) > 0 {
		err = errors.Join(err, fmt.Errorf("%d failures, listed above", len(r.Failures)))
	}
	return err
}
