// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// commandError is a message for the person who gave a command, together with the errno their write(2) returns. The
// text says all there is to say: the errno's own words are not appended to it.
type commandError struct {
	errno syscall.Errno
	err   error
}

func (e *commandError) Error() string   { return e.err.Error() }
func (e *commandError) Unwrap() []error { return []error{e.errno, e.err} }

// failf makes a commandError. A cause given with %w stays reachable, but errno decides what write(2) returns.
func failf(errno syscall.Errno, format string, args ...any) error {
	return &commandError{errno: errno, err: fmt.Errorf(format, args...)}
}

// errnoOf is the errno that stands for err: the first one found in its chain, ETIMEDOUT and EINTR for an ended
// context, EIO for an error that says nothing about it.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno) && errno != 0:
		return errno
	case errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	default:
		return syscall.EIO
	}
}
