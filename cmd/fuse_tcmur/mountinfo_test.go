// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	text := `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /a\040b\011c\134d rw - fuse.fuse_tcmur fuse_tcmur rw,user_id=0
31 22 7:0 / /mnt rw shared:9 master:3 propagate_from:2 - ext4 /dev/loop0 rw
short line
32 22 no:thing / /x rw - ext4 /dev/x rw
33 22 0:33 / /no-separator rw shared:1 ext4 /dev/x rw
34 22 0:34 / /on\top rw - tmpfs none`
	want := []mountInfo{
		{unix.Mkdev(8, 1), "/", "ext4", "/dev/sda1"},
		{unix.Mkdev(0, 30), "/a b\tc\\d", "fuse.fuse_tcmur", "fuse_tcmur"},
		{unix.Mkdev(7, 0), "/mnt", "ext4", "/dev/loop0"},
		{unix.Mkdev(0, 34), "/on\\top", "tmpfs", "none"},
	}
	if diff := cmp.Diff(want, parseMounts(text), cmp.AllowUnexported(mountInfo{})); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestTopMount(t *testing.T) {
	mounts := []mountInfo{
		{mountpoint: "/m", fsType: "lower"}, {mountpoint: "/m", fsType: "upper"}, {mountpoint: "/mm"},
	}
	if top := topMount(mounts, "/m"); top == nil || top.fsType != "upper" {
		t.Errorf("top mount: %v", top)
	}
	if top := topMount(mounts, "/m/below"); top != nil {
		t.Errorf("a mount where none is: %v", top)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("30 22 0:30 / /a\\040b rw - fuse.fuse_tcmur fuse_tcmur rw")
	f.Add("\\ - \\0")
	f.Fuzz(func(_ *testing.T, text string) { parseMounts(text) })
}
