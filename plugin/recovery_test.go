// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// info describes a loaded handler.
func info(t testing.TB, l *plugin.Library, subtype string) plugin.HandlerInfo {
	t.Helper()
	for _, h := range l.Handlers() {
		if h.Subtype == subtype {
			return h
		}
	}
	t.Fatalf("%s is not loaded", subtype)
	return plugin.HandlerInfo{}
}

// eventually waits for something that no event tells of.
func eventually(t testing.TB, what string, within time.Duration, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// kill kills the handler's host from outside, and waits until its successor serves. A host that is dead already does
// not count: then it is the successor's turn.
func kill(t testing.TB, l *plugin.Library, subtype string) {
	t.Helper()
	for {
		pid := info(t, l, subtype).PID
		err := syscall.Kill(pid, syscall.SIGKILL)
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		awaitSuccessor(t, l, subtype, pid)
		if err == nil {
			return
		}
	}
}

// awaitSuccessor waits until another process than pid serves.
func awaitSuccessor(t testing.TB, l *plugin.Library, subtype string, pid int) {
	t.Helper()
	eventually(t, fmt.Sprintf("recovery of %s, after process %d", subtype, pid), 10*time.Second, func() bool {
		h := info(t, l, subtype)
		return h.PID != pid && h.State == plugin.HandlerRunning
	})
}

func awaitRestarts(t testing.TB, l *plugin.Library, subtype string, n int) {
	t.Helper()
	eventually(t, "recovery of "+subtype, 10*time.Second, func() bool {
		h := info(t, l, subtype)
		return h.Restarts >= n && h.State == plugin.HandlerRunning
	})
}

func mustWrite(t testing.TB, d *plugin.Device, p []byte, off int64) {
	t.Helper()
	if n, err := d.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("write of %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

// wantContents reads the device at off and compares.
func wantContents(t testing.TB, d *plugin.Device, want []byte, off int64) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, off); err != nil {
		t.Errorf("read of %s at %d: %v", d.Name(), off, err)
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%s: byte %d is %#x, want %#x", d.Name(), off+int64(i), got[i], want[i])
			return
		}
	}
}

func block(seed int) []byte {
	p := make([]byte, 4096)
	for i := range p {
		p[i] = byte(seed>>(i%3*8)) + byte(i)
	}
	return p
}

// TestReplayInFlight kills a host with reads and writes in it: all of them end well, with the next host.
func TestReplayInFlight(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/delay=50000,store="+t.TempDir()+"/store", plugin.DeviceOptions{})
	const clients = 16
	eventually(t, "a kill with all requests in flight", 30*time.Second, func() bool {
		var all sync.WaitGroup
		for c := range clients {
			all.Go(func() {
				if c%2 == 0 {
					if _, err := d.WriteAt(block(c), int64(c)*4096); err != nil {
						t.Errorf("write: %v", err)
					}
				} else if _, err := d.ReadAt(make([]byte, 4096), int64(c)*4096); err != nil {
					t.Errorf("read: %v", err)
				}
			})
		}
		time.Sleep(5 * time.Millisecond) // part of the 50
		kill(t, l, "fault")
		all.Wait()
		deaths := l.Deaths(-1)
		return t.Failed() || len(deaths[len(deaths)-1].Requests) == clients
	})
	for c := 0; c < clients; c += 2 {
		wantContents(t, d, block(c), int64(c)*4096)
	}
}

