// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"syscall"
)

// command is one entry of the command language.
type command struct {
	name    string
	args    string // as the help shows them
	summary string
	run     func(call *call, args string) error
	// forcible: with --force it does not wait for other commands to end by themselves.
	forcible bool
}

// commandTable is the whole language: what can be run, what can be abbreviated to what, and what the help says. The
// order is the order of the help.
func commandTable() []command {
	return []command{
		{name: "load", args: "SUBTYPE", summary: "load a handler into a process of its own", run: runLoad},
		{
			name: "unload", args: "[--force] SUBTYPE", run: runUnload, forcible: true,
			summary: "unload a handler that has no devices, or by force with all it has",
		},
		{
			name: "reload", args: "SUBTYPE", run: runReload,
			summary: "replace a handler by what is now in its file; its devices go on",
		},
		{name: "add", args: "MINOR [KEY=VALUE ...] /SUBTYPE/CFG", summary: "make a device", run: runAdd},
		{
			name: "remove", args: "[--force] MINOR", run: runRemove, forcible: true,
			summary: "flush, close and remove a device that nobody has open, or by force any",
		},
		{
			name: "resize", args: "[--force] MINOR SIZE", run: runResize,
			summary: "change the size of a device in use; by force also to a smaller one",
		},
		{
			name: "describe", args: "SUBTYPE", run: runDescribe,
			summary: "print what a handler is, can do and has to be guarded from",
		},
		{name: "dump", summary: "print the tree, the handlers, and the devices that have failed", run: runDump},
		{name: "blame", args: "[MINOR]", summary: "print which requests handlers have died of, and where", run: runBlame},
		{name: "echo", args: "TEXT", summary: "print TEXT", run: runEcho},
		{name: "source", args: "FILE", summary: "run the commands in FILE (an absolute path)", run: runSource},
		{
			name: "save", args: "[FILE]", run: runSave,
			summary: "write what is loaded and added as a command file, by default " + defaultSaveFile,
		},
		{name: "help", args: "[COMMAND]", summary: "print this, or what COMMAND does", run: runHelp},
		{
			name: "exit", args: "[--force]", run: runExit, forcible: true,
			summary: "remove all devices, unload all handlers, unmount and stop; by force also in use",
		},
	}
}

// findCommand finds the command that name stands for: a whole name or an unambiguous beginning of one, in either case.
func findCommand(name string) (*command, error) {
	table := commandTable()
	var matches []string
	var found *command
	for i := range table {
		if strings.EqualFold(table[i].name, name) {
			return &table[i], nil
		}
		if len(name) < len(table[i].name) && strings.EqualFold(table[i].name[:len(name)], name) {
			found = &table[i]
			matches = append(matches, table[i].name)
		}
	}
	switch len(matches) {
	case 0:
		return nil, failf(syscall.EINVAL, "there is no command %q: help lists them", name)
	case 1:
		return found, nil
	default:
		return nil, failf(syscall.EINVAL, "%q could be any of %s", name, strings.Join(matches, ", "))
	}
}

func runLoad(call *call, args string) error {
	subtype, err := parseSubtype(args)
	if err != nil {
		return err
	}
	return call.front.load(call.ctx, call.out, subtype)
}

func runUnload(call *call, args string) error {
	args, forced := takeForce(args)
	subtype, err := parseSubtype(args)
	if err != nil {
		return err
	}
	if forced {
		return call.front.forceUnload(subtype)
	}
	return call.front.unload(call.ctx, subtype)
}

func runReload(call *call, args string) error {
	subtype, err := parseSubtype(args)
	if err != nil {
		return err
	}
	return call.front.reload(call.ctx, call.out, subtype)
}

func runAdd(call *call, args string) error {
	parsed, err := parseAdd(args)
	if err != nil {
		return err
	}
	return call.front.add(call.ctx, call.out, parsed)
}

func runRemove(call *call, args string) error {
	args, forced := takeForce(args)
	word, rest := nextWord(args)
	if word == "" || rest != "" {
		return failf(syscall.EINVAL, "give one minor number: remove MINOR")
	}
	minor, err := parseMinor(word)
	if err != nil {
		return err
	}
	if forced {
		return call.front.forceRemove(minor)
	}
	return call.front.remove(call.ctx, minor)
}

func runBlame(call *call, args string) error {
	minor := -1
	if word, rest := nextWord(args); rest != "" {
		return failf(syscall.EINVAL, "give one minor number, or none: blame [MINOR]")
	} else if word != "" {
		var err error
		if minor, err = parseMinor(word); err != nil {
			return err
		}
	}
	call.print(call.front.blame(minor))
	return nil
}

func runDump(call *call, args string) error {
	if err := noArguments(args); err != nil {
		return err
	}
	call.print(call.front.dump())
	return nil
}

func runEcho(call *call, args string) error {
	call.print(args + "\n")
	return nil
}

func runSource(call *call, args string) error {
	if args == "" {
		return failf(syscall.EINVAL, "the name of the command file is missing: source FILE")
	}
	return call.source(args)
}

func runHelp(call *call, args string) error {
	if args == "" {
		call.print(helpText())
		return nil
	}
	cmd, err := findCommand(args)
	if err != nil {
		return err
	}
	call.print(fmt.Sprintf("%s: %s\n", cmd.synopsis(), cmd.summary))
	if cmd.name == "add" {
		call.print(addHelpText())
	}
	return nil
}

func runExit(call *call, args string) error {
	args, forced := takeForce(args)
	if err := noArguments(args); err != nil {
		return err
	}
	if forced {
		call.front.forceExit()
		return nil
	}
	return call.front.requestExit()
}

func noArguments(args string) error {
	if args != "" {
		return failf(syscall.EINVAL, "takes no arguments, but was given %q", args)
	}
	return nil
}

// synopsis is the command's name with its arguments.
func (c *command) synopsis() string {
	if c.args == "" {
		return c.name
	}
	return c.name + " " + c.args
}

// helpText describes the whole language.
func helpText() string {
	var text strings.Builder
	width := 0
	for _, cmd := range commandTable() {
		width = max(width, len(cmd.synopsis()))
	}
	for _, cmd := range commandTable() {
		fmt.Fprintf(&text, "  %-*s  %s\n", width, cmd.synopsis(), cmd.summary)
	}
	text.WriteString(addHelpText())
	text.WriteString("One command per line, in either case, shortened at will as long as it stays unambiguous.\n" +
		"MINOR is decimal, 0x hexadecimal or 0 octal. BYTES may end in K, M, G or T (powers of 1024).\n" +
		"A '#' at the beginning of a line or after a blank starts a comment.\n")
	return text.String()
}

// addHelpText describes the options of "add".
func addHelpText() string {
	var text strings.Builder
	text.WriteString("Options of add, before the config string:\n")
	eachAddOption(func(key, value, summary string) {
		if value != "" {
			key += "=" + value
		}
		fmt.Fprintf(&text, "  %-20s  %s\n", key, summary)
	})
	return text.String()
}
