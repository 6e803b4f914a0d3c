// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// replyTime is kept back from a call's deadline, so that the caller hears what went wrong and not just that it is late.
const replyTime = 50 * time.Millisecond

// drainTime is how long the end of the process waits for the handler's last words to be logged.
const drainTime = 200 * time.Millisecond

// server is the control protocol's host side. Calls may come at any time, from several goroutines.
type server struct {
	hostpb.UnimplementedHostServer
	logger hclog.Logger

	mu      sync.Mutex     // never held while the handler is called
	tried   bool           // a Load has got as far as running the object's code; there is no way back from that
	handler *handlerStruct // nil until a Load has succeeded
	quirks  quirks
	devices map[uint32]*device // those that are open, or being opened
	ending  bool               // shutdown has begun
	taps    []*tap             // what the handler says; nil until a Load has begun
	sizes   sizeWatch
}

// device is an open device.
type device struct {
	name string
	// opened is closed when the open has ended; nothing else is done with the device before.
	opened chan struct{}
	guard  guard // valid once opened is closed

	// Guarded by server.mu:
	size     uint64 // bytes, as last told to the front; 0 while it is being opened
	resizing bool   // a Resize is under way, and its reply tells the size
}

var _ hostpb.HostServer = (*server)(nil)

// Load implements hostpb.HostServer.
func (s *server) Load(_ context.Context, req *hostpb.LoadRequest) (*hostpb.LoadReply, error) {
	reply, err := s.load(req)
	return reply, control.ToStatus(err)
}

func (s *server) load(req *hostpb.LoadRequest) (*hostpb.LoadReply, error) {
	if !strings.HasPrefix(req.GetPath(), "/") || strings.ContainsRune(req.GetPath(), 0) {
		return nil, control.Failf(syscall.EINVAL, "%q is not an absolute path", req.GetPath())
	}
	s.mu.Lock()
	tried := s.tried
	s.tried = true
	s.mu.Unlock()
	if tried {
		return nil, control.Failf(syscall.EBUSY, "this host process has a handler already, or tried to load one")
	}
	s.setLogLevel(req.GetLogLevel())
	subtype := req.GetSubtype()
	if subtype == "" {
		subtype = "?"
	}
	logger := s.logger.With("handler", subtype)
	output, err := captureOutput(logger)
	if err != nil {
		return nil, err
	}
	messages, err := startHandlerLog(logger)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.taps = []*tap{output, messages}
	s.mu.Unlock()
	h, err := s.bringIn(req)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.handler, s.quirks = h, quirksOf(h)
	s.mu.Unlock()
	how := handlerThreading()
	return &hostpb.LoadReply{
		Subtype: h.subtype, Name: h.name, CfgDesc: h.cfgDesc, Abi: h.layout.name, NrThreads: int32(h.threads),
		Callbacks: h.callbackNames(), Concurrency: how.concurrency, Asynchronous: how.async,
		ByCommandBlock: how.byCDB, Guards: quirksOf(h).guards,
	}, nil
}

// bringIn loads the shared object's file, or the copy that the front has of it.
func (s *server) bringIn(req *hostpb.LoadRequest) (*handlerStruct, error) {
	path := req.GetPath()
	if !req.GetReplaced() {
		return loadHandler(path, path, req.GetSubtype(), req.GetAbi())
	}
	object, err := keptObject()
	if err != nil {
		return nil, control.Failf(syscall.ENOENT, "%s has changed, and the front's copy cannot be had: %v", path, err)
	}
	defer object.Close() // the mapping stays
	image := fmt.Sprintf("/proc/self/fd/%d", object.Fd())
	for _, library := range librariesBeside(image, path) {
		preload(library)
	}
	return loadHandler(path, image, req.GetSubtype(), req.GetAbi())
}

// SetLogLevel implements hostpb.HostServer.
func (s *server) SetLogLevel(_ context.Context, req *hostpb.SetLogLevelRequest) (*hostpb.SetLogLevelReply, error) {
	s.setLogLevel(req.GetLogLevel())
	return &hostpb.SetLogLevelReply{}, nil
}

func (s *server) setLogLevel(level hostpb.LogLevel) {
	syslog, hc := thresholds(level)
	setLogThreshold(syslog)
	s.logger.SetLevel(hc)
}

// CheckConfig implements hostpb.HostServer.
func (s *server) CheckConfig(
	_ context.Context, req *hostpb.CheckConfigRequest,
) (*hostpb.CheckConfigReply, error) {
	return &hostpb.CheckConfigReply{}, control.ToStatus(s.checkConfig(req.GetConfig()))
}

func (s *server) checkConfig(config string) error {
	_, q, err := s.forConfig(config)
	if err != nil {
		return err
	}
	ok, reason := checkConfig(q.configFor(config))
	switch {
	case ok:
		return nil
	case reason == "":
		return control.Failf(syscall.EINVAL, "the handler refuses the configuration %q and does not say why", config)
	default:
		return control.Failf(syscall.EINVAL, "%s", strings.TrimSpace(reason))
	}
}

