// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// Seek implements hostpb.HostServer.
func (s *server) Seek(_ context.Context, req *hostpb.SeekRequest) (*hostpb.SeekReply, error) {
	s.mu.Lock()
	dev := s.devices[req.GetDevice()]
	s.mu.Unlock()
	if dev == nil {
		return nil, control.ToStatus(control.Failf(syscall.ENODEV, "no device has index %d", req.GetDevice()))
	}
	<-dev.opened
	at, err := seekDevice(req.GetDevice(), req.GetOffset(), req.GetHole())
	return &hostpb.SeekReply{Offset: at}, control.ToStatus(err)
}
