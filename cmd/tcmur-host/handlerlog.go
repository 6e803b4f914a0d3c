// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// logPipeSize in bytes: how far the handler may get ahead of the log before messages are dropped.
const logPipeSize = 1 << 20

// Log levels of syslog, which handlers use.
const (
	syslogError   = 3
	syslogWarning = 4
	syslogInfo    = 6
)

// thresholds returns the levels that a level of the protocol stands for: syslog's for the C side, hclog's for ours.
func thresholds(level hostpb.LogLevel) (int, hclog.Level) {
	switch level {
	case hostpb.LogLevel_LOG_LEVEL_ERROR:
		return syslogError, hclog.Error
	case hostpb.LogLevel_LOG_LEVEL_WARN:
		return syslogWarning, hclog.Warn
	case hostpb.LogLevel_LOG_LEVEL_DEBUG:
		return 7, hclog.Debug
	default:
		return syslogInfo, hclog.Info
	}
}

// startHandlerLog connects the handler's logging functions to logger.
func startHandlerLog(logger hclog.Logger) (*tap, error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("make a pipe for the handler's log: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, logPipeSize) // best effort
	setLogOutput(pipe[1])
	read := func() {
		if err := passOnRecords(os.NewFile(uintptr(pipe[0]), "handler log"), logger); !errors.Is(err, io.EOF) {
			// A handler that writes to descriptors that are not its own can do this. I/O does not depend on it.
			logger.Error("the handler's log is broken and not shown any more", "error", err)
			setLogOutput(-1)
		}
	}
	return newTap(read, func() {
		setLogOutput(-1)
		unix.Close(pipe[1])
	}), nil
}

// record is struct log_record and its texts.
type record struct {
	level               int
	host                bool
	line                int32
	device, func_, text string
}

// readRecord reads one.
func readRecord(in io.Reader) (record, error) {
	var head [logRecordSize]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return record{}, err
	}
	u16 := func(at int) int { return int(binary.NativeEndian.Uint16(head[at:])) }
	size, device, fn, text := u16(0), u16(8), u16(10), u16(12)
	if size != logRecordSize+device+fn+text || size > 4096 {
		return record{}, fmt.Errorf("a record of %d bytes has parts of %d, %d and %d", size, device, fn, text)
	}
	body := make([]byte, size-logRecordSize)
	if _, err := io.ReadFull(in, body); err != nil {
		return record{}, err
	}
	return record{
		level: int(head[2]), host: head[3] != 0, line: int32(binary.NativeEndian.Uint32(head[4:])),
		device: string(body[:device]), func_: string(body[device : device+fn]), text: string(body[device+fn:]),
	}, nil
}

// handlerLogReport is how long after a message that was not shown it is said how many were not.
const handlerLogReport = time.Second

// passOnRecords logs what the C side writes, until that ends (io.EOF) or cannot be understood any more. It reads all of
// it, and shows no more than what handlers may print: a back end that fails each request must not flood the log.
func passOnRecords(from io.Reader, logger hclog.Logger) error {
	in := bufio.NewReaderSize(from, 64<<10)
	allowance := newAllowance(outputBurst, outputPerSec, time.Now)
	var suppressed atomic.Int64
	report := func() {
		if n := suppressed.Swap(0) + int64(takeDroppedLogs()); n > 0 {
			logger.Warn("handler logged too much", "messages_dropped", n)
		}
	}
	defer report()
	for {
		rec, err := readRecord(in)
		if err != nil {
			return err
		}
		if ok, _ := allowance.take(); !ok {
			if suppressed.Add(1) == 1 {
				time.AfterFunc(handlerLogReport, report)
			}
			continue
		}
		var fields []any
		if rec.device != "" {
			fields = append(fields, "device", rec.device)
		}
		if rec.func_ != "" {
			fields = append(fields, "source", fmt.Sprintf("%s:%d", rec.func_, rec.line))
		}
		logger.Log(hclogLevel(rec.level), rec.text, fields...)
	}
}

func hclogLevel(syslog int) hclog.Level {
	switch {
	case syslog <= syslogError:
		return hclog.Error
	case syslog == syslogWarning:
		return hclog.Warn
	case syslog <= syslogInfo:
		return hclog.Info
	case syslog == 7:
		return hclog.Debug
	}
	return hclog.Trace
}
