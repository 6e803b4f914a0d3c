// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

func TestParseAdd(t *testing.T) {
	for text, want := range map[string]addArgs{
		"0 /ram/@":              {minor: 0, config: "/ram/@"},
		"0x1F   /ram/@":         {minor: 31, config: "/ram/@"},
		"1 /file//a b = c.img":  {minor: 1, config: "/file//a b = c.img"},
		"1 /rbd/p/i;conf=/x ro": {minor: 1, config: "/rbd/p/i;conf=/x ro"},
		"2 ro size=1M block_size=4K max_xfer=64KiB /ram/@": {
			minor: 2, config: "/ram/@",
			options: plugin.DeviceOptions{Size: 1 << 20, BlockSize: 4096, MaxXfer: 65536, ReadOnly: true},
			words:   []string{"ro", "size=1M", "block_size=4K", "max_xfer=64KiB"},
		},
		"3 recovery=fail timeout=1.5 retain=1M /ram/@": {
			minor: 3, config: "/ram/@",
			options: plugin.DeviceOptions{FailFast: true, Timeout: 1500 * time.Millisecond, Retention: 1 << 20},
			words:   []string{"recovery=fail", "timeout=1.5", "retain=1M"},
		},
		"4 recovery=replay timeout=500ms /ram/@": {
			minor: 4, config: "/ram/@", options: plugin.DeviceOptions{Timeout: 500 * time.Millisecond},
			words: []string{"recovery=replay", "timeout=500ms"},
		},
		"5 timeout=0 /ram/@": {
			minor: 5, config: "/ram/@", options: plugin.DeviceOptions{Timeout: -1}, words: []string{"timeout=0"},
		},
		"6 mode=0640 owner=0 group=54321 /ram/@": {
			minor: 6, config: "/ram/@",
			access: nodeAccess{mode: 0o640, hasUID: true, gid: 54321, hasGID: true},
			words:  []string{"mode=0640", "owner=0", "group=54321"},
		},
		"8 cache=none /ram/@": {minor: 8, config: "/ram/@", cache: cacheNone, words: []string{"cache=none"}},
		"7 record=/tmp/r ro /ram/@": {
			minor: 7, config: "/ram/@", options: plugin.DeviceOptions{Record: "/tmp/r", ReadOnly: true},
			words: []string{"record=/tmp/r", "ro"},
		},
	} {
		got, err := parseAdd(text)
		if err != nil {
			t.Errorf("parseAdd(%q): %v", text, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(addArgs{}, nodeAccess{})); diff != "" {
			t.Errorf("parseAdd(%q): -want +got\n%s", text, diff)
		}
	}
}

func TestParseAddErrors(t *testing.T) {
	for _, test := range []struct {
		text  string
		errno syscall.Errno
		says  string
	}{
		{"", syscall.EINVAL, "minor number is missing"},
		{"/ram/@", syscall.EINVAL, "minor number is missing"},
		{"x /ram/@", syscall.EINVAL, "not a minor number"},
		{"-1 /ram/@", syscall.ENODEV, "out of range"},
		{"0", syscall.EINVAL, "config string is missing"},
		{"0 size=1M", syscall.EINVAL, "config string is missing"},
		{"0 ram/@", syscall.EINVAL, "known: size, block_size, max_xfer, ro, "},
		{"0 record=r /ram/@", syscall.EINVAL, "no absolute path"},
		{"0 siez=1M /ram/@", syscall.EINVAL, "unknown option \"siez=1M\""},
		{"0 size /ram/@", syscall.EINVAL, "size=BYTES"},
		{"0 size= /ram/@", syscall.EINVAL, "size=BYTES"},
		{"0 mode=0888 /ram/@", syscall.EINVAL, "octal"},
		{"0 mode=4755 /ram/@", syscall.EINVAL, "octal"},
		{"0 mode=0 /ram/@", syscall.EINVAL, "octal"},
		{"0 owner=no-such-user /ram/@", syscall.EINVAL, "knows no user \"no-such-user\""},
		{"0 group=no-such-group /ram/@", syscall.EINVAL, "knows no group \"no-such-group\""},
		{"0 owner=4294967295 /ram/@", syscall.EINVAL, "no number of a user"},
		{"0 mode=600 mode=660 /ram/@", syscall.EINVAL, "given twice"},
		{"0 size=big /ram/@", syscall.EINVAL, "size: \"big\""},
		{"0 ro=1 /ram/@", syscall.EINVAL, "ro takes no value"},
		{"0 ro ro /ram/@", syscall.EINVAL, "given twice"},
		{"0 size=1M size=2M /ram/@", syscall.EINVAL, "given twice"},
		{"0 block_size=4G /ram/@", syscall.EINVAL, "too large"},
		{"0 recovery=maybe /ram/@", syscall.EINVAL, "replay or fail"},
		{"0 timeout=soon /ram/@", syscall.EINVAL, "not a time"},
		{"0 timeout=-1 /ram/@", syscall.EINVAL, "at most 24h"},
		{"0 timeout=48h /ram/@", syscall.EINVAL, "at most 24h"},
		{"0 timeout=NaN /ram/@", syscall.EINVAL, "not a time"},
		{"0 cache=some /ram/@", syscall.EINVAL, "cache: \"some\": must be one of none, readahead, writeback"},
		{"0 cache=none cache=none /ram/@", syscall.EINVAL, "given twice"},
		{"0 retain=0 /ram/@", syscall.EINVAL, "retain"},
	} {
		_, err := parseAdd(test.text)
		wantErrno(t, err, test.errno)
		if err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("parseAdd(%q): %q does not say %q", test.text, err, test.says)
		}
	}
}
