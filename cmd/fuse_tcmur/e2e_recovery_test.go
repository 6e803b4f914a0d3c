// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// TestE2EBlastRadius has handlers fail in every way, while eight devices of two other handlers are written to and
// checked. Nothing happens to these, and whoever uses the faulty device has no error either.
func TestE2EBlastRadius(t *testing.T) {
	b := newBed(t, 120*time.Second, "fault", "faultasync")
	f := b.start()
	dir := b.TempDir()
	f.must("load ram\nload file\nload fault\nload faultasync")
	c := f.startClients()
	for i := range 8 {
		name := fmt.Sprintf("ram%03d", 100+i)
		add := fmt.Sprintf("add %d /ram/@/%d", 100+i, 1<<20+i*4096)
		if i%2 == 1 {
			name = fmt.Sprintf("file%03d", 100+i)
			add = fmt.Sprintf("add %d size=1M /file/%s/bystander%d", 100+i, dir, i)
		}
		f.must(add)
		c.writer(f.path(name), []int{os.O_RDWR, os.O_RDWR | syscall.O_DIRECT}[i/2%2], 0, 256<<10)
	}
	c.first.Wait()
	const died, hangs = "handler process died", "handler hangs"
	minor := 0
	for _, tt := range []struct {
		subtype, words string
		logged         string // within a second, or for a hang, a second after the timeout; "": it does no harm
	}{
		{"fault", "write=segv", died},
		{"fault", "read=abort", died},
		{"fault", "flush=segv", died},
		{"fault", "write:8192=exit", died},
		{"fault", "write@2=exit0", died},
		{"fault", "read=_exit", died},
		{"fault", "write=thread", died},
		{"fault", "write=unmap", died},
		{"fault", "write=submissions", died},
		{"fault", "read=forge", "broke the protocol"},
		{"fault", "write=shrink", ""},
		{"fault", "write=stdout,read=stderr,flush=log", ""},
		{"fault", "write=fork", ""},
		{"fault", "write=other", ""},
		{"faultasync", "write=segv", died},
		{"faultasync", "write=twice", ""},
		{"faultasync", "write=late", ""},
		{"fault", "write=hang", hangs},
		{"fault", "read=loop", hangs},
		{"fault", "flush=deadlock", hangs},
		{"fault", "write=stop", hangs},
		{"faultasync", "read=never", hangs},
		{"fault", "read=scribble", hangs},
	} {
		name := fmt.Sprintf("%s%03d", tt.subtype, minor)
		f.must(fmt.Sprintf("add %d timeout=1 /%s/%s,once=%s/once%[1]d,store=%[4]s/store%[1]d",
			minor, tt.subtype, tt.words, dir))
		before := len(f.log.String())
		began := time.Now()
		file := f.open(name, os.O_RDWR|syscall.O_DIRECT)
		for i := range 4 {
			off, want, got := int64(i)*4096, pattern(4096, byte(i)), make([]byte, 4096)
			if _, err := file.WriteAt(want, off); err != nil {
				t.Errorf("%s: write: %v", tt.words, err)
			}
			if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: read: %v, or wrong contents", tt.words, err)
			}
			if err := file.Sync(); err != nil {
				t.Errorf("%s: fsync: %v", tt.words, err)
			}
		}
		file.Close()
		limit := time.Second
		if tt.logged == hangs {
			limit += 1250 * time.Millisecond // timeouts are counted in quarters of a second
		}
		switch {
		case tt.words == "read=scribble":
			// What it hits decides whether it hangs, breaks the protocol, dies, or nobody notices.
		case tt.logged != "":
			if took := f.loggedAt(before, tt.logged).Sub(began); took > limit {
				t.Errorf("%s: the log says %q after %v, later than %v", tt.words, tt.logged, took, limit)
			}
		case hasLine(f.log.String()[before:], died):
			t.Errorf("%s: harmless, but the handler's process died", tt.words)
		}
		f.must(fmt.Sprintf("remove %d", minor))
		minor++
	}
	c.end()
}

// loggedAt waits until the log, behind so many bytes, has a line with the text, and returns the time that stands there.
func (f *front) loggedAt(behind int, wanted string) time.Time {
	f.Helper()
	f.wantLogSince(behind, wanted)
	for line := range strings.Lines(f.log.String()[behind:]) {
		if !strings.Contains(line, wanted) {
			continue
		}
		stamp, _, _ := strings.Cut(line, " ")
		at, err := time.Parse(hclog.TimeFormat, stamp)
		if err != nil {
			f.Fatalf("%q does not begin with a time: %v", line, err)
		}
		return at
	}
	panic("the line is gone")
}
