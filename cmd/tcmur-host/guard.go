// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Guards keep devices from known bugs of their handlers that lose data, crash or hang. What is checked before the
// handler's open is in guard_SUBTYPE.go, together with the size that the handler has to be told, since both come from
// the same headers; what has to be done for each request is in guard_SUBTYPE.c. A device that is opened with guards off
// has none of them; what every handler needs (bounds, alignment, one callout at a time) is no guard and stays.

// guard is what stands between one device and the bugs of its handler. The zero value guards nothing.
type guard struct {
	inForce []string // for people
	// readErrorsLogged: a failed read returns success, and only an error message gives it away.
	readErrorsLogged bool
	// hold is files whose locks last as long as they are open.
	hold []*os.File
	// notes tell what has been done to what the device is made of.
	notes []string
	// qcow is for the callouts of that handler.
	qcow qcowCallouts
}

// qcowCallouts is what guard_qcow.c needs to know. The zero value: nothing is to be done.
type qcowCallouts struct {
	cluster  uint32 // bytes
	whole    bool   // writes have to cover whole clusters
	smallest uint32 // bytes: the smallest clusters of the image and its backing files
	lookups  uint64 // of clusters, after which the device is opened again
}

// release gives back what the guard holds, once the device is closed.
func (g *guard) release() {
	for _, f := range g.hold {
		_ = f.Close() // nothing was written by it
	}
	g.hold = nil
}

// refusal is the error for a device that must not be opened as it is: why, and what to do about it.
func refusal(errno syscall.Errno, format string, args ...any) error {
	return control.Failf(errno, format+" (guards=off hands it to the handler all the same)", args...)
}
