// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// options is the command line.
type options struct {
	rounds    int
	runtime   time.Duration
	size      int64 // MiB
	peers     []peer
	workloads []workload
	json      string
	svg       string
	base      string
	from      string
	quick     bool
	list      bool
	scale     bool
	delay     bool
	retention bool
	cache     bool
	writeback bool
	addDirect string
	addCached string
	oursFlags []string
}

const (
	defaultRounds  = 5
	defaultRuntime = 1500 * time.Millisecond
	quickRuntime   = 500 * time.Millisecond
)

func parseOptions(args []string) (*options, error) {
	o := &options{}
	var pattern, names, flags string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.IntVar(&o.rounds, "rounds", defaultRounds, "`number` of rounds")
	f.DurationVar(&o.runtime, "runtime", defaultRuntime, "`time` of one run, for workloads that do not end by themselves")
	f.Int64Var(&o.size, "size", 1024, "size of each device in `MiB`")
	f.StringVar(&pattern, "workload", "", "run only workloads whose name matches `regexp`")
	f.StringVar(&names, "peers", "", "`names` of the peers to run, with commas between them")
	f.StringVar(&o.json, "json", "", "`file` for the figures (default docs/bench/latest.json, or MODE.json)")
	f.StringVar(&o.svg, "svg", "", "`file` for a chart; none is drawn without it")
	f.StringVar(&o.base, "chart-base", gofuse, "`peer` that has the speed 1 in the chart")
	f.StringVar(&o.from, "from", "", "measure nothing: report, and draw, the figures in `file`")
	f.BoolVar(&o.quick, "quick", false, "one round of half a second: does it work at all?")
	f.BoolVar(&o.list, "list", false, "list the workloads")
	f.BoolVar(&o.scale, "scale", false, "measure many devices and hosts instead")
	f.BoolVar(&o.delay, "delay", false, "count the requests in flight at a slow handler instead")
	f.BoolVar(&o.retention, "retention", false, "measure what it costs to retain unflushed writes instead")
	f.BoolVar(&o.cache, "cache", false, "compare the modes of cache= instead, by workloads of their own")
	f.BoolVar(&o.writeback, "peer-writeback", false, "gofuse and libfuse write back, not through, in page-cache workloads")
	f.StringVar(&o.addDirect, "add-direct", "", "our `options` of add for workloads with direct I/O")
	f.StringVar(&o.addCached, "add-cached", "", "our `options` of add for workloads with the page cache")
	f.StringVar(&flags, "ours-flags", "", "more `flags` for fuse_tcmur, with blanks between them")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.quick {
		o.rounds, o.runtime = 1, quickRuntime
	}
	o.oursFlags = strings.Fields(flags)
	if o.rounds < 1 || o.runtime < time.Millisecond || o.size < 1 {
		return nil, errors.New("-rounds, -runtime and -size must be positive")
	}
	if labelOf(o.base) == o.base {
		return nil, fmt.Errorf("-chart-base: there is no peer %q", o.base)
	}
	var err error
	all := workloads()
	if o.cache {
		all = cacheWorkloads()
	}
	if o.workloads, err = selectWorkloads(all, pattern); err != nil {
		return nil, err
	}
	o.peers, err = selectPeers(names)
	return o, err
}

func selectWorkloads(all []workload, pattern string) ([]workload, error) {
	expression, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("-workload: %w", err)
	}
	selected := slices.DeleteFunc(all, func(w workload) bool { return !expression.MatchString(w.name) })
	if len(selected) == 0 {
		return nil, fmt.Errorf("-workload: none matches %q; -list lists them", pattern)
	}
	return selected, nil
}

func selectPeers(names string) ([]peer, error) {
	if names == "" {
		return peers(), nil
	}
	wanted := strings.Split(names, ",")
	for _, name := range wanted {
		if labelOf(name) == name {
			return nil, fmt.Errorf("-peers: there is no peer %q", name)
		}
	}
	return slices.DeleteFunc(peers(), func(p peer) bool { return !slices.Contains(wanted, p.name) }), nil
}

// notes says which settings are not the usual ones.
func (o *options) notes() []string {
	var notes []string
	add := func(format, value string) {
		if value != "" {
			notes = append(notes, fmt.Sprintf(format, value))
		}
	}
	add("Our devices for direct I/O are added with %s.", o.addDirect)
	add("Our devices for the page cache are added with %s.", o.addCached)
	add("fuse_tcmur runs with %s.", strings.Join(o.oursFlags, " "))
	if o.writeback {
		notes = append(notes, "gofuse and libfuse write back in page-cache workloads.")
	}
	return notes
}

func (o *options) jsonPath(b *bed, name string) string {
	if o.json != "" {
		return o.json
	}
	return filepath.Join(b.root, "docs", "bench", name+".json")
}

func (o *options) writeChart(r *results) error {
	if o.svg == "" {
		return nil
	}
	return writeFile(o.svg, []byte(chart(r, o.base)))
}
