// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// fault is something that a handler does wrong, once, and what has to become of it.
type fault struct {
	words  string // of the device's configuration
	async  bool   // needs the asynchronous handler
	logged string // what the log says within a second, or for a hang within its timeout; "": it does no harm
	hangs  bool   // or may hang: it takes the timeout to notice
	fails  bool   // calls fail, until the process is replaced
}

const died = "handler process died"

// faults are those of plugin/testdata/fault.c, each in one call or another.
var faults = []fault{
	{words: "write=segv", logged: died},
	{words: "read@3=segv", logged: died},
	{words: "read:8192=abort", logged: died},
	{words: "flush=segv", logged: died},
	{words: "write=exit", logged: died},
	{words: "write=exit0", logged: died},
	{words: "write=_exit", logged: died},
	{words: "write=thread", logged: died},
	{words: "write=unmap", logged: died},
	{words: "write=submissions", logged: died},
	{words: "read=forge", logged: "broke the protocol"},
	{words: "write=garbage", fails: true},
	{words: "write=shrink"},
	{words: "write=stdout,read=stderr,flush=log"},
	{words: "write=fork"},
	{words: "write=twice", async: true},
	{words: "write=late", async: true},
	{words: "write=other"},
	{words: "write=hang", hangs: true, logged: "handler hangs"},
	{words: "write=loop", hangs: true, logged: "handler hangs"},
	{words: "write=deadlock", hangs: true, logged: "handler hangs"},
	{words: "write=stop", hangs: true, logged: "handler hangs"},
	{words: "write=never", async: true, hangs: true, logged: "handler hangs"},
	// What these lead to depends on what they hit; all of it must be survived.
	{words: "read=scribble", hangs: true},
	{words: "read=scribble-all", hangs: true},
	{words: "read=overrun", hangs: true},
	{words: "write=closefds", logged: died, fails: true},
	{words: "write=memory", hangs: true},
}

// TestBlastRadius has each fault while eight devices of two other handlers are written to and verified: nothing happens
// to them. The faulty handler is back for the next fault each time.
func TestBlastRadius(t *testing.T) {
	l, logged := open(t, "fault", "faultasync")
	for _, subtype := range []string{"ram", "file", "fault", "faultasync"} {
		load(t, l, subtype)
	}
	dir := t.TempDir()
	var all sync.WaitGroup
	var stop atomic.Bool
	var rounds [8]atomic.Int64
	for i := range rounds {
		config := fmt.Sprintf("/ram/@/%d", 1<<20+i*4096)
		if i%2 == 1 {
			config = fmt.Sprintf("/file/%s/bystander%d", dir, i)
		}
		d := add(t, l, 100+i, config, plugin.DeviceOptions{Size: []int64{0, 1 << 20}[i%2]})
		all.Go(func() {
			bystand(t, d, &rounds[i], &stop)
		})
	}
	done := func() (n int64) {
		for i := range rounds {
			n += rounds[i].Load()
		}
		return n
	}
	var rates blastRates
	for i, f := range faults {
		subtype := "fault"
		if f.async {
			subtype = "faultasync"
		}
		before := len(logged.String())
		config := fmt.Sprintf("/%s/%s,once=%s/once%d,store=%[3]s/store%[4]d", subtype, f.words, dir, i)
		d := add(t, l, i, config, plugin.DeviceOptions{Timeout: time.Second})
		rates.calm(done)
		began, sofar := time.Now(), done()
		haveFault(t, d, f)
		if f.logged != "" {
			limit := time.Second
			if f.hangs {
				limit = 2 * time.Second // of which one is the timeout
			}
			logged.waitFor(t, f.logged)
			for !strings.Contains(logged.String()[before:], f.logged) {
				if time.Since(began) > limit {
					t.Errorf("%s: the log does not say %q within %v", f.words, f.logged, limit)
					break
				}
				time.Sleep(time.Millisecond)
			}
		} else if !f.hangs && strings.Contains(logged.String()[before:], died) {
			t.Errorf("%s: harmless, but the handler's process died", f.words)
		}
		if f.fails {
			f.fails = false
			haveFault(t, d, f)
		}
		rates.fault(f, began, sofar, done)
		if err := l.RemoveDevice(t.Context(), i); err != nil {
			t.Errorf("%s: remove: %v", f.words, err)
		}
		for i := range rounds {
			at := rounds[i].Load()
			eventually(t, "progress of a bystander", 5*time.Second, func() bool { return rounds[i].Load() > at || t.Failed() })
		}
	}
	rates.check(t)
	stop.Store(true)
	all.Wait()
	for _, subtype := range []string{"ram", "file"} {
		if n := info(t, l, subtype).Restarts; n != 0 {
			t.Errorf("%s was restarted %d times", subtype, n)
		}
	}
}

// blastRates are how many rounds per second all bystanders together get done: before each fault, and during it.
type blastRates struct {
	before, during []float64
	words          []string
}

func rate(rounds int64, since time.Time) float64 {
	return float64(rounds) / time.Since(since).Seconds()
}

