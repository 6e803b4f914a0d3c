// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"runtime"
)

// blockedThreads is how many threads of the I/O path are usually inside a system call: FUSE readers, and a completion
// thread for each of a few handlers that are busy at once. Each returns to Go for a few microseconds at a time.
const blockedThreads = 6

// spareProcessors lets Go run more threads at a time than there are processors. A thread that returns from a system
// call has to find a free one of Go's processors, and queues for it behind goroutines otherwise; with spare ones the
// kernel's scheduler decides, which knows who waits. GOMAXPROCS in the environment overrides it.
func spareProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + blockedThreads)
	}
}
