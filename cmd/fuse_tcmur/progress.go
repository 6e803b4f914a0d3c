// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

const (
	// progressDelay is how long something takes before it is worth a word.
	progressDelay = 500 * time.Millisecond
	progressStep  = 200 * time.Millisecond
	eraseLine     = "\r\x1b[K"
)

// showProgress keeps a line up to date on a terminal that says how long something has taken, and what text makes of
// it, until stop is called, which takes the line away. Where out is not a terminal it shows nothing.
func showProgress(out io.Writer, what string, text func() string) (stop func()) {
	if !isTerminal(out) {
		return func() {}
	}
	return keepLine(out, what, text, progressDelay, progressStep)
}

// keepLine is showProgress on whatever out is.
func keepLine(out io.Writer, what string, text func() string, delay, step time.Duration) (stop func()) {
	began := time.Now()
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		next := time.NewTimer(delay)
		defer next.Stop()
		shown := false
		for {
			select {
			case <-next.C:
			case <-end:
				if shown {
					_, _ = io.WriteString(out, eraseLine)
				}
				return
			}
			line := fmt.Sprintf("%s: %.0f s", what, time.Since(began).Seconds())
			if more := text(); more != "" {
				line += ", " + more
			}
			_, _ = io.WriteString(out, eraseLine+line)
			shown = true
			next.Reset(step)
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() { close(end) })
		<-ended
	}
}

// describeWork says what a server is busy with: replays, and writes that a flush has yet to cover.
func describeWork(devices []deviceStatus) string {
	var parts []string
	for _, d := range devices {
		switch {
		case d.ReplayLeft > 0:
			parts = append(parts, fmt.Sprintf("%s: %s to be sent again", d.Name, formatBytes(d.ReplayLeft)))
		case d.Retained > 0:
			parts = append(parts, fmt.Sprintf("%s: %s not flushed", d.Name, formatBytes(d.Retained)))
		}
	}
	const most = 3
	if len(parts) > most {
		parts = append(parts[:most], fmt.Sprintf("and %d more", len(parts)-most))
	}
	return strings.Join(parts, "; ")
}

// formatBytes is a number of bytes in powers of 1024, such as "1.5M"; whole numbers without a fraction.
func formatBytes(n int64) string {
	value, unit := float64(n), ""
	for _, next := range []string{"K", "M", "G", "T", "P"} {
		if value < 1024 {
			break
		}
		value, unit = value/1024, next
	}
	text := fmt.Sprintf("%.1f", value)
	return strings.TrimSuffix(text, ".0") + unit
}
