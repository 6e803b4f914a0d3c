// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"
)

// FuzzParser checks what must hold for every line anybody can write to the command node.
func FuzzParser(f *testing.F) {
	for _, line := range []string{
		"", "# x", "load ram", "add 0 /ram/@", "add 0x10 size=1G ro block_size=4096 /file//a b#c # d",
		"remove 010", "l ram", "e", "echo # no", "add -1 /ram/@", "add 99999999999999999999 size=99999999T /x",
		"source /a\x00b", "add 1 size=9223372036854775807K /ram/@", "help add", "\xff\xfe #\r",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		name, args := splitCommand(line)
		if strings.ContainsAny(name, blanks) || strings.Trim(args, blanks) != args ||
			(name == "" && args != "") {
			t.Fatalf("splitCommand(%q) = %q, %q", line, name, args)
		}
		if !strings.Contains(line, args) {
			t.Fatalf("splitCommand(%q): the arguments %q are not from the line", line, args)
		}
		if again, args2 := splitCommand(name + " " + args); name != "" && (again != name || args2 != args) {
			t.Fatalf("splitCommand(%q) is not stable: %q %q, then %q %q", line, name, args, again, args2)
		}
		if cmd, err := findCommand(name); err == nil && name != "" &&
			!strings.EqualFold(cmd.name[:len(name)], name) {
			t.Fatalf("%q was taken for %s", name, cmd.name)
		}
		parsed, err := parseAdd(args)
		if err != nil {
			if errno := errnoOf(err); errno != syscall.EINVAL && errno != syscall.ENODEV {
				t.Fatalf("parseAdd(%q): %v has errno %v", args, err, errno)
			}
			return
		}
		options := parsed.options
		if parsed.minor < 0 ||
			!strings.HasPrefix(parsed.config, "/") || !strings.HasSuffix(args, parsed.config) ||
			options.Size < 0 || options.BlockSize < 0 || options.MaxXfer < 0 {
			t.Fatalf("parseAdd(%q) = %+v", args, parsed)
		}
	})
}
