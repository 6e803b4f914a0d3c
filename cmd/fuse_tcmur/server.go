// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

const (
	// maxWrite is the most bytes the kernel sends in one WRITE request.
	maxWrite = 1 << 20
	// maxBackground is how many asynchronous requests the kernel keeps under way, for all devices together: one whose
	// handler hangs must not keep the others from theirs. The kernel's default of 12 throttles deep queues.
	maxBackground = 4096
	// mountTimeout bounds the wait for the mount to appear.
	mountTimeout = 10 * time.Second
)

// server is one run of the program: it owns the library, the tree and the mount, from start to clean-up.
type server struct {
	log     hclog.Logger
	stdout  io.Writer
	hints   bool
	lib     library
	tree    mountedTree
	front   *front
	interp  *interpreter
	point   *mountpoint
	signals <-chan os.Signal
	// ctlAccess is that of the command node.
	ctlAccess nodeAccess
	service   *service
	// config is the config file, "" for none; where it is not required it may be missing.
	config         string
	configRequired bool
	// restoring are the commands of the config file, endRestore ends them.
	restoring  *lanes
	endRestore context.CancelFunc
	// forceDelay is the constant of this name, except in tests.
	forceDelay time.Duration
	metricsAt  string         // address, "" for none
	metrics    *metricsServer // nil if there is none
	// stopTimeout bounds the flush and the close of all devices at the end.
	stopTimeout time.Duration

	// ctx is that of the commands written to the mount; abandon ends it when the stop is forced.
	ctx     context.Context
	abandon context.CancelFunc
	// ended is closed when the tree is served no more; runErr says why and may be read then.
	ended  chan struct{}
	runErr error
	// dataAtRisk: a flush or a close failed, or users were cut off while they could write.
	dataAtRisk bool
}

// mountedTree is a nodeTree with its mount; fusetree.Tree has the contracts.
type mountedTree interface {
	nodeTree
	Run() error
	Mounted() <-chan struct{}
	Unmount(force bool) error
	Abort() error
	Exit() error
}

// serve mounts, runs the start commands and serves until it is told to stop. Its errors carry an exit status.
func serve(opts *options, stdout io.Writer, service *service, log hclog.Logger) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	if service.mindsHangup() {
		signal.Notify(signals, syscall.SIGHUP)
	}
	defer signal.Stop(signals)
	// A reader of the log or of stdout that goes away must not take the mount with it. Taking the signal, not
	// ignoring it: what is ignored stays so in the host processes.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	s, err := newServer(opts, stdout, signals, log)
	if err != nil {
		return withStatus(exitStartFailed, err)
	}
	s.service, s.config, s.configRequired = service, opts.config, opts.configRequired
	return s.serve(opts.start)
}

// newServer prepares everything short of the mount. When it fails it has left nothing behind.
func newServer(opts *options, stdout io.Writer, signals <-chan os.Signal, log hclog.Logger) (*server, error) {
	// A working directory inside a mount, this one above all, would keep it busy.
	if err := os.Chdir("/"); err != nil {
		return nil, err
	}
	dirs := systemDirs{proc: "/proc", sys: "/sys"}
	lib, err := plugin.Init(plugin.Config{
		HandlerPrefixes: opts.prefixes,
		HostBinary:      opts.hostBinary,
		MaxMinors:       opts.maxMinors,
		DeathBudget:     opts.budget,
		Logger:          log.Named("plugin"),

		AllowInsecureHandlers: opts.insecure,
	})
	if err != nil {
		return nil, err
	}
	point, err := prepareMountpoint(dirs.proc, opts.mountpoint, log)
	if err != nil {
		return nil, err
	}
	tree, err := fusetree.Init(point.path, fusetree.Options{
		FsName:        fsName,
		FsType:        fsName,
		Logger:        log.Named("fusetree"),
		MaxWrite:      maxWrite,
		MaxBackground: maxBackground,
		IOUring:       fusetree.IOUringMode(opts.ioUring),
	})
	if err != nil {
		point.remove(log)
		return nil, err
	}
	front, err := newFront(pluginLibrary{lib}, tree, point.path, dirs, log)
	if err != nil {
		point.remove(log)
		return nil, err
	}
	front.mountFile = func(path string, mode uint32, ops *fusetree.Ops, data any) (fileMount, error) {
		// The other transport has a thread and memory for each processor: too much for each of many devices.
		return fusetree.InitFile(path, mode, ops, data, fusetree.Options{
			FsName: fsName, FsType: fsName, Logger: log.Named("fusetree"), MaxWrite: maxWrite, MaxBackground: maxBackground,
			IOUring: fusetree.IOUringOff, WritebackCache: true,
		})
	}
	s := &server{
		log:         log,
		stdout:      stdout,
		hints:       opts.hints || isTerminal(stdout),
		lib:         pluginLibrary{lib},
		tree:        tree,
		front:       front,
		interp:      newInterpreter(front, log.Named("ctl")),
		point:       point,
		signals:     signals,
		ctlAccess:   opts.ctlAccess,
		forceDelay:  forceDelay,
		stopTimeout: opts.stopAfter,
		metricsAt:   opts.metricsListen,
		ended:       make(chan struct{}),
		service:     &service{},
	}
	s.ctx, s.abandon = context.WithCancel(context.Background())
	return s, nil
}

