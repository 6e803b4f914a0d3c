// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"syscall"
)

// What --force does: users lose what they have open, and handlers the time to finish.

// forceRemove takes a device away whoever has it open: their requests fail with EIO or ENODEV from now on. Errors:
// those of plugin.Library.ForceRemoveDevice.
func (f *front) forceRemove(minor int) error {
	if node := f.node(minor); node != nil {
		if err := f.detach(node); err != nil {
			return err
		}
	}
	return f.lib.ForceRemoveDevice(minor)
}

// detach takes the node of a device out of the tree, also while it is open.
func (f *front) detach(node *deviceNode) error {
	if !node.writeBackCovered(forcedWriteBack) {
		f.log.Warn("what the kernel has not written back is lost", "device", node.device.Name())
	}
	f.cutCover(node)
	if err := f.tree.Detach(node.device.Name(), f.devDir); err != nil {
		return err
	}
	f.forgetNode(node)
	return nil
}

// forceUnload is forceRemove for all devices of a handler, and unloads it. Errors: those of
// plugin.Library.ForceUnloadHandler; with EIO it is unloaded all the same.
func (f *front) forceUnload(subtype string) error {
	for _, node := range f.allNodes() {
		if node.device.Handler() != subtype {
			continue
		}
		if err := f.detach(node); err != nil {
			return err
		}
	}
	err := f.lib.ForceUnloadHandler(subtype)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EBUSY) {
		return err
	}
	return errors.Join(err, f.removeModule(subtype))
}

// forceExit makes the program stop, whoever uses its devices.
func (f *front) forceExit() {
	f.gate.shut()
	f.forceOnce.Do(func() { close(f.exitForced) })
}
