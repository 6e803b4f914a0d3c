// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// reload replaces a handler by what is now in its file. Errors: those of plugin.Library.ReloadHandler; the old one goes
// on then.
func (f *front) reload(ctx context.Context, out io.Writer, subtype string) error {
	if err := f.lib.ReloadHandler(ctx, subtype); err != nil {
		return err
	}
	if handler, ok := f.handler(subtype); ok {
		_, _ = fmt.Fprintf(out, "%s: reloaded %s (%s) into process %d\n", subtype, handler.Path, handler.Name, handler.PID)
	}
	return nil
}

// handler describes a loaded handler.
func (f *front) handler(subtype string) (plugin.HandlerInfo, bool) {
	for _, handler := range f.lib.Handlers() {
		if handler.Subtype == subtype {
			return handler, true
		}
	}
	return plugin.HandlerInfo{}, false
}
