// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// TestRAMSurvivesFlushed: what is flushed is not retained by the front. It is there after a death of the host all the
// same, and so is what was never written.
func TestRAMSurvivesFlushed(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	d := add(t, l, 0, "/ram/@/8M", plugin.DeviceOptions{})
	small := add(t, l, 1, "/ram/@", plugin.DeviceOptions{Size: 1 << 20}) // this one's size is not in its config string
	want := make([]byte, 8<<20)
	rng := rand.New(rand.NewPCG(8, 15))
	for round := range 8 {
		for range 200 {
			off := rng.IntN(len(want) - 20000)
			p := bytes.Repeat([]byte{byte(rng.IntN(255) + 1)}, 1+rng.IntN(20000))
			copy(want[off:], p)
			mustWrite(t, d, p, int64(off))
		}
		off := int64(rng.IntN(len(want) - 1<<20))
		clear(want[off : off+1<<20])
		mustWrite(t, d, want[off:off+1<<20], off)
		mustWrite(t, small, block(round), 4096)
		if err := errors.Join(d.Flush(), small.Flush()); err != nil {
			t.Fatal(err)
		}
		if d.Retained() != 0 {
			t.Errorf("%d bytes are retained", d.Retained())
		}
		kill(t, l, "ram")
		wantContents(t, d, want, 0)
		wantContents(t, small, block(round), 4096)
		wantContents(t, small, make([]byte, 4096), 8192)
	}
}

// TestRAMSurvivesUnderLoad kills the host again and again under writes, reads and flushes; every one of them
// succeeds, and every client finds in its part of the device what it has left there. Nothing is retained for that.
func TestRAMSurvivesUnderLoad(t *testing.T) {
	const clients, stripe = 6, 1 << 20
	l, _ := open(t)
	load(t, l, "ram")
	d := add(t, l, 0, fmt.Sprintf("/ram/@/%d", clients*stripe), plugin.DeviceOptions{})
	var stop atomic.Bool
	var all sync.WaitGroup
	for c := range clients {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(c), 1))
			mine := make([]byte, stripe)
			base := int64(c) * stripe
			for i := 0; !stop.Load() && !t.Failed(); i++ {
				off := rng.IntN(stripe - 32768)
				part := mine[off : off+1+rng.IntN(32768)]
				var err error
				switch rng.IntN(8) {
				case 0:
					clear(part)
					_, err = d.WriteAt(part, base+int64(off))
				case 1:
					err = d.Flush()
				case 2, 3:
					got := make([]byte, len(part))
					_, err = d.ReadAt(got, base+int64(off))
					if err == nil && !bytes.Equal(got, part) {
						t.Errorf("client %d, request %d: wrong contents at %d", c, i, off)
					}
				default:
					for k := range part {
						part[k] = byte(i + k>>9)
					}
					_, err = d.WriteAt(part, base+int64(off))
				}
				if err != nil {
					t.Errorf("client %d, request %d: %v", c, i, err)
				}
			}
			wantContents(t, d, mine, base)
		})
	}
	rng := rand.New(rand.NewPCG(47, 11))
	for range 25 {
		kill(t, l, "ram")
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond) // kills come when they come
		if n := d.Retained(); n != 0 {
			t.Errorf("%d bytes are retained", n)
		}
	}
	stop.Store(true)
	all.Wait()
}

// memfdUsage is how many bytes the memfds of the device take, and how many of them this process has.
func memfdUsage(t *testing.T, device string) (bytes int64, n int) {
	t.Helper()
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(target, "/memfd:tcmur-"+device+"-") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(fd, &st); err != nil {
			t.Fatal(err)
		}
		bytes += st.Blocks * 512
		n++
	}
	return bytes, n
}

// TestRAMSparse: a device of 1 TiB with little in it costs little, and is there again at once.
func TestRAMSparse(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	d := add(t, l, 0, "/ram/@/1T", plugin.DeviceOptions{})
	places := []int64{0, 1 << 30, 1<<39 + 4096, 1<<40 - 4096}
	for i, off := range places {
		mustWrite(t, d, block(i), off)
	}
	best := time.Hour // of several, because the machine may have other things to do
	for range 5 {
		pid := info(t, l, "ram").PID
		start := time.Now()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for i, off := range places {
			wantContents(t, d, block(i), off)
		}
		best = min(best, time.Since(start))
		wantContents(t, d, make([]byte, 1<<20), 1<<35)
		awaitRestarts(t, l, "ram", 1)
	}
	if best > 200*time.Millisecond {
		t.Errorf("the contents were back after %v at best", best)
	}
	if used, n := memfdUsage(t, "ram000"); used > 64<<10 || n != 1 {
		t.Errorf("%d memfds with %d bytes hold four blocks", n, used)
	}
}

// TestKeptMemoryEnds: it goes with its device, however that ends, and a device that takes its place gets none of it.
func TestKeptMemoryEnds(t *testing.T) {
	l, _ := open(t)
	load(t, l, "ram")
	ends := map[string]func() error{
		"remove":          func() error { return l.RemoveDevice(context.Background(), 0) },
		"remove by force": func() error { return l.ForceRemoveDevice(0) },
		"remove after a death": func() error {
			kill(t, l, "ram")
			return l.RemoveDevice(context.Background(), 0)
		},
	}
	for name, end := range ends {
		d := add(t, l, 0, "/ram/@/1M", plugin.DeviceOptions{})
		wantContents(t, d, make([]byte, 1<<20), 0)
		mustWrite(t, d, block(1), 0)
		if _, n := memfdUsage(t, "ram000"); n != 1 {
			t.Errorf("%s: %d memfds before", name, n)
		}
		if err := end(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, n := memfdUsage(t, "ram000"); n != 0 {
			t.Errorf("%s: %d memfds are left", name, n)
		}
	}
	_, err := l.AddDevice(context.Background(), 0, "/ram/@/1M", plugin.DeviceOptions{Size: 1 << 21})
	wantErrno(t, "sizes that differ", err, syscall.EINVAL)
	if _, n := memfdUsage(t, "ram000"); n != 0 {
		t.Errorf("%d memfds are left of a device that could not be opened", n)
	}
}

// TestKeptRegions: another handler, with two regions for each device, one of which it counts in.
func TestKeptRegions(t *testing.T) {
	const blocks = 64
	l, log := open(t, "keep")
	load(t, l, "keep")
	configs := []string{"/keep/", "/keep/greedy", "/keep/nonsense"}
	var devices []*plugin.Device
	for minor, config := range configs {
		devices = append(devices, add(t, l, minor, config, plugin.DeviceOptions{}))
	}
	for round := range 4 {
		for minor, d := range devices {
			for i := range blocks {
				mustWrite(t, d, block(1000*minor+100*round+i), int64(i)*4096)
			}
			if d.Retained() != 0 {
				t.Errorf("%s: %d bytes are retained", d.Name(), d.Retained())
			}
		}
		kill(t, l, "keep")
		for minor, d := range devices {
			counts := make([]byte, 4096)
			if _, err := d.ReadAt(counts, blocks*4096); err != nil {
				t.Fatal(err)
			}
			for i := range blocks {
				wantContents(t, d, block(1000*minor+100*round+i), int64(i)*4096)
				if n := binary.NativeEndian.Uint64(counts[8*i:]); n != uint64(round)+1 {
					t.Fatalf("%s: block %d was written %d times, not %d", d.Name(), i, n, round+1)
				}
			}
		}
	}
	if n := strings.Count(log.String(), "host broke the protocol of the memory socket"); n != 4 {
		t.Errorf("%d complaints about four messages that make no sense", n)
	}
}
