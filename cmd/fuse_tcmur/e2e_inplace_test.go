// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestE2EReadsInPlace reads a ram device past the page cache, so that each answer comes straight from the kept memory,
// while its end comes and goes under the reads and its host is killed. What stays is always there; of the rest a read
// may fail, or find some of it. The front goes on in any case.
func TestE2EReadsInPlace(t *testing.T) {
	t.Parallel()
	const small, large, piece = 2 << 20, 8 << 20, 256 << 10
	b := newBed(t, 120*time.Second)
	f := b.start()
	host := f.load("ram")
	f.must(fmt.Sprintf("add 0 size=%d /ram/@", large))
	file := f.open("ram000", os.O_RDWR)
	fill := func(from int64) {
		t.Helper()
		for off := from; off < large; off += piece {
			if _, err := file.WriteAt(bytes.Repeat([]byte{byte(1 + off/piece)}, piece), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := file.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	fill(0)

	stop := make(chan struct{})
	var readers sync.WaitGroup
	for _, from := range []int64{0, small} {
		direct := f.open("ram000", os.O_RDONLY|syscall.O_DIRECT)
		buf, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			defer direct.Close()
			defer func() { _ = unix.Munmap(buf) }()
			for off := from; ; off += piece {
				select {
				case <-stop:
					return
				default:
				}
				if off >= large || from < small && off >= small {
					off = from
				}
				n, err := direct.ReadAt(buf, off)
				want := bytes.Repeat([]byte{byte(1 + off/piece)}, piece)
				if off < small && (err != nil || !bytes.Equal(buf, want)) {
					t.Errorf("read at %d, which stays: %d bytes, %v, first %#x", off, n, err, buf[0])
					return
				}
				for _, c := range buf[:n] {
					if c != 0 && c != want[0] {
						t.Errorf("read at %d: %#x, which was never there", off, c)
						return
					}
				}
			}
		})
	}
	for round := range 12 {
		f.must(fmt.Sprintf("resize --force 0 %d", small))
		f.must(fmt.Sprintf("resize 0 %d", large))
		fill(small)
		if round%4 == 3 {
			if err := syscall.Kill(host, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			host = f.awaitRecovery("ram", round/4+1)
		}
	}
	close(stop)
	readers.Wait()
	if !f.running() {
		t.Fatal("the front has ended")
	}
	file.Close()
	f.stop()
}
