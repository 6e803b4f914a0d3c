// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// ended is a completion that sends the error of its request.
type ended chan error

func (e ended) Complete(_ []byte, _ int, err error) { e <- err }

// TestScatteredRetention: what is retained here and there in the memory for requests is no obstacle to a large one for
// ever.
func TestScatteredRetention(t *testing.T) {
	testbed.Deadline(t, testDeadline)
	testbed.NothingLeft(t)
	const blocks = 4
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{testbed.BuildHandlers(t, "fault")},
		HostBinary:      testbed.Program(t, "tcmur-host"),
		ChannelMemory:   blocks << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	load(t, l, "fault")
	d := add(t, l, 0, "/fault/size=0x1000000,delay=200000", plugin.DeviceOptions{})
	other := add(t, l, 1, "/fault/size=0x2000000", plugin.DeviceOptions{})

	// In each block of memory one payload that stays where it is, and small ones that are copied: none of these is done
	// before all have their place.
	results := make(ended, 100)
	begun := 0
	for range blocks {
		for i := range 9 {
			p := make([]byte, 60<<10)
			if i == 0 {
				p = make([]byte, 512<<10)
			}
			if !d.StartWrite(p, 0, results) {
				t.Fatal("a write was not begun")
			}
			begun++
		}
	}
	d.Commit(nil)
	for range begun {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	go func() {
		_, err := other.WriteAt(make([]byte, 1<<20), 0)
		_, small := other.WriteAt(make([]byte, 512), 0)
		results <- errors.Join(err, small)
	}()
	select {
	case err := <-results:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a large write waits for memory that nobody frees")
		if err := l.ForceUnloadHandler("fault"); err != nil {
			t.Log(err)
		}
	}
	if n := d.Stats().OwnFlushes; n == 0 {
		t.Error("what was retained was not flushed: the memory was not as scattered as this test needs it")
	}
}
