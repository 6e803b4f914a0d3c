// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"
)

func TestFindCommand(t *testing.T) {
	for name, want := range map[string]string{
		"load": "load", "LOAD": "load", "l": "load", "L": "load", "u": "unload", "a": "add",
		"rem": "remove", "rel": "reload", "b": "blame", "du": "dump", "ec": "echo", "Ex": "exit", "h": "help",
		"so": "source", "sa": "save", "de": "describe",
	} {
		if cmd, err := findCommand(name); err != nil || cmd.name != want {
			t.Errorf("findCommand(%q) = %v, %v; want %s", name, cmd, err, want)
		}
	}
	for name, candidates := range map[string]string{"e": "echo, exit", "re": "reload, remove"} {
		_, err := findCommand(name)
		wantErrno(t, err, syscall.EINVAL)
		if !strings.Contains(err.Error(), candidates) {
			t.Errorf("the error %q does not name the candidates %s", err, candidates)
		}
	}
	for _, name := range []string{"loads", "x", "lod"} {
		_, err := findCommand(name)
		wantErrno(t, err, syscall.EINVAL)
	}
}

func TestHelpNamesEverything(t *testing.T) {
	r := newRig(t)
	help := r.mustRun(t, "help")
	for _, cmd := range commandTable() {
		if !strings.Contains(help, "  "+cmd.synopsis()+" ") {
			t.Errorf("help does not explain %s", cmd.name)
		}
		if one := r.mustRun(t, "help "+cmd.name); !strings.Contains(one, cmd.summary) {
			t.Errorf("help %s says %q", cmd.name, one)
		}
	}
	for _, option := range addOptions() {
		if !strings.Contains(help, option.key) || !strings.Contains(r.mustRun(t, "help add"), option.key) {
			t.Errorf("help does not explain the option %s", option.key)
		}
	}
}

func TestArgumentsThatDoNotFit(t *testing.T) {
	r := newRig(t)
	for _, line := range []string{
		"reload", "reload a b", "unload --force", "unload --force a b", "remove --force", "remove --force 1 2",
		"remove 1 --force", "exit --force now", "blame x", "blame 1 2", "load", "load a b", "unload", "unload a b", "remove",
		"remove 1 2", "remove x", "dump x", "exit now",
		"source", "help nothing", "add", "bogus",
	} {
		_, err := r.run(t, line)
		wantErrno(t, err, syscall.EINVAL)
	}
	select {
	case <-r.front.exitRequested:
		t.Error("'exit now' was obeyed")
	default:
	}
}
