// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

const losetupTimeout = 30 * time.Second

// attachLoop makes a loop device on a file and returns its path. With direct, the loop device bypasses the page cache
// of the file. unblock is as in command.
func attachLoop(ctx context.Context, file string, direct bool, unblock func()) (string, error) {
	mode := "off"
	if direct {
		mode = "on"
	}
	out, _, err := command{
		argv:    []string{"losetup", "--find", "--show", "--direct-io=" + mode, file},
		timeout: losetupTimeout, unblock: unblock,
	}.run(ctx)
	if err != nil {
		return "", err
	}
	device := strings.TrimSpace(string(out))
	if !strings.HasPrefix(device, "/dev/loop") {
		return "", fmt.Errorf("losetup on %s: no device but %q", file, device)
	}
	return device, nil
}

// detachLoop takes the loop device away and returns when it has let go of its file. It does so even if ctx is
// cancelled.
func detachLoop(ctx context.Context, device string, unblock func()) error {
	ctx = context.WithoutCancel(ctx)
	_, _, err := command{
		argv: []string{"losetup", "--detach", device}, timeout: losetupTimeout, unblock: unblock,
	}.run(ctx)
	if err != nil {
		return err
	}
	// The device goes when its last user does, which may be udev.
	for range 250 {
		if _, _, err := (command{argv: []string{"losetup", device}, timeout: losetupTimeout}).run(ctx); err != nil {
			return nil
		}
		<-time.After(pollInterval)
	}
	return errors.New(device + " is still in use")
}
