// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The benchmark itself does no I/O on what a server under test serves: it could come to wait for a server that hangs.
// Programs that can be killed do it. (The one exception is server.command, which has a watchdog.)

// mounted reports whether something is mounted on dir, without asking what is mounted.
func mounted(dir string) bool {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == dir {
			return true
		}
	}
	return false
}

const pollInterval = 20 * time.Millisecond

// waitForFiles waits until the mount on dir has all files, or p ends, or the time is over.
func waitForFiles(ctx context.Context, p *process, dir string, files ...string) error {
	const timeout = 20 * time.Second
	deadline := time.After(timeout)
	for {
		if mounted(dir) {
			stat := command{argv: append([]string{"stat", "-t"}, files...), timeout: timeout, unblock: func() { abort(dir) }}
			if _, _, err := stat.run(ctx); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.done:
			return p.ended()
		case <-deadline:
			return fmt.Errorf("no %s within %v: %s", strings.Join(files, ", "), timeout, p.output.String())
		case <-time.After(pollInterval):
		}
	}
}

// abort makes every request to the FUSE server mounted on dir fail, those that wait for it now and all to come.
func abort(dir string) {
	_ = unix.Unmount(dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
}

// unmount takes away what is mounted on dir, by force if it must.
func unmount(dir string) error {
	for deadline := time.Now().Add(5 * time.Second); mounted(dir); {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
			<-time.After(pollInterval) // whoever uses it has been told to end
			continue
		}
		if err != nil && mounted(dir) {
			abort(dir)
			if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && mounted(dir) {
				return fmt.Errorf("unmount %s: %w", dir, err)
			}
		}
	}
	return nil
}
