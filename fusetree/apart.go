// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// apart calls f on a thread that has a table of descriptors of its own: the standard ones, those of the Go runtime's
// poller, and keep, if that is not -1. It is for calls that may lead to a mount of this process, be it only on the way
// along a path. A thread cannot be killed while it waits for the answer to a request that has been read. If it had the
// connection's descriptor too, and the process was killed, then the connection would never end, nor that wait, nor the
// process.
//
// What f opens is its own to close. A file that this process has open on a FUSE mount is flushed on the way, as if a
// duplicate of its descriptor was closed; the start of any child process does the same.
func apart(keep int, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // it never ends, and /proc shows its descriptors as the process's
			result <- apart(keep, f)
			runtime.UnlockOSThread()
			return
		}
		// It is not unlocked again: the thread ends with the goroutine. Others do not inherit its table, since the
		// runtime has threads that are locked start none.
		leaveDescriptors(keep)
		result <- f()
	}()
	return <-result
}

// leaveDescriptors gives the thread its own table for apart. Where that cannot be, for want of /proc, it keeps the
// common one.
func leaveDescriptors(keep int) {
	const dir = "/proc/thread-self/fd"
	if _, err := os.Stat(dir); err != nil || unix.Unshare(unix.CLONE_FILES) != nil {
		return
	}
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd <= syscall.Stderr || fd == keep {
			continue
		}
		what, err := os.Readlink(filepath.Join(dir, entry.Name()))
		switch {
		case err != nil: // that of dir itself
		case what == "anon_inode:[eventpoll]", what == "anon_inode:[eventfd]":
			// The runtime polls in passing on any thread, and ends the process if it cannot. Which of these are its own it
			// does not say; one more reference to others does no harm.
		default:
			_ = unix.Close(fd)
		}
	}
}
