// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// handler is one loaded handler, served by one host after another.
type handler struct {
	lib     *Library
	subtype string
	since   time.Time
	log     hclog.Logger

	// shape is held for reading while a device is opened or closed, and for writing by a reload.
	shape sync.RWMutex

	// successor is the host that a recovery or a reload is preparing, nil at other times: it can hang as the one in
	// service can.
	successor atomic.Pointer[host]
	progress  atomic.Bool  // a request has completed since the last death
	restarts  atomic.Int64 // of the host

	life       context.Context // of the supervisor's work; ended by stop
	endLife    context.CancelFunc
	reloads    chan reloadCall // to supervise
	supervised chan struct{}   // closed when supervise has returned

	mu        sync.Mutex
	state     HandlerState
	object    *object
	host      *host // in service, or the last one that was; nil while the handler is being loaded
	reply     *hostpb.LoadReply
	resumed   chan struct{} // closed when state is no longer HandlerRecovering
	lastError error         // why state is HandlerFailed
	parked    []*op         // whose host has died, and which the next one gets
	lost      []lostRequest // whose host has died, and which were ended at once

	// supervise's own:

	deathsInRow int
	graves      []*host // dead, or replaced; the payloads of parked requests may lie in their channels
}

// HandlerState tells whether a handler serves.
type HandlerState string

// The states of a handler.
const (
	HandlerRunning    HandlerState = "running"
	HandlerRecovering HandlerState = "recovering" // its requests wait for a new process
	HandlerFailed     HandlerState = "failed"     // for good; its devices answer EIO
)

// HandlerInfo describes a loaded handler.
type HandlerInfo struct {
	Subtype   string
	Name      string // the handler's own name
	Path      string // of the shared object
	ABI       string // struct layout, as in hostpb.LoadReply
	CfgDesc   string // the handler's description of its config strings
	Callbacks []string
	NRThreads int // requests that the handler takes at once per device; 0: it queues them itself
	// Concurrency is how many callouts the host makes at a time for one device.
	Concurrency  int
	Asynchronous bool     // callouts only queue a command; the handler completes it later
	ByCDB        bool     // I/O goes by SCSI command blocks, for want of read and write
	Guards       []string // against bugs of this handler, for its devices; one each
	PID          int      // of the host process
	State        HandlerState
	Failure      error     // why State is HandlerFailed
	Restarts     int       // of the host process
	Since        time.Time // of the load
	// ChannelMemory is how many bytes there are for the data of requests, ChannelUsed how many of them are in use.
	ChannelMemory, ChannelUsed int64
}

func (h *handler) info() HandlerInfo {
	h.mu.Lock()
	defer h.mu.Unlock()
	memory, used := h.host.channel.Usage()
	return HandlerInfo{
		Subtype: h.subtype, Name: h.reply.GetName(), Path: h.object.path, ABI: h.reply.GetAbi(),
		CfgDesc: h.reply.GetCfgDesc(), Callbacks: h.reply.GetCallbacks(), NRThreads: int(h.reply.GetNrThreads()),
		PID:         h.host.pid(),
		Concurrency: int(h.reply.GetConcurrency()), Asynchronous: h.reply.GetAsynchronous(),
		ByCDB: h.reply.GetByCommandBlock(), Guards: h.reply.GetGuards(),
		State: h.state, Failure: h.lastError, Restarts: int(h.restarts.Load()), Since: h.since,
		ChannelMemory: int64(memory), ChannelUsed: int64(used),
	}
}

// current is the host in service, or the last one that was.
func (h *handler) current() *host {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.host
}

