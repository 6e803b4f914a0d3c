// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	maxSourceDepth = 8       // files that are read from one another
	maxSourceSize  = 1 << 20 // bytes in one file
)

// source runs the commands in the file at path. ELOOP: files source one another too deeply; EDEADLK: the path leads
// into the program's own mount; EINVAL: not an absolute path, not a regular file, too large, or not text; otherwise
// what opening the file says, or the first failing line's error.
func (c *call) source(path string) error {
	if c.script.depth >= maxSourceDepth {
		return failf(syscall.ELOOP, "%s: files source one another more than %d deep", path, maxSourceDepth)
	}
	text, err := readCommandFile(path, c.front.ownMount())
	if err != nil {
		return err
	}
	return c.interp.runLines(c.ctx, &script{
		text:          text,
		file:          path,
		stopAtFailure: c.script.stopAtFailure,
		depth:         c.script.depth + 1,
	}, c.out)
}

// readCommandFile reads the whole file before any of it is run. It never touches the program's own mount, which
// could only answer by way of this very process: the path is followed one component at a time, and what was opened
// is compared once more, because a link may have changed meanwhile.
func readCommandFile(path string, own ownMount) (string, error) {
	if !filepath.IsAbs(path) {
		return "", failf(syscall.EINVAL, "%s: give an absolute path, the server is in another directory", path)
	}
	resolved, err := resolvePath(path, own.covers)
	var untouchable *untouchableError
	if errors.As(err, &untouchable) {
		return "", ownMountError(path)
	}
	if err != nil {
		return "", err
	}
	// O_PATH opens nothing yet: devices and FIFOs do not notice.
	fd, err := unix.Open(resolved, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case own.isDevice(stat.Dev):
		return "", ownMountError(path)
	case stat.Mode&unix.S_IFMT != unix.S_IFREG:
		return "", failf(syscall.EINVAL, "%s: not a regular file", path)
	}
	file, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, errnoOf(err))
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, maxSourceSize+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", path, errnoOf(err))
	case len(text) > maxSourceSize:
		return "", failf(syscall.EINVAL, "%s: larger than %d bytes: not a command file", path, maxSourceSize)
	case strings.IndexByte(string(text), 0) >= 0:
		return "", failf(syscall.EINVAL, "%s: has NUL bytes: not a command file", path)
	}
	return string(text), nil
}

func ownMountError(path string) error {
	return failf(syscall.EDEADLK, "%s lies in this server's own mount, which it must not read itself: "+
		"copy the file elsewhere", path)
}