// TestRetentionOrder: acknowledged writes that a host has lost are there again, and of those to the same place the last
// one counts. A flush in between changes nothing of that.
func TestRetentionOrder(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{})
	last := make(map[int64]int)
	for i := range 1500 {
		off := int64(i*i%7) * 2048 // blocks overlap their neighbours
		mustWrite(t, d, block(i), off)
		last[off/2048] = i
		if i == 700 {
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := make([]byte, 8*2048)
	offsets := []int64{}
	for off := range last {
		offsets = append(offsets, off)
	}
	slices.SortFunc(offsets, func(a, b int64) int { return last[a] - last[b] })
	for _, off := range offsets {
		copy(want[off*2048:], block(last[off]))
	}
	wantContents(t, d, want, 0)
	for range 3 { // the later ones find what the earlier ones have sent again, unflushed
		kill(t, l, "fault")
		wantContents(t, d, want, 0)
	}
	if d.Retained() == 0 {
		t.Error("nothing is retained, though nothing was flushed")
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := d.Retained(); n != 0 {
		t.Errorf("%d bytes are retained after a flush", n)
	}
	kill(t, l, "fault")
	wantContents(t, d, want, 0)
}

// TestRetainedClears: holes and zeroed ranges that a host has acknowledged into its memory, and lost, are made again,
// in their order among the writes around them. That a flush covers them ends it.
func TestRetainedClears(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	for minor, config := range []string{"/fault/zeroes,lazy=" + dir + "/unmap", "/fault/lazy=" + dir + "/writesame"} {
		d := add(t, l, minor, config, plugin.DeviceOptions{})
		want := make([]byte, 64<<10)
		for i := range want {
			want[i] = byte(i>>9) | 1
		}
		mustWrite(t, d, want, 0)
		if err := d.Flush(); err != nil { // what a lost hole would bring to light again
			t.Fatal(err)
		}
		for i := range 200 {
			off, n := int64(i*i%13)*4096+int64(i%3)*100, int64(4096+i%5*700)
			p := want[off : off+n]
			switch i % 4 {
			case 0, 1:
				copy(p, bytes.Repeat([]byte{byte(i) | 1}, int(n)))
				mustWrite(t, d, p, off)
				continue
			case 2:
				clear(p)
				if err := d.Discard(off, n); err != nil {
					t.Fatal(err)
				}
			case 3:
				clear(p)
				if err := d.Zero(off, n); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range 2 {
			kill(t, l, "fault")
			wantContents(t, d, want, 0)
		}
		if d.Retained() == 0 {
			t.Error("nothing is retained, though nothing was flushed")
		}
		if err := d.Flush(); err != nil || d.Retained() != 0 {
			t.Errorf("%d bytes are retained after a flush (%v)", d.Retained(), err)
		}
		kill(t, l, "fault")
		wantContents(t, d, want, 0)
	}
}

// TestFlushBoundary: what completes while a flush is under way is not covered by it.
func TestFlushBoundary(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	path := filepath.Join(t.TempDir(), "lazy")
	d := add(t, l, 0, "/fault/linger=200000,lazy="+path, plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush() }()
	eventually(t, "the handler's flush", 5*time.Second, func() bool {
		got, err := os.ReadFile(path)
		return err == nil && len(got) >= 4096 && bytes.Equal(got[:4096], block(1))
	})
	mustWrite(t, d, block(2), 4096)
	mustWrite(t, d, block(3), 0)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	kill(t, l, "fault")
	wantContents(t, d, block(3), 0)
	wantContents(t, d, block(2), 4096)
}

// TestContentsModel writes, reads and flushes at random, by several clients, while the host, its successors and those
// in reserve are killed at random instants. Whatever was acknowledged is there at each read, and whatever was flushed
// is in the file.
func TestContentsModel(t *testing.T) {
	const clients, stripe = 6, 96 << 10
	for _, handler := range []string{"lazy", "store", "file"} {
		t.Run(handler, func(t *testing.T) {
			l, _ := open(t, "fault")
			path := filepath.Join(t.TempDir(), "contents")
			subtype, config := "fault", fmt.Sprintf("/fault/zeroes,size=%d,delay=100,%s=%s", clients*stripe, handler, path)
			if handler == "file" {
				subtype, config = "file", "/file/"+path
			}
			load(t, l, subtype)
			d := add(t, l, 0, config, plugin.DeviceOptions{Size: clients * stripe})
			var models [clients][]byte
			var all sync.WaitGroup
			var stop atomic.Bool
			var rounds atomic.Int64
			for c := range clients {
				rng := rand.New(rand.NewPCG(uint64(c), uint64(len(handler))))
				all.Go(func() {
					models[c] = driveModel(t, d, path, int64(c)*stripe, stripe, rng, &stop, &rounds)
				})
			}
			rng := rand.New(rand.NewPCG(4711, 0))
			for end := time.Now().Add(3 * time.Second); time.Now().Before(end) && !t.Failed(); {
				time.Sleep(time.Duration(rng.IntN(30_000)) * time.Microsecond)
				before := rounds.Load()
				pid := info(t, l, subtype).PID
				_ = syscall.Kill(pid, syscall.SIGKILL)
				if rng.IntN(3) == 0 { // once more in the middle of the recovery, and with it those in reserve
					time.Sleep(time.Duration(rng.IntN(60_000)) * time.Microsecond)
					for _, pid := range testbed.Descendants(os.Getpid()) {
						_ = syscall.Kill(pid, syscall.SIGKILL)
					}
				}
				awaitSuccessor(t, l, subtype, pid)
				// The budget of deaths is for those without a request completed in between.
				eventually(t, "progress", 10*time.Second, func() bool { return rounds.Load() > before+clients || t.Failed() })
			}
			stop.Store(true)
			all.Wait()
			restarts := info(t, l, subtype).Restarts
			t.Logf("%d restarts, %d rounds", restarts, rounds.Load())
			if restarts < 5 {
				t.Errorf("only %d restarts", restarts)
			}
			want := slices.Concat(models[:]...)
			kill(t, l, subtype)
			wantContents(t, d, want, 0)
			if err := l.RemoveDevice(t.Context(), 0); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the file has other contents than the device had (%v)", err)
			}
		})
	}
}

// driveModel works on a part of a device that is the caller's alone until it is told to stop, and returns what must be
// in it then.
func driveModel(
	t *testing.T, d *plugin.Device, path string, start, length int64, rng *rand.Rand, stop *atomic.Bool,
	rounds *atomic.Int64,
) []byte {
	model := make([]byte, length)
	for round := 0; !stop.Load() && !t.Failed(); round++ {
		rounds.Add(1)
		off := rng.Int64N(length)
		n := 1 + rng.Int64N(min(length-off, 16<<10))
		switch rng.IntN(16) {
		default:
			for i := range n {
				model[off+i] = byte(rng.Uint32())
			}
			if _, err := d.WriteAt(model[off:off+n], start+off); err != nil {
				t.Errorf("write: %v", err)
			}
		case 4:
			clear(model[off : off+n])
			if err := d.Zero(start+off, n); err != nil {
				t.Errorf("zero: %v", err)
			}
		case 5:
			clear(model[off : off+n])
			if err := d.Discard(start+off, n); err != nil {
				t.Errorf("discard: %v", err)
			}
		case 0, 1, 2:
			wantContents(t, d, model[off:off+n], start+off)
		case 3:
			if err := d.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
			got := make([]byte, length)
			f, err := os.Open(path)
			if err == nil {
				_, err = f.ReadAt(got, start)
				_ = f.Close()
			}
			if err != nil || !bytes.Equal(got, model) {
				t.Errorf("round %d: flushed, but the file has other contents (%v)", round, err)
			}
		}
	}
	return model
}

// TestPoison: of many requests in flight the one that its handler dies of is found, and it alone fails.
func TestPoison(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	load(t, l, "ram")
	dir := t.TempDir()
	bad := add(t, l, 0, "/fault/delay=2000,write:65536=segv,store="+dir+"/a", plugin.DeviceOptions{})
	same := add(t, l, 1, "/fault/delay=2000,store="+dir+"/b", plugin.DeviceOptions{})
	other := add(t, l, 2, "/ram/@/1M", plugin.DeviceOptions{})
	var all sync.WaitGroup
	stop := make(chan struct{})
	var rounds [8]atomic.Int64
	for c := range rounds {
		d := []*plugin.Device{bad, same, other}[c%3]
		all.Go(func() {
			for i := 0; ; i++ {
				if _, err := d.WriteAt(block(i), int64(c)*4096); err != nil {
					t.Errorf("neighbour on %s: %v", d.Name(), err)
					return
				}
				wantContents(t, d, block(i), int64(c)*4096)
				rounds[c].Add(1)
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for range 2 { // again, when the first is forgotten
		_, err := bad.WriteAt(block(1), 65536)
		wantErrno(t, "poison", err, syscall.EIO, "fault000", "65536", "died")
		logged.waitFor(t, "request is given up", "fault000", "write of 4096 bytes at 65536")
	}
	close(stop)
	all.Wait()
	poison := 0
	for _, death := range l.Deaths(0) {
		if !death.Poison {
			continue
		}
		poison++
		text := death.String()
		for _, want := range []string{"fault", "write of 4096 bytes at 65536 on fault000", "signal 11", "backtrace"} {
			if !strings.Contains(text, want) {
				t.Errorf("the story of the death does not say %q:\n%s", want, text)
			}
		}
		if len(death.Requests) != 1 {
			t.Errorf("%d requests were alone in flight", len(death.Requests))
		}
	}
	if poison != 2 {
		t.Errorf("%d deaths by poison, want 2", poison)
	}
	mustWrite(t, bad, block(5), 128<<10)
}

// TestTwoPoisons has two of them in flight at once: each is found, and nobody else fails.
func TestTwoPoisons(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/write:0=segv,write:8192=abort,delay=1000,store="+t.TempDir()+"/a", plugin.DeviceOptions{})
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			_, err := d.WriteAt(block(i), int64(i)*4096)
			if i == 0 || i == 2 {
				wantErrno(t, "poison", err, syscall.EIO)
			} else if err != nil {
				t.Errorf("innocent write %d: %v", i, err)
			}
		})
	}
	all.Wait()
	for _, i := range []int{1, 3, 4, 5} {
		wantContents(t, d, block(i), int64(i)*4096)
	}
	alone := make(map[int64]int) // by offset
	for _, death := range l.Deaths(0) {
		if len(death.Requests) == 1 {
			alone[death.Requests[0].Offset]++
		}
	}
	for _, off := range []int64{0, 8192} {
		if alone[off] != 3 {
			t.Errorf("the write at %d was condemned after %d deaths alone in flight", off, alone[off])
		}
	}
}

// TestKillsFromOutside: a request that is alone in flight each time that somebody kills the host is not to blame.
func TestKillsFromOutside(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/delay=300000,store="+t.TempDir()+"/store", plugin.DeviceOptions{})
	alone := 0
	for round := 0; alone < 8 && !t.Failed(); round++ {
		written := make(chan error, 1)
		go func() {
			_, err := d.WriteAt(block(round), 0)
			written <- err
		}()
		for range 4 { // in a row, each well before the write is done
			time.Sleep(10 * time.Millisecond)
			kill(t, l, "fault")
		}
		if err := <-written; err != nil {
			t.Errorf("write: %v", err)
		}
		alone = 0
		for _, death := range l.Deaths(0) {
			if !death.Outside || death.Poison {
				t.Errorf("not told from a crash: %v", death)
			}
			alone += len(death.Requests)
		}
	}
}

// TestDeathBudget: a handler that dies whenever it is loaded again, though not at first, fails in the end; its devices
// answer EIO, and can be removed, the handler unloaded, and both be had again.
func TestDeathBudget(t *testing.T) {
	deadly := spoilInit(t)
	l, logged := open(t, "fault")
	load(t, l, "fault")
	load(t, l, "ram")
	bystander := add(t, l, 9, "/ram/@/1M", plugin.DeviceOptions{})
	d := add(t, l, 0, "/fault/store="+t.TempDir()+"/store", plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
	deadly(true)
	if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, err := d.ReadAt(make([]byte, 512), 0)
	wantErrno(t, "read that waited for the recovery", err, syscall.EIO)
	logged.waitFor(t, "handler has failed", "fault")
	if state := info(t, l, "fault").State; state != plugin.HandlerFailed {
		t.Errorf("state %s", state)
	}
	_, err = d.WriteAt(block(2), 0)
	wantErrno(t, "write", err, syscall.EIO)
	wantErrno(t, "flush", d.Flush(), syscall.EIO)
	if d.StartRead(512, 0, nil) {
		t.Error("a read was started")
	}
	_, err = l.AddDevice(t.Context(), 1, "/fault/", plugin.DeviceOptions{})
	wantErrno(t, "add", err, syscall.EIO)
	mustWrite(t, bystander, block(3), 0)
	deadly(false)
	if err := l.RemoveDevice(t.Context(), 0); err != nil && !errors.Is(err, syscall.EIO) {
		t.Errorf("remove: %v", err)
	}
	if err := l.UnloadHandler(t.Context(), "fault"); err != nil {
		t.Fatal(err)
	}
	load(t, l, "fault")
	d = add(t, l, 0, "/fault/", plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
}

// spoilInit has handlers that are built from fault.c, and loaded from now on, die in handler_init while that is set.
func spoilInit(t *testing.T) (set func(bool)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "deadly")
	t.Setenv("TCMUR_FAULT_INIT", path)
	return func(deadly bool) {
		t.Helper()
		var err error
		if deadly {
			err = os.WriteFile(path, nil, 0o600)
		} else {
			err = os.Remove(path)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestInitDiesAtRestart: a handler that dies in handler_init when it is loaded again is tried again, and whoever waits
// for it notices no more than that.
func TestInitDiesAtRestart(t *testing.T) {
	deadly := spoilInit(t)
	l, logged := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{})
	mustWrite(t, d, block(1), 0)
	deadly(true)
	if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	logged.waitFor(t, "recovery failed, trying again", "fault", "handler_init")
	deadly(false)
	wantContents(t, d, block(1), 0)
}

// TestReopenDies: devices in whose reopen the handler's process dies each time fail, and no other: neither by the
// number of deaths, which all of them together have more of than the handler may, nor for longer than it takes to try
// once.
func TestReopenDies(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	var devices []*plugin.Device
	for i, word := range []string{"", "reopen=segv,", "", "reopen=abort,", ""} {
		config := fmt.Sprintf("/fault/%slazy=%s/%d", word, dir, i)
		devices = append(devices, add(t, l, i, config, plugin.DeviceOptions{}))
		mustWrite(t, devices[i], block(i), 0)
	}
	if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for i, d := range devices {
		if i%2 == 0 {
			wantContents(t, d, block(i), 0)
			continue
		}
		_, err := d.ReadAt(make([]byte, 4096), 0)
		wantErrno(t, "read", err, syscall.EIO, d.Name(), "3 times while reopening")
		deaths := l.Deaths(i)
		if len(deaths) != 3 {
			t.Errorf("%d deaths for %s", len(deaths), d.Name())
		}
		for _, death := range deaths {
			if text := death.String(); death.Reopening != d.Name() || !strings.Contains(text, "while reopening "+d.Name()) {
				t.Errorf("the story of the death does not name %s:\n%s", d.Name(), text)
			}
		}
	}
	for i := 0; i < len(devices); i += 2 {
		wantContents(t, devices[i], block(i), 0)
	}
	kill(t, l, "fault")
	wantContents(t, devices[4], block(4), 0)
	if strings.Contains(logged.String(), "handler has failed") {
		t.Error("the handler has failed")
	}
}

// TestReopenDiesOnce: a device whose reopen kills the process once is there after the others, with what it had retained
// and what was in flight.
func TestReopenDiesOnce(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	good := add(t, l, 0, "/fault/store="+dir+"/good", plugin.DeviceOptions{})
	config := fmt.Sprintf("/fault/delay=100000,reopen=segv,once=%s/once,lazy=%[1]s/bad", dir)
	bad := add(t, l, 1, config, plugin.DeviceOptions{})
	mustWrite(t, bad, block(1), 0)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			if _, err := bad.WriteAt(block(i), int64(1+i)*4096); err != nil {
				t.Errorf("write: %v", err)
			}
		})
		all.Go(func() {
			for range 100 {
				if _, err := good.WriteAt(block(i), int64(i)*4096); err != nil {
					t.Errorf("write: %v", err)
				}
			}
		})
	}
	time.Sleep(20 * time.Millisecond) // part of the 100
	if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	all.Wait()
	logged.waitFor(t, "device recovered after the others", "fault001")
	wantContents(t, bad, block(1), 0)
	for i := range 8 {
		wantContents(t, bad, block(i), int64(1+i)*4096)
		wantContents(t, good, block(i), int64(i)*4096)
	}
	kill(t, l, "fault") // when it is one of many again
	wantContents(t, bad, block(1), 0)
}

// TestReopenHangs: a device whose reopen hangs holds up the others for part of its timeout only, and fails by itself.
func TestReopenHangs(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	before := add(t, l, 0, "/fault/store="+dir+"/0", plugin.DeviceOptions{})
	bad := add(t, l, 1, "/fault/reopen=hang,store="+dir+"/1", plugin.DeviceOptions{Timeout: 6 * time.Second})
	after := add(t, l, 2, "/fault/store="+dir+"/2", plugin.DeviceOptions{})
	mustWrite(t, bad, block(1), 0)
	if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for i, d := range []*plugin.Device{before, after} {
		mustWrite(t, d, block(i), 0)
		wantContents(t, d, block(i), 0)
	}
	t.Logf("the others were back after %v", time.Since(began))
	if bad.Failure() != nil {
		t.Error("the others were back only when the device that hangs had failed")
	}
	_, err := bad.ReadAt(make([]byte, 4096), 0)
	wantErrno(t, "read", err, syscall.EIO, "does not return from open")
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	wantContents(t, before, block(0), 0)
	wantContents(t, after, block(1), 0)
}

// TestRemoveDiesInClose: what a removal says when the handler dies of it depends on what that means for the data.
func TestRemoveDiesInClose(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	flushed := add(t, l, 0, "/fault/close=segv,lazy="+dir+"/0", plugin.DeviceOptions{})
	again := add(t, l, 1, fmt.Sprintf("/fault/close=segv,once=%s/once,lazy=%[1]s/1", dir), plugin.DeviceOptions{})
	unguarded := add(t, l, 2, "/fault/close=segv,lazy="+dir+"/2", plugin.DeviceOptions{FailFast: true})
	never := add(t, l, 3, "/fault/flush=segv,lazy="+dir+"/3", plugin.DeviceOptions{})
	for i, d := range []*plugin.Device{flushed, again, unguarded, never} {
		mustWrite(t, d, block(i), 0)
	}
	if err := flushed.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Errorf("everything was flushed: %v", err)
	}
	logged.waitFor(t, "device has failed", "fault000", "died while closing it")
	if err := l.RemoveDevice(t.Context(), 1); err != nil {
		t.Errorf("the second try went well: %v", err)
	}
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 2), syscall.EIO, "since its last flush may be lost")
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 3), syscall.EIO, "of unflushed writes may be lost")
	for i := range 2 {
		got, err := os.ReadFile(fmt.Sprintf("%s/%d", dir, i))
		if err != nil || !bytes.Equal(got[:4096], block(i)) {
			t.Errorf("device %d: the file has other contents (%v)", i, err)
		}
	}
	for i := range 4 {
		if l.Device(i) != nil {
			t.Errorf("device %d is still there", i)
		}
	}
}

