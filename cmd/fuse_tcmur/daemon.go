// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Go program cannot fork. With --daemon the program starts itself once more, in a session of its own, and waits until
// that one is ready or has failed; its messages until then go where the parent's would have gone.

const (
	// readyVariable names the descriptor by which the child tells its parent that it is ready. It does not begin with
	// TCMUR_, which hosts would inherit.
	readyVariable  = "FUSE_TCMUR_READY_FD"
	readyFD        = 3
	readyMessage   = "ready"
	defaultLogFile = "/var/log/fuse_tcmur.log"
	defaultPIDFile = "/run/fuse_tcmur.pid"
)

// isDaemonChild reports whether this process is the one that is to serve.
func isDaemonChild() bool { return os.Getenv(readyVariable) != "" }

// startDaemon starts the child and returns when it serves. Otherwise the error has the child's exit status, and the
// child has said why.
func startDaemon() error {
	self, err := os.Executable()
	if err != nil {
		return withStatus(exitStartFailed, err)
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return withStatus(exitStartFailed, err)
	}
	defer ours.Close()
	child := exec.Command(self, os.Args[1:]...)
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", readyVariable, readyFD))
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	child.ExtraFiles = []*os.File{theirs}
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = child.Start()
	_ = theirs.Close()
	if err != nil {
		return withStatus(exitStartFailed, err)
	}
	message := make([]byte, len(readyMessage))
	if n, _ := ours.Read(message); string(message[:n]) == readyMessage {
		return nil
	}
	err = child.Wait()
	status := exitStartFailed
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		status = exit.ExitCode()
	}
	return withStatus(status, errors.New("the daemon has not started"))
}

// daemonParent is where the child tells that it is ready.
func daemonParent() *os.File {
	_ = os.Unsetenv(readyVariable)
	return os.NewFile(readyFD, "parent")
}

// detach lets go of the parent and of what it was started with: from here on the log file takes everything.
func (s *service) detach() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if _, err := s.parent.WriteString(readyMessage); err != nil {
		return fmt.Errorf("the process that started the daemon has gone: %w", err)
	}
	_ = s.parent.Close()
	for fd := range 2 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return s.file.takeStderr()
}

// writePIDFile writes this process's id, so that a reader sees all of it or the file of before.
func writePIDFile(path string) error {
	temporary, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("pid file: %w", err)
	}
	_, err = fmt.Fprintln(temporary, os.Getpid())
	err = errors.Join(err, temporary.Chmod(0o644), temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		_ = os.Remove(temporary.Name())
		return fmt.Errorf("pid file: %w", err)
	}
	return nil
}

// removePIDFile removes the file if it is this process's.
func removePIDFile(path string) {
	text, err := os.ReadFile(path)
	if err == nil && string(bytes.TrimSpace(text)) == strconv.Itoa(os.Getpid()) {
		_ = os.Remove(path)
	}
}
