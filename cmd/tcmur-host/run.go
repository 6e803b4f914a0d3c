// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Exit statuses; anything else is a signal or a handler's own exit().
const (
	exitOK      = 0
	exitFailed  = 1 // could not start, or a device could not be closed in time
	exitBadArgs = 2
)

// How long devices may take to close when nobody is there to wait for them: the front is gone, or has asked the process
// to end (after which go-plugin kills it within two seconds).
const (
	orphanCloseTimeout   = 5 * time.Second
	shutdownCloseTimeout = 1500 * time.Millisecond
)

// options are the command line.
type options struct {
	submitFD, completeFD, livenessFD int
	memoryFD                         int // -1: none
	spinMicros                       uint
	logDir                           string
}

func parseArgs(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("tcmur-host", flag.ContinueOnError)
	fs.IntVar(&o.submitFD, control.FlagSubmitFD, -1, "descriptor of the channel's submit segment")
	fs.IntVar(&o.completeFD, control.FlagCompleteFD, -1, "descriptor of the channel's complete segment")
	fs.IntVar(&o.livenessFD, control.FlagLivenessFD, -1, "socket whose hang-up means that the front is gone")
	fs.IntVar(&o.memoryFD, control.FlagMemoryFD, -1, "socket to ask for memory that outlives this process (optional)")
	fs.UintVar(&o.spinMicros, "spin-us", 50,
		"how long an idle worker watches for requests before it sleeps, in microseconds; 0: not at all")
	fs.StringVar(&o.logDir, "log-dir", "/var/log", "directory for the log files of handlers that write their own")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	for name, fd := range map[string]int{
		control.FlagSubmitFD: o.submitFD, control.FlagCompleteFD: o.completeFD, control.FlagLivenessFD: o.livenessFD,
	} {
		if fd < 0 {
			return o, fmt.Errorf("--%s is missing; fuse_tcmur starts this program, it is of no use by hand", name)
		}
	}
	return o, nil
}

// run is the life of the process. It returns the exit status.
func run(args []string) int {
	o, err := parseArgs(args)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tcmur-host:", err)
		return exitBadArgs
	}
	closeAllOnExec(o)
	// A ^C at the front's terminal goes to every process of the group. What to do then is the front's decision.
	signal.Ignore(unix.SIGINT)
	// A front that is gone already must not end this process before it has cleaned up: writing to it is EPIPE.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)

	stderr, err := privateStderr()
	if err != nil {
		fmt.Fprintln(os.Stderr, "tcmur-host:", err)
		return exitFailed
	}
	logger := hclog.New(&hclog.LoggerOptions{Output: stderr, JSONFormat: true, Level: hclog.Info})
	srv, err := prepare(o, stderr, logger)
	if err != nil {
		logger.Error("tcmur-host cannot start", "error", err)
		return exitFailed
	}

	go func() {
		waitForHangUp(o.livenessFD)
		logger.Warn("the front is gone: closing all devices")
		// Whatever hangs, in a handler or on the way to one: an orphan does not stay.
		time.AfterFunc(orphanCloseTimeout+time.Second, func() { os.Exit(exitFailed) })
		// The front has made this directory and would have removed it. Its socket may be in the making.
		socketDir := os.Getenv(goplugin.EnvUnixSocketDir)
		_ = os.RemoveAll(socketDir)
		status := srv.shutdown(orphanCloseTimeout)
		_ = os.RemoveAll(socketDir)
		os.Exit(status)
	}()
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: control.Handshake,
		Plugins:         goplugin.PluginSet{control.Name: &control.Plugin{Impl: srv}},
		GRPCServer:      goplugin.DefaultGRPCServer,
		Logger:          logger,
	})
	return srv.shutdown(shutdownCloseTimeout)
}

// closeAllOnExec sees to it, first of all, that nothing which a handler may execute inherits a descriptor: neither
// those that were donated nor what the front itself was started with.
func closeAllOnExec(o options) {
	// Linux 5.11; where it is not known, the donated ones have to do.
	if unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for _, fd := range []int{o.submitFD, o.completeFD, o.livenessFD, o.memoryFD} {
		if fd >= 0 {
			unix.CloseOnExec(fd)
		}
	}
}

// prepare sets up everything that has to be there before a handler is loaded.
func prepare(o options, stderr *os.File, logger hclog.Logger) (*server, error) {
	if err := mapChannel(o.submitFD, o.completeFD); err != nil {
		return nil, err
	}
	// The mappings hold the segments; a handler that closes or writes to descriptors at random must not hit these.
	for _, fd := range []int{o.submitFD, o.completeFD} {
		if err := unix.Close(fd); err != nil {
			return nil, fmt.Errorf("close descriptor %d: %w", fd, err)
		}
	}
	// Where Go's own fatal errors go once descriptor 2 is the handler's.
	if err := debug.SetCrashOutput(stderr, debug.CrashOptions{}); err != nil {
		return nil, fmt.Errorf("set crash output: %w", err)
	}
	if err := installCrashReports(int(stderr.Fd())); err != nil {
		return nil, err
	}
	setSpin(o.spinMicros)
	if o.memoryFD >= 0 {
		setKeepSocket(o.memoryFD)
	}
	setLogDirectory(o.logDir)
	return &server{logger: logger, devices: map[uint32]*device{}}, nil
}

// privateStderr is the original standard error under a number of its own, which handlers do not know.
func privateStderr() (*os.File, error) {
	fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return nil, fmt.Errorf("duplicate standard error: %w", err)
	}
	return os.NewFile(uintptr(fd), "stderr"), nil
}

// waitForHangUp returns when the other end of the socket is closed, by the front or by its death.
func waitForHangUp(fd int) {
	var buf [64]byte
	for {
		// Blocking, on a thread of its own: it has to notice even if everything else is stuck.
		n, err := unix.Read(fd, buf[:])
		if errors.Is(err, syscall.EINTR) || (err == nil && n > 0) {
			continue
		}
		if errors.Is(err, syscall.EAGAIN) {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			continue
		}
		return
	}
}
