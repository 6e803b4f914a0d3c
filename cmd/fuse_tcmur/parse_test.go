// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"strconv"
	"syscall"
	"testing"
)

func TestSplitCommand(t *testing.T) {
	for _, test := range []struct{ line, name, args string }{
		{"", "", ""},
		{"  \t\r", "", ""},
		{"# all comment", "", ""},
		{"   # comment after blanks", "", ""},
		{"load ram", "load", "ram"},
		{"\tload\t ram  \r", "load", "ram"},
		{"load ram # the first", "load", "ram"},
		{"load ram\t#the first", "load", "ram"},
		{"add 0 /file//a#b", "add", "0 /file//a#b"},
		{"add 0 /file//a b = c", "add", "0 /file//a b = c"},
		{"echo  two  blanks", "echo", "two  blanks"},
		{"#load ram", "", ""},
		{"load#ram", "load#ram", ""},
	} {
		if name, args := splitCommand(test.line); name != test.name || args != test.args {
			t.Errorf("splitCommand(%q) = %q, %q; want %q, %q", test.line, name, args, test.name, test.args)
		}
	}
}

func TestParseMinor(t *testing.T) {
	for text, want := range map[string]int{
		"0": 0, "00": 0, "-0": 0, "7": 7, "+7": 7, "255": 255, "0x10": 16, "0XfF": 255, "010": 8, "0377": 255,
		"2147483647": math.MaxInt32,
	} {
		if got, err := parseMinor(text); got != want || err != nil {
			t.Errorf("parseMinor(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "-", "+", "x", "0x", "0xg", "08", "1a", "1 ", " 1", "1_0", "0b1", "0o7", "--1", "+-1", "1.0", "٣",
	} {
		_, err := parseMinor(text)
		wantErrno(t, err, syscall.EINVAL)
	}
	for _, text := range []string{"-1", "-0x1", "2147483648", "99999999999999999999", "0xffffffffffffffffff"} {
		_, err := parseMinor(text)
		wantErrno(t, err, syscall.ENODEV)
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1, "512": 512, "0512": 512, "64K": 64 << 10, "64k": 64 << 10, "64KiB": 64 << 10, "64kib": 64 << 10,
		"3M": 3 << 20, "2G": 2 << 30, "1T": 1 << 40, "8388607T": 8388607 << 40,
		strconv.Itoa(math.MaxInt64): math.MaxInt64,
	} {
		if got, err := parseSize(text); got != want || err != nil {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "0", "0K", "K", "-1", "+1", "1KB", "1B", "1KiBs", "1P", "1 K", "0x10", "1.5G", "1e6",
		"8388608T", "9223372036854775808",
	} {
		_, err := parseSize(text)
		wantErrno(t, err, syscall.EINVAL)
	}
}

func TestParseSubtype(t *testing.T) {
	if got, err := parseSubtype("ram"); got != "ram" || err != nil {
		t.Errorf("parseSubtype(ram) = %q, %v", got, err)
	}
	for _, text := range []string{"", "ram file"} {
		_, err := parseSubtype(text)
		wantErrno(t, err, syscall.EINVAL)
	}
}
