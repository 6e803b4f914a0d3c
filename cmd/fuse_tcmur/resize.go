// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"syscall"
)

func runResize(call *call, args string) error {
	args, forced := takeForce(args)
	word, rest := nextWord(args)
	text, more := nextWord(rest)
	if text == "" || more != "" {
		return failf(syscall.EINVAL, "give a minor number and a size in bytes: resize MINOR SIZE")
	}
	minor, err := parseMinor(word)
	if err != nil {
		return err
	}
	size, err := parseSize(text)
	if err != nil {
		return err
	}
	return call.front.resize(call.ctx, call.out, minor, size, forced)
}

// resize changes the size of a device, and with it that of its node. EBUSY: it would get smaller, is open, and that is
// not forced. ENODEV: there is no such device. Otherwise the errors are those of plugin.Device.Resize.
func (f *front) resize(ctx context.Context, out io.Writer, minor int, size int64, forced bool) error {
	node := f.node(minor)
	if node == nil {
		return failf(syscall.ENODEV, "no device has minor %d", minor)
	}
	name := node.device.Name()
	if opens := node.file().OpenCount(); size < node.device.Size() && opens > 0 && !forced {
		return failf(syscall.EBUSY, "%s; close it first, or cut it off with resize --force", f.describeOpen(name, opens))
	}
	if err := node.device.Resize(ctx, size); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(out, "%s: %d bytes\n", name, node.device.Size())
	return nil
}
