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
	if !w.yielded(began, began+tooLong-1) || !w.Pays() {
		t.Error("a short pause ends the watch")
	}
	if w.yielded(began, began+tooLong) || w.Pays() {
		t.Error("a long pause does not end the watch")
	}
	if ended := time.Since(epoch) - respite; w.yielded(ended-tooLong, ended) || !w.Pays() {
		t.Error("watching does not pay any more when the respite is over")
	}
	(&Watch{}).Yield() // whatever it returns here, it comes back
}