// forConfig checks a configuration string and returns what is to deal with it.
func (s *server) forConfig(config string) (*handlerStruct, quirks, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.handler == nil:
		return nil, quirks{}, control.Failf(syscall.ENODEV, "no handler is loaded")
	case !strings.HasPrefix(config, s.handler.subtype+"/"):
		return nil, quirks{}, control.Failf(syscall.EINVAL, "%q does not begin with %q", config, s.handler.subtype+"/")
	case len(config) > maxConfig:
		return nil, quirks{}, control.Failf(syscall.ENAMETOOLONG,
			"the configuration has %d bytes; handlers take %d at most", len(config), maxConfig)
	case strings.ContainsRune(config, 0):
		return nil, quirks{}, control.Failf(syscall.EINVAL, "%q contains a NUL", config)
	}
	return s.handler, s.quirks, nil
}

// Open implements hostpb.HostServer.
func (s *server) Open(_ context.Context, req *hostpb.OpenRequest) (*hostpb.OpenReply, error) {
	reply, err := s.open(req)
	return reply, control.ToStatus(err)
}

func (s *server) open(req *hostpb.OpenRequest) (*hostpb.OpenReply, error) {
	h, q, err := s.forConfig(req.GetConfig())
	if err != nil {
		return nil, err
	}
	dev, err := s.reserve(req.GetDevice(), req.GetName())
	if err != nil {
		return nil, err
	}
	defer close(dev.opened)
	reply, g, err := open(h, q, req)
	if err != nil {
		s.forget(req.GetDevice())
		return nil, err
	}
	dev.guard = g
	s.mu.Lock()
	dev.size = reply.GetSize()
	s.mu.Unlock()
	for _, note := range g.notes {
		s.logger.Warn(note, "handler", h.subtype, "device", dev.name)
	}
	return reply, nil
}

// reserve claims an index.
func (s *server) reserve(index uint32, name string) (*device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ending:
		return nil, control.Failf(syscall.ESHUTDOWN, "this host process is ending")
	case index >= maxDevices:
		return nil, control.Failf(syscall.ENODEV, "device index %d is not below %d", index, maxDevices)
	case name == "" || len(name) > maxName || strings.ContainsRune(name, 0):
		return nil, control.Failf(syscall.EINVAL, "%q is no name for a device", name)
	case s.devices[index] != nil:
		return nil, control.Failf(syscall.EBUSY, "device index %d is in use by %s", index, s.devices[index].name)
	}
	dev := &device{name: name, opened: make(chan struct{})}
	s.devices[index] = dev
	return dev, nil
}

func (s *server) forget(index uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.devices, index)
}

// Close implements hostpb.HostServer.
func (s *server) Close(ctx context.Context, req *hostpb.CloseRequest) (*hostpb.CloseReply, error) {
	return &hostpb.CloseReply{}, control.ToStatus(s.close(ctx, req.GetDevice()))
}

// close ends a device within the context's time. ENODEV: there is none; ETIMEDOUT: requests are still in the handler,
// and the device stays, without taking new ones; any other errno: the device is closed, but its last flush failed.
func (s *server) close(ctx context.Context, index uint32) error {
	s.mu.Lock()
	dev := s.devices[index]
	s.mu.Unlock()
	if dev == nil {
		return control.Failf(syscall.ENODEV, "no device has index %d", index)
	}
	select {
	case <-dev.opened:
	case <-ctx.Done():
		return control.Failf(syscall.ETIMEDOUT, "%s is still being opened", dev.name)
	}
	timeout := time.Duration(-1)
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(0, time.Until(deadline)-replyTime)
	}
	stop := context.AfterFunc(ctx, func() { interruptDevice(index) })
	flushErr, err := closeDevice(index, timeout)
	stop()
	switch {
	case errors.Is(err, syscall.ETIMEDOUT):
		return control.Failf(syscall.ETIMEDOUT, "requests of %s did not come back from the handler in time", dev.name)
	case err != nil:
		return control.Failf(errnoOf(err), "%s: %v", dev.name, err)
	}
	dev.guard.release()
	s.forget(index)
	if flushErr != nil {
		return control.Failf(errnoOf(flushErr), "%s is closed, but the flush before failed (%v): what was written last "+
			"may be lost", dev.name, flushErr)
	}
	return nil
}

// shutdown closes all devices, all at once, and returns the exit status of the process. It may be called twice, also at
// the same time.
func (s *server) shutdown(timeout time.Duration) int {
	status := s.closeAll(timeout)
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	s.mu.Lock()
	taps := s.taps
	s.mu.Unlock()
	for _, t := range taps {
		t.drain(ctx.Done())
	}
	return status
}

// closeAll closes all devices and has the handler clean up, within timeout.
func (s *server) closeAll(timeout time.Duration) int {
	ctx, cancel := context.WithTimeout(context.Background(), timeout+replyTime)
	defer cancel()
	s.mu.Lock()
	s.ending = true
	indices := make([]uint32, 0, len(s.devices))
	for index := range s.devices {
		indices = append(indices, index)
	}
	loaded := s.handler != nil
	s.mu.Unlock()

	results := make(chan error, len(indices))
	for _, index := range indices {
		go func() { results <- s.close(ctx, index) }()
	}
	status := exitOK
	for range indices {
		select {
		case err := <-results:
			if err != nil && !errors.Is(err, syscall.ENODEV) {
				s.logger.Error("closing a device at the end", "error", err)
				status = exitFailed
			}
		case <-ctx.Done():
			// close itself hangs, in the handler. There is no more to be done.
			s.logger.Error("the handler's close did not end in time")
			return exitFailed
		}
	}
	if loaded && status == exitOK {
		done := make(chan struct{})
		go func() {
			destroyHandler()
			close(done)
		}()
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
	return status
}
