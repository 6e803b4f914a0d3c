// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkRead4k reads 4 KiB blocks past the page cache through the mount, from one goroutine and from four per CPU.
func BenchmarkRead4k(b *testing.B) {
	s := serve(b, Options{})
	newDirectMemory(b, s.Tree, "file", 1<<20)
	f := open(b, s.path("file"), os.O_RDONLY)
	fd := int(f.Fd())
	const blocks = 1 << 20 / 4096

	b.Run("serial", func(b *testing.B) {
		p := make([]byte, 4096)
		b.SetBytes(4096)
		for i := 0; b.Loop(); i++ {
			if _, err := unix.Pread(fd, p, int64(i%blocks)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		var next atomic.Int64
		b.SetBytes(4096)
		b.SetParallelism(4)
		b.RunParallel(func(pb *testing.PB) {
			p := make([]byte, 4096)
			for pb.Next() {
				if _, err := unix.Pread(fd, p, next.Add(1)%blocks*4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}
