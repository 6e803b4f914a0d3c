// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// objectIndex stands for the handler's shared object where the memory socket wants the index of a device.
	objectIndex = 1<<32 - 1
	// objectName is what it is asked for by.
	objectName = "object"
	// maxObjectSize is the size in bytes up to which a shared object is copied.
	maxObjectSize = 256 << 20
)

// object is the shared object of a handler as it was when it was loaded: what a host that takes over has to load, and
// not whatever lies at its path by then. Hosts load the file, so that debuggers, and libraries that are looked for
// beside it, find it where it is, as long as the file is the same; then the copy.
type object struct {
	path  string
	stamp fileStamp

	mu   sync.Mutex
	copy *os.File // a sealed memfd; nil if there is none, or no longer
}

// fileStamp tells whether a file was replaced or written to.
type fileStamp struct {
	device, inode uint64
	size          int64
	written       unix.Timespec
	changed       unix.Timespec
}

func stampOf(path string) (fileStamp, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileStamp{}, err
	}
	return fileStamp{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}

// takeObject copies a shared object. drop must follow. With an error the object has no copy: hosts load the file then,
// whatever it is.
func takeObject(path string) (*object, error) {
	o := &object{path: path}
	var err error
	if o.stamp, err = stampOf(path); err != nil {
		return o, err
	}
	if o.stamp.size > maxObjectSize {
		return o, fmt.Errorf("it has %d bytes: %w", o.stamp.size, syscall.EFBIG)
	}
	from, err := os.Open(path)
	if err != nil {
		return o, err
	}
	defer from.Close()
	fd, err := unix.MemfdCreate("tcmur-"+filepath.Base(path), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return o, fmt.Errorf("memfd_create: %w", err)
	}
	to := os.NewFile(uintptr(fd), "copy of "+path)
	_, err = io.Copy(to, io.LimitReader(from, maxObjectSize))
	if err == nil {
		// Hosts get this very descriptor.
		_, err = unix.FcntlInt(to.Fd(), unix.F_ADD_SEALS,
			unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return o, errors.Join(err, to.Close())
	}
	o.copy = to
	return o, nil
}

// isReplaced reports whether the copy has to be loaded instead of the file.
func (o *object) isReplaced() bool {
	stamp, err := stampOf(o.path)
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.copy != nil && (err != nil || stamp != o.stamp)
}

// use implements lender.
func (o *object) use(name string, fn func(fd int) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.copy == nil || name != objectName {
		return syscall.ENODEV
	}
	return fn(int(o.copy.Fd()))
}

// drop gives the copy up. Hosts that have loaded it go on. Safe to call on nil.
func (o *object) drop() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.copy != nil {
		o.copy.Close()
		o.copy = nil
	}
}
