// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// sizes keeps what a device says of its size.
type sizes struct {
	mu  sync.Mutex
	all []int64
}

func (s *sizes) add(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, size)
}

func (s *sizes) last() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[len(s.all)-1]
}

// TestResize makes devices larger and smaller while they are read and written, and has their host die afterwards.
func TestResize(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	load(t, l, "file")
	path := filepath.Join(t.TempDir(), "image")
	for minor, tt := range []struct {
		config string
		size   int64
	}{{"/ram/@/1M", 0}, {"/ram/@", 1 << 20}, {"/file/" + path, 1 << 20}, {"/ram" + path + "2", 1 << 20}} {
		d := add(t, l, minor, tt.config, plugin.DeviceOptions{Size: tt.size})
		var told sizes
		d.OnResize(told.add)
		want := slices.Concat(block(1), make([]byte, 2<<20-8192), block(2))
		mustWrite(t, d, block(1), 0)
		if err := d.Resize(t.Context(), 2<<20); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, d, block(2), 2<<20-4096)
		wantContents(t, d, want, 0)
		kill(t, l, d.Handler())
		wantContents(t, d, want, 0)
		if d.Size() != 2<<20 || told.last() != 2<<20 {
			t.Errorf("%s has %d bytes and says %d, want 2 MiB", tt.config, d.Size(), told.last())
		}

		if err := d.Resize(t.Context(), 512<<10); err != nil {
			t.Fatal(err)
		}
		if n, err := d.ReadAt(make([]byte, 8192), 512<<10-4096); n != 4096 || err != nil {
			t.Errorf("read across the new end: %d, %v", n, err)
		}
		_, err := d.WriteAt(block(3), 512<<10)
		wantErrno(t, "write beyond the new end", err, syscall.ENOSPC)
		kill(t, l, d.Handler())
		wantContents(t, d, want[:512<<10], 0)

		// What was cut off does not come back.
		if err := d.Resize(t.Context(), 4<<20); err != nil {
			t.Fatal(err)
		}
		wantContents(t, d, slices.Concat(block(1), make([]byte, 4<<20-4096)), 0)
		wantErrno(t, "odd size", d.Resize(t.Context(), 4<<20+1), syscall.EINVAL, "512")
		wantErrno(t, "no size", d.Resize(t.Context(), 0), syscall.EINVAL)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 4<<20 {
		t.Errorf("the file has %d bytes (%v)", info.Size(), err)
	}
	ro := add(t, l, 9, "/ram/@/8M", plugin.DeviceOptions{ReadOnly: true})
	wantErrno(t, "resize of a read-only device", ro.Resize(t.Context(), 16<<20), syscall.EROFS)
}

// TestResizeUnderLoad: requests that are on the device before and after a resize do not notice it, nor what is retained
// beyond a new end when the host dies.
func TestResizeUnderLoad(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	path := filepath.Join(t.TempDir(), "store")
	d := add(t, l, 0, "/fault/delay=500,store="+path, plugin.DeviceOptions{})
	stop := make(chan struct{})
	var all sync.WaitGroup
	for c := range 4 {
		all.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				off := int64(c) * 4096
				mustWrite(t, d, block(i), off)
				wantContents(t, d, block(i), off)
			}
		})
	}
	for i := range 10 {
		size := []int64{2 << 20, 128 << 10, 1 << 20}[i%3]
		if err := d.Resize(t.Context(), size); err != nil {
			t.Error(err)
		}
		if size == 2<<20 {
			mustWrite(t, d, block(9), size-4096) // retained, and soon beyond the end
		}
		if i%4 == 3 {
			kill(t, l, "fault")
		}
	}
	close(stop)
	all.Wait()
	if failure := d.Failure(); failure != nil {
		t.Error(failure)
	}
}

// TestResizeFails: a handler that cannot, will not or dies.
func TestResizeFails(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	cannot := add(t, l, 0, "/fault/", plugin.DeviceOptions{})
	wantErrno(t, "memory", cannot.Resize(t.Context(), 2<<20), syscall.EOPNOTSUPP)
	willNot := add(t, l, 1, "/fault/reconfig=-28,store="+dir+"/1", plugin.DeviceOptions{})
	for _, size := range []int64{2 << 20, 512 << 10} {
		wantErrno(t, "refused", willNot.Resize(t.Context(), size), syscall.ENOSPC)
		if willNot.Size() != 1<<20 {
			t.Errorf("after a refusal it has %d bytes", willNot.Size())
		}
	}
	for i, size := range []int64{2 << 20, 512 << 10} {
		file := dir + "/dies" + string(rune('0'+i))
		d := add(t, l, 2+i, "/fault/once="+file+".once,reconfig=segv,store="+file, plugin.DeviceOptions{})
		mustWrite(t, d, block(1), 4096)
		if err := d.Resize(t.Context(), size); err != nil {
			t.Fatal(err)
		}
		wantContents(t, d, block(1), 4096)
		if d.Size() != size || info(t, l, "fault").Restarts < i+1 {
			t.Errorf("%d bytes, %d restarts", d.Size(), info(t, l, "fault").Restarts)
		}
		mustWrite(t, d, block(2), size-4096)
		if got, err := os.ReadFile(file); err != nil || int64(len(got)) != size || !bytes.Equal(got[size-4096:], block(2)) {
			t.Errorf("the file has %d bytes (%v)", len(got), err)
		}
	}
	always := add(t, l, 8, "/fault/reconfig=abort,store="+dir+"/8", plugin.DeviceOptions{})
	wantErrno(t, "it dies each time", always.Resize(t.Context(), 2<<20), syscall.EIO, "died")
}

// TestHandlerChangesSize: the size that a handler gives its device while it is open is the device's.
func TestHandlerChangesSize(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/grow=3145728", plugin.DeviceOptions{})
	var told sizes
	d.OnResize(told.add)
	if d.Size() != 1<<20 {
		t.Fatalf("%d bytes at first", d.Size())
	}
	began := time.Now()
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new size", 5*time.Second, func() bool { return told.last() == 3<<20 })
	t.Logf("told after %v", time.Since(began))
	mustWrite(t, d, block(1), 3<<20-4096)
	wantContents(t, d, block(1), 3<<20-4096)
}