// serve is the program's life: mount, start commands, work, clean-up.
func (s *server) serve(start startList) error {
	defer s.abandon()
	s.service.keepWatch(func() {
		// What every command and every device needs: the locks of the tables.
		s.front.allNodes()
		s.lib.Handlers()
	})
	err := s.mount()
	if err == nil {
		err = s.start(start)
	}
	if err == nil {
		if err = s.service.ready(); err != nil {
			s.unmountForCleanUp()
		}
	}
	if err == nil {
		s.work()
	}
	s.service.stopping()
	s.cleanUp()
	if s.dataAtRisk {
		risk := errors.New("stopped, but data may be lost: the log says of which device")
		return withStatus(exitDataAtRisk, errors.Join(err, risk))
	}
	return withStatus(exitStartFailed, err)
}

// addTexts makes the nodes that tell of the whole program.
func (s *server) addTexts() error {
	registry := newMetricsRegistry(s.front)
	_, err := s.tree.Add(statusName, s.front.sysDir, textMode, textOps(s.interp.statusText), nil)
	if err == nil {
		text := func() string { return metricsText(registry) }
		_, err = s.tree.Add(metricsName, s.front.sysDir, textMode, textOps(text), nil)
	}
	if err == nil && s.metricsAt != "" {
		s.metrics, err = serveMetrics(s.metricsAt, registry, s.log)
	}
	return err
}

// mount makes the command node and mounts the tree.
func (s *server) mount() error {
	ctl := &ctlNode{ctx: s.ctx, interp: s.interp, gate: s.front.gate}
	node, err := s.tree.Add(ctlName, s.front.devDir, s.ctlAccess.permissions(ctlMode), ctl.ops(), nil)
	if err != nil {
		close(s.ended)
		return err
	}
	node.UpdateBlockSize(ctlBlockSize)
	s.ctlAccess.apply(node)
	if err := s.addTexts(); err != nil {
		close(s.ended)
		return err
	}
	go func() {
		s.runErr = s.tree.Run()
		s.front.awaitCovers()
		close(s.ended)
	}()
	select {
	case <-s.tree.Mounted():
		return nil
	case <-s.ended:
		return fmt.Errorf("cannot mount %s: %w", s.front.mountpoint, s.runErr)
	case <-time.After(mountTimeout):
		s.unmountForCleanUp()
		return failf(syscall.ETIMEDOUT, "%s was not mounted within %v", s.front.mountpoint, mountTimeout)
	}
}

// start runs the start commands up to the first that fails; a signal or an umount from outside ends it early.
func (s *server) start(list startList) error {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	restoreCtx, endRestore := context.WithCancel(s.ctx)
	s.restoring, s.endRestore = newLanes(), endRestore
	result := make(chan error, 1)
	go func() {
		err := s.restore(restoreCtx, s.restoring)
		if err == nil {
			err = s.runStartList(ctx, list)
		}
		result <- err
	}()
	var err error
	select {
	case err = <-result:
	case sig := <-s.signals:
		cancel()
		endRestore()
		<-result // each command ends with its context
		err = fmt.Errorf("stopped by %v before the start was done", sig)
	case <-s.ended:
		cancel()
		endRestore()
		<-result
		err = fmt.Errorf("%s was unmounted before the start was done", s.front.mountpoint)
	}
	if err != nil {
		s.unmountForCleanUp()
	}
	return err
}

func (s *server) runStartList(ctx context.Context, list startList) error {
	for _, item := range list {
		if s.front.gate.refuseWhenStopping() != nil {
			return nil // the item before was "exit"
		}
		var out bytes.Buffer
		err := s.runStartItem(ctx, item, &out)
		if err != nil {
			return err
		}
		_, _ = s.stdout.Write(out.Bytes())
	}
	return nil
}

func (s *server) runStartItem(ctx context.Context, item startItem, out io.Writer) error {
	if item.file == "" {
		return s.interp.run(ctx, script{text: item.command, stopAtFailure: true}, out)
	}
	text, err := readCommandFile(item.file, s.front.ownMount())
	if err != nil {
		return fmt.Errorf("--source %w", err)
	}
	return s.interp.run(ctx, script{text: text, file: item.file, stopAtFailure: true, depth: 1}, out)
}

// work serves until there is a reason to stop, and ends unmounted or, when forced, cut off from its users.
func (s *server) work() {
	if s.front.gate.refuseWhenStopping() == nil {
		_, _ = io.WriteString(s.stdout, readyText(s.front, s.hints))
	}
	var refused time.Time // when a signal last found the mount busy
	for {
		select {
		case <-s.ended:
			if s.runErr != nil {
				s.log.Warn("the mount ended", "reason", s.runErr)
			}
			s.log.Info("stopping", "reason", "unmounted from outside")
			return
		case <-s.front.exitRequested:
			s.unmountAfterExit()
			return
		case <-s.front.exitForced:
			// The command itself came through the mount: its writer gets the answer.
			s.front.gate.waitCtlClosed(exitGrace)
			s.forceUnmount()
			return
		case sig := <-s.signals:
			since := time.Since(refused)
			switch {
			case refused.IsZero() || since >= forceWindow:
			case since < s.forceDelay:
				continue
			default:
				s.forceUnmount()
				return
			}
			if s.unmountIfIdle(sig) {
				return
			}
			refused = time.Now()
		}
	}
}