// TestReopenRefused: a device that the handler does not open again fails alone.
func TestReopenRefused(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	gone := add(t, l, 0, "/fault/x=1", plugin.DeviceOptions{})
	refused := add(t, l, 1, "/fault/reopen=-2,store="+dir+"/a", plugin.DeviceOptions{})
	good := add(t, l, 2, "/fault/store="+dir+"/b", plugin.DeviceOptions{})
	for _, d := range []*plugin.Device{gone, refused, good} {
		mustWrite(t, d, block(7), 0)
	}
	kill(t, l, "fault")
	for _, d := range []*plugin.Device{gone, refused} {
		logged.waitFor(t, "device has failed", d.Name())
		_, err := d.ReadAt(make([]byte, 4096), 0)
		wantErrno(t, "read", err, syscall.EIO, d.Name())
		_, err = d.WriteAt(make([]byte, 4096), 0)
		wantErrno(t, "write", err, syscall.EIO, d.Name())
		wantErrno(t, "flush", d.Flush(), syscall.EIO, d.Name())
	}
	kill(t, l, "fault")
	wantContents(t, good, block(7), 0)
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 0), syscall.EIO)
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 1), syscall.EIO)
	mustWrite(t, add(t, l, 0, "/fault/x=1", plugin.DeviceOptions{}), block(1), 0)
}

