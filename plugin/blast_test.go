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

	"github.com/hashicorp/go-hclog"

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

// bystanderPace is how often each bystander writes and verifies: a load that the machine carries with ease, so that
// what is missing of it was taken by a fault. Who was held up makes up for it, as far as it can.
const bystanderPace = 20 * time.Millisecond

// TestBlastRadius has each fault while eight devices of two other handlers are written to and verified: nothing happens
// to them, and they get nine tenths of what they want to be done, or more. The faulty handler is back for the next
// fault each time.
func TestBlastRadius(t *testing.T) { blastRadius(t, bystanderPace) }

// blastRadius does that. Bystanders without a pace go as fast as they can: what becomes of that is only reported.
func blastRadius(t *testing.T, pace time.Duration) {
	l, logged := open(t, "fault", "faultasync")
	for _, subtype := range []string{"ram", "file", "fault", "faultasync"} {
		load(t, l, subtype)
	}
	dir := t.TempDir()
	var all sync.WaitGroup
	var stop atomic.Bool
	var rounds [8]atomic.Int64
	rates := blastRates{began: time.Now(), pace: pace}
	for i := range rounds {
		config := fmt.Sprintf("/ram/@/%d", 1<<20+i*4096)
		if i%2 == 1 {
			config = fmt.Sprintf("/file/%s/bystander%d", dir, i)
		}
		d := add(t, l, 100+i, config, plugin.DeviceOptions{Size: []int64{0, 1 << 20}[i%2]})
		all.Go(func() {
			bystand(t, d, pace, &rounds[i], &stop)
		})
	}
	rates.done = func() (n int64) {
		for i := range rounds {
			n += rounds[i].Load()
		}
		return n
	}
	for i, f := range faults {
		subtype := "fault"
		if f.async {
			subtype = "faultasync"
		}
		before := len(logged.String())
		config := fmt.Sprintf("/%s/%s,once=%s/once%d,store=%[3]s/store%[4]d", subtype, f.words, dir, i)
		d := add(t, l, i, config, plugin.DeviceOptions{Timeout: time.Second})
		rates.calm()
		began, sofar := time.Now(), rates.done()
		haveFault(t, d, f)
		if f.logged != "" {
			limit := time.Second
			if f.hangs {
				limit = 2 * time.Second // of which one is the timeout
			}
			var at time.Time
			eventually(t, f.words+" in the log", 5*time.Second, func() (found bool) {
				at, found = loggedAt(t, logged.String()[before:], f.logged)
				return found
			})
			if took := at.Sub(began); took > limit {
				t.Errorf("%s: the log says %q after %v, later than %v", f.words, f.logged, took, limit)
			}
		} else if !f.hangs && strings.Contains(logged.String()[before:], died) {
			t.Errorf("%s: harmless, but the handler's process died", f.words)
		}
		if f.fails {
			f.fails = false
			haveFault(t, d, f)
		}
		rates.fault(f, began, sofar)
		if err := l.RemoveDevice(t.Context(), i); err != nil {
			t.Errorf("%s: remove: %v", f.words, err)
		}
		for i := range rounds {
			at := rounds[i].Load()
			eventually(t, "progress of a bystander", 5*time.Second, func() bool { return rounds[i].Load() > at || t.Failed() })
		}
	}
	rates.check(t, len(rounds))
	stop.Store(true)
	all.Wait()
	for _, subtype := range []string{"ram", "file"} {
		if n := info(t, l, subtype).Restarts; n != 0 {
			t.Errorf("%s was restarted %d times", subtype, n)
		}
	}
}

// loggedAt is when the first line with the text was logged.
func loggedAt(t *testing.T, text, wanted string) (time.Time, bool) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.Contains(line, wanted) {
			stamp, _, _ := strings.Cut(line, " ")
			at, err := time.Parse(hclog.TimeFormat, stamp)
			if err != nil {
				t.Fatalf("%q does not begin with a time: %v", line, err)
			}
			return at, true
		}
	}
	return time.Time{}, false
}

// blastRates are how many rounds per second all bystanders together get done: in windows that alternate, one before
// each fault, one with it.
type blastRates struct {
	began          time.Time
	pace           time.Duration
	done           func() int64 // rounds so far
	before, during []float64
	words          []string
}

func rate(rounds int64, since time.Time) float64 {
	return float64(rounds) / time.Since(since).Seconds()
}

func (r *blastRates) calm() {
	if blastWindow > 0 {
		began, sofar := time.Now(), r.done()
		time.Sleep(blastWindow)
		r.before = append(r.before, rate(r.done()-sofar, began))
	}
}

func (r *blastRates) fault(f fault, began time.Time, sofar int64) {
	if blastWindow > 0 {
		time.Sleep(time.Until(began.Add(blastWindow)))
		r.during = append(r.during, rate(r.done()-sofar, began))
		r.words = append(r.words, f.words)
	}
}

// check reports what the bystanders have kept of their throughput. Those with a pace must have kept nine tenths, all in
// all and, where windows are counted, in the middle one and in the sum of those with faults.
func (r *blastRates) check(t *testing.T, bystanders int) {
	if r.pace > 0 {
		got, wanted := rate(r.done(), r.began), float64(bystanders)/r.pace.Seconds()
		t.Logf("%.0f rounds/s of %.0f wanted, from the first to the last fault", got, wanted)
		if got < 0.9*wanted {
			t.Errorf("the bystanders got %.0f rounds/s done of %.0f that they wanted", got, wanted)
		}
	}
	if len(r.during) == 0 {
		return
	}
	var kept []float64
	before, during := 0.0, 0.0
	for i := range r.during {
		kept = append(kept, r.during[i]/r.before[i])
		before, during = before+r.before[i], during+r.during[i]
		t.Logf("%-36s %6.0f rounds/s before, %6.0f during: %3.0f%%", r.words[i], r.before[i], r.during[i], 100*kept[i])
	}
	slices.Sort(kept)
	middle, sum := kept[len(kept)/2], during/before
	t.Logf("the bystanders kept %.1f%% in the middle, %.1f%% in sum, %.1f%% at least", 100*middle, 100*sum, 100*kept[0])
	if r.pace > 0 && min(middle, sum) < 0.9 {
		t.Errorf("the bystanders kept %.1f%% of their throughput in the middle, %.1f%% in sum", 100*middle, 100*sum)
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

// bystand writes and verifies until told to stop, once in a pace.
func bystand(t *testing.T, d *plugin.Device, pace time.Duration, rounds *atomic.Int64, stop *atomic.Bool) {
	next := time.Now()
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
		if pace == 0 {
			time.Sleep(time.Millisecond) // leave the processors to those who are to fail
			continue
		}
		next = next.Add(pace)
		time.Sleep(time.Until(next))
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
