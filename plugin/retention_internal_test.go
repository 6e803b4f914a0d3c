// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// BenchmarkRetain is what retention adds to a write of 4 KiB: keeping it, and its share of the flush that gives it up.
func BenchmarkRetain(b *testing.B) {
	c, err := shared.New(shared.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	req, err := c.Get(shared.OpWrite, 4096)
	if err != nil {
		b.Fatal(err)
	}
	defer req.Release()
	r := newRetention()
	for b.Loop() {
		if r.add(req) > DefaultRetention/2 {
			r.drop()
		}
	}
}