// TestHang: a request that the handler does not end costs the host its life, and ends with the next one.
func TestHang(t *testing.T) {
	for _, tt := range []struct{ subtype, effect string }{
		{"fault", "hang"}, {"fault", "stop"}, {"faultasync", "never"},
	} {
		t.Run(tt.effect+"-"+tt.subtype, func(t *testing.T) {
			l, logged := open(t, tt.subtype)
			load(t, l, tt.subtype)
			dir := t.TempDir()
			config := fmt.Sprintf("/%s/write=%s,once=%s/once,store=%[3]s/store", tt.subtype, tt.effect, dir)
			d := add(t, l, 0, config, plugin.DeviceOptions{Timeout: time.Second})
			began := time.Now()
			mustWrite(t, d, block(3), 0)
			if took := time.Since(began); took < time.Second || took > 4*time.Second {
				t.Errorf("the write took %v, with a timeout of 1s", took)
			}
			logged.waitFor(t, "handler hangs", tt.subtype)
			wantContents(t, d, block(3), 0)
		})
	}
}

// TestHangAfterRest: the request that hangs is the first one in a while, and nobody watches by then.
func TestHangAfterRest(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	config := fmt.Sprintf("/fault/read=hang,once=%s/once,store=%[1]s/store", dir)
	d := add(t, l, 0, config, plugin.DeviceOptions{Timeout: 500 * time.Millisecond})
	mustWrite(t, d, block(3), 0)
	eventually(t, "the watchdog sleeps", 10*time.Second, l.WatchdogSleeps)
	wantContents(t, d, block(3), 0)
	logged.waitFor(t, "handler hangs", "fault")
}

