// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const stressBlock = 4096

// fillBlock makes contents that tell where they belong and that are whole.
func fillBlock(p []byte, where, round uint64) {
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], where)
		binary.LittleEndian.PutUint64(p[i+8:], round)
	}
}

func checkBlock(p []byte, where, round uint64) error {
	for i := 0; i < len(p); i += 16 {
		w, r := binary.LittleEndian.Uint64(p[i:]), binary.LittleEndian.Uint64(p[i+8:])
		if w != where || r != round {
			return fmt.Errorf("at byte %d: block %d of round %d, want %d of %d", i, w, r, where, round)
		}
	}
	return nil
}

// Readers and writers of stable files see their own data while nodes around them come and go.
// Not parallel, as TestRemoveWhileOpen.
func TestConcurrentUse(t *testing.T) {
	s := serve(t, Options{})
	const (
		files   = 4
		workers = 8
		blocks  = 16 // per worker and file
		rounds  = 20
	)
	var group sync.WaitGroup
	for i := range files {
		name := fmt.Sprint("stable", i)
		addMemory(t, s.Tree, name, &memory{data: make([]byte, workers*blocks*stressBlock), direct: i%2 == 0})
		for w := range workers {
			group.Go(func() { writeAndCheck(t, s.path(name), uint64(w*blocks), blocks, rounds) })
		}
	}

	stop := make(chan struct{})
	var churn sync.WaitGroup
	for i := range 3 {
		churn.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
					churnOnce(t, s, fmt.Sprint("dir", i), n)
				}
			}
		})
	}
	group.Wait()
	close(stop)
	churn.Wait()

	s.unmount(t)
	s.wantRun(t, nil)
	for i := range files {
		ok(t, "Remove", s.Remove(fmt.Sprint("stable", i), s.Root()))
	}
	ok(t, "Exit", s.Exit())
	if len(s.nodes) != 1 || len(s.files.all()) != 0 {
		t.Errorf("%d nodes and %d open files remain", len(s.nodes), len(s.files.all()))
	}
}

// writeAndCheck owns the blocks from first of a file: it reads what it wrote the round before, and writes anew.
func writeAndCheck(t *testing.T, path string, first, blocks uint64, rounds uint64) {
	p := make([]byte, stressBlock)
	for round := range rounds {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		for b := first; b < first+blocks; b++ {
			off := int64(b) * stressBlock
			if round > 0 {
				if _, err := f.ReadAt(p, off); err != nil {
					t.Errorf("%s: %v", path, err)
				} else if err := checkBlock(p, b, round); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
			fillBlock(p, b, round+1)
			if _, err := f.WriteAt(p, off); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		ok(t, "fsync", f.Sync())
		ok(t, "close", f.Close())
	}
}

// churnOnce makes a directory with a file, uses the file, and takes both away in one of several ways.
func churnOnce(t *testing.T, s *served, name string, n int) {
	dir, err := s.Mkdir(name, s.Root())
	if err != nil {
		t.Error(err)
		return
	}
	m := &memory{data: make([]byte, stressBlock), direct: n%2 == 0}
	m.node, err = s.Add("file", dir, 0o600, m.ops(), m)
	if err != nil {
		t.Error(err)
		return
	}
	m.node.UpdateSize(stressBlock)
	f, err := os.OpenFile(s.path(name, "file"), os.O_RDWR, 0)
	if err != nil {
		t.Error(err)
		return
	}
	p := make([]byte, stressBlock)
	var user sync.WaitGroup
	user.Go(func() { // until it is cut off, if it is
		for {
			if _, err := f.WriteAt(p, 0); err != nil {
				if !errors.Is(err, syscall.ENODEV) {
					t.Errorf("%s: %v", name, err)
				}
				return
			}
			if n%3 != 0 {
				return
			}
		}
	})
	m.node.UpdateMTime()
	_ = s.Format()
	if _, err := os.ReadDir(s.dir); err != nil {
		t.Error(err)
	}
	if n%3 == 0 {
		ok(t, "Detach", s.Detach("file", dir))
		user.Wait()
		ok(t, "close", f.Close())
	} else {
		user.Wait()
		wantErr(t, "Remove of an open file", s.Remove("file", dir), syscall.EBUSY)
		ok(t, "close", f.Close())
		ok(t, "Remove", s.Remove("file", dir))
	}
	ok(t, "Rmdir", s.Rmdir(name, s.Root()))
	if err := unix.Access(s.path(name), unix.F_OK); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%s after Rmdir: %v", name, err)
	}
}

// The mount is taken away at every stage of its life, and Run ends each time.
func TestUnmountAtAnyTime(t *testing.T) {
	t.Parallel()
	for i := range 30 {
		s := newServed(t, Options{})
		s.background(t)
		if i%3 != 0 {
			select {
			case <-s.Mounted():
			case err := <-s.run:
				t.Fatalf("Run: %v", err)
			}
		}
		var group sync.WaitGroup
		for range 2 {
			group.Go(func() {
				if i%2 == 0 {
					ok(t, "Unmount", s.Unmount(true))
				} else {
					ok(t, "Abort", s.Abort())
				}
			})
		}
		group.Wait()
		s.wantRun(t, nil)
	}
}
