// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Handlers that take SCSI command blocks only, as block devices like any other. Their files are not named for them:
// handler_file_optical.so is fbo, handler_file_zbc.so is zbc.

// TestE2EOptical: fio verifies an optical disc, a file system on it holds files, and both are in the backing file.
func TestE2EOptical(t *testing.T) {
	b := newBed(t, 180*time.Second)
	f := b.start()
	image := b.TempDir() + "/disc"
	b.run("truncate", "-s", "48M", image)
	f.must("load fbo\nadd 0 /fbo/" + image)
	text := f.must("describe fbo")
	for _, want := range []string{
		"file_optical.so", "callbacks", "handle_cmd", "by SCSI command blocks", "one call at a time",
		"read errors", "fbo000: 50331648 bytes in blocks of 2048", "guard size",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("describe does not say %q:\n%s", want, text)
		}
	}
	for _, direct := range []string{"--direct=0", "--direct=1"} {
		f.fio("fbo000", "--rw=randwrite", "--bsrange=4k-64k", "--size=16M", "--verify=crc32c", "--verify_fatal=1",
			"--ioengine=io_uring", "--iodepth=8", "--do_verify=1", direct)
	}
	// The block size is 2048: what is smaller is read, modified and written.
	f.fio("fbo000", "--rw=randwrite", "--bs=512", "--io_size=256k", "--size=4M", "--verify=crc32c", "--verify_fatal=1",
		"--ioengine=psync", "--do_verify=1")

	mounted := b.mkfsAndMount(f, "fbo000")
	content := bytes.Repeat([]byte("optical "), 100_000)
	if err := os.WriteFile(mounted+"/file", content, 0o600); err != nil {
		t.Fatal(err)
	}
	b.run("umount", mounted)
	f.must("remove 0")
	b.run("e2fsck", "-fn", image)
	f.must("add 1 ro /fbo/" + image)
	mounted = b.mountDevice(f.path("fbo001"), "-o", "ro,noload")
	if got, err := os.ReadFile(mounted + "/file"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("read back: error %v, equal %v", err, bytes.Equal(got, content))
	}
	b.run("umount", mounted)
	f.must("remove 1")
	f.refused("add 2 size=64M /fbo/"+image, syscall.EINVAL, "fewer than size=67108864", "truncate -s 67108864")
}

// TestE2EZoned: the conventional zones of a zoned disc serve like any block device, rules of the others are kept where
// splitting requests can keep them and are errors otherwise, and nothing formats the disc by mistake.
func TestE2EZoned(t *testing.T) {
	b := newBed(t, 180*time.Second)
	f := b.start()
	image := b.TempDir() + "/zoned"
	f.must("load zbc\nadd 0 size=33M /zbc/zsize-1/conv-32@" + image)
	f.fio("zbc000", "--rw=randwrite", "--bsrange=4k-64k", "--size=16M", "--verify=crc32c", "--verify_fatal=1",
		"--ioengine=io_uring", "--iodepth=8", "--do_verify=1", "--direct=1")
	b.run("mkfs.ext4", "-q", "-F", f.path("zbc000"), "32M")
	mounted := b.mountDevice(f.path("zbc000"))
	content := bytes.Repeat([]byte("zoned "), 100_000)
	if err := os.WriteFile(mounted+"/file", content, 0o600); err != nil {
		t.Fatal(err)
	}
	b.run("umount", mounted)

	disc := f.open("zbc000", os.O_RDWR|syscall.O_DSYNC)
	if _, err := disc.WriteAt(make([]byte, 4096), 32<<20+8192); err == nil {
		t.Error("a write in the middle of a sequential zone succeeded")
	}
	if err := disc.Close(); err != nil {
		t.Error(err)
	}
	f.must("remove 0")

	f.refused("add 0 size=33M /zbc/zsize-1/conv-32@"+image, syscall.EEXIST, "loses what is in it", "say format")
	f.refused("add 0 size=32M /zbc/"+image, syscall.EINVAL, "would format it", "leave size= out")
	f.must("add 0 /zbc/" + image)
	mounted = b.mountDevice(f.path("zbc000"), "-o", "ro")
	if got, err := os.ReadFile(mounted + "/file"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("read back: error %v, equal %v", err, bytes.Equal(got, content))
	}
	b.run("umount", mounted)
	f.must("remove 0\nadd 0 format size=17M /zbc/zsize-1/conv-16@" + image)
	if text := f.must("describe zbc"); !strings.Contains(text, "zbc000: 17825792 bytes in blocks of 512") {
		t.Errorf("describe says:\n%s", text)
	}
	f.must("remove 0\nadd 0 guards=off size=9M /zbc/" + image)
	if text := f.must("describe zbc"); !strings.Contains(text, "no guards") {
		t.Errorf("describe says:\n%s", text)
	}
	f.must("remove 0")
}