// TestHangsEachTime: a request that hangs each time is given up, as one that crashes is.
func TestHangsEachTime(t *testing.T) {
	l, logged := open(t, "fault")
	load(t, l, "fault")
	config := "/fault/read:8192=hang,store=" + t.TempDir() + "/store"
	d := add(t, l, 0, config, plugin.DeviceOptions{Timeout: 500 * time.Millisecond})
	began := time.Now()
	_, err := d.ReadAt(make([]byte, 4096), 8192)
	wantErrno(t, "poison", err, syscall.EIO, "8192")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	logged.waitFor(t, "request is given up", "fault000")
	mustWrite(t, d, block(3), 0)
}

// TestForceRemove takes a device away with requests that never end, in every state in which a handler can be stuck.
func TestForceRemove(t *testing.T) {
	for _, tt := range []struct {
		name, config string
		kill         bool // the host, so that the handler is stuck in its recovery
	}{
		{"hang", "read=hang", false},
		{"stop", "read=stop", false},
		{"reopen-hangs", "read=hang,reopen=hang", true},
		{"reopen-dies", "read=hang,reopen=segv", true},
		{"close-hangs", "close=hang", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, logged := open(t, "fault")
			load(t, l, "fault")
			dir := t.TempDir()
			d := add(t, l, 0, "/fault/"+tt.config+",store="+dir+"/a", plugin.DeviceOptions{Timeout: -1})
			other := add(t, l, 1, "/fault/store="+dir+"/b", plugin.DeviceOptions{})
			mustWrite(t, other, block(1), 0)
			var reads sync.WaitGroup
			if tt.name != "close-hangs" {
				for range 3 {
					reads.Go(func() {
						_, err := d.ReadAt(make([]byte, 512), 0)
						if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENODEV) {
							t.Errorf("read that was stuck: %v", err)
						}
					})
				}
				time.Sleep(50 * time.Millisecond) // not needed for the test to pass, only to be what it should be
			}
			if tt.kill {
				if err := syscall.Kill(info(t, l, "fault").PID, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				logged.waitFor(t, "handler process died", "fault")
			}
			began := time.Now()
			if err := l.ForceRemoveDevice(0); err != nil && !errors.Is(err, syscall.EIO) {
				t.Error(err)
			}
			reads.Wait()
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("it took %v", took)
			}
			if l.Device(0) != nil {
				t.Error("the device is still there")
			}
			wantContents(t, other, block(1), 0)
			if took := time.Since(began); took > 4*time.Second { // least of all until a reopen's time is up
				t.Errorf("the handler's other device was back after %v", took)
			}
			mustWrite(t, add(t, l, 0, "/fault/size=4096", plugin.DeviceOptions{}), block(1), 0)
		})
	}
}

