// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// maxLinks is how many symbolic links a path may lead through, as for the kernel.
const maxLinks = 40

// untouchableError says that a path leads to or through a place the caller must not let the kernel look at.
type untouchableError struct {
	place string // the untouchable directory
	below string // what was left of the path below it, "" if it ends there
}

func (e *untouchableError) Error() string { return e.place + " must not be touched" }

// resolvePath follows every symbolic link in path, which is absolute, one component at a time. Before it looks at
// what a component is, it asks untouchable, and stops there with an untouchableError. From a component on that does
// not exist, the path is taken as it stands.
func resolvePath(path string, untouchable func(place string) bool) (string, error) {
	done, rest := "/", strings.TrimPrefix(path, "/")
	links := 0
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			// No link is left in done, so that its parent by name is its parent.
			done = filepath.Dir(done)
			continue
		}
		next := filepath.Join(done, name)
		if untouchable(next) {
			return "", &untouchableError{place: next, below: strings.Trim(rest, "/")}
		}
		info, err := os.Lstat(next)
		switch {
		case os.IsNotExist(err) && !slices.Contains(strings.Split(rest, "/"), ".."):
			return filepath.Join(next, rest), nil
		case err != nil:
			return "", fmt.Errorf("%s: %w", next, errnoOf(err))
		case info.Mode()&os.ModeSymlink == 0:
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", failf(syscall.ELOOP, "%s: too many symbolic links", path)
		}
		target, err := os.Readlink(next)
		if err != nil {
			return "", fmt.Errorf("%s: %w", next, errnoOf(err))
		}
		if filepath.IsAbs(target) {
			done = "/"
		}
		rest = target + "/" + rest
	}
	return done, nil
}
