// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// layoutMeaning says what the struct layout of a handler tells of its version.
func layoutMeaning(abi string) string {
	if abi == "prefix" {
		return "of tcmu-runner 1.5.0 to 1.6.2 (cannot be told closer; only what all have in common is used)"
	}
	return "of tcmu-runner " + abi
}

// threadModel says how a handler is driven.
func threadModel(info *plugin.HandlerInfo) string {
	calls := "one call at a time for each device"
	if info.Concurrency > 1 {
		calls = fmt.Sprintf("up to %d calls at a time for each device", info.Concurrency)
	}
	kind := "synchronous"
	if info.Asynchronous {
		kind = "asynchronous, many requests outstanding"
	}
	way := "by read and write"
	if info.ByCDB {
		way = "by SCSI command blocks"
	}
	return fmt.Sprintf("%s, %s, %s; opens and closes one at a time (nr_threads %d)", kind, calls, way, info.NRThreads)
}

// describe tells what there is to know about a loaded handler and its devices. ENOENT: it is not loaded.
func (f *front) describe(subtype string) (string, error) {
	info, ok := f.handler(subtype)
	if !ok {
		return "", failf(syscall.ENOENT, "handler %s is not loaded: load %s", subtype, subtype)
	}
	var text strings.Builder
	line := func(title, value string) {
		// Handlers describe their configuration in several lines.
		value = strings.ReplaceAll(strings.TrimSpace(value), "\n", "\n           ")
		fmt.Fprintf(&text, "%-10s %s\n", title, value)
	}
	line("subtype", info.Subtype)
	line("name", info.Name)
	line("file", info.Path)
	line("layout", layoutMeaning(info.ABI))
	line("callbacks", strings.Join(info.Callbacks, " "))
	line("threads", threadModel(&info))
	line("config", info.CfgDesc)
	if len(info.Guards) == 0 {
		line("guards", "none: no bugs are known that need any")
	}
	for _, guard := range info.Guards {
		line("guard", guard)
	}
	nodes := f.allNodes()
	slices.SortFunc(nodes, func(a, b *deviceNode) int { return a.device.Minor() - b.device.Minor() })
	for _, node := range nodes {
		if node.device.Handler() == subtype {
			line("device", deviceSummary(node))
		}
	}
	return text.String(), nil
}

// deviceSummary is a device and its attributes.
func deviceSummary(node *deviceNode) string {
	d := node.device
	a := d.Attributes()
	words := []string{
		fmt.Sprintf("%s: %d bytes in blocks of %d", d.Name(), d.Size(), a.BlockSize),
		fmt.Sprintf("requests of up to %d, aligned to %d", a.MaxXfer, a.Alignment),
		"cache " + string(node.cache()),
	}
	for _, flag := range []struct {
		set  bool
		word string
	}{
		{d.ReadOnly(), "read-only"}, {a.WriteCache, "write cache"}, {!a.Rotational, "solid state"}, {a.CanUnmap, "unmap"},
		{len(a.Guards) == 0, "no guards"},
	} {
		if flag.set {
			words = append(words, flag.word)
		}
	}
	for _, guard := range a.Guards {
		name, _, _ := strings.Cut(guard, ":")
		words = append(words, "guard "+name)
	}
	return strings.Join(words, ", ")
}

func runDescribe(call *call, args string) error {
	subtype, err := parseSubtype(args)
	if err != nil {
		return err
	}
	text, err := call.front.describe(subtype)
	if err != nil {
		return err
	}
	call.print(text)
	return nil
}
