// SPDX-License-Identifier: Apache-2.0

package main

import (
	"sync/atomic"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// openFile is what is known of one open file of a device, in its Data.
type openFile struct {
	// reported is the device's count of failed flushes of which this file's user knows. A flush covers the writes of
	// everybody: when one fails, each file's next fsync has to fail, once, whoever asked for that flush and even if a
	// later one succeeds.
	reported atomic.Uint64
}

// settle is the result for the file's user of a flush that ended with err.
func (o *openFile) settle(device device, err error) error {
	failures := device.FlushFailures()
	if o.reported.Swap(failures) != failures && err == nil {
		return failf(syscall.EIO, "%s: a flush has failed since the last fsync of this file", device.Name())
	}
	return err
}

// fsyncEnd ends an fsync that was begun by deviceNode.start.
type fsyncEnd struct {
	request *fusetree.IO
	device  device
}

// Complete implements plugin.Completion.
func (e *fsyncEnd) Complete(_ []byte, _ int, err error) {
	e.request.Complete(nil, 0, e.request.File.Data.(*openFile).settle(e.device, err))
}

func (n *deviceNode) fsync(file *fusetree.File, _ bool) error {
	return file.Data.(*openFile).settle(n.device, n.device.Flush())
}