// TestFailFast: a device that was added so has its requests fail at the death of its host, and works with the next one.
func TestFailFast(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/write:4096=segv,lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{FailFast: true})
	mustWrite(t, d, block(1), 0)
	if n := d.Retained(); n != 0 {
		t.Errorf("%d bytes are retained", n)
	}
	_, err := d.WriteAt(block(1), 4096)
	wantErrno(t, "write", err, syscall.EIO)
	awaitRestarts(t, l, "fault", 1)
	deaths := l.Deaths(0)
	if len(deaths) != 1 {
		t.Fatalf("%d deaths of a request that was not to be sent again", len(deaths))
	}
	if text := deaths[0].String(); !strings.Contains(text, "in flight: write of 4096 bytes at 4096 on fault000") {
		t.Errorf("the story of the death does not name the request:\n%s", text)
	}
	wantContents(t, d, make([]byte, 4096), 0) // the handler had it in memory, and nobody else had
	mustWrite(t, d, block(2), 8192)
}

// TestRetentionBound: whoever writes and never flushes goes on for ever, in bounded memory, by flushes that nobody
// asked for.
func TestRetentionBound(t *testing.T) {
	const (
		bound   = 1 << 20
		clients = 4
		total   = 6 * bound
	)
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/flush=slow,lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{Retention: bound})
	var most atomic.Int64
	var all sync.WaitGroup
	for c := range clients {
		all.Go(func() {
			for i := range total / clients / 4096 {
				if _, err := d.WriteAt(block(i), int64(c)*(128<<10)+int64(i%32)*4096); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				for held, old := d.Retained(), most.Load(); held > old && !most.CompareAndSwap(old, held); {
					old = most.Load()
				}
			}
		})
	}
	all.Wait()
	t.Logf("at most %d bytes were retained", most.Load())
	if limit := int64(bound + clients*8192); most.Load() > limit {
		t.Errorf("%d bytes were retained, more than %d", most.Load(), limit)
	}
	kill(t, l, "fault")
	for c := range int64(clients) {
		for i := total/clients/4096 - 32; i < total/clients/4096; i++ {
			wantContents(t, d, block(i), c*(128<<10)+int64(i%32)*4096)
		}
	}
}

