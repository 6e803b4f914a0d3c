// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// mount is one mount of a FUSE connection. The connection may outlive it, and another mount may take its place.
type mount struct {
	path    string
	id      mountID
	aborted bool // by us; under Tree.runMu
}

// mountID tells a mount from others at the same path. Only unique is never given out again, the other numbers are as
// soon as the mount has gone.
type mountID struct {
	major, minor uint32 // device; the minor number is also the name of the FUSE connection in fusectl
	mount        uint64 // as in mountinfo
	unique       uint64 // the same as mount before Linux 6.8
}

// newMount mounts on path, a directory or, with file set, a regular file, and returns the descriptor on which the
// kernel sends its requests, beginning with INIT. Nothing can use the mount before that has been answered.
func newMount(path string, file bool, opts *fuse.MountOptions) (*mount, int, error) {
	var st os.FileInfo
	err := apart(-1, func() (err error) {
		if st, err = os.Stat(path); err == nil {
			path, err = filepath.EvalSymlinks(path) // umount(2) must mean what mount(2) meant
		}
		return err
	})
	switch {
	case errors.Is(err, syscall.ENOTCONN):
		return nil, -1, fmt.Errorf("a dead FUSE mount is on %s, remove it with umount: %w", path, err)
	case err != nil:
		return nil, -1, fmt.Errorf("mount point: %w", err)
	case !file && !st.IsDir():
		return nil, -1, fmt.Errorf("mount point %s: %w", path, syscall.ENOTDIR)
	case file && !st.Mode().IsRegular():
		return nil, -1, fmt.Errorf("mount point %s is no regular file: %w", path, syscall.EINVAL)
	}
	var fd int
	if os.Geteuid() == 0 {
		fd, err = mountAsRoot(path, file, opts)
	} else {
		fd, err = mountAsUser(path, opts)
	}
	if err != nil {
		return nil, -1, fmt.Errorf("mount on %s: %w", path, err)
	}
	m := &mount{path: path}
	if m.id, err = mountAt(path); err != nil {
		_ = umount(path, unix.MNT_DETACH)
		_ = unix.Close(fd)
		return nil, -1, fmt.Errorf("mount on %s: %w", path, err)
	}
	return m, fd, nil
}

// mountAsRoot calls mount(2). The descriptor is not inherited by child processes, which would keep the connection alive
// after a crash of this one.
func mountAsRoot(path string, file bool, opts *fuse.MountOptions) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse (is the fuse module there?): %w", err)
	}
	rootMode := syscall.S_IFDIR
	if file {
		rootMode = syscall.S_IFREG
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,allow_other,default_permissions,max_read=%d",
		fd, rootMode, os.Geteuid(), os.Getegid(), opts.MaxWrite)
	err = apart(fd, func() error {
		return unix.Mount(opts.FsName, path, "fuse."+opts.Name, unix.MS_NOSUID|unix.MS_NODEV, data)
	})
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// mountAsUser has fusermount3(1) mount and send the descriptor back through a socket. Without allow_other, which would
// need consent in /etc/fuse.conf.
func mountAsUser(path string, opts *fuse.MountOptions) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer func() { _ = ours.Close() }()
	options := fmt.Sprintf("default_permissions,fsname=%s,subtype=%s,max_read=%d", opts.FsName, opts.Name, opts.MaxWrite)
	cmd := exec.Command("fusermount3", "-o", options, "--", path)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	out, err := cmd.CombinedOutput()
	_ = theirs.Close()
	if err != nil {
		return -1, fmt.Errorf("fusermount3: %s: %w", strings.TrimSpace(string(out)), errors.Join(err, syscall.EPERM))
	}
	return receiveDescriptor(int(ours.Fd()))
}

// receiveDescriptor receives one descriptor that was sent before.
func receiveDescriptor(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return -1, err
	}
	for _, m := range messages {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, fmt.Errorf("fusermount3 sent no descriptor: %w", syscall.EPROTO)
}

// mountAt identifies the mount that is on top at path, without asking its file system, which may be dead or not yet be
// served.
func mountAt(path string) (id mountID, err error) {
	err = apart(-1, func() error {
		id, err = mountOf(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)
		return err
	})
	return id, err
}

