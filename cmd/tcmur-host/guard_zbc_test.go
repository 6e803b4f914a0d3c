// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// zoned is a device that the handler has made: two conventional zones, and data at the start of the third.
type zoned struct {
	options    string
	size, zone uint64
}

var (
	// By the handler's defaults: it formats so when it is given no options, and then the third zone loses its data.
	zonedByDefault = zoned{"zsize-256/conv-2@", 1 << 30, 256 << 20}
	zonedSmall     = zoned{"zsize-1/conv-2@", 16 << 20, 1 << 20}
)

func (z zoned) make(t *testing.T, f *front) (file string, data []byte) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "zoned")
	f.mustOpen(&hostpb.OpenRequest{Config: "zbc/" + z.options + file, Size: z.size})
	data = pattern(9, 256<<10)
	if err := f.write(0, 2*z.zone, data); err != nil {
		t.Fatal(err)
	}
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
	return file, data
}

// TestGuardZbcFormat: the handler formats a file whose size is not the one it is told, or when it is given options. The
// guard refuses both and names the cure, unless formatting is asked for.
func TestGuardZbcFormat(t *testing.T) {
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_file_zbc.so"), "zbc")
	z := zonedByDefault
	for _, c := range []struct {
		name    string
		options string
		size    uint64
		errno   syscall.Errno
	}{
		{"size", "", z.size - 512, syscall.EINVAL},
		{"options", z.options, z.size, syscall.EEXIST},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, how := range []string{"guards off", "format"} {
				file, data := z.make(t, f)
				req := &hostpb.OpenRequest{Config: "zbc/" + c.options + file, Size: c.size}
				_, err := f.open(req)
				wantErrno(t, err, c.errno)
				if err != nil && !strings.Contains(err.Error(), "say format") {
					t.Errorf("error %q names no cure", err)
				}
				f.mustOpen(&hostpb.OpenRequest{Config: "zbc/" + file})
				if got, err := f.read(0, 2*z.zone, len(data)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("after a refused open: error %v, data equal: %v", err, bytes.Equal(got, data))
				}
				if err := f.close(callCtx(t), 0); err != nil {
					t.Fatal(err)
				}

				req.GuardsOff, req.Format = how == "guards off", how == "format"
				f.mustOpen(req)
				if got, err := f.read(0, 2*z.zone, len(data)); err == nil && bytes.Equal(got, data) {
					t.Errorf("%s: it was not formatted", how)
				}
				if err := f.close(callCtx(t), 0); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	t.Run("foreign file", func(t *testing.T) {
		content := bytes.Repeat([]byte("precious"), 1<<20)
		file := makeFile(t, content, 0)
		_, err := f.open(&hostpb.OpenRequest{Config: "zbc/" + file, Size: 16 << 20})
		wantErrno(t, err, syscall.EINVAL)
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, content) {
			t.Error("the file was changed")
		}
	})
	t.Run("format of a sound device", func(t *testing.T) {
		file, data := z.make(t, f)
		reply := f.mustOpen(&hostpb.OpenRequest{Config: "zbc/" + file, Format: true})
		if reply.GetSize() != z.size {
			t.Errorf("size %d", reply.GetSize())
		}
		if got, err := f.read(0, 2*z.zone, len(data)); err == nil && bytes.Equal(got, data) {
			t.Error("it was not formatted")
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}
	})
}

// TestGuardZbcZones: a write across the end of a zone, and one across that of the conventional zones, is refused by the
// handler; with the guard it is cut there. What a zoned device cannot do is an error all the same.
func TestGuardZbcZones(t *testing.T) {
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_file_zbc.so"), "zbc")
	file, data := zonedSmall.make(t, f)
	across := pattern(7, 128<<10)
	const end = 2 << 20 // of the conventional zones
	second := uint64(end + len(data))

	f.mustOpen(&hostpb.OpenRequest{Config: "zbc/" + file, GuardsOff: true})
	if got, err := f.read(0, end-4096, 8192); err == nil && bytes.Equal(got[4096:], data[:4096]) {
		t.Error("the bug is not there: a read across zones is served")
	}
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}

	f.mustOpen(&hostpb.OpenRequest{Config: "zbc/" + file})
	if got, err := f.read(0, end-4096, 8192); err != nil || !bytes.Equal(got[4096:], data[:4096]) {
		t.Errorf("read across zones: error %v", err)
	}
	// At the write pointer, up to the end of the zone and into the next one, in one request.
	if err := f.write(0, second, pattern(3, 1<<20-len(data)-len(across)/2)); err != nil {
		t.Fatal(err)
	}
	if err := f.write(0, 3<<20-uint64(len(across)/2), across); err != nil {
		t.Errorf("write across zones: %v", err)
	}
	if got, err := f.read(0, 3<<20-uint64(len(across)/2), len(across)); err != nil || !bytes.Equal(got, across) {
		t.Errorf("read back: error %v, equal %v", err, bytes.Equal(got, across))
	}
	// Elsewhere in a sequential zone, and in a full one.
	wantErrno(t, f.write(0, 5<<20+4096, across), syscall.EIO)
	wantErrno(t, f.write(0, 2<<20, across), syscall.EINVAL)
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
}