// loadHandler starts a host and has it load the handler. On error nothing is left.
func (l *Library) loadHandler(ctx context.Context, subtype string) (*handler, error) {
	path, err := l.findFile(subtype)
	if err != nil {
		return nil, err
	}
	h := &handler{
		lib: l, subtype: subtype, since: time.Now(), log: l.log, state: HandlerRunning,
		reloads: make(chan reloadCall), supervised: make(chan struct{}),
	}
	first, err := l.takeHost()
	defer l.refill()
	if err != nil {
		return nil, err
	}
	h.object = h.takeObject(path)
	if h.reply, err = h.loadInto(ctx, first, h.object); err != nil {
		h.object.drop()
		if timeIsUp(ctx) {
			first.killFor(killedForHang) // it would not listen
		}
		first.stop()
		return nil, err
	}
	h.life, h.endLife = context.WithCancel(context.Background())
	h.host = first
	first.enlist(func() {}, func() { h.died(first) }) // if it is dead already, supervise sees that
	go h.supervise()
	l.log.Info("handler loaded", "handler", subtype, "path", path, "abi", h.reply.GetAbi(), "pid", first.pid())
	return h, nil
}

// announce makes a host the successor.
func (h *handler) announce(next *host) {
	h.successor.Store(next)
	if h.isStopped() { // stop may have looked too early
		next.killFor(killedForRemoval)
	}
}

// takeObject is the function of that name; without a copy the handler lives, only not as well.
func (h *handler) takeObject(path string) *object {
	o, err := takeObject(path)
	if err != nil {
		h.log.Warn("the handler's file cannot be copied: a restart will load what it is then", "handler", h.subtype,
			"path", path, "error", err)
	}
	return o
}

// loadInto has a host load the handler from a shared object: from its file, or if that is no longer the same, the copy.
func (h *handler) loadInto(ctx context.Context, to *host, from *object) (*hostpb.LoadReply, error) {
	replaced := from.isReplaced()
	if replaced {
		h.log.Warn("the handler's file was changed or removed since it was loaded: loading what it was, until a reload",
			"handler", h.subtype, "path", from.path)
		to.memory.lend(objectIndex, from)
	}
	reply, err := to.rpc.Load(ctx, &hostpb.LoadRequest{
		Path: from.path, Subtype: h.subtype, LogLevel: logLevel(h.log), Replaced: replaced,
	})
	if err != nil {
		return nil, to.rpcError("handler_init", err)
	}
	h.lib.background.Go(func() { h.followSizes(to) })
	return reply, nil
}

// stop ends the handler's service and its host, which is killed if that takes longer than the context. It has no
// devices any more.
func (h *handler) stop(ctx context.Context) {
	h.endLife()
	if next := h.successor.Load(); next != nil {
		next.killFor(killedForRemoval)
	}
	<-h.supervised
	defer h.object.drop()
	in := h.current()
	defer context.AfterFunc(ctx, func() { in.killFor(killedForRemoval) })()
	in.stop()
}

// logLevel asks the host for no more than what the logger will show.
func logLevel(log hclog.Logger) hostpb.LogLevel {
	switch {
	case log.IsDebug():
		return hostpb.LogLevel_LOG_LEVEL_DEBUG
	case log.IsInfo():
		return hostpb.LogLevel_LOG_LEVEL_INFO
	case log.IsWarn():
		return hostpb.LogLevel_LOG_LEVEL_WARN
	}
	return hostpb.LogLevel_LOG_LEVEL_ERROR
}

// rpcError translates the error of a control call; what names the callback that was running, for a host that died in
// it.
func (h *host) rpcError(what string, err error) error {
	err = control.FromStatus(err)
	switch {
	case errors.Is(err, control.ErrHostGone):
		// The connection can end a little before the process does.
		select {
		case <-h.process.exited:
			return control.Failf(syscall.EIO, "the handler's process %s in %s", h.process.exitReason(), what)
		case <-time.After(time.Second):
			return fmt.Errorf("%w in %s (%w)", err, what, syscall.EIO)
		}
	case errors.Is(err, context.DeadlineExceeded):
		return control.Failf(syscall.ETIMEDOUT, "the handler did not return from %s in time", what)
	case errors.Is(err, context.Canceled):
		return control.Failf(syscall.EINTR, "interrupted during %s", what)
	}
	return err
}

// checkConfig asks the handler; config is without its leading slash.
func (h *handler) checkConfig(ctx context.Context, host *host, config string) error {
	if _, err := host.rpc.CheckConfig(ctx, &hostpb.CheckConfigRequest{Config: config}); err != nil {
		return host.rpcError("check_config", err)
	}
	return nil
}
