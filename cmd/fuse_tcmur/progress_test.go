// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestProgress: on a terminal there is a line that is kept up to date and taken away in the end; in a pipe there is
// nothing.
func TestProgress(t *testing.T) {
	t.Parallel()
	read, write := io.Pipe()
	shown := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(read)
		shown <- string(text)
	}()
	asked := make(chan struct{}, 100)
	stop := keepLine(write, "remove 0", func() string {
		asked <- struct{}{}
		return "ram000: 1.5M not flushed"
	}, 0, time.Millisecond)
	for range 3 {
		<-asked
	}
	stop()
	stop()
	_ = write.Close()
	text := <-shown
	if !strings.HasPrefix(text, eraseLine+"remove 0: 0 s, ram000: 1.5M not flushed") ||
		!strings.HasSuffix(text, eraseLine) || strings.Contains(text, "\n") {
		t.Errorf("shown: %q", text)
	}

	var pipe bytes.Buffer
	showProgress(&pipe, "remove 0", func() string { return "" })()
	if pipe.Len() > 0 {
		t.Errorf("in a pipe: %q", pipe.String())
	}
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if !isTerminal(terminal) {
		t.Error("a terminal is not recognised")
	}
}

// TestDescribeWork: what is to be flushed or sent again is named, and not too much of it.
func TestDescribeWork(t *testing.T) {
	t.Parallel()
	devices := []deviceStatus{
		{Name: "a", Retained: 3 << 19}, {Name: "b"}, {Name: "c", ReplayLeft: 2048, Retained: 4096},
		{Name: "d", Retained: 1}, {Name: "e", Retained: 1 << 40}, {Name: "f", Retained: 1},
	}
	const want = "a: 1.5M not flushed; c: 2K to be sent again; d: 1 not flushed; and 2 more"
	if got := describeWork(devices); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := describeWork(nil); got != "" {
		t.Errorf("of nothing: %q", got)
	}
}
