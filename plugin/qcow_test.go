// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// openQcow loads the distribution's own qcow handler and makes an image of the size.
func openQcow(t *testing.T, size int64) (l *plugin.Library, image string) {
	t.Helper()
	testbed.Deadline(t, testDeadline)
	testbed.NothingLeft(t)
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{testbed.SystemHandlers(t)}, HostBinary: testbed.Program(t, "tcmur-host"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = l.Shutdown(ctx)
	})
	load(t, l, "qcow")
	image = filepath.Join(t.TempDir(), "image.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", image, fmt.Sprint(size))
	return l, image
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

// TestQcow drives the unmodified handler: the size is found without being told, random writes read back, the image is
// sound and holds the same bytes for qemu.
func TestQcow(t *testing.T) {
	const size = 16 << 20
	l, image := openQcow(t, size)
	d := add(t, l, 0, "/qcow/"+image, plugin.DeviceOptions{})
	if d.Size() != size {
		t.Fatalf("size %d", d.Size())
	}
	model := make([]byte, size)
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		n := 512 * (1 + rng.IntN(256))
		off := 512 * rng.IntN((size-n)/512)
		for i := range n {
			model[off+i] = byte(rng.Uint32())
		}
		if _, err := d.WriteAt(model[off:off+n], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, size)
	if n, err := d.ReadAt(got, 0); n != size || err != nil || !bytes.Equal(got, model) {
		t.Fatalf("read %d, %v, equal %v", n, err, bytes.Equal(got, model))
	}
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "check", "-q", image)
	raw := image + ".raw"
	qemuImg(t, "convert", "-O", "raw", image, raw)
	d = add(t, l, 1, "/qcow/"+raw, plugin.DeviceOptions{})
	if n, err := d.ReadAt(got, 0); n != size || err != nil || !bytes.Equal(got, model) {
		t.Fatalf("converted image: read %d, %v, equal %v", n, err, bytes.Equal(got, model))
	}
	_, err := l.AddDevice(t.Context(), 2, "/qcow//nonexistent/image", plugin.DeviceOptions{})
	wantErrno(t, "missing image", err, syscall.ENOENT, "/nonexistent/image")
}
