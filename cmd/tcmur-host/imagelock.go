// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Image locks, as qemu takes them: open file description locks on single bytes of the image, all of them shared. A byte
// from 100 on says that its holder uses a permission, a byte from 200 on that its holder does not let others use it;
// the permission's number is added. Whoever has taken his bytes looks whether anybody holds a contrary one.
const (
	lockUses    = 100
	lockForbids = 200

	permRead   = 0 // of consistent contents
	permWrite  = 1
	permResize = 3
)

// lockImage takes the locks of a user of an image that nobody else may write, for as long as the file is open. EBUSY:
// somebody writes it, or forbids what we want.
func lockImage(f *os.File, writes bool) error {
	uses := []int64{permRead}
	if writes {
		uses = append(uses, permWrite, permResize)
	}
	forbids := []int64{permWrite, permResize}
	for from, perms := range map[int64][]int64{lockUses: uses, lockForbids: forbids} {
		for _, perm := range perms {
			lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: from + perm, Len: 1}
			if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
				return control.Failf(syscall.EBUSY, "%s cannot be locked: %v", f.Name(), err)
			}
		}
	}
	for from, perms := range map[int64][]int64{lockForbids: uses, lockUses: forbids} {
		for _, perm := range perms {
			held, err := lockIsHeld(f, from+perm)
			if err != nil {
				return err
			}
			if held {
				return refusal(syscall.EBUSY, "%s is in use by another process, such as qemu: end that first", f.Name())
			}
		}
	}
	return nil
}

// lockIsHeld reports whether anybody else has a lock on a byte.
func lockIsHeld(f *os.File, at int64) (bool, error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return false, fmt.Errorf("%s: look for locks: %w", f.Name(), err)
	}
	return lock.Type != unix.F_UNLCK, nil
}
