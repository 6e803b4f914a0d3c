// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
)

// service tells those who have started the program how it is, and does what they ask for by signals: systemd, or the
// parent of --daemon. The zero value serves nobody.
type service struct {
	log       hclog.Logger
	file      *logFile // nil: the log is standard error
	isDaemon  bool
	parent    *os.File // tells the parent of --daemon that the start is done; nil without
	pidFile   string   // "" for none
	bySystemd bool
	watchdog  time.Duration // within which systemd wants to hear from us; 0: it does not
	hangups   chan os.Signal
}

// newService finds out who has started the program. finish must be called in the end.
func newService(opts *options, file *logFile, log hclog.Logger) (*service, error) {
	s := &service{
		log: log, file: file, isDaemon: opts.daemon, pidFile: opts.pidFile, bySystemd: os.Getenv("NOTIFY_SOCKET") != "",
	}
	if opts.daemon {
		s.parent = daemonParent()
	}
	var err error
	if s.watchdog, err = daemon.SdWatchdogEnabled(false); err != nil {
		log.Warn("the service manager's watchdog cannot be served", "reason", err)
	}
	if file != nil || s.bySystemd {
		s.hangups = make(chan os.Signal, 1)
		signal.Notify(s.hangups, syscall.SIGHUP)
		go s.reopenLogs()
	}
	return s, nil
}

// mindsHangup reports whether SIGHUP is to end the program: it does at a terminal, and is a request otherwise.
func (s *service) mindsHangup() bool { return s.hangups == nil }

// reopenLogs opens the log anew at each SIGHUP.
func (s *service) reopenLogs() {
	for range s.hangups {
		if s.file == nil {
			continue // the journal needs nothing
		}
		if err := s.file.reopen(); err != nil {
			s.log.Error("the log file cannot be opened anew; the old one goes on", "reason", err)
			continue
		}
		s.log.Info("log file opened anew", "path", s.file.path)
	}
}

// ready says that commands are taken and the start commands have run.
func (s *service) ready() error {
	if s.pidFile != "" {
		if err := writePIDFile(s.pidFile); err != nil {
			return err
		}
	}
	if s.isDaemon {
		if err := s.detach(); err != nil {
			return err
		}
	}
	s.notify(daemon.SdNotifyReady)
	return nil
}

// stopping says that the end has begun.
func (s *service) stopping() { s.notify(daemon.SdNotifyStopping) }

// finish takes back what outlives the process otherwise.
func (s *service) finish() {
	if s.hangups != nil {
		signal.Stop(s.hangups)
	}
	if s.pidFile != "" {
		removePIDFile(s.pidFile)
	}
}

func (s *service) notify(state string) {
	if !s.bySystemd {
		return
	}
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("the service manager does not hear", "message", state, "reason", err)
	}
}

// keepWatch tells the service manager twice in each watchdog interval that alive has returned; when it does not return
// any more the manager kills and restarts the program. It ends with the process.
func (s *service) keepWatch(alive func()) {
	if s.watchdog == 0 {
		return
	}
	go func() {
		for range time.Tick(s.watchdog / 2) {
			alive()
			s.notify(daemon.SdNotifyWatchdog)
		}
	}()
}