func (r *blastRates) calm(done func() int64) {
	if blastWindow > 0 {
		began, sofar := time.Now(), done()
		time.Sleep(blastWindow)
		r.before = append(r.before, rate(done()-sofar, began))
	}
}

func (r *blastRates) fault(f fault, began time.Time, sofar int64, done func() int64) {
	if blastWindow > 0 {
		time.Sleep(time.Until(began.Add(blastWindow)))
		r.during = append(r.during, rate(done()-sofar, began))
		r.words = append(r.words, f.words)
	}
}

// check fails the test unless the bystanders have kept nine tenths of their throughput, taking the middle of all
// faults. What is forgiven beyond that is by how much the middle half of the rates before the faults differ from each
// other: so much the machine makes of nothing.
func (r *blastRates) check(t *testing.T) {
	if len(r.during) == 0 {
		return
	}
	var kept []float64
	for i := range r.during {
		kept = append(kept, r.during[i]/r.before[i])
		t.Logf("%-36s %6.0f rounds/s before, %6.0f during: %3.0f%%", r.words[i], r.before[i], r.during[i], 100*kept[i])
	}
	calm := slices.Sorted(slices.Values(r.before))
	slices.Sort(kept)
	noise := (calm[len(calm)*3/4] - calm[len(calm)/4]) / calm[len(calm)/2]
	middle := kept[len(kept)/2]
	t.Logf("the bystanders kept %.1f%%, at a noise of %.1f%%", 100*middle, 100*noise)
	if middle < 0.9-noise {
		t.Errorf("the bystanders kept %.1f%% of their throughput", 100*middle)
	}
}

// haveFault works on a device until its fault has happened: everything ends, and well, unless the fault is that it does
// not.
func haveFault(t *testing.T, d *plugin.Device, f fault) {
	t.Helper()
	for i := range 4 {
		off := int64(i) * 4096
		want := block(i)
		if _, err := d.WriteAt(want, off); err != nil {
			if !f.fails {
				t.Errorf("%s: write: %v", f.words, err)
			}
		}
		got := make([]byte, 4096)
		if _, err := d.ReadAt(got, off); err != nil && !f.fails {
			t.Errorf("%s: read: %v", f.words, err)
		} else if !f.fails && !bytes.Equal(got, want) {
			t.Errorf("%s: wrong contents at %d", f.words, off)
		}
		if err := d.Flush(); err != nil && !f.fails {
			t.Errorf("%s: flush: %v", f.words, err)
		}
	}
}

// bystand writes and verifies until told to stop.
func bystand(t *testing.T, d *plugin.Device, rounds *atomic.Int64, stop *atomic.Bool) {
	for i := 0; !stop.Load(); i++ {
		off := int64(i%64) * 4096
		began := time.Now()
		if _, err := d.WriteAt(block(i), off); err != nil {
			t.Errorf("bystander %s: write: %v", d.Name(), err)
			return
		}
		got := make([]byte, 4096)
		if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, block(i)) {
			t.Errorf("bystander %s: read: %v, or wrong contents", d.Name(), err)
			return
		}
		if i%32 == 0 {
			if err := d.Flush(); err != nil {
				t.Errorf("bystander %s: flush: %v", d.Name(), err)
				return
			}
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("bystander %s was held up for %v", d.Name(), took)
		}
		rounds.Add(1)
		time.Sleep(time.Millisecond) // leave the processors to those who are to fail
	}
}

// TestHostileHost lets a handler scribble over the memory channel for a while, with requests under way: the front does
// not crash or hang, and what goes wrong is the handler's own.
func TestHostileHost(t *testing.T) {
	l, _ := open(t, "fault")
	load(t, l, "fault")
	load(t, l, "ram")
	bystander := add(t, l, 9, "/ram/@/1M", plugin.DeviceOptions{})
	dir := t.TempDir()
	for round, effect := range []string{"scribble", "scribble-all", "forge", "overrun"} {
		config := fmt.Sprintf("/fault/read@20=%s,store=%s", effect, filepath.Join(dir, effect))
		d := add(t, l, round, config, plugin.DeviceOptions{Timeout: 500 * time.Millisecond})
		var all sync.WaitGroup
		end := time.Now().Add(2 * time.Second)
		for c := range 8 {
			all.Go(func() {
				for i := 0; time.Now().Before(end); i++ {
					_, _ = d.WriteAt(block(i), int64(c)*4096) // whatever comes of it
					_, _ = d.ReadAt(make([]byte, 4096), int64(c)*4096)
				}
			})
		}
		all.Wait()
		mustWrite(t, bystander, block(round), 0)
		wantContents(t, bystander, block(round), 0)
		if err := l.ForceRemoveDevice(round); err != nil {
			t.Logf("%s: %v", effect, err)
		}
		if state := info(t, l, "fault").State; state == plugin.HandlerFailed {
			if err := l.UnloadHandler(t.Context(), "fault"); err != nil {
				t.Fatal(err)
			}
			load(t, l, "fault")
		}
	}
}
