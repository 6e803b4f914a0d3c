// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a server in the background, with a process group of its own: what it starts is signalled with it, and a ^C
// in the terminal leaves it alone until its mount is gone.
type process struct {
	cmd    *exec.Cmd
	output tail
	done   chan struct{} // closed when it has been waited for; err is set then
	err    error
}

// startProcess starts argv. The caller ends it with stop.
func startProcess(argv ...string) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A grandchild that keeps the output open must not delay the news of the child's end.
	p.cmd.WaitDelay = time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// ended returns why the process is gone, nil if it is not.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended (%v): %s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, p.output.String())
	default:
		return nil
	}
}

// stop waits for the process to end, which it does by itself when its mount is gone, and makes it end if it does not.
func (p *process) stop() {
	for _, signal := range []syscall.Signal{0, syscall.SIGTERM, syscall.SIGKILL} {
		if signal != 0 {
			_ = syscall.Kill(-p.cmd.Process.Pid, signal)
		}
		select {
		case <-p.done:
			// What it started and left behind. The group id stays taken while the group has a member.
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
			return
		case <-time.After(5 * time.Second):
		}
	}
}

// pids lists the process and its descendants.
func (p *process) pids() []int {
	all := []int{p.cmd.Process.Pid}
	parents := parentOfEach()
	for i := 0; i < len(all); i++ {
		for pid, parent := range parents {
			if parent == all[i] {
				all = append(all, pid)
			}
		}
	}
	return all
}

func parentOfEach() map[int]int {
	parents := map[int]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		if pid, parent, err := parseStat(string(stat)); err == nil {
			parents[pid] = parent
		}
	}
	return parents
}

// parseStat reads the process id and the parent's from /proc/PID/stat. The name, second, may hold anything.
func parseStat(stat string) (pid, parent int, err error) {
	first, rest, _ := strings.Cut(stat, " ")
	fields := strings.Fields(rest[strings.LastIndexByte(rest, ')')+1:])
	if len(fields) < 2 {
		return 0, 0, fmt.Errorf("%q is no process status", stat)
	}
	if pid, err = strconv.Atoi(first); err != nil {
		return 0, 0, err
	}
	parent, err = strconv.Atoi(fields[1])
	return pid, parent, err
}

// cpuTime is the CPU time that the processes have used so far, all threads, those that have ended too. It comes from
// their CPU-time clocks: /proc/PID/stat counts hundredths of a second, too coarse for idle processes.
func cpuTime(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		const scheduler = 2 // CPUCLOCK_SCHED; see clock_getcpuclockid(3) for how a clock id is made
		var t unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|scheduler), &t); err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		sum += time.Duration(t.Nano())
	}
	return sum, nil
}

// residentMemory is the processes' memory in bytes, each shared page counted in equal parts for those that share it.
func residentMemory(pids []int) (int64, error) {
	var sum int64
	for _, pid := range pids {
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		kib, err := parsePss(string(rollup))
		if err != nil {
			return 0, err
		}
		sum += kib << 10
	}
	return sum, nil
}

// parsePss reads the proportional set size in KiB from /proc/PID/smaps_rollup.
func parsePss(rollup string) (int64, error) {
	for line := range strings.Lines(rollup) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "Pss:" {
			return strconv.ParseInt(fields[1], 10, 64)
		}
	}
	return 0, errors.New("no Pss in smaps_rollup")
}

// setAffinity lets all present threads of the processes, and those that they start, run on these CPUs only.
func setAffinity(pids []int, cpus *unix.CPUSet) error {
	for _, pid := range pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, _ := strconv.Atoi(filepath.Base(task))
			if err := unix.SchedSetaffinity(tid, cpus); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("CPUs of thread %d: %w", tid, err)
			}
		}
	}
	return nil
}

// command is a program that runs to its end.
type command struct {
	argv    []string
	timeout time.Duration
	// unblock is called when the command does not even end when killed, because a request to a server never
	// returns. It may be nil.
	unblock func()
}

// unblockGrace is how long a killed command may take to end.
const unblockGrace = 3 * time.Second

// run returns what the command wrote on standard output, and the CPU time that it used. It ends the command when the
// time is over or ctx is cancelled.
func (c command) run(ctx context.Context) ([]byte, time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("did not end within %v", c.timeout))
	defer cancel()
	var stdout bytes.Buffer
	var stderr tail
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	finished := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-finished:
		case <-time.After(unblockGrace):
			if c.unblock != nil {
				c.unblock()
			}
		}
	})
	defer stop()
	err := cmd.Wait()
	close(finished)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w: %s", c.argv[0], err, stderr.String())
	}
	return stdout.Bytes(), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// tail keeps the end of what is written to it. It may be written and read at the same time.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailLength = 2000

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	if excess := len(t.text) - tailLength; excess > 0 {
		t.text = append(t.text[:0], t.text[excess:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}
