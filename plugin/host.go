// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

const (
	hostStartTimeout = 10 * time.Second
	// firstDonatedFD is the number that the first of exec.Cmd.ExtraFiles gets in the child.
	firstDonatedFD = 3
)

// hostEnvironment lists the variables (a trailing * matches any rest) that reach a host. A handler and the libraries it
// brings would otherwise see everything that the front was started with.
var hostEnvironment = []string{
	"PATH", "HOME", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CEPH_*", "GFAPI_*", "GLUSTER_*", "TCMUR_*",
	"GOTRACEBACK", "ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS",
}

// host is one running tcmur-host: its process, its control connection and its channel. It lives from startHost until
// stop; what becomes of it in between is told by exited.
type host struct {
	rpc     hostpb.HostClient
	channel *shared.Channel
	log     hclog.Logger

	client     *goplugin.Client
	connection *grpc.ClientConn
	process    *processRunner
	liveness   *os.File // our end; its closing tells the host that the front does not need it any more
	memory     *memoryServer
	output     tail // of its log

	abandoned chan struct{} // closed once the process is dead and its requests have been ended
	stopOnce  sync.Once
	killedFor atomic.Int32 // why we killed it
	// supervise's own:
	judged    bool                                  // its death has been looked into
	restart   bool                                  // it takes the place of one that has died
	reopening *Device                               // what a recovery is having it reopen; nil at other times
	prepared  struct{ process, load time.Duration } // how long it took to have the process, and it the handler

	mu      sync.Mutex
	dead    bool   // the process has exited
	atDeath func() // called before the requests end
}

// Reasons for which the front kills a host.
const (
	killedForNothing = iota
	killedForHang
	killedForRemoval
	killedForViolation
	killedForSilence
)

// silenceGrace is how long a process may live without a control connection: one that dies loses it a little earlier.
const silenceGrace = 500 * time.Millisecond

// startHost starts a host process and connects to it. The handler is not loaded yet. stop must be called in the end.
func startHost(binary string, memory int64, busy func(), log hclog.Logger) (*host, error) {
	h := &host{log: log, abandoned: make(chan struct{})}
	var err error
	h.channel, err = shared.New(shared.Options{
		Memory: memory,
		Fault:  h.violated,
		Busy:   busy,
	})
	if err != nil {
		return nil, fmt.Errorf("memory channel: %w", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.channel.Close()
		return nil, fmt.Errorf("liveness socket: %w", err)
	}
	h.liveness = os.NewFile(uintptr(pair[0]), "liveness")
	theirs := os.NewFile(uintptr(pair[1]), "liveness-host")
	var memoryEnd *os.File
	if h.memory, memoryEnd, err = newMemoryServer(log); err == nil {
		err = h.connect(binary, theirs, memoryEnd)
		memoryEnd.Close()
		if err != nil {
			h.memory.stop()
		}
	}
	theirs.Close()
	h.channel.CloseFiles()
	if err != nil {
		h.liveness.Close()
		h.channel.Close()
		return nil, err
	}
	go h.watch()
	go h.listen()
	return h, nil
}

// connect starts the process through go-plugin and performs the handshake. On error no process is left.
func (h *host) connect(binary string, liveness, memory *os.File) error {
	var socketDir string
	h.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  control.Handshake,
		Plugins:          goplugin.PluginSet{control.Name: &control.Plugin{}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     hostStartTimeout,
		Logger:           h.log,
		SyncStdout:       io.Discard,
		SyncStderr:       io.Discard,
		Stderr:           &h.output,
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: os.TempDir()},
		RunnerFunc: func(_ hclog.Logger, spec *exec.Cmd, dir string) (runner.Runner, error) {
			socketDir = dir
			submit, complete := h.channel.Files()
			cmd := exec.Command(binary,
				donated(control.FlagSubmitFD, 0), donated(control.FlagCompleteFD, 1), donated(control.FlagLivenessFD, 2),
				donated(control.FlagMemoryFD, 3))
			cmd.Env = append(hostEnv(os.Environ()), spec.Env...)
			cmd.ExtraFiles = []*os.File{submit, complete, liveness, memory}
			// A group of its own: ^C in the front's terminal is for the front to act on.
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			r, err := newProcessRunner(cmd)
			h.process = r
			return r, err
		},
	})
	connection, err := h.client.Client()
	if err == nil {
		var rpc any
		rpc, err = connection.Dispense(control.Name)
		if err == nil {
			h.rpc = rpc.(hostpb.HostClient)
			h.connection = connection.(*goplugin.GRPCClient).Conn
			return nil
		}
	}
	h.client.Kill()
	if socketDir != "" {
		_ = os.RemoveAll(socketDir) // Kill leaves it behind where there was no process
	}
	if errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("host binary %s: %w; build it with make, or name it with --host-binary", binary, syscall.ENOENT)
	}
	return fmt.Errorf("start of host %s: %w (%w)", binary, err, syscall.EIO)
}