// TestFailingFlush: when what is retained cannot be flushed, writers are told, and still nothing is lost of what was
// acknowledged.
func TestFailingFlush(t *testing.T) {
	const bound = 256 << 10
	l, logged := open(t, "fault")
	load(t, l, "fault")
	dir := t.TempDir()
	d := add(t, l, 0, "/fault/flush=4,lazy="+dir+"/lazy", plugin.DeviceOptions{Retention: bound})
	var acknowledged []int
	var refused error
	for i := 0; i < 2*bound/4096 && refused == nil; i++ {
		if _, refused = d.WriteAt(block(i), int64(i)*4096); refused == nil {
			acknowledged = append(acknowledged, i)
		}
	}
	wantErrno(t, "write when the bound is reached", refused, syscall.EIO)
	logged.waitFor(t, "request failed", "fault000: flush")
	wantErrno(t, "flush", d.Flush(), syscall.EIO)
	kill(t, l, "fault")
	for _, i := range acknowledged {
		wantContents(t, d, block(i), int64(i)*4096)
	}
	if len(acknowledged) < bound/2/4096 {
		t.Errorf("only %d writes were acknowledged", len(acknowledged))
	}
	wantErrno(t, "remove", l.RemoveDevice(t.Context(), 0), syscall.EIO, "flush")
}

