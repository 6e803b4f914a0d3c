// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// handler is one loaded handler. Its fields do not change once it is in the Library's table with a host.
type handler struct {
	subtype string
	path    string
	reply   *hostpb.LoadReply
	since   time.Time
	log     hclog.Logger
	host    *host
}

// HandlerState tells whether a handler serves.
type HandlerState string

// The states of a handler.
const (
	HandlerRunning HandlerState = "running"
	HandlerDead    HandlerState = "dead" // its process ended by itself; its devices answer EIO
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
	PID       int // of the host process
	State     HandlerState
	Since     time.Time // of the load
}

func (h *handler) info() HandlerInfo {
	i := HandlerInfo{
		Subtype: h.subtype, Name: h.reply.GetName(), Path: h.path, ABI: h.reply.GetAbi(), CfgDesc: h.reply.GetCfgDesc(),
		Callbacks: h.reply.GetCallbacks(), NRThreads: int(h.reply.GetNrThreads()), PID: h.host.pid(),
		State: HandlerRunning, Since: h.since,
	}
	if !h.host.alive() {
		i.State = HandlerDead
	}
	return i
}

// findFile returns the path of the first file that a prefix and the subtype name. ENOENT tells which were tried.
func (l *Library) findFile(subtype string) (string, error) {
	var tried []string
	for _, prefix := range l.cfg.HandlerPrefixes {
		path := prefix + subtype + ".so"
		_, err := os.Stat(path)
		if err == nil {
			return filepath.Abs(path)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("handler file: %w", err)
		}
		tried = append(tried, path)
	}
	return "", control.Failf(syscall.ENOENT, "no such handler; looked for %s", strings.Join(tried, ", "))
}

// loadHandler starts a host and has it load the handler. On error nothing is left.
func (l *Library) loadHandler(ctx context.Context, subtype string) (*handler, error) {
	path, err := l.findFile(subtype)
	if err != nil {
		return nil, err
	}
	h := &handler{subtype: subtype, path: path, since: time.Now(), log: l.log.Named("host." + subtype)}
	h.host, err = startHost(l.cfg.HostBinary, l.cfg.ChannelMemory, h.log)
	if err != nil {
		return nil, err
	}
	h.reply, err = h.host.rpc.Load(ctx, &hostpb.LoadRequest{Path: path, Subtype: subtype, LogLevel: logLevel(h.log)})
	if err != nil {
		err = h.rpcError("handler_init", err)
		h.host.stop()
		return nil, err
	}
	go h.reportDeath()
	l.log.Info("handler loaded", "handler", subtype, "path", path, "abi", h.reply.GetAbi(), "pid", h.host.pid())
	return h, nil
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

// reportDeath logs the end of the host process unless somebody asked for it.
func (h *handler) reportDeath() {
	<-h.host.abandoned
	if !h.host.stopping.Load() {
		h.log.Error("handler process died; its devices answer with an I/O error", "handler", h.subtype,
			"pid", h.host.pid(), "reason", h.host.process.exitReason())
	}
}

// rpcError translates the error of a control call; what names the callback that was running, for a host that died in
// it.
func (h *handler) rpcError(what string, err error) error {
	err = control.FromStatus(err)
	switch {
	case errors.Is(err, control.ErrHostGone):
		// The connection can end a little before the process does.
		select {
		case <-h.host.process.exited:
			return control.Failf(syscall.EIO, "the handler's process %s in %s", h.host.process.exitReason(), what)
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
func (h *handler) checkConfig(ctx context.Context, config string) error {
	if _, err := h.host.rpc.CheckConfig(ctx, &hostpb.CheckConfigRequest{Config: config}); err != nil {
		return h.rpcError("check_config", err)
	}
	return nil
}