// mountOf is mountAt for a path from a directory, or a file, as statx(2) has it.
func mountOf(dir int, path string, flags int) (mountID, error) {
	flags |= unix.AT_STATX_DONT_SYNC
	var st, unique unix.Statx_t
	err := unix.Statx(dir, path, flags, unix.STATX_MNT_ID, &st)
	if err == nil {
		unique = st
		err = unix.Statx(dir, path, flags, unix.STATX_MNT_ID|unix.STATX_MNT_ID_UNIQUE, &unique)
	}
	if err != nil {
		return mountID{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return mountID{major: st.Dev_major, minor: st.Dev_minor, mount: st.Mnt_id, unique: unique.Mnt_id}, nil
}

// mountinfoEscaper writes a path as mountinfo shows it.
var mountinfoEscaper = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)

// present reports whether the mount is there, on top or not.
func (m *mount) present() bool {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return m.inPlace()
	}
	id, device := fmt.Sprint(m.id.mount), fmt.Sprintf("%d:%d", m.id.major, m.id.minor)
	path := mountinfoEscaper.Replace(m.path)
	for line := range strings.Lines(string(table)) {
		// id, parent's id, device, root, path, ...
		f := strings.Fields(line)
		if len(f) > 4 && f[0] == id && f[2] == device && f[4] == path {
			return true
		}
	}
	return false
}

// inPlace reports whether the mount is on top at its path.
func (m *mount) inPlace() bool {
	id, err := mountAt(m.path)
	return err == nil && id == m.id
}

// probeName is a name in the root directory that go-fuse serves by itself, for the purpose of probe.
const probeName = ".go-fuse-epoll-hack"

// probe returns when the mount has answered, or its connection ended. It polls a file: go-fuse answers ENOSYS, and the
// kernel never sends a POLL again, for any file. So regular files are always ready, and above all the Go runtime
// can poll a file of the mount in its own process without waiting for itself.
func (m *mount) probe() {
	_ = apart(-1, func() error {
		fd, err := unix.Open(filepath.Join(m.path, probeName), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err // unmounted already
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return unix.Close(fd)
	})
}

// probeFile is probe for a mount on a file, which it does not open: that would reach the node.
func (m *mount) probeFile() {
	_ = apart(-1, func() error {
		var st unix.Statx_t
		return unix.Statx(unix.AT_FDCWD, m.path, unix.AT_STATX_FORCE_SYNC|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_SIZE, &st)
	})
}

// unmount takes the mount away; with force also if it is in use. It is no error if somebody else did.
func (m *mount) unmount(force bool) error {
	if !m.present() {
		return nil
	}
	if !m.inPlace() {
		return fmt.Errorf("another file system is mounted over %s, unmount it first: %w", m.path, syscall.EBUSY)
	}
	flags := 0
	if force {
		flags = unix.MNT_DETACH
	}
	err := umount(m.path, flags)
	if errors.Is(err, syscall.EPERM) {
		err = m.fusermount(force)
	}
	switch {
	case err == nil, !m.present(): // in the latter case it has gone at this moment
		return nil
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s is in use (fuser -vm %s shows by whom): %w", m.path, m.path, err)
	}
	return fmt.Errorf("unmount %s: %w", m.path, err)
}

// umount is umount2(2) for path itself.
func umount(path string, flags int) error {
	return apart(-1, func() error { return unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW) })
}

// abort ends the connection and takes the mount away.
func (m *mount) abort() error {
	if m.aborted {
		return nil
	}
	if m.inPlace() {
		err := umount(m.path, unix.MNT_FORCE|unix.MNT_DETACH)
		if err == nil {
			m.aborted = true
			return nil
		}
		if !errors.Is(err, syscall.EPERM) && m.present() {
			return fmt.Errorf("forced unmount of %s: %w", m.path, err)
		}
	}
	control := fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", m.id.minor)
	err := os.WriteFile(control, []byte("1"), 0)
	if errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("the detached mount of %s can be aborted only with fusectl mounted (no %s): %w",
			m.path, control, syscall.EOPNOTSUPP)
	}
	if err != nil {
		return fmt.Errorf("abort the connection of %s: %w", m.path, err)
	}
	m.aborted = true
	return m.unmount(true)
}

// fusermount unmounts for a user who is not root.
func (m *mount) fusermount(force bool) error {
	args := []string{"-u", "--", m.path}
	if force {
		args = append([]string{"-z"}, args...)
	}
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err == nil {
		return nil
	}
	message := strings.TrimSpace(string(out))
	if strings.Contains(message, syscall.EBUSY.Error()) {
		return fmt.Errorf("%s: %w", message, syscall.EBUSY)
	}
	return fmt.Errorf("fusermount3: %s: %w", message, errors.Join(err, syscall.EPERM))
}
