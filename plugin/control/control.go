// SPDX-License-Identifier: Apache-2.0

// Package control is the go-plugin glue of the control protocol that the front and a tcmur-host speak: the handshake,
// the gRPC plugin, and the one place where errors cross the process boundary. Both processes import it; the messages
// are in package hostpb.
package control

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// Name is the name under which the host serves its only go-plugin plugin.
const Name = "host"

// Command-line flags by which the front names the descriptors that it donates to a host.
const (
	FlagSubmitFD   = "submit-fd"   // memfd: the channel's submit segment, can be mapped read-only
	FlagCompleteFD = "complete-fd" // memfd: the channel's complete segment
	FlagLivenessFD = "liveness-fd" // socket: hang-up means that the front is gone
	FlagMemoryFD   = "memory-fd"   // socket: asks the front for memory that outlives the host
)

// Handshake is what go-plugin compares before anything else. The cookie only keeps people from starting a host by hand.
var Handshake = goplugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "TCMUR_HOST",
	MagicCookieValue: "7f1d6c52-fuse-tcmur",
}

// ErrHostGone is returned for every call to a host that has died or does not answer any more. Test with errors.Is.
var ErrHostGone = errors.New("handler process is gone")

// Failure is an error with a Linux errno and a message for the user. errors.Is(err, syscall.ENOENT) works on it.
type Failure struct {
	Errno   syscall.Errno
	Message string
}

// Failf makes a Failure; the message is formatted as by fmt.Sprintf.
func Failf(errno syscall.Errno, format string, args ...any) *Failure {
	return &Failure{Errno: errno, Message: fmt.Sprintf(format, args...)}
}

// Error is the message; the errno's text stands in where there is none.
func (f *Failure) Error() string {
	if f.Message == "" {
		return f.Errno.Error()
	}
	return f.Message
}

// Unwrap makes the errno visible to errors.Is and errors.As.
func (f *Failure) Unwrap() error { return f.Errno }

// ToStatus turns an error of the host's into what gRPC carries. The errno is the one found in the error's chain, EIO if
// there is none.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	errno := syscall.EIO
	errors.As(err, &errno)
	st, detailErr := status.New(codes.Unknown, err.Error()).WithDetails(&hostpb.Failure{
		Errno: int32(errno), Message: err.Error(),
	})
	if detailErr != nil {
		return status.Error(codes.Unknown, err.Error())
	}
	return st.Err()
}

// FromStatus turns what gRPC delivered back into a *Failure, or into ErrHostGone (wrapped) when the call did not reach
// a live host. A host is not trusted: an errno outside 1..4095 becomes EIO. An expired or cancelled context of the
// caller's own comes back as context.DeadlineExceeded or context.Canceled.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%w: %w", ErrHostGone, err)
	}
	switch st.Code() {
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	case codes.Canceled:
		return context.Canceled
	}
	for _, d := range st.Details() {
		if f, ok := d.(*hostpb.Failure); ok {
			errno := syscall.Errno(f.GetErrno())
			if f.GetErrno() < 1 || f.GetErrno() > 4095 {
				errno = syscall.EIO
			}
			return &Failure{Errno: errno, Message: f.GetMessage()}
		}
	}
	return fmt.Errorf("%w: %s", ErrHostGone, st.Message())
}

// Plugin is the go-plugin description of a host. The host sets Impl; the front leaves it nil.
type Plugin struct {
	goplugin.NetRPCUnsupportedPlugin
	Impl hostpb.HostServer
}

var _ goplugin.GRPCPlugin = (*Plugin)(nil)

// GRPCServer registers the host's implementation.
func (p *Plugin) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	hostpb.RegisterHostServer(s, p.Impl)
	return nil
}

// GRPCClient returns a hostpb.HostClient.
func (p *Plugin) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return hostpb.NewHostClient(conn), nil
}
