// SPDX-License-Identifier: Apache-2.0

package plugin

import "unsafe"

// streamLines copies lines of streamLine bytes, at least one, past the cache. to is aligned to streamLine.
//
//go:noescape
func streamLines(to, from *byte, lines int)

// streamCopy is copy to memory that is not read soon, and not in the cache either: it goes there without fetching what
// it overwrites, and leaves the cache to others. to begins at a multiple of streamLine and is as long as from.
func streamCopy(to, from []byte) {
	if lines := len(from) / streamLine; lines > 0 {
		streamLines(unsafe.SliceData(to), unsafe.SliceData(from), lines)
	}
	rest := len(from) &^ (streamLine - 1)
	copy(to[rest:], from[rest:])
}
