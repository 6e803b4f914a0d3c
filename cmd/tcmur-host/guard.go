// SPDX-License-Identifier: Apache-2.0

package main

import (
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
}

// release gives back what the guard holds, once the device is closed.
func (g *guard) release() {}

// refusal is the error for a device that must not be opened as it is: why, and what to do about it.
func refusal(errno syscall.Errno, format string, args ...any) error {
	return control.Failf(errno, format+" (guards=off hands it to the handler all the same)", args...)
}
