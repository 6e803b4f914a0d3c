// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// BenchmarkRead reads 4 KiB from memory through a host, at several depths. What is measured is the hop: ring, wake-up,
// worker, callout, completion.
func BenchmarkRead(b *testing.B) {
	for _, spin := range []int{0, 50} {
		for _, depth := range []int{1, 16} {
			b.Run(fmt.Sprintf("spin=%d/depth=%d", spin, depth), func(b *testing.B) {
				f := startHost(b, fmt.Sprint("--spin-us=", spin))
				f.mustLoad(buildHandler(b, "behave.c"), "sync")
				f.mustOpen(&hostpb.OpenRequest{Config: "sync/", Size: 1 << 20})
				b.SetBytes(4096)
				b.ResetTimer()
				submitted := 0
				for done := 0; done < b.N; done++ {
					fresh := 0
					for ; submitted < b.N && submitted-done < depth; submitted++ {
						fresh++
						f.push(sqe{op: opRead, offset: uint64(submitted%256) * 4096, length: 4096,
							payload: uint64(submitted%depth) * 4096, withoutDoorbell: true})
					}
					if fresh > 0 {
						f.ring()
					}
					if c, ok := f.next(testDeadline); !ok || c.err != 0 {
						b.Fatalf("completion %+v, %v", c, ok)
					}
				}
			})
		}
	}
}
