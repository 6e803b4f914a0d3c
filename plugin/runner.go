// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/go-plugin/runner"
)

// outputGrace is how long a dead host's output is still read: a grandchild may hold the pipes open for ever, and
// go-plugin waits for their end.
const outputGrace = 100 * time.Millisecond

// processRunner runs a tcmur-host for go-plugin. Unlike go-plugin's own runner it notices the exit of the process
// itself and not the end of its output, and leaves the child without the front's standard input.
type processRunner struct {
	cmd            *exec.Cmd
	stdout, stderr *os.File // our ends of the pipes
	exited         chan struct{}
	waitErr        error // valid once exited is closed
}

var _ runner.Runner = (*processRunner)(nil)

// newProcessRunner takes a command that has not been started; its output goes to the runner.
func newProcessRunner(cmd *exec.Cmd) (*processRunner, error) {
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		outR.Close()
		outW.Close()
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, outW, errW
	return &processRunner{cmd: cmd, stdout: outR, stderr: errR, exited: make(chan struct{})}, nil
}

// Start starts the process and its watcher.
func (r *processRunner) Start(context.Context) error {
	err := r.cmd.Start()
	r.cmd.Stdout.(*os.File).Close()
	r.cmd.Stderr.(*os.File).Close()
	if err != nil {
		r.stdout.Close()
		r.stderr.Close()
		return fmt.Errorf("start %s: %w", r.cmd.Path, err)
	}
	go func() {
		r.waitErr = r.cmd.Wait()
		close(r.exited)
		deadline := time.Now().Add(outputGrace)
		_ = r.stdout.SetReadDeadline(deadline)
		_ = r.stderr.SetReadDeadline(deadline)
	}()
	return nil
}

// Wait waits for the exit of the process. go-plugin calls it after it has read the output.
func (r *processRunner) Wait(context.Context) error {
	<-r.exited
	r.stdout.Close()
	r.stderr.Close()
	return r.waitErr
}

// Kill sends SIGKILL; the process may be dead already.
func (r *processRunner) Kill(context.Context) error {
	if r.cmd.Process == nil {
		return nil
	}
	if err := r.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// exitReason says in words how the process ended. Only after exited.
func (r *processRunner) exitReason() string {
	st := r.cmd.ProcessState
	if st == nil {
		return "was not started"
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return fmt.Sprintf("was killed by signal %d (%s)", int(ws.Signal()), ws.Signal())
	}
	return fmt.Sprintf("exited with status %d", st.ExitCode())
}

// killedFromOutside reports whether the process was ended by a signal that people and programs send to processes, not
// one that a process brings upon itself. Only after exited, and for hosts that the front has not killed.
func (r *processRunner) killedFromOutside() bool {
	st := r.cmd.ProcessState
	if st == nil {
		return false
	}
	ws, ok := st.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && (ws.Signal() == syscall.SIGKILL || ws.Signal() == syscall.SIGTERM)
}

// Stdout carries go-plugin's handshake.
func (r *processRunner) Stdout() io.ReadCloser { return r.stdout }

// Stderr carries the host's log.
func (r *processRunner) Stderr() io.ReadCloser { return r.stderr }

// Name is the path of the executable.
func (r *processRunner) Name() string { return r.cmd.Path }

// ID is the process id.
func (r *processRunner) ID() string {
	if r.cmd.Process == nil {
		return ""
	}
	return strconv.Itoa(r.cmd.Process.Pid)
}

// Diagnose is shown when the handshake fails.
func (r *processRunner) Diagnose(context.Context) string {
	return "is " + r.cmd.Path + " the tcmur-host of this version?"
}

// PluginToHost and HostToPlugin: both processes see the same file system.

func (r *processRunner) PluginToHost(network, addr string) (string, string, error) {
	return network, addr, nil
}
func (r *processRunner) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}
