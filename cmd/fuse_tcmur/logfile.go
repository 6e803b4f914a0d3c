// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// logFile is a file that is appended to and can be opened anew, after logrotate(8) has moved it away.
type logFile struct {
	path string

	mu        sync.Mutex // guards the fields below
	file      *os.File
	hasStderr bool // descriptor 2 is this file too
}

func openLogFile(path string) (*logFile, error) {
	l := &logFile{path: path}
	return l, l.reopen()
}

// Write implements io.Writer.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Write(p)
}

// reopen opens the path again. On error the log goes on to where it went before.
func (l *logFile) reopen() error {
	file, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close()
	}
	l.file = file
	if l.hasStderr {
		return l.redirectLocked()
	}
	return nil
}

// takeStderr sends to the file what goes to standard error: a crash of this process.
func (l *logFile) takeStderr() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hasStderr = true
	return l.redirectLocked()
}

func (l *logFile) redirectLocked() error { return unix.Dup3(int(l.file.Fd()), 2, 0) }
