// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"runtime/debug"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hashicorp/go-hclog"
)

// runState is how far a tree's one run has come.
type runState int

const (
	fresh    runState = iota // neither run nor stopped
	running                  // mounted, or being mounted
	finished                 // Run has returned, or is never to mount
)

// maxReadAhead is in bytes. The kernel takes it as an upper bound of its own setting for the mount, which is 128 KiB
// unless /sys/class/bdi says otherwise.
const maxReadAhead = 1 << 20

// serverOptions are the settings of the FUSE connection.
func (t *Tree) serverOptions() *fuse.MountOptions {
	// Without the first direct I/O is one request at a time, without the second DirectIO files have no shared mappings.
	capabilities := uint64(fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP)
	if t.opts.WritebackCache {
		capabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	return &fuse.MountOptions{
		FsName:            t.opts.FsName,
		Name:              t.opts.FsType,
		MaxBackground:     t.opts.MaxBackground,
		MaxWrite:          t.opts.MaxWrite,
		MaxReadAhead:      maxReadAhead,
		ExtraCapabilities: capabilities,
		DisableXAttrs:     true, // raw.go, GetXAttr
		// Replies come from memory: splice would only copy them into a pipe first.
		DisableSplice:      true,
		DisableReadDirPlus: true, // raw.go, ReadDirPlus
		Logger:             t.log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Warn}),
		PanicHandler: func(reason any) fuse.Status {
			t.log.Error("panic in a file system operation", "reason", reason, "stack", string(debug.Stack()))
			return fuse.EIO
		},
	}
}

// probe returns when the mount has answered, or its connection ended.
func (t *Tree) probe() {
	if t.root.dir {
		t.mnt.probe()
		return
	}
	if t.opts.WritebackCache {
		// The kernel has made the root before it knew anything of it, and believes that it is empty.
		t.tellSize(t.root)
	}
	t.mnt.probeFile()
}

// Run mounts the tree and serves it until it is unmounted, by Unmount, Abort or from outside, and the last file on it
// is closed. It returns nil then; by that time every open file has been released. It runs once: EALREADY for a second
// call. After a call of Unmount it returns nil without mounting.
//
// ENOENT, ENOTDIR: the mount point does not exist or is not a directory. EINVAL: it is to be a regular file (InitFile)
// and is not. ECONNABORTED: the connection to the kernel was
// aborted from outside; Run has removed the dead mount. With IOUringOn, errors that say why it is not possible:
// EOPNOTSUPP, ENOSYS, EPERM, ENOMEM. Other errors are those of mount(2).
//
// Run waits for operations of nodes that are under way, however long they take.
func (t *Tree) Run() error {
	conn, err := t.start()
	if conn == nil {
		return err
	}
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		t.probe()
		close(t.mounted)
	}()
	conn.serve()
	<-probed // ends at the latest when the connection does
	return t.finish(conn)
}

// start mounts. It returns no connection if there is nothing to serve.
func (t *Tree) start() (transport, error) {
	t.runMu.Lock()
	defer t.runMu.Unlock()
	switch t.state {
	case running:
		return nil, fmt.Errorf("tree is already mounted on %s: %w", t.mountpoint, syscall.EALREADY)
	case finished:
		if t.mnt != nil {
			return nil, fmt.Errorf("tree on %s has been run and cannot be run again: %w", t.mountpoint, syscall.EALREADY)
		}
		return nil, nil
	}
	opts := t.serverOptions()
	mnt, fd, err := newMount(t.mountpoint, !t.root.dir, opts)
	if err != nil {
		t.state = finished
		return nil, err
	}
	conn, err := newTransport(t, fd, opts)
	if err != nil {
		t.state = finished
		return nil, errors.Join(fmt.Errorf("mount on %s: %w", t.mountpoint, err), mnt.unmount(true))
	}
	t.state, t.mnt = running, mnt
	t.mu.Lock()
	t.kernel = conn
	t.mu.Unlock()
	return conn, nil
}

// finish cleans up when no more requests come: the kernel does not send RELEASE and FORGET for what is left.
func (t *Tree) finish(conn transport) error {
	t.mu.Lock()
	t.kernel = nil
	t.mu.Unlock()
	t.notices.Wait()
	conn.close()
	for _, f := range t.files.all() {
		t.release(f.handle)
	}
	t.mu.Lock()
	for _, n := range t.nodes {
		n.lookups = 0
		t.drop(n)
	}
	t.mu.Unlock()

	t.runMu.Lock()
	defer t.runMu.Unlock()
	t.state = finished
	if !t.mnt.inPlace() {
		return nil
	}
	// Still mounted without a connection: everything on it fails with ENOTCONN.
	if err := t.mnt.unmount(true); err != nil {
		return fmt.Errorf("connection was aborted, and the dead mount stays: %w", err)
	}
	return fmt.Errorf("connection of the mount on %s was aborted from outside: %w", t.mountpoint, syscall.ECONNABORTED)
}

// Mounted returns a channel that is closed once the mount is in place and answers. It stays open if Run fails to mount.
func (t *Tree) Mounted() <-chan struct{} { return t.mounted }

// Unmount removes the mount, and Run returns when it has served what was under way. It does not wait for Run, so that
// it can be called from anywhere, also from a node's operation, and also twice: nil if there is no mount any more.
// Before Run it keeps Run from mounting.
//
// EBUSY: the mount is in use, or another file system is mounted over it. With force the mount disappears from the
// directory tree at once even so, and Run returns when the last user has closed the last file (see Abort).
func (t *Tree) Unmount(force bool) error {
	t.runMu.Lock()
	defer t.runMu.Unlock()
	switch t.state {
	case fresh:
		t.state = finished
		return nil
	case finished:
		return nil
	}
	return t.mnt.unmount(force)
}

// Abort removes the mount and cuts all its users off: their requests, present and future, fail with ENOTCONN or
// ECONNABORTED, and Run returns as soon as the operations under way have. It is for mounts that Unmount found
// busy and data that nobody needs any more. Otherwise it is as Unmount.
//
// EOPNOTSUPP: the mount is out of reach after Unmount with force, and the kernel's fusectl file system is not mounted.
func (t *Tree) Abort() error {
	t.runMu.Lock()
	defer t.runMu.Unlock()
	switch t.state {
	case fresh:
		t.state = finished
		return nil
	case finished:
		return nil
	}
	return t.mnt.abort()
}
