// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/bits"
	"strings"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// Sizes in bytes.
const (
	maxRequest   = 1 << 20 // TCMUR_MAX_PAYLOAD
	minBlockSize = 512
	maxBlockSize = 64 << 10
	maxSize      = 1<<63 - 1 // off_t
)

// defaultRetry is how long a handler's "busy" is put up with where the front does not say: less than the time after
// which the front takes the handler for hung.
const defaultRetry = 20 * time.Second

// open opens a device as handlers expect it: all attributes set first, the size found out where the handler insists on
// the right one, and everything read back afterwards. The guard is to be released when the device is closed.
func open(h *handlerStruct, q quirks, req *hostpb.OpenRequest) (*hostpb.OpenReply, guard, error) {
	p, s, err := openParamsFor(h, q, req)
	if err != nil {
		return nil, guard{}, err
	}
	reply, err := openAs(h, q, p, s)
	if err != nil {
		s.guard.release()
		return nil, guard{}, err
	}
	return reply, s.guard, nil
}

// openAs opens and starts a device.
func openAs(h *handlerStruct, q quirks, p openParams, s sizing) (*hostpb.OpenReply, error) {
	guessing := p.size == 0 && q.sizeInRefusal != nil
	if guessing {
		p.size = uint64(p.blockSize) // wrong, as good as always; what matters is the answer
		p.probing = true
	}
	result, logged, err := openDevice(p)
	if err == nil && result != 0 && guessing {
		if size, ok := q.sizeInRefusal(logged); ok {
			p.size, p.probing = size, false
			result, logged, err = openDevice(p)
		}
	}
	if err != nil {
		return nil, err
	}
	if result != 0 {
		return nil, openFailure(h, p, result, logged)
	}
	reply, err := start(p, s)
	if err != nil {
		abandonDevice(p.index)
		return nil, err
	}
	return reply, nil
}

// openParamsFor turns a request into what the handler is told.
func openParamsFor(h *handlerStruct, q quirks, req *hostpb.OpenRequest) (openParams, sizing, error) {
	p := openParams{
		index: req.GetDevice(), name: req.GetName(), config: q.configFor(req.GetConfig()), size: req.GetSize(),
		blockSize: req.GetBlockSize(), maxXfer: req.GetMaxXfer(), alignment: q.alignment, readOnly: req.GetReadOnly(),
		retry: time.Duration(req.GetRetryMs()) * time.Millisecond, reopen: req.GetReopen(),
	}
	if p.retry == 0 {
		p.retry = defaultRetry
	}
	if p.blockSize == 0 {
		p.blockSize = defaultBlockSize
	}
	if bits.OnesCount32(p.blockSize) != 1 || p.blockSize < minBlockSize || p.blockSize > maxBlockSize {
		return p, sizing{}, control.Failf(syscall.EINVAL, "block_size=%d is not a power of two from %d to %d",
			p.blockSize, minBlockSize, maxBlockSize)
	}
	if q.blockSize != 0 {
		p.blockSize = q.blockSize
	}
	if p.maxXfer == 0 || p.maxXfer > maxRequest {
		p.maxXfer = maxRequest
	}
	p.maxXfer -= p.maxXfer % p.blockSize
	if p.maxXfer == 0 {
		return p, sizing{}, control.Failf(syscall.EINVAL, "max_xfer=%d is less than a block of %d bytes",
			req.GetMaxXfer(), p.blockSize)
	}
	if req.GetFormat() && !q.formats {
		return p, sizing{}, control.Failf(syscall.EINVAL, "format: handler %s does not format anything", h.subtype)
	}
	if p.size > maxSize {
		return p, sizing{}, control.Failf(syscall.EFBIG, "size=%d is more than %d", p.size, uint64(maxSize))
	}
	s := sizing{size: p.size}
	if q.measure != nil {
		_, rest, _ := strings.Cut(req.GetConfig(), "/")
		var err error
		s, err = q.measure(measurement{
			rest: rest, size: p.size, reopen: p.reopen, subtype: h.subtype, readOnly: p.readOnly,
			format: req.GetFormat() && !p.reopen, guardsOff: req.GetGuardsOff(),
		})
		if err != nil {
			return p, sizing{}, err
		}
		p.readErrorsLogged, p.qcow = s.guard.readErrorsLogged, s.guard.qcow
		p.size = s.size
		if s.config != "" {
			p.config = s.config
		}
	}
	return p, s, nil
}

// openFailure is the error for a handler's open that returned result.
func openFailure(h *handlerStruct, p openParams, result int, logged string) error {
	errno := syscall.Errno(-result)
	if result > 0 || result < -4095 || (result == -1 && h.subtype == "qcow") {
		errno = syscall.EINVAL // qcow returns -1 whatever the matter is, which is not to say EPERM
	}
	if logged == "" {
		return control.Failf(errno, "the handler could not open %s and did not say why (it returned %d)", p.config, result)
	}
	return control.Failf(errno, "the handler could not open %s: %s", p.config, logged)
}

// start checks what the handler has made of the device and lets I/O in.
func start(p openParams, s sizing) (*hostpb.OpenReply, error) {
	g := deviceGeometry(p.index)
	switch {
	case bits.OnesCount32(g.blockSize) != 1 || g.blockSize < minBlockSize || g.blockSize > maxBlockSize:
		return nil, control.Failf(syscall.EINVAL, "the handler has set a block size of %d, not a power of two from %d to %d",
			g.blockSize, minBlockSize, maxBlockSize)
	case g.size == 0:
		return nil, control.Failf(syscall.EINVAL, "%s: the handler does not tell the device's size: say size=", p.config)
	case g.size > maxSize:
		return nil, control.Failf(syscall.EFBIG, "the handler has set a size of %d bytes", g.size)
	}
	var boundary uint64
	if s.boundary != nil {
		var err error
		if boundary, err = s.boundary(); err != nil {
			return nil, err
		}
	}
	if err := startDevice(p.index, boundary); err != nil {
		return nil, fmt.Errorf("max_xfer=%d does not hold a block of %d bytes: %w", p.maxXfer, g.blockSize, err)
	}
	g = deviceGeometry(p.index)
	return &hostpb.OpenReply{
		Size: g.size, BlockSize: g.blockSize, MaxXfer: g.maxXfer, Alignment: g.alignment,
		CanRead: true, CanWrite: g.canWrite, CanFlush: g.canFlush, CanUnmap: g.canUnmap, CanZero: g.canZero,
		CanWriteSame: g.canWriteSame, UnmapZeroes: g.unmapZeroes, CanSeek: g.canSeek,
		WriteCache: g.writeCache, Rotational: g.rotational, WritesSurvive: g.writesSurvive || s.writesSurvive,
		Guards: s.guard.inForce, Contents: g.contents,
	}, nil
}
