// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
)

// The exit statuses. Scripts and service managers test them: a number is never given a new meaning.
const (
	exitClean       = 0 // stopped, every device flushed and closed
	exitStartFailed = 1 // could not mount, or a start command failed; nothing is left behind
	exitUsage       = 2 // the command line was wrong; nothing was tried
	exitDataAtRisk  = 3 // stopped, but a flush or a close failed, or a node was still open for writing

	// Of the subcommands that speak to a running server.

	exitRefused      = 4 // a command failed
	exitNoServer     = 5 // nobody serves the mount point
	exitNotPermitted = 6 // this user may not
	exitNoAnswer     = 7 // the server does not answer, or has died
)

const exitStatusText = `
EXIT STATUS
  0  stopped cleanly: every device was flushed and closed
  1  the start failed: nothing could be mounted, or a -c or --source command failed
  2  the command line was wrong
  3  stopped, but data may be lost: a flush or a close failed, or a device was still open for writing when the stop
     was forced; the log says which
  4  ctl: a command failed; release: something is still in use
  5  ctl, status: no fuse_tcmur serves the mount point
  6  ctl, status: not permitted
  7  ctl, status: the server has died and left its mount behind, or does not answer
`

// exitError is an error that knows the status the program ends with.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// withStatus gives err an exit status; nil stays nil.
func withStatus(status int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{status: status, err: err}
}

// report tells the user about err, if there is one, and returns the exit status. An error that carries none comes from
// the flag parser.
func report(err error, stderr io.Writer) int {
	if err == nil {
		return exitClean
	}
	status := exitUsage
	var withStatus *exitError
	if errors.As(err, &withStatus) {
		status = withStatus.status
	}
	hint := ""
	if status == exitUsage {
		hint = " (fuse_tcmur --help lists the flags)"
	}
	_, _ = fmt.Fprintf(stderr, "fuse_tcmur: %v%s\n", err, hint)
	return status
}
