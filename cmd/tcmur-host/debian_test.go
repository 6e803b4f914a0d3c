// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// debianHandler is a handler of Debian's package tcmu-runner, as it comes.
func debianHandler(t *testing.T, name string) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/*/tcmu-runner/" + name)
	if len(found) == 0 {
		t.Skipf("%s (package tcmu-runner) is not installed", name)
	}
	return found[0]
}

// exercise writes and reads device 0 at random, in multiples of block, and compares with a model in memory.
func exercise(t *testing.T, f *front, size, block uint64, rounds int) []byte {
	t.Helper()
	model := make([]byte, size)
	rng := rand.New(rand.NewSource(1))
	for i := 0; i < rounds; i++ {
		n := block * uint64(1+rng.Intn(int(256<<10/block)))
		at := block * uint64(rng.Intn(int((size-n)/block+1)))
		switch rng.Intn(8) {
		case 0, 1, 2:
			data := pattern(byte(i), int(n))
			if err := f.write(0, at, data); err != nil {
				t.Fatalf("write of %d at %d: %v", n, at, err)
			}
			copy(model[at:], data)
		case 3:
			if err := f.do(sqe{op: opZero, offset: at, length: n}); err != nil {
				t.Fatalf("zero of %d at %d: %v", n, at, err)
			}
			clear(model[at : at+n])
		case 4:
			if err := f.do(sqe{op: opFlush}); err != nil {
				t.Fatalf("flush: %v", err)
			}
		default:
			got, err := f.read(0, at, int(n))
			if err != nil || !bytes.Equal(got, model[at:at+n]) {
				t.Fatalf("read of %d at %d: error %v, data equal: %v", n, at, err, bytes.Equal(got, model[at:at+n]))
			}
		}
	}
	return model
}

func TestQcow(t *testing.T) {
	so := debianHandler(t, "handler_qcow.so")
	image := makeImage(t, "-f", "qcow2", "9M")
	f := startHost(t)
	if abi := f.mustLoad(so, "qcow").GetAbi(); abi != "prefix" {
		t.Errorf("layout is %s", abi)
	}
	open := f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image, BlockSize: 4096})
	if open.GetSize() != 9<<20 || open.GetBlockSize() != 512 || open.GetAlignment() != 512 || open.GetCanUnmap() {
		t.Errorf("open reply is %v", open)
	}
	// What makes the handler abort, loop for ever or round silently.
	wantErrno(t, f.do(sqe{op: opRead, offset: 1, length: 512}), syscall.EINVAL)
	wantErrno(t, f.do(sqe{op: opRead, length: 511}), syscall.EINVAL)
	wantErrno(t, f.do(sqe{op: opWrite, offset: 9 << 20, length: 512}), syscall.ENOSPC)
	model := exercise(t, f, 9<<20, 512, 300)
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "check", image).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
	raw := image + ".raw"
	if out, err := exec.Command("qemu-img", "convert", "-O", "raw", image, raw).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img convert: %v\n%s", err, out)
	}
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the image's contents are not what was written (%v)", err)
	}

	// Clusters of a size that the handler does not know. Its -1 is not EPERM, and what it logged is what we are told.
	_, err := f.open(&hostpb.OpenRequest{Config: "qcow/" + makeImage(t, "-f", "qcow2", "-o", "cluster_size=2M", "9M")})
	wantErrno(t, err, syscall.EINVAL)
	if err != nil && !strings.Contains(err.Error(), "cluster_bits") {
		t.Errorf("error is %q", err)
	}
	_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image, Size: 4 << 20})
	wantErrno(t, err, syscall.EINVAL)
}

func TestFbo(t *testing.T) {
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_file_optical.so"), "fbo")
	file := makeFile(t, nil, 4<<20)
	open := f.mustOpen(&hostpb.OpenRequest{Config: "fbo/" + file})
	if open.GetSize() != 4<<20 || open.GetBlockSize() != 2048 || open.GetAlignment() != 2048 ||
		open.GetMaxXfer() != 1<<20 {
		t.Errorf("open reply is %v", open)
	}
	model := exercise(t, f, 4<<20, 2048, 200)
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the file's contents are not what was written (%v)", err)
	}

	f.mustOpen(&hostpb.OpenRequest{Config: "fbo/ro/" + file})
	wantErrno(t, f.do(sqe{op: opWrite, length: 2048}), syscall.EROFS)
	missing := filepath.Join(t.TempDir(), "missing")
	_, err := f.open(&hostpb.OpenRequest{Device: 1, Config: "fbo/" + missing})
	wantErrno(t, err, syscall.ENOENT)
	if _, err := os.Stat(missing); err == nil {
		t.Error("a missing file was created")
	}
}

func TestZbc(t *testing.T) {
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_file_zbc.so"), "zbc")
	file := filepath.Join(t.TempDir(), "zoned")
	config := "zbc/zsize-1/conv-8@" + file
	open := f.mustOpen(&hostpb.OpenRequest{Config: config, Size: 9 << 20})
	if open.GetSize() != 9<<20 || open.GetBlockSize() != 512 || open.GetAlignment() != 512 {
		t.Errorf("open reply is %v", open)
	}
	// The first eight zones are conventional; requests cross their ends.
	model := exercise(t, f, 8<<20, 512, 300)
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}

	// The same path opened without a size, and by its options again but as a reopen: nothing is lost.
	for _, req := range []*hostpb.OpenRequest{
		{Config: "zbc/" + file}, {Config: config, Size: 9 << 20, Reopen: true},
	} {
		f.mustOpen(req)
		for at := uint64(0); at < 8<<20; at += 1 << 20 {
			got, err := f.read(0, at, 1<<20)
			if err != nil || !bytes.Equal(got, model[at:at+1<<20]) {
				t.Fatalf("read at %d: error %v, data equal: %v", at, err, bytes.Equal(got, model[at:at+1<<20]))
			}
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.open(&hostpb.OpenRequest{Config: "zbc/" + file, Size: 8 << 20})
	wantErrno(t, err, syscall.EINVAL)
	if err != nil && !strings.Contains(err.Error(), "format") {
		t.Errorf("error %q does not say what would happen", err)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Error("a refused open changed the file")
	}
}

// TestRbdWithoutCluster: Debian's handler loads, and says why it cannot open anything.
func TestRbdWithoutCluster(t *testing.T) {
	if builtWith("-asan") {
		t.Skip("AddressSanitizer cannot deal with C++ exceptions in a C program")
	}
	f := startHost(t)
	reply := f.mustLoad(debianHandler(t, "handler_rbd.so"), "rbd")
	if reply.GetAbi() == "prefix" {
		t.Errorf("layout is %s", reply.GetAbi())
	}
	_, err := f.open(&hostpb.OpenRequest{Config: "rbd/pool/image;conf=/nonexistent/ceph.conf"})
	wantErrno(t, err, syscall.ENOENT)
	t.Log(err)
}

// TestReadErrorsOfFbo: the handler of that name logs failed reads but reports success.
func TestReadErrorsOfFbo(t *testing.T) {
	f := startHost(t)
	f.mustLoad(buildHandler(t, "cdb.c", "-DFBO"), "fbo")
	f.mustOpen(&hostpb.OpenRequest{Config: "fbo/" + makeFile(t, nil, 1<<20)})
	if err := f.do(sqe{op: opRead, length: 4096}); err != nil {
		t.Error(err)
	}
	wantErrno(t, f.do(sqe{op: opRead, offset: 8192, length: 4096}), syscall.EIO)
}

// TestCommandBlocks drives a handler that knows command blocks of 10 bytes only.
func TestCommandBlocks(t *testing.T) {
	f := startHost(t)
	f.mustLoad(buildHandler(t, "cdb.c"), "cdb")
	open := f.mustOpen(&hostpb.OpenRequest{Config: "cdb/", Size: 4<<20 + 4095})
	want := fmt.Sprint(uint64(4<<20), 4096, 4096)
	if got := fmt.Sprint(open.GetSize(), open.GetBlockSize(), open.GetAlignment()); got != want {
		t.Errorf("size, block size, alignment are %s, not %s", got, want)
	}
	exercise(t, f, 4<<20, 4096, 200)
	wantErrno(t, f.do(sqe{op: opRead, offset: 512, length: 4096}), syscall.EINVAL)
	wantErrno(t, f.do(sqe{op: opUnmap, length: 4096}), syscall.EOPNOTSUPP)
}
