// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// TestReadWrite is the thinnest slice: load, open, write, read, flush, close.
func TestReadWrite(t *testing.T) {
	for _, kind := range []string{"sync", "async", "async inside"} {
		t.Run(kind, func(t *testing.T) {
			f := startHost(t)
			subtype, flags := "sync", []string(nil)
			if kind != "sync" {
				subtype, flags = "async", []string{"-DASYNC"}
			}
			reply := f.mustLoad(buildHandler(t, "behave.c", flags...), subtype)
			if reply.GetSubtype() != subtype || reply.GetAbi() != "1.5.4-1.6.2" || reply.GetName() != "handler for tests" {
				t.Errorf("load reply is %v", reply)
			}
			open := f.mustOpen(&hostpb.OpenRequest{Device: 7, Config: subtype + "/" + kind, Size: 2<<20 + 100})
			if open.GetSize() != 2<<20 || open.GetBlockSize() != 512 || open.GetMaxXfer() != 1<<20 || open.GetAlignment() != 1 {
				t.Errorf("open reply is %v", open)
			}
			for _, c := range []struct {
				offset uint64
				n      int
			}{{0, 512}, {1 << 20, 1 << 20}, {12345, 777}, {2<<20 - 1, 1}} {
				data := pattern(byte(c.offset), c.n)
				if err := f.write(7, c.offset, data); err != nil {
					t.Fatalf("write of %d at %d: %v", c.n, c.offset, err)
				}
				got, err := f.read(7, c.offset, c.n)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("read of %d at %d: error %v, data equal: %v", c.n, c.offset, err, bytes.Equal(got, data))
				}
			}
			if err := f.do(sqe{op: opFlush, device: 7}); err != nil {
				t.Errorf("flush: %v", err)
			}
			if err := f.close(callCtx(t), 7); err != nil {
				t.Errorf("close: %v", err)
			}
			f.awaitLog("closing; at most")
			f.awaitLog("handler printed: hello from handler_init")
		})
	}
}
