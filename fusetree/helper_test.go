// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestHelper: the helper reads large requests when there are several at a time, and soon no small ones any more.
func TestHelper(t *testing.T) {
	moreThreads(t)
	s := serve(t, Options{IOUring: IOUringOff})
	s.mu.Lock()
	h := s.kernel.(*deviceTransport).readers.helper
	s.mu.Unlock()
	if h == nil {
		t.Skip("with several readers there is no helper")
	}
	const users, size = 4, 256 << 10
	var helped atomic.Int64
	m := &fastMemory{memory: memory{data: make([]byte, users*size), direct: true}}
	ops := m.ops()
	ops.Start = func(r *IO) bool {
		if r.origin == origin(h.reader.blocking) || r.origin == origin(h.reader.draining) {
			helped.Add(1)
		}
		return m.start(r)
	}
	ops.Commit = m.commit
	m.node = must(s.Add("file", s.Root(), 0o600, ops, nil))(t)
	m.node.UpdateSize(int64(len(m.data)))
	f := open(t, s.path("file"), os.O_RDWR)

	end := time.Now().Add(deadline)
	var group sync.WaitGroup
	for i := range uint64(users) {
		group.Go(func() {
			p := make([]byte, size)
			for round := uint64(1); helped.Load() < 100 && time.Now().Before(end); round++ {
				fillBlock(p, i, round)
				_, err := f.WriteAt(p, int64(i*size))
				ok(t, "write", err)
				clear(p)
				_, err = f.ReadAt(p, int64(i*size))
				ok(t, "read", err)
				ok(t, "contents", checkBlock(p, i, round))
			}
		})
	}
	group.Wait()
	if helped.Load() < 100 {
		t.Fatalf("the helper has read %d large requests", helped.Load())
	}
	helped.Store(0)
	for range 100 * helperPatience {
		must(f.ReadAt(make([]byte, 4096), 0))(t)
	}
	if n := helped.Load(); n > 2*helperPatience { // some come together
		t.Errorf("the helper has read %d small requests", n)
	}
	ok(t, "close", f.Close())
	s.unmount(t)
	s.wantRun(t, nil)
}
