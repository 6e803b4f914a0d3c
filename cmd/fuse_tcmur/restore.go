// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// The config file brings back the handlers and devices that there are to be. It is a command file, with two
// differences: a command that fails stands in the log and changes nothing for the others, and load and add for
// different handlers run side by side, so that a back end which cannot be reached holds nobody up.

const (
	// defaultConfig is read if it is there.
	defaultConfig = "/etc/tcmur/tcmur.conf"
	// restorePatience is for how long no command may end before the start goes on without those that still run.
	restorePatience = time.Second
)

// restore applies the config file. It returns when all of its commands have ended, except for those of handlers that
// let it wait; these go on until ctx ends. Only a file that cannot be read is an error: missing, it is one unless it is
// the default one.
func (s *server) restore(ctx context.Context, lanes *lanes) error {
	if s.config == "" {
		return nil
	}
	text, err := readCommandFile(s.config, s.front.ownMount())
	if errors.Is(err, os.ErrNotExist) && !s.configRequired {
		return nil
	}
	if err != nil {
		return fmt.Errorf("--config %w", err)
	}
	return s.interp.restore(ctx, &script{text: text, file: s.config, depth: 1}, lanes, s.stdout)
}

// restore runs the lines of a config file; what fails is in the log.
func (in *interpreter) restore(ctx context.Context, script *script, lanes *lanes, out io.Writer) error {
	if err := in.takeTurn(ctx, false); err != nil {
		return err
	}
	defer func() { <-in.turn }()
	number := 0
	for line := range strings.SplitSeq(script.text, "\n") {
		number++
		name, args := splitCommand(line)
		if name == "" {
			continue
		}
		place := fmt.Sprintf("%s:%d: ", script.file, number)
		run := func() {
			var printed bytes.Buffer
			_ = in.runLine(ctx, script, place, name, args, &printed)
			lanes.print(out, printed.Bytes())
		}
		if lane := laneOf(name, args); lane != "" {
			lanes.run(lane, strings.TrimSpace(line), run)
			continue
		}
		in.settle(ctx, lanes)
		run()
	}
	in.settle(ctx, lanes)
	return ctx.Err()
}

// settle waits for the lanes, and says for which commands it does not.
func (in *interpreter) settle(ctx context.Context, lanes *lanes) {
	if slow := lanes.settle(ctx, restorePatience); len(slow) > 0 {
		in.log.Warn("going on without waiting for commands that take long", "commands", strings.Join(slow, "; "))
	}
}

// laneOf is the subtype whose handler a command is for, "" if it has to wait for all others.
func laneOf(name, args string) string {
	cmd, err := findCommand(name)
	if err != nil {
		return ""
	}
	switch cmd.name {
	case "load":
		return args
	case "add":
		parsed, err := parseAdd(args)
		if err != nil {
			return ""
		}
		subtype, _, _ := strings.Cut(strings.TrimPrefix(parsed.config, "/"), "/")
		return subtype
	}
	return ""
}

// lanes run functions: those of one lane one after the other, those of different lanes side by side.
type lanes struct {
	mu       sync.Mutex // guards the fields below
	queues   map[string][]job
	progress chan struct{} // closed and replaced when a job has ended

	printing sync.Mutex // held while something is printed
}

type job struct {
	title string
	run   func()
}

func newLanes() *lanes {
	return &lanes{queues: map[string][]job{}, progress: make(chan struct{})}
}

// run puts a job at the end of a lane.
func (l *lanes) run(lane, title string, run func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queues[lane] = append(l.queues[lane], job{title, run})
	if len(l.queues[lane]) == 1 {
		go l.work(lane)
	}
}

// work runs the jobs of a lane until there are no more. The first in the queue is the one that runs.
func (l *lanes) work(lane string) {
	for {
		l.mu.Lock()
		next := l.queues[lane][0]
		l.mu.Unlock()
		next.run()
		l.mu.Lock()
		l.queues[lane] = l.queues[lane][1:]
		done := len(l.queues[lane]) == 0
		if done {
			delete(l.queues, lane)
		}
		close(l.progress)
		l.progress = make(chan struct{})
		l.mu.Unlock()
		if done {
			return
		}
	}
}

// settle waits until the lanes are empty, no job has ended for so long, or ctx ends. It returns the jobs that run then.
func (l *lanes) settle(ctx context.Context, patience time.Duration) []string {
	for {
		l.mu.Lock()
		var titles []string
		for _, queue := range l.queues {
			titles = append(titles, queue[0].title)
		}
		progress := l.progress
		l.mu.Unlock()
		if len(titles) == 0 {
			return nil
		}
		select {
		case <-progress:
		case <-time.After(patience):
			slices.Sort(titles)
			return titles
		case <-ctx.Done():
			return nil
		}
	}
}

// print writes a job's output in one piece.
func (l *lanes) print(out io.Writer, text []byte) {
	l.printing.Lock()
	defer l.printing.Unlock()
	_, _ = out.Write(text)
}
