// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// Whether the kernel writes back is settled for a FUSE connection, not for a file: so a device with cache=writeback
// has a connection of its own, whose root is the device's file. It is mounted over the device's node in the tree,
// which is then out of reach and refuses to be opened, since two page caches of one device would not agree.

const (
	// coverTimeout bounds the wait for a device's mount to appear.
	coverTimeout = 10 * time.Second
	// uncoverGrace is how long the connection of a device may outlive its mount. Nobody has the device open then, but a
	// mount namespace may have a copy of the mount.
	uncoverGrace = time.Second
	// forcedWriteBack is how long the kernel has for what it has not written back when a device is taken away by force.
	forcedWriteBack = time.Second
)

// fileMount is a mount of one file; fusetree.Tree has the contracts.
type fileMount interface {
	Root() *fusetree.Node
	Run() error
	Mounted() <-chan struct{}
	Unmount(force bool) error
	Abort() error
}

// cover is the mount of a device.
type cover struct {
	fileMount
	ended chan struct{} // closed when it is served no more
}

func (c *cover) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// wantsCover reports whether the device needs a mount of its own. What cannot be written needs no writing back.
func (n *deviceNode) wantsCover() bool { return n.cache() == cacheWriteback && !n.device.ReadOnly() }

// file is the node that users of the device open.
func (n *deviceNode) file() *fusetree.Node {
	if c := n.cover.Load(); c != nil {
		return c.Root()
	}
	return n.node
}

// updateSize makes the device's nodes show a size in bytes.
func (n *deviceNode) updateSize(size int64) {
	n.node.UpdateSize(size)
	if file := n.file(); file != n.node {
		file.UpdateSize(size)
	}
}

// coveredOps is the device's side of a node that is mounted over.
func (n *deviceNode) coveredOps() *fusetree.Ops {
	return &fusetree.Ops{Open: func(*fusetree.File) error {
		return failf(syscall.ENXIO, "the mount of %s is not there: remove it, and add it again", n.device.Name())
	}}
}

// coverNode mounts a device over its node.
func (f *front) coverNode(n *deviceNode) error {
	path := f.nodePath(n.device.Name())
	mount, err := f.mountFile(path, n.args.access.permissions(deviceMode), n.ops(), n)
	if err != nil {
		return err
	}
	c := &cover{mount, make(chan struct{})}
	n.args.access.apply(c.Root())
	c.Root().UpdateBlockSize(n.device.BlockSize())
	n.cover.Store(c)
	c.Root().UpdateSize(n.device.Size())
	var runErr error
	go func() {
		runErr = c.Run()
		close(c.ended)
	}()
	select {
	case <-c.Mounted():
		return nil
	case <-c.ended:
		return fmt.Errorf("cache=%s needs a mount of its own: %w", cacheWriteback, runErr)
	case <-time.After(coverTimeout):
		f.cutCover(n)
		return failf(syscall.ETIMEDOUT, "%s was not mounted within %v", path, coverTimeout)
	}
}

// uncover takes the mount of a device away, if it has one and nobody uses it (EBUSY otherwise).
func (f *front) uncover(n *deviceNode) error {
	c := n.cover.Load()
	if c == nil || c.hasEnded() {
		return nil
	}
	// The umount itself tells nothing of users in other mount namespaces.
	if opens := c.Root().OpenCount(); opens > 0 {
		return failf(syscall.EBUSY, "%s is open %d times", n.device.Name(), opens)
	}
	if err := c.Unmount(false); err != nil {
		return err
	}
	select {
	case <-c.ended:
	case <-time.After(uncoverGrace):
		f.cutCover(n)
	}
	return nil
}

// cutCover takes the mount of a device away from whoever uses it.
func (f *front) cutCover(n *deviceNode) {
	c := n.cover.Load()
	if c == nil || c.hasEnded() {
		return
	}
	if err := c.Abort(); err != nil {
		f.log.Warn("cutting a device's users off", "device", n.device.Name(), "reason", err)
	}
	select {
	case <-c.ended:
	case <-time.After(cutOffTimeout): // an operation hangs; it ends with the handler's process
	}
}

// uncoverAll takes the mounts of all devices away. EBUSY: one is in use, and some may be gone; see coverAll.
func (f *front) uncoverAll() error {
	nodes := f.sortedNodes()
	for _, n := range nodes {
		if opens := n.file().OpenCount(); n.wantsCover() && opens > 0 {
			return failf(syscall.EBUSY, "%s is open %d times", n.device.Name(), opens)
		}
	}
	for _, n := range nodes {
		if err := f.uncover(n); err != nil {
			return err
		}
	}
	return nil
}

// coverAll mounts the devices again that have lost their mount.
func (f *front) coverAll() {
	for _, n := range f.sortedNodes() {
		c := n.cover.Load()
		if c == nil || !c.hasEnded() {
			continue
		}
		if err := f.coverNode(n); err != nil {
			f.log.Error("a device cannot be opened any more: remove it, and add it again", "device", n.device.Name(),
				"reason", err)
		}
	}
}

// cutCovers takes the mounts of all devices away from whoever uses them.
func (f *front) cutCovers() {
	f.eachCovered(f.cutCover)
}

// awaitCovers waits until no device has a mount. That of one that is in use may outlive the tree's.
func (f *front) awaitCovers() {
	for _, n := range f.sortedNodes() {
		if c := n.cover.Load(); c != nil {
			<-c.ended
		}
	}
}

// writeBackCovered makes the kernel write back what it has cached of a device with a mount of its own, within limit.
// The result is whether it has.
func (n *deviceNode) writeBackCovered(limit time.Duration) bool {
	c := n.cover.Load()
	if c == nil || c.hasEnded() {
		return true
	}
	done := make(chan bool, 1)
	go func() { done <- c.Root().WriteBack() }()
	select {
	case ok := <-done:
		return ok
	case <-time.After(limit):
		return false
	}
}

// eachCovered calls do for all devices with a mount at the same time.
func (f *front) eachCovered(do func(*deviceNode)) {
	var done sync.WaitGroup
	for _, n := range f.allNodes() {
		if n.cover.Load() != nil {
			done.Go(func() { do(n) })
		}
	}
	done.Wait()
}
