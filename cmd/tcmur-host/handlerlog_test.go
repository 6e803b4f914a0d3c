// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// TestHandlerLogFlood: of a flood of messages the first ones are shown, and the number of the others.
func TestHandlerLogFlood(t *testing.T) {
	const messages = 20000
	var flood, log bytes.Buffer
	for range messages {
		const text = "request failed"
		head := make([]byte, logRecordSize)
		binary.NativeEndian.PutUint16(head, uint16(logRecordSize+len(text)))
		head[2] = syslogError
		binary.NativeEndian.PutUint16(head[12:], uint16(len(text)))
		flood.Write(head)
		flood.WriteString(text)
	}
	if err := passOnRecords(&flood, hclog.New(&hclog.LoggerOptions{Output: &log})); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	shown, dropped := 0, 0
	for line := range strings.Lines(log.String()) {
		if m := regexp.MustCompile(`messages_dropped=(\d+)`).FindStringSubmatch(line); m != nil {
			n, _ := strconv.Atoi(m[1])
			dropped += n
		} else {
			shown++
		}
	}
	if shown+dropped != messages || shown < outputBurst || shown > 10*outputBurst {
		t.Errorf("%d messages shown and %d said to be dropped, of %d", shown, dropped, messages)
	}
}
