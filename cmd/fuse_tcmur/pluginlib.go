// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// pluginLibrary lets a plugin.Library be used as a library.
type pluginLibrary struct{ *plugin.Library }

var (
	_ library = pluginLibrary{}
	_ device  = (*plugin.Device)(nil)
)

// AddDevice is plugin.Library's, without its typed nil in the interface.
func (l pluginLibrary) AddDevice(
	ctx context.Context, minor int, config string, options plugin.DeviceOptions,
) (device, error) {
	added, err := l.Library.AddDevice(ctx, minor, config, options)
	if err != nil {
		return nil, err
	}
	return added, nil
}

// HasDevice reports whether a device has this minor.
func (l pluginLibrary) HasDevice(minor int) bool { return l.Device(minor) != nil }
