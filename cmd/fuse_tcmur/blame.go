// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// blame tells of the latest deaths of handler processes, oldest first: all, or those at which a request of a minor was
// in flight.
func (f *front) blame(minor int) string {
	deaths := f.lib.Deaths(minor)
	switch {
	case len(deaths) > 0:
	case minor < 0:
		return "no handler has died\n"
	default:
		return fmt.Sprintf("no handler has died with a request of device %d in flight\n", minor)
	}
	var text strings.Builder
	for _, death := range deaths {
		text.WriteString(death.String())
	}
	return text.String()
}

// states is a table of the loaded handlers, and below it the devices that have failed, with the reasons, and the latest
// death of a handler.
func (f *front) states() string {
	handlers := f.lib.Handlers()
	if len(handlers) == 0 {
		return ""
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%-16s %-10s %8s %8s\n", "HANDLER", "STATE", "PROCESS", "RESTARTS")
	for _, handler := range handlers {
		fmt.Fprintf(&text, "%-16s %-10s %8d %8d\n", handler.Subtype, handler.State, handler.PID, handler.Restarts)
	}
	for _, handler := range handlers {
		if handler.State == plugin.HandlerFailed {
			fmt.Fprintf(&text, "handler failed: %s: %v\n", handler.Subtype, handler.Failure)
		}
	}
	for _, node := range f.sortedNodes() {
		if err := node.device.Failure(); err != nil {
			fmt.Fprintf(&text, "device failed: %s: %v\n", node.device.Name(), err)
		}
	}
	if deaths := f.lib.Deaths(-1); len(deaths) > 0 {
		last := deaths[len(deaths)-1]
		fmt.Fprintf(&text, "last death: %s handler %s %s (blame tells more)\n",
			last.Time.Format(time.RFC3339), last.Handler, last.Reason)
	}
	return text.String()
}
