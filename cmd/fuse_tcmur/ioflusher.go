// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"runtime"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// The main goroutine stays on the process's first thread until serving begins: becomeIOFlusher depends on it.
func init() { runtime.LockOSThread() }

// becomeIOFlusher tells the kernel that this process writes out other processes' dirty pages, so that its own
// allocations never wait for pages that only it can write out.
//
// The state belongs to a thread and is inherited by the threads and processes it starts, and it outlives execve(2).
// By the time Go code runs, the runtime has started threads without it; so the first thread takes the state and the
// process executes itself again: then every thread has it, and so have the host processes. It does nothing when the
// state is there already, and no more than a log line when it is not to be had (it needs CAP_SYS_RESOURCE). Call it on
// the first thread before anything has been opened or started.
func becomeIOFlusher(log hclog.Logger) {
	defer runtime.UnlockOSThread()
	if isIOFlusher() {
		return
	}
	err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	if err == nil {
		var self string
		if self, err = os.Executable(); err == nil {
			err = unix.Exec(self, os.Args, os.Environ())
		}
	}
	log.Info("running without PR_SET_IO_FLUSHER: when memory is short, writes may wait for themselves",
		"reason", err)
}

// isIOFlusher reports whether becomeIOFlusher has succeeded, for all threads or none.
func isIOFlusher() bool {
	state, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	return err == nil && state == 1
}
