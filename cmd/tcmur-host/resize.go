// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"

	"google.golang.org/grpc"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// Resize implements hostpb.HostServer.
func (s *server) Resize(_ context.Context, req *hostpb.ResizeRequest) (*hostpb.ResizeReply, error) {
	return &hostpb.ResizeReply{}, control.ToStatus(s.resize(req.GetDevice(), req.GetSize()))
}

// resize changes the size of a device. ENODEV: there is none, or its handler is just being closed and opened again.
// EOPNOTSUPP: the handler cannot do it. EINVAL: not a size. Otherwise the errno of the handler's reconfig.
func (s *server) resize(index uint32, size uint64) error {
	s.mu.Lock()
	dev := s.devices[index]
	s.mu.Unlock()
	if dev == nil {
		return control.Failf(syscall.ENODEV, "no device has index %d", index)
	}
	<-dev.opened
	if g := deviceGeometry(index); size == 0 || size > maxSize || g.blockSize == 0 || size%uint64(g.blockSize) != 0 {
		return control.Failf(syscall.EINVAL, "%d bytes is no possible size", size)
	}
	s.mu.Lock()
	dev.resizing = true
	s.mu.Unlock()
	result, logged, err := resizeDevice(index, size)
	s.mu.Lock()
	dev.resizing = false
	if err == nil && result == 0 {
		dev.size = size // told by the reply
	}
	s.mu.Unlock()
	if err == nil && result == 0 {
		return nil
	}
	switch errno := syscall.Errno(-result); {
	case err != nil:
		return control.Failf(errnoOf(err), "the handler cannot change the size: %v", err)
	case result > 0 || result < -4095:
		return control.Failf(syscall.EINVAL, "the handler refused the size (%d): %s", result, logged)
	case logged == "":
		return control.Failf(errno, "the handler refused the size: %v", errno)
	default:
		return control.Failf(errno, "the handler refused the size: %s", logged)
	}
}

// sizeWatch is what tells Watch that a handler may have changed a size.
type sizeWatch struct {
	once sync.Once
	err  error
	set  chan struct{} // of capacity 1
}

// start begins to listen to the handler; what comes before is found by comparing.
func (w *sizeWatch) start() error {
	w.once.Do(func() {
		w.set = make(chan struct{}, 1)
		var fd int
		if fd, w.err = sizeEvents(); w.err != nil {
			return
		}
		go w.listen(os.NewFile(uintptr(fd), "size events"))
	})
	return w.err
}

// listen runs as long as the process.
func (w *sizeWatch) listen(events *os.File) {
	for count := make([]byte, 8); ; {
		if _, err := events.Read(count); err != nil {
			return // the handler has closed it
		}
		select {
		case w.set <- struct{}{}:
		default:
		}
	}
}

// Watch implements hostpb.HostServer. The front calls it once.
func (s *server) Watch(_ *hostpb.WatchRequest, to grpc.ServerStreamingServer[hostpb.SizeChange]) error {
	if err := s.sizes.start(); err != nil {
		return control.ToStatus(fmt.Errorf("watch the sizes of devices: %w", err))
	}
	for {
		for _, change := range s.sizeChanges() {
			if err := to.Send(change); err != nil {
				return err
			}
		}
		select {
		case <-s.sizes.set:
		case <-to.Context().Done():
			return to.Context().Err()
		}
	}
}

// sizeChanges lists the open devices whose size is not what the front was told last, and takes it that it is now.
func (s *server) sizeChanges() []*hostpb.SizeChange {
	s.mu.Lock()
	defer s.mu.Unlock()
	var changes []*hostpb.SizeChange
	for index, dev := range s.devices {
		if dev.size == 0 || dev.resizing {
			continue // the reply tells
		}
		if size := deviceGeometry(index).size; size != 0 && size != dev.size {
			dev.size = size
			changes = append(changes, &hostpb.SizeChange{Device: index, Size: size})
		}
	}
	return changes
}
