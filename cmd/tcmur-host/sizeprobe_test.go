// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// makeImage runs qemu-img create.
func makeImage(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img (package qemu-utils) is not installed")
	}
	path := filepath.Join(t.TempDir(), "image")
	args = append(append([]string{"create", "-q"}, args[:len(args)-1]...), path, args[len(args)-1])
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	return path
}

func makeFile(t *testing.T, content []byte, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if size > int64(len(content)) {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// wantSize checks one measurement; errno 0: none.
func wantSize(
	t *testing.T, measure func(measurement) (sizing, error), m measurement, size uint64, errno syscall.Errno,
) sizing {
	t.Helper()
	s, err := measure(m)
	defer s.guard.release()
	if errno != 0 {
		wantErrno(t, err, errno)
		return s
	}
	if err != nil || s.size != size {
		t.Errorf("%+v: got size %d, error %v, want %d", m, s.size, err, size)
	}
	return s
}

func TestMeasureQcow(t *testing.T) {
	for _, c := range [][]string{
		{"-f", "qcow", "5M"}, {"-f", "qcow2", "5M"}, {"-f", "qcow2", "-o", "compat=0.10", "5M"}, {"-f", "raw", "5M"},
	} {
		path := makeImage(t, c...)
		wantSize(t, measureQcow, measurement{rest: path}, 5<<20, 0)
		wantSize(t, measureQcow, measurement{rest: path, size: 5 << 20}, 5<<20, 0)
		wantSize(t, measureQcow, measurement{rest: path, size: 4 << 20}, 0, syscall.EINVAL)
	}
	wantSize(t, measureQcow, measurement{rest: "/nonexistent/image"}, 0, syscall.ENOENT)
	wantSize(t, measureQcow, measurement{rest: makeFile(t, nil, 0)}, 0, syscall.EINVAL)
	wantSize(t, measureQcow, measurement{rest: makeFile(t, []byte(qcowMagic), 0)}, 4, 0) // too short for an image
	wantSize(t, measureQcow, measurement{rest: t.TempDir()}, 0, syscall.EISDIR)
}

func TestMeasureFbo(t *testing.T) {
	path := makeFile(t, nil, 10*2048+5)
	wantSize(t, measureFbo, measurement{rest: path}, 10*2048, 0)
	wantSize(t, measureFbo, measurement{rest: "ro/" + path}, 10*2048, 0)
	wantSize(t, measureFbo, measurement{rest: path, size: 4096}, 4096, 0)
	wantSize(t, measureFbo, measurement{rest: path, size: 11 * 2048}, 0, syscall.EINVAL)
	wantSize(t, measureFbo, measurement{rest: path + "x"}, 0, syscall.ENOENT)
	wantSize(t, measureFbo, measurement{rest: "relative"}, 0, syscall.EINVAL)
	wantSize(t, measureFbo, measurement{rest: makeFile(t, nil, 2047)}, 0, syscall.EINVAL)
}

// zbcImage makes what the handler's metadata look like for a device of 16 zones of 1 MiB.
func zbcImage(t *testing.T, change func(head []byte)) string {
	head := make([]byte, zbcHeaderSize)
	binary.NativeEndian.PutUint32(head[0:], zbcMagic)
	binary.NativeEndian.PutUint64(head[8:], 16*2048)
	binary.NativeEndian.PutUint32(head[16:], 512)
	binary.NativeEndian.PutUint32(head[20:], 2048)
	binary.NativeEndian.PutUint32(head[24:], 16)
	binary.NativeEndian.PutUint32(head[28:], 15)
	binary.NativeEndian.PutUint32(head[32:], 16)
	if change != nil {
		change(head)
	}
	return makeFile(t, head, 4096+16<<20)
}

func TestMeasureZbc(t *testing.T) {
	good := zbcImage(t, nil)
	measure := func(rest string, size uint64, reopen bool) measurement {
		return measurement{rest: rest, size: size, reopen: reopen, subtype: "zbc"}
	}
	s := wantSize(t, measureZbc, measure(good, 0, false), 16<<20, 0)
	if zone, err := s.boundary(); err != nil || zone != 1<<20 {
		t.Errorf("zones are %d bytes, error %v", zone, err)
	}
	wantSize(t, measureZbc, measure(good, 16<<20, false), 16<<20, 0)

	// Whatever would be formatted away.
	wantSize(t, measureZbc, measure(good, 16<<20-512, false), 0, syscall.EINVAL)
	wantSize(t, measureZbc, measure(makeFile(t, []byte("precious"), 16<<20), 16<<20, false), 0, syscall.EINVAL)
	for at, value := range map[int]uint32{0: 1, 16: 513, 20: 0, 24: 400, 28: 16, 32: 17} {
		path := zbcImage(t, func(head []byte) { binary.NativeEndian.PutUint32(head[at:], value) })
		wantSize(t, measureZbc, measure(path, 0, false), 0, syscall.EINVAL)
	}

	// What is not there yet can be made, if its size is known.
	missing := filepath.Join(t.TempDir(), "missing")
	wantSize(t, measureZbc, measure(missing, 0, false), 0, syscall.ENOENT)
	wantSize(t, measureZbc, measure(missing, 1<<20, false), 1<<20, 0)
	wantSize(t, measureZbc, measure(missing, 1<<20, true), 0, syscall.ENOENT)

	// Options format; a reopen must not.
	wantSize(t, measureZbc, measure("zsize-1@"+good, 0, false), 0, syscall.EEXIST)
	wantSize(t, measureZbc, measure("zsize-1@"+good, 8<<20, false), 0, syscall.EEXIST)
	wantSize(t, measureZbc, measure("zsize-1@"+good+"x", 8<<20, false), 8<<20, 0)
	s = wantSize(t, measureZbc, measure("zsize-1@"+good, 16<<20, true), 16<<20, 0)
	if s.config != "zbc/"+good {
		t.Errorf("reopen with the configuration %q", s.config)
	}
	wantSize(t, measureZbc, measure("zsize-1@/a@b", 16<<20, true), 0, syscall.EINVAL)
}

func TestRbdSizeInRefusal(t *testing.T) {
	size, ok := rbdSizeInRefusal("Mismatched sizes. RBD image size 10737418240. Requested new size 512.")
	if !ok || size != 10737418240 {
		t.Errorf("got %d, %v", size, ok)
	}
	for _, text := range []string{"", "RBD image size many. Requested new size 1.",
		"RBD image size " + strings.Repeat("9", 30) + ". Requested new size 1."} {
		if size, ok := rbdSizeInRefusal(text); ok {
			t.Errorf("%q: got %d", text, size)
		}
	}
}
