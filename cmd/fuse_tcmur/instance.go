// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// instance is a running fuse_tcmur as another process sees it: by its mount.
type instance struct {
	place string // where it is mounted, without symbolic links
}

// findInstance finds the one that serves a mount point. Its errors carry exit statuses. It touches no mount before it
// knows that somebody answers.
func findInstance(procDir, mountpoint string) (*instance, error) {
	path, err := filepath.Abs(mountpoint)
	if err != nil {
		return nil, withStatus(exitUsage, err)
	}
	mounts, err := readMounts(procDir)
	if err != nil {
		return nil, withStatus(exitNoServer, err)
	}
	resolved, err := resolvePath(path, func(place string) bool {
		mount := topMount(mounts, place)
		return mount != nil && isOwnType(mount)
	})
	var own *untouchableError
	switch {
	case errors.As(err, &own) && own.below == "":
		resolved = own.place
	case errors.As(err, &own):
		return nil, withStatus(exitUsage, fmt.Errorf("%s is not a mount point, but lies below one: --mountpoint %s",
			path, own.place))
	case errors.Is(err, syscall.EACCES):
		return nil, notPermitted(path, err)
	default:
		return nil, withStatus(exitNoServer, noServer(mounts, path, resolved))
	}
	switch err := probe(resolved, probeTimeout); {
	case errors.Is(err, syscall.ENOTCONN):
		return nil, withStatus(exitNoAnswer, fmt.Errorf(
			"the server of %s has died and left its mount behind: umount %s, or just start it again", path, resolved))
	case errors.Is(err, syscall.ETIMEDOUT):
		return nil, withStatus(exitNoAnswer, fmt.Errorf(
			"the server of %s does not answer: its log may say why; kill it, then umount -l %s", path, resolved))
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return nil, notPermitted(path, err)
	}
	return &instance{place: resolved}, nil
}

// noServer says that nobody serves a path, and what could have been meant.
func noServer(mounts []mountInfo, path, resolved string) error {
	if other := topMount(mounts, resolved); other != nil && resolved != "/" {
		return fmt.Errorf("no fuse_tcmur serves %s: what is mounted there is %s (%s)", path, other.source, other.fsType)
	}
	var others []string
	for _, mount := range mounts {
		if isOwnType(&mount) {
			others = append(others, mount.mountpoint)
		}
	}
	if len(others) > 0 {
		return fmt.Errorf("no fuse_tcmur serves %s, but one serves %s: choose it with --mountpoint", path,
			strings.Join(others, ", another one "))
	}
	return fmt.Errorf("no fuse_tcmur serves %s: start it first, for example with: fuse_tcmur --mountpoint %s", path, path)
}

func notPermitted(path string, err error) error {
	return withStatus(exitNotPermitted, fmt.Errorf("%s: %w: try again as root", path, errnoOf(err)))
}

// within calls fn and waits for it, but not for longer than ctx: a call on a mount whose server hangs cannot be taken
// back, and is left behind.
func within(ctx context.Context, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// command has the server run one command, and returns what that printed. The error is the command's, an errno, or one
// with an exit status where the command did not get that far.
func (i *instance) command(ctx context.Context, line string) (string, error) {
	path := i.place + "/dev/" + ctlName
	var answer []byte
	var refused error
	err := within(ctx, func() error {
		node, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer node.Close()
		_, refused = io.WriteString(node, line+"\n")
		answer, err = io.ReadAll(node)
		return err
	})
	switch {
	case err == nil:
		return string(answer), refused
	case ctx.Err() != nil:
		return "", withStatus(exitNoAnswer, fmt.Errorf("%q has not ended, and may still be going on: %w", line, err))
	}
	return "", i.unreachable(path, err)
}

// unreachable explains why a node could not be used.
func (i *instance) unreachable(path string, err error) error {
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return notPermitted(path, err)
	case errors.Is(err, syscall.ESHUTDOWN):
		return withStatus(exitNoServer, fmt.Errorf("the server of %s is stopping", i.place))
	case errors.Is(err, syscall.ENOTCONN), errors.Is(err, syscall.ECONNABORTED):
		return withStatus(exitNoServer, fmt.Errorf("the server of %s has just ended", i.place))
	case errors.Is(err, syscall.ENOENT):
		return withStatus(exitNoServer, fmt.Errorf("%s is not there: the server of %s is stopping, or of another version",
			path, i.place))
	}
	return withStatus(exitNoAnswer, err)
}

// status asks for the state of everything.
func (i *instance) status(ctx context.Context) (*statusReport, error) {
	path := i.place + "/sys/" + statusName
	var text []byte
	err := within(ctx, func() (err error) {
		text, err = os.ReadFile(path)
		return err
	})
	if ctx.Err() != nil {
		return nil, withStatus(exitNoAnswer, fmt.Errorf("the server of %s does not answer: %w", i.place, ctx.Err()))
	}
	if err != nil {
		return nil, i.unreachable(path, err)
	}
	report, err := parseStatus(text)
	return report, withStatus(exitNoAnswer, err)
}

// awaitGone waits until nothing is mounted there any more.
func (i *instance) awaitGone(ctx context.Context, procDir string) error {
	poll := time.NewTicker(20 * time.Millisecond) // of a table in memory; nothing tells of its changes for sure
	defer poll.Stop()
	for {
		mounts, err := readMounts(procDir)
		if err != nil {
			return err
		}
		if mount := topMount(mounts, i.place); mount == nil || !isOwnType(mount) {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
