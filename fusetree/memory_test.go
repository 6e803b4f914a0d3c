// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// memory is a node of fixed size whose contents are in memory. It counts what it is asked to do.
type memory struct {
	node   *Node
	direct bool // opens ask for DirectIO

	opens, releases, fsyncs, datasyncs, dsyncWrites atomic.Int64

	mu   sync.RWMutex // guards data
	data []byte
}

func newMemory(t testing.TB, tree *Tree, name string, size int) *memory {
	t.Helper()
	return addMemory(t, tree, name, &memory{data: make([]byte, size)})
}

func newDirectMemory(t testing.TB, tree *Tree, name string, size int) *memory {
	t.Helper()
	return addMemory(t, tree, name, &memory{data: make([]byte, size), direct: true})
}

func addMemory(t testing.TB, tree *Tree, name string, m *memory) *memory {
	t.Helper()
	m.node = must(tree.Add(name, tree.Root(), 0o600, m.ops(), m))(t)
	m.node.UpdateSize(int64(len(m.data)))
	return m
}

func (m *memory) ops() *Ops {
	return &Ops{
		Open: func(f *File) error {
			m.opens.Add(1)
			f.DirectIO = m.direct
			return nil
		},
		Release: func(*File) { m.releases.Add(1) },
		Fsync: func(_ *File, datasync bool) error {
			m.fsyncs.Add(1)
			if datasync {
				m.datasyncs.Add(1)
			}
			return nil
		},
		Read: func(_ *File, p []byte, off int64) (int, error) {
			m.mu.RLock()
			defer m.mu.RUnlock()
			if off >= int64(len(m.data)) {
				return 0, io.EOF
			}
			return copy(p, m.data[off:]), nil
		},
		Write: func(_ *File, p []byte, off int64, flags WriteFlags) (int, error) {
			if flags.DSync() {
				m.dsyncWrites.Add(1)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if off >= int64(len(m.data)) {
				return 0, syscall.ENOSPC
			}
			return copy(m.data[off:], p), nil
		},
	}
}

// bytes returns a copy of n bytes from off.
func (m *memory) bytes(off, n int) []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.data[off:off+n]...)
}

// put sets bytes behind the back of the mount.
func (m *memory) put(off int, p string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.data[off:], p)
}
