// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// seekTimeout is how long a handler may take to tell where its data is. Without an answer everything is data.
const seekTimeout = 2 * time.Second

// SeekData tells where data begins from byte off on or, with hole set, where a hole does, which reads zeroes; the end
// of the device is one. Where the handler does not know, everything is data. ENXIO: there is no data from there on, or
// off is at the end or beyond.
func (d *Device) SeekData(off int64, hole bool) (int64, error) {
	size := d.Size()
	if off < 0 || off >= size {
		return 0, control.Failf(syscall.ENXIO, "%s: seek from %d, with an end at %d", d.name, off, size)
	}
	allData := off
	if hole {
		allData = size
	}
	if !d.canSeek || !d.gate.enter() {
		return allData, nil
	}
	defer d.gate.leave()
	ctx, cancel := context.WithTimeout(context.Background(), seekTimeout)
	defer cancel()
	in, err := d.handler.service(ctx, d)
	if err != nil {
		return allData, nil
	}
	reply, err := in.rpc.Seek(ctx, &hostpb.SeekRequest{Device: uint32(d.minor), Offset: uint64(off), Hole: hole})
	err = control.FromStatus(err)
	at := int64(reply.GetOffset())
	switch {
	case errors.Is(err, syscall.ENXIO):
		return 0, control.Failf(syscall.ENXIO, "%s: no data from %d on", d.name, off)
	case err != nil || at < off || at > size:
		return allData, nil
	}
	return at, nil
}
