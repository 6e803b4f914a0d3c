// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree" //nolint:depguard // for a file with a bad sector
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// badSectorFile is a file of size bytes on a file system of its own, all 0x11, that cannot be read from bad on.
func badSectorFile(t *testing.T, size, bad int64) string {
	t.Helper()
	mountpoint := t.TempDir()
	tree, err := fusetree.Init(mountpoint, fusetree.Options{FsName: "bad-sector"})
	if err != nil {
		t.Fatal(err)
	}
	node, err := tree.Add("disc", tree.Root(), 0o600, &fusetree.Ops{
		Open: func(f *fusetree.File) error {
			f.DirectIO = true // no read-ahead: the error belongs to whoever reads the place
			return nil
		},
		Read: func(_ *fusetree.File, p []byte, off int64) (int, error) {
			if off+int64(len(p)) > bad {
				return 0, syscall.EIO
			}
			return copy(p, bytes.Repeat([]byte{0x11}, len(p))), nil
		},
		Write: func(_ *fusetree.File, p []byte, _ int64, _ fusetree.WriteFlags) (int, error) { return len(p), nil },
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	node.UpdateSize(size)
	ended := make(chan error, 1)
	go func() { ended <- tree.Run() }()
	select {
	case <-tree.Mounted():
	case err := <-ended:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tree.Unmount(true); err != nil {
			t.Error(err)
		}
		<-ended
	})
	return filepath.Join(mountpoint, "disc")
}

// TestGuardFboReadErrors: the handler reports a failed read as done, with a buffer that nothing was read into. With the
// guard it fails.
func TestGuardFboReadErrors(t *testing.T) {
	file := badSectorFile(t, 1<<20, 512<<10)
	for _, guardsOff := range []bool{true, false} {
		f := startHost(t)
		f.mustLoad(debianHandler(t, "handler_file_optical.so"), "fbo")
		f.mustOpen(&hostpb.OpenRequest{Config: "fbo/" + file, GuardsOff: guardsOff})
		if got, err := f.read(0, 0, 4096); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0x11}, 4096)) {
			t.Errorf("guards off %v: sound part: error %v", guardsOff, err)
		}
		got, err := f.read(0, 512<<10, 4096)
		switch {
		case !guardsOff:
			wantErrno(t, err, syscall.EIO)
		case err != nil || bytes.Equal(got, bytes.Repeat([]byte{0x11}, 4096)):
			t.Errorf("the bug is not there: error %v", err)
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Error(err)
		}
	}
}

// TestGuardFboShortFile: the handler reads for ever at the end of a file that is shorter than the device. The guard
// refuses such a file.
func TestGuardFboShortFile(t *testing.T) {
	file := makeFile(t, nil, 64<<10)
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_file_optical.so"), "fbo")
	_, err := f.open(&hostpb.OpenRequest{Config: "fbo/" + file, Size: 128 << 10})
	wantErrno(t, err, syscall.EINVAL)
	missing := filepath.Join(t.TempDir(), "missing")
	_, err = f.open(&hostpb.OpenRequest{Config: "fbo/" + missing, Size: 128 << 10})
	wantErrno(t, err, syscall.ENOENT)
	if _, err := os.Stat(missing); err == nil {
		t.Error("a missing file was created")
	}

	reply := f.mustOpen(&hostpb.OpenRequest{Config: "fbo/" + file, Size: 128 << 10, GuardsOff: true})
	if len(reply.GetGuards()) != 0 {
		t.Errorf("guards %q are in force", reply.GetGuards())
	}
	f.push(sqe{op: opRead, offset: 64 << 10, length: 4096})
	if c, ok := f.next(300 * time.Millisecond); ok {
		t.Errorf("the bug is not there: %+v", c)
	}
}
