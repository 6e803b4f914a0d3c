// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestE2EConcurrency has 64 threads write and check on 8 devices of three handlers, alone and while other devices come
// and go.
func TestE2EConcurrency(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second, "fault")
	f := b.start()
	f.must("load ram\nload file\nload fault")
	const (
		devices = 8
		clients = 64
		stripe  = 128 << 10 // bytes that belong to one client
	)
	size := clients / devices * stripe
	dir := b.TempDir()
	var names []string
	for i := range devices {
		names = append(names, fmt.Sprintf("%s%03d", []string{"ram", "file", "fault"}[i%3], i))
		f.must([]string{
			fmt.Sprintf("add %d /ram/@/%d", i, size+i*4096),
			fmt.Sprintf("add %d size=%d /file/%s/%d", i, size, dir, i),
			fmt.Sprintf("add %d /fault/size=%d,n=%d", i, size, i),
		}[i%3])
	}
	load := func(seed uint64) {
		var clientsDone sync.WaitGroup
		for c := range clients {
			clientsDone.Go(func() {
				f.writeStripe(names[c%devices], int64(c/devices)*stripe, stripe, rand.New(rand.NewPCG(seed, uint64(c))))
			})
		}
		clientsDone.Wait()
	}
	load(1)

	const changes = 10
	stop, stopped := make(chan struct{}), make(chan struct{})
	var changed atomic.Int64
	go func() {
		defer close(stopped)
		for ; ; changed.Add(1) {
			select {
			case <-stop:
				return
			default:
			}
			minor := 100 + changed.Load()%50
			out, err := f.ctl(fmt.Sprintf("add %d /ram/@/5M\nadd %d size=1M /file/%s/x\n", minor, minor+50, dir))
			if err != nil {
				t.Errorf("add under load: %v\n%s", err, out)
				return
			}
			f.writeAndCheck(fmt.Sprintf("ram%03d", minor), 1<<20, 5000, byte(minor))
			if out, err := f.ctl(fmt.Sprintf("remove %d\nremove %d", minor, minor+50)); err != nil {
				t.Errorf("remove under load: %v\n%s", err, out)
				return
			}
		}
	}()
	for seed := uint64(2); changed.Load() < changes && !t.Failed(); seed++ {
		load(seed)
	}
	close(stop)
	<-stopped
}

// writeStripe writes to a part of a device that is the caller's alone, and reads it back: at any offset and length,
// through the page cache and past it.
func (f *front) writeStripe(device string, start, length int64, rng *rand.Rand) {
	const rounds = 12
	var files [2]*os.File
	for i, flags := range []int{os.O_RDWR, os.O_RDWR | syscall.O_DIRECT} {
		file, err := os.OpenFile(f.path(device), flags, 0)
		if err != nil {
			f.Error(err)
			return
		}
		defer file.Close()
		files[i] = file
	}
	model := make([]byte, length)
	if _, err := files[0].WriteAt(model, start); err != nil {
		f.Errorf("%s: %v", device, err)
		return
	}
	for round := range rounds {
		off := rng.Int64N(length)
		n := 1 + rng.Int64N(length-off)
		copy(model[off:], pattern(int(n), byte(rng.Uint32())))
		if _, err := files[rng.IntN(2)].WriteAt(model[off:off+n], start+off); err != nil {
			f.Errorf("%s: %v", device, err)
			return
		}
		got := make([]byte, length)
		if _, err := files[rng.IntN(2)].ReadAt(got, start); err != nil || !bytes.Equal(got, model) {
			f.Errorf("%s, round %d: wrong contents after a write of %d at %d (%v)", device, round, n, start+off, err)
			return
		}
		if round%4 == 0 {
			if err := files[rng.IntN(2)].Sync(); err != nil {
				f.Errorf("%s: %v", device, err)
			}
		}
	}
}
