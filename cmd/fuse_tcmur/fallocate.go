// SPDX-License-Identifier: Apache-2.0

package main

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// fallocate does what fallocate(2) does on a block device: it punches holes and zeroes ranges, and cannot allocate.
// Unlike there ranges need not be aligned. EROFS: the device is read-only. EOPNOTSUPP: another mode, or punching a hole
// in a device without discards. EINVAL: the range begins beyond the end, or ends there and the size was not to be kept.
// A range that is to keep the size is cut at the end.
func (n *deviceNode) fallocate(file *fusetree.File, mode uint32, off, length int64) error {
	const punch, zero, keep = unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_KEEP_SIZE
	size := n.device.Size()
	switch {
	case n.device.ReadOnly():
		return failf(syscall.EROFS, "%s is read-only", n.device.Name())
	case !isWritable(file.Flags):
		return failf(syscall.EBADF, "%s is not open for writing", n.device.Name())
	case mode != punch|keep && mode != zero && mode != zero|keep:
		return failf(syscall.EOPNOTSUPP, "%s: fallocate mode %#x", n.device.Name(), mode)
	case off < 0 || length <= 0 || off >= size || (length > size-off && mode&keep == 0):
		return failf(syscall.EINVAL, "%s: %d bytes at %d are not all on the device", n.device.Name(), length, off)
	}
	length = min(length, size-off)
	if mode&punch != 0 {
		return n.device.Discard(off, length)
	}
	return n.device.Zero(off, length)
}
