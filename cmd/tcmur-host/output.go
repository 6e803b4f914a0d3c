// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

const (
	outputLineMax  = 1024 // bytes of a line that are logged
	outputBurst    = 200  // lines that may come at once
	outputPerSec   = 100  // lines per second in the long run
	outputPipeSize = 1 << 20
)

// captureOutput makes pipes of the descriptors 1 and 2, so that what a handler (or a library of its) prints reaches
// neither the front's protocol nor its log unformatted, and never blocks the handler. What arrives is logged, line by
// line. Descriptor 0 becomes /dev/null.
func captureOutput(logger hclog.Logger) (*tap, error) {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	if err := unix.Dup3(null, 0, 0); err != nil {
		return nil, fmt.Errorf("replace standard input: %w", err)
	}
	var readers [2]int
	var ended sync.WaitGroup
	for i, stream := range []struct {
		fd   int
		name string
	}{{1, "stdout"}, {2, "stderr"}} {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			return nil, fmt.Errorf("make a pipe for %s: %w", stream.name, err)
		}
		// Only this end: the handler's has to behave like an ordinary stream.
		if err := unix.SetNonblock(pipe[0], true); err != nil {
			return nil, fmt.Errorf("make a pipe for %s: %w", stream.name, err)
		}
		_, _ = unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, outputPipeSize) // best effort
		if err := unix.Dup3(pipe[1], stream.fd, 0); err != nil {
			return nil, fmt.Errorf("replace %s: %w", stream.name, err)
		}
		unix.Close(pipe[1])
		readers[i] = pipe[0]
		ended.Go(func() {
			logOutput(os.NewFile(uintptr(pipe[0]), stream.name), logger.With("stream", stream.name))
		})
	}
	setCrashOutput(readers[0], readers[1])
	return newTap(ended.Wait, func() {
		_ = unix.Dup3(null, 1, 0)
		_ = unix.Dup3(null, 2, 0)
	}), nil
}

// tap is something that goroutines drain into the log.
type tap struct {
	close   func()        // ends the supply; may be called twice
	drained chan struct{} // closed when all of it has been logged
}

func newTap(wait, closeSupply func()) *tap {
	t := &tap{close: sync.OnceFunc(closeSupply), drained: make(chan struct{})}
	go func() {
		wait()
		close(t.drained)
	}()
	return t
}

// drain ends the supply and waits until the rest has been logged, or until late is closed: a grandchild may hold on to
// a pipe for ever.
func (t *tap) drain(late <-chan struct{}) {
	t.close()
	select {
	case <-t.drained:
	case <-late:
	}
}

// logOutput logs what comes out of a pipe until the process ends. It always goes on reading, however little it logs.
func logOutput(from *os.File, logger hclog.Logger) {
	in := bufio.NewReaderSize(from, outputLineMax)
	allowance := newAllowance(outputBurst, outputPerSec, time.Now)
	inLongLine := false
	for {
		line, err := in.ReadSlice('\n')
		long := errors.Is(err, bufio.ErrBufferFull)
		if text := bytes.TrimRight(line, "\r\n"); len(text) > 0 && !inLongLine {
			if ok, suppressed := allowance.take(); ok {
				if suppressed > 0 {
					logger.Warn("handler printed too much", "lines_not_shown", suppressed)
				}
				logger.Info("handler printed: "+string(bytes.ToValidUTF8(text, []byte("\uFFFD"))), "cut", long)
			}
		}
		inLongLine = long
		if err != nil && !long {
			return
		}
	}
}

// allowance is a token bucket.
type allowance struct {
	burst, perSecond float64
	now              func() time.Time
	tokens           float64
	last             time.Time
	refused          int
}

func newAllowance(burst, perSecond float64, now func() time.Time) *allowance {
	return &allowance{burst: burst, perSecond: perSecond, now: now, tokens: burst, last: now()}
}

// take says whether one more is allowed and, if so, how many were not since the last that was.
func (a *allowance) take() (ok bool, refused int) {
	now := a.now()
	a.tokens = min(a.burst, a.tokens+a.perSecond*now.Sub(a.last).Seconds())
	a.last = now
	if a.tokens < 1 {
		a.refused++
		return false, 0
	}
	a.tokens--
	refused, a.refused = a.refused, 0
	return true, refused
}
