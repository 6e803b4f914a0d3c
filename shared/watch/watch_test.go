// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"testing"
	"time"
)

func TestWatch(t *testing.T) {
	t.Parallel()
	var w Watch
	if !w.Pays() {
		t.Error("watching does not pay to begin with")
	}
	began := time.Since(epoch)
	for at := began; at < began+allowance; at += tooLong {
		if !w.yielded(at, at+tooLong-1) || !w.Pays() {
			t.Fatal("short pauses end the watch")
		}
	}
	const one = allowance / 2
	if !w.yielded(began, began+one) || !w.yielded(began+2*period, began+2*period+one) || !w.Pays() {
		t.Error("long pauses now and then end the watch")
	}
	if at := began + 2*period + one; w.yielded(at, at+one) || w.Pays() {
		t.Error("long pauses in a row do not end the watch")
	}
	if ended := time.Since(epoch) - respite; w.yielded(ended-allowance, ended) || !w.Pays() {
		t.Error("watching does not pay any more when the respite is over")
	}
	(&Watch{}).Yield() // whatever it returns here, it comes back
}
