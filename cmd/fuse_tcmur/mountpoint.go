// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

const (
	// fsName names the mounts of this program: source and subtype in the mount table.
	fsName = "fuse_tcmur"
	// probeTimeout is how long a mount may take to answer before it counts as alive but hung.
	probeTimeout = 2 * time.Second
)

// isOwnType reports whether a mount was made by this program, in this process or another.
func isOwnType(mount *mountInfo) bool { return mount.fsType == "fuse."+fsName }

// mountpoint is the directory that is mounted on.
type mountpoint struct {
	path    string   // absolute, without symbolic links
	created []string // the directories that had to be made for it, outermost first
}

// prepareMountpoint makes path, which is absolute, fit to be mounted on: the mount that a dead front left there is
// detached, and missing directories are made. EBUSY: a live front serves there. EINVAL: path cannot be a mount point.
func prepareMountpoint(procDir, path string, log hclog.Logger) (*mountpoint, error) {
	resolved, err := clearMountpoint(procDir, path, log)
	if err != nil {
		return nil, err
	}
	point := &mountpoint{path: resolved}
	if err := point.create(); err != nil {
		point.remove(log)
		return nil, err
	}
	return point, nil
}

// clearMountpoint detaches stale mounts from path and returns it without symbolic links. The mount table is asked what
// lies there before the file system is: a mount whose server hangs would take this process with it.
func clearMountpoint(procDir, path string, log hclog.Logger) (string, error) {
	for {
		mounts, err := readMounts(procDir)
		if err != nil {
			return "", err
		}
		resolved, err := resolvePath(path, func(place string) bool {
			mount := topMount(mounts, place)
			return mount != nil && isOwnType(mount)
		})
		var untouchable *untouchableError
		switch {
		case err == nil:
			return resolved, nil
		case !errors.As(err, &untouchable):
			return "", fmt.Errorf("mount point %s: %w", path, err)
		}
		if err := detachIfDead(untouchable.place, log); err != nil {
			return "", err
		}
	}
}

// detachIfDead detaches the mount of this program at place if its server has ended. EBUSY: it has not.
func detachIfDead(place string, log hclog.Logger) error {
	err := probe(place, probeTimeout)
	// The latter when the connection ends just now.
	if !errors.Is(err, syscall.ENOTCONN) && !errors.Is(err, syscall.ECONNABORTED) {
		return failf(syscall.EBUSY, "another fuse_tcmur serves %s: stop it with 'echo exit > %s/dev/%s', "+
			"or choose another directory with --mountpoint", place, place, ctlName)
	}
	if err := unix.Unmount(place, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return failf(errnoOf(err), "a dead mount is in the way, and umount -l %s fails: %w", place, err)
	}
	log.Warn("detached the mount of a server that has died", "mountpoint", place)
	return nil
}

// probe asks the server of the mount at path whether it is there: nil if so, ENOTCONN or ECONNABORTED if not. When no
// answer comes in time it gives up (ETIMEDOUT) and leaves the goroutine that asked behind: a call on a hung mount
// cannot be taken back.
func probe(path string, timeout time.Duration) error {
	answer := make(chan error, 1)
	go func() {
		// Not stat(2): the kernel may answer that from what it has cached, also for a server that is dead.
		var stat unix.Statfs_t
		answer <- unix.Statfs(path, &stat)
	}()
	select {
	case err := <-answer:
		return err
	case <-time.After(timeout):
		return syscall.ETIMEDOUT
	}
}

// create makes the mount point and the directories above it as far as they are missing.
func (m *mountpoint) create() error {
	var missing []string
	for path := m.path; ; path = filepath.Dir(path) {
		info, err := os.Stat(path)
		if err == nil && !info.IsDir() {
			return failf(syscall.ENOTDIR, "mount point %s: %s is not a directory", m.path, path)
		}
		if err == nil {
			break
		}
		if !os.IsNotExist(err) {
			return fmt.Errorf("mount point %s: %w", m.path, err)
		}
		missing = append(missing, path)
	}
	for _, path := range slices.Backward(missing) {
		if err := os.Mkdir(path, 0o755); err != nil {
			return fmt.Errorf("cannot make the mount point: %w", err)
		}
		m.created = append(m.created, path)
	}
	return nil
}

// remove takes away what create made, as far as nobody has put anything into it.
func (m *mountpoint) remove(log hclog.Logger) {
	for _, path := range slices.Backward(m.created) {
		if err := unix.Rmdir(path); err != nil {
			log.Debug("left a directory behind that was made for the mount", "path", path, "reason", err)
			return
		}
	}
	m.created = nil
}