// TestSpare: the process that takes over is one that was ready. It goes with the last handler.
func TestSpare(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/store="+t.TempDir()+"/store", plugin.DeviceOptions{})
	for range 3 {
		var spare []int
		eventually(t, "a spare process", 5*time.Second, func() bool {
			spare = slices.DeleteFunc(testbed.Descendants(os.Getpid()), func(pid int) bool {
				return pid == info(t, l, "fault").PID
			})
			return len(spare) == 1 && l.HasSpare()
		})
		kill(t, l, "fault")
		if pid := info(t, l, "fault").PID; pid != spare[0] {
			t.Errorf("process %d took over, and not %d, which was ready", pid, spare[0])
		}
		mustWrite(t, d, block(1), 0)
	}
	// The spare one is not there when it is needed.
	eventually(t, "a spare process", 5*time.Second, l.HasSpare)
	for _, pid := range testbed.Descendants(os.Getpid()) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	awaitRestarts(t, l, "fault", 4)
	wantContents(t, d, block(1), 0)
	if err := l.RemoveDevice(t.Context(), 0); err != nil {
		t.Error(err)
	}
	if err := l.UnloadHandler(t.Context(), "fault"); err != nil {
		t.Error(err)
	}
	eventually(t, "the end of all processes", time.Second, func() bool {
		return len(testbed.Descendants(os.Getpid())) == 0
	})
}
