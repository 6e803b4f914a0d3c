// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// commandTimeout bounds one command, and the wait for the commands before it. It is far beyond what opening a remote
// image takes: it is there so that a writer is not held for ever.
const commandTimeout = 2 * time.Minute

// forceGrace is how long a forced command lets others go on before it interrupts them.
const forceGrace = 300 * time.Millisecond

// interpreter runs commands, one at a time, whoever gives them.
type interpreter struct {
	front *front
	log   hclog.Logger
	turn  chan struct{} // holds a token while a script runs

	mu          sync.Mutex // guards the fields below
	running     string     // the line being run, "" if none
	interrupt   func()     // ends the script that is running; nil if there is none
	lastFailure string     // the last failing line and the reason
}

func newInterpreter(front *front, log hclog.Logger) *interpreter {
	return &interpreter{front: front, log: log, turn: make(chan struct{}, 1)}
}

// script is a text of commands on its way through the interpreter.
type script struct {
	text string
	// file is the path the text was read from, "" for commands given directly. Failures in a file are reported as
	// file:line.
	file string
	// stopAtFailure ends the script at the first failing line; otherwise the remaining lines still run.
	stopAtFailure bool
	// depth counts the files that are being read from one another.
	depth int
}

// call is one command being run.
type call struct {
	ctx    context.Context
	interp *interpreter
	front  *front
	script *script
	out    io.Writer
}

// print gives text to whoever gave the command. The output is collected in memory: there is no error to report.
func (c *call) print(text string) { _, _ = io.WriteString(c.out, text) }

// scriptError is the failure of a script: the first failing line's error, already printed and logged, with the place
// and the command in front.
type scriptError struct {
	text string
	err  error
}

func (e *scriptError) Error() string { return e.text }
func (e *scriptError) Unwrap() error { return e.err }

// run runs a script when the scripts before it are done, and writes what its commands print and how they fail to out.
// The error is the first failing line's, and errnoOf tells its errno; ETIMEDOUT means that the turn did not come, EINTR
// that ctx ended first, or that a forced command came.
func (in *interpreter) run(ctx context.Context, script script, out io.Writer) error {
	if err := in.takeTurn(ctx, isForced(script.text)); err != nil {
		return err
	}
	defer func() { <-in.turn }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in.setInterrupt(cancel)
	defer in.setInterrupt(nil)
	return in.runLines(ctx, &script, out)
}

// isForced reports whether a text has a command that is not to wait for others.
func isForced(text string) bool {
	for line := range strings.SplitSeq(text, "\n") {
		name, args := splitCommand(line)
		if _, forced := takeForce(args); !forced {
			continue
		}
		if cmd, err := findCommand(name); err == nil && cmd.forcible {
			return true
		}
	}
	return false
}

func (in *interpreter) setInterrupt(interrupt func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.interrupt = interrupt
}

// interruptScript ends the script that is running, if there is one: its commands end with their context.
func (in *interpreter) interruptScript() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.interrupt != nil {
		in.interrupt()
	}
}

// takeTurn waits, within bounds, until no other script runs. One that is forced does not wait for long.
func (in *interpreter) takeTurn(ctx context.Context, forced bool) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if forced {
		defer time.AfterFunc(forceGrace, in.interruptScript).Stop()
	}
	select {
	case in.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		in.mu.Lock()
		defer in.mu.Unlock()
		return failf(errnoOf(ctx.Err()), "not run, because another command still is: %s", in.running)
	}
}

// runLines runs each line of script; the caller holds the turn.
func (in *interpreter) runLines(ctx context.Context, script *script, out io.Writer) error {
	var first error
	several := strings.Contains(strings.TrimRight(script.text, "\n"), "\n")
	number := 0
	for line := range strings.SplitSeq(script.text, "\n") {
		number++
		name, args := splitCommand(line)
		if name == "" {
			continue
		}
		place := ""
		switch {
		case script.file != "":
			place = fmt.Sprintf("%s:%d: ", script.file, number)
		case several:
			place = fmt.Sprintf("line %d: ", number)
		}
		err := in.runLine(ctx, script, place, name, args, out)
		if err != nil && first == nil {
			first = err
		}
		if err != nil && (script.stopAtFailure || ctx.Err() != nil) {
			break
		}
	}
	return first
}

// runLine runs one command and accounts for it: what it prints and how it fails goes to out and to the log.
func (in *interpreter) runLine(ctx context.Context, script *script, place, name, args string, out io.Writer) error {
	line := strings.TrimRight(name+" "+args, " ")
	in.setRunning(line)
	defer in.setRunning("")
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var printed bytes.Buffer
	title := name
	cmd, err := findCommand(name)
	if err == nil {
		title = cmd.name
		if err = in.front.gate.refuseWhenStopping(); err == nil {
			call := &call{ctx: ctx, interp: in, front: in.front, script: script, out: &printed}
			err = cmd.run(call, args)
		}
	}
	_, _ = out.Write(printed.Bytes())
	log := in.log.With("line", place+line)
	if printed.Len() > 0 {
		log = log.With("output", strings.TrimRight(printed.String(), "\n"))
	}
	var inner *scriptError
	if err == nil || errors.As(err, &inner) {
		log.Info("command")
		return err // the lines of a sourced file have reported their failures themselves
	}
	text := place + titled(title, err)
	_, _ = io.WriteString(out, text+"\n")
	log.Error("command failed", "reason", err.Error(), "errno", errnoName(err))
	in.mu.Lock()
	in.lastFailure = text
	in.mu.Unlock()
	return &scriptError{text: text, err: err}
}

// titled puts the command's name in front of the error, unless libtcmur has done so already.
func titled(title string, err error) string {
	if text := err.Error(); strings.HasPrefix(text, title+" ") || strings.HasPrefix(text, title+":") {
		return text
	}
	return title + ": " + err.Error()
}

func errnoName(err error) string { return unix.ErrnoName(errnoOf(err)) }

func (in *interpreter) setRunning(line string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running = line
}

// snapshot is what a reader sees who gave no command: the tree, and the last failing line with its reason, if one
// failed yet. It does not wait for a command that is running.
func (in *interpreter) snapshot() string {
	in.mu.Lock()
	failure := in.lastFailure
	in.mu.Unlock()
	text := in.front.dump()
	if failure != "" {
		text += "last failure: " + failure + "\n"
	}
	return text
}
