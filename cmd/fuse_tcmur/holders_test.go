// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFindHolders(t *testing.T) {
	dirs := systemDirs{proc: t.TempDir(), sys: t.TempDir()}
	writeFile(t, dirs.sys, "block/loop0/loop/backing_file", "/m/dev/ram000\n")
	writeFile(t, dirs.sys, "block/loop1/loop/backing_file", "/m/dev/ram0001\n")
	writeFile(t, dirs.sys, "block/loop2/size", "0\n")
	writeFile(t, dirs.proc, "self/mountinfo", "31 22 259:0 / /mnt\\040k rw - ext4 /dev/loop0p1 rw\n"+
		"32 22 7:10 / /other rw - ext4 /dev/loop10 rw\n")
	for pid, links := range map[string]map[string]string{
		"12":   {"fd/0": "/dev/null", "fd/3": "/m/dev/ram000", "cwd": "/"},
		"13":   {"fd/0": "/dev/null", "cwd": "/m/dev"},
		"14":   {"fd/0": "/mm/dev/ram000", "cwd": "/"},
		"self": {"fd/0": "/m/dev/ram000"},
	} {
		writeFile(t, dirs.proc, pid+"/comm", "prog"+pid+"\n")
		for name, target := range links {
			link := filepath.Join(dirs.proc, pid, name)
			if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, link); err != nil {
				t.Fatal(err)
			}
		}
	}
	for path, want := range map[string][]string{
		"/m/dev/ram000": {"/dev/loop0 mounted on /mnt k", "process 12 prog12"},
		"/m": {
			"/dev/loop0 mounted on /mnt k", "/dev/loop1", "process 12 prog12", "process 13 prog13",
		},
		"/elsewhere": nil,
	} {
		if diff := cmp.Diff(want, findHolders(dirs, path)); diff != "" {
			t.Errorf("%s: -want +got\n%s", path, diff)
		}
	}
}