func donated(flag string, i int) string { return fmt.Sprintf("--%s=%d", flag, firstDonatedFD+i) }

// hostEnv keeps of environ what hostEnvironment lists.
func hostEnv(environ []string) []string {
	var keep []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		for _, pattern := range hostEnvironment {
			prefix, wild := strings.CutSuffix(pattern, "*")
			if name == pattern || wild && strings.HasPrefix(name, prefix) {
				keep = append(keep, kv)
				break
			}
		}
	}
	return keep
}

// watch ends the host's requests once its process is dead: from then on nobody can write to the channel any more.
func (h *host) watch() {
	<-h.process.exited
	h.mu.Lock()
	h.dead = true
	atDeath := h.atDeath
	h.mu.Unlock()
	if atDeath != nil {
		atDeath()
	}
	h.channel.Abandon()
	close(h.abandoned)
}

// listen kills a host that has closed its end of the control connection and cannot be reached by another one: whatever
// else it still does, nobody can tell it to stop.
func (h *host) listen() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-h.process.exited
		cancel()
	}()
	for ctx.Err() == nil { // the process lives
		switch state := h.connection.GetState(); state {
		case connectivity.Shutdown: // by us
			return
		case connectivity.Ready:
			h.connection.WaitForStateChange(ctx, state)
		default:
			h.connection.Connect()
			grace, done := context.WithTimeout(ctx, silenceGrace)
			for state != connectivity.Ready && state != connectivity.Shutdown && h.connection.WaitForStateChange(grace, state) {
				state = h.connection.GetState()
			}
			lost := grace.Err() != nil && ctx.Err() == nil
			done()
			if lost {
				h.killFor(killedForSilence)
				return
			}
		}
	}
}

// enlist puts a live host into service: it calls serve, and will call atDeath when the process has died, before its
// requests end, and in any case after serve. False, without a call: it is dead already.
func (h *host) enlist(serve, atDeath func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.dead {
		return false
	}
	serve()
	h.atDeath = atDeath
	return true
}

// alive reports whether the process has not been seen to exit.
func (h *host) alive() bool {
	select {
	case <-h.process.exited:
		return false
	default:
		return true
	}
}

// pid is the process id, also after its death.
func (h *host) pid() int { return h.process.cmd.Process.Pid }

// kill sends SIGKILL and waits until the process is gone and its requests have been ended.
func (h *host) kill() {
	_ = h.process.Kill(context.Background())
	<-h.abandoned
}

// killFor is kill with a reason for those who look at the death, without the wait. It reports whether it is the first
// reason.
func (h *host) killFor(reason int32) bool {
	first := h.killedFor.CompareAndSwap(killedForNothing, reason)
	_ = h.process.Kill(context.Background())
	return first
}

// violated is told of what no sane host does to the channel. Nothing that comes from there can be believed any more,
// nor that the requests which it has ever end.
func (h *host) violated(err error) {
	if h.killFor(killedForViolation) {
		h.log.Error("host broke the protocol of the memory channel: killing it", "pid", h.pid(), "error", err)
	}
}

// stop ends the process, gently if it is alive, and frees everything. Devices should have been closed before. It waits
// until the process is gone; go-plugin bounds that with a SIGKILL. Safe to call twice.
func (h *host) stop() {
	h.stopOnce.Do(func() {
		h.client.Kill()
		h.liveness.Close()
		h.memory.stop()
		<-h.abandoned
		h.channel.Close()
	})
}
