// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

const (
	// releaseGrace is how long a node that somebody just closed may take to become idle: close(2) returns, and loop
	// devices and mounts go away, before the kernel tells the server.
	releaseGrace = 500 * time.Millisecond
	// undoTimeout bounds taking back what the first half of a failed command did.
	undoTimeout = 30 * time.Second
)

// front joins the devices of a library to the nodes of a tree: what the commands act on.
//
// Its methods that change things are called by one command at a time, or after the last one; but load and add also side
// by side, for different handlers (restore.go).
type front struct {
	log  hclog.Logger
	lib  library
	tree nodeTree
	gate *gate
	sys  systemDirs
	// mountpoint is absolute and has no symbolic links.
	mountpoint string
	// mountFile makes a mount of one file, to be run (cover.go).
	mountFile func(path string, mode uint32, ops *fusetree.Ops, data any) (fileMount, error)

	devDir, sysDir, modulesDir, blockDir, hostsDir *fusetree.Node

	mu      sync.Mutex // guards the fields below
	nodes   map[int]*deviceNode
	modules map[string]*branch // the directories in /sys/modules, with what /sys/hosts has of them

	exitOnce, forceOnce sync.Once
	// exitRequested is closed by the exit command, exitForced by exit --force.
	exitRequested, exitForced chan struct{}
}

// systemDirs is where the kernel shows its state, which tests put elsewhere.
type systemDirs struct{ proc, sys string }

// newFront makes the tree's fixed nodes except the command node, which needs an interpreter first.
func newFront(lib library, tree nodeTree, mountpoint string, dirs systemDirs, log hclog.Logger) (*front, error) {
	f := &front{
		log: log, lib: lib, tree: tree, gate: newGate(), sys: dirs, mountpoint: mountpoint,
		nodes: map[int]*deviceNode{}, modules: map[string]*branch{},
		exitRequested: make(chan struct{}), exitForced: make(chan struct{}),
	}
	var devErr, sysErr, modulesErr, blockErr, hostsErr error
	f.devDir, devErr = tree.Mkdir("dev", tree.Root())
	f.sysDir, sysErr = tree.Mkdir("sys", tree.Root())
	if sysErr == nil {
		f.modulesDir, modulesErr = tree.Mkdir("modules", f.sysDir)
		f.blockDir, blockErr = tree.Mkdir("block", f.sysDir)
		f.hostsDir, hostsErr = tree.Mkdir("hosts", f.sysDir)
	}
	return f, errors.Join(devErr, sysErr, modulesErr, blockErr, hostsErr)
}

// load loads a handler and shows it in /sys/modules. Errors: those of plugin.Library.LoadHandler and of the tree.
func (f *front) load(ctx context.Context, out io.Writer, subtype string) error {
	if err := f.lib.LoadHandler(ctx, subtype); err != nil {
		return err
	}
	if err := f.addModule(subtype); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return errors.Join(err, f.lib.UnloadHandler(undo, subtype))
	}
	if handler, ok := f.handler(subtype); ok {
		_, _ = fmt.Fprintf(out, "%s: loaded %s into process %d\n", subtype, handler.Path, handler.PID)
	}
	return nil
}

// unload unloads a handler without devices. Errors: those of plugin.Library.UnloadHandler.
func (f *front) unload(ctx context.Context, subtype string) error {
	if err := f.lib.UnloadHandler(ctx, subtype); err != nil {
		return err
	}
	return f.removeModule(subtype)
}

// addModule shows a handler in /sys/modules and /sys/hosts.
func (f *front) addModule(subtype string) error {
	if _, err := f.tree.Mkdir(subtype, f.modulesDir); err != nil {
		return err
	}
	attributes, err := f.showHandler(subtype)
	if err != nil {
		return errors.Join(err, f.tree.Rmdir(subtype, f.modulesDir))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.modules[subtype] = attributes
	return nil
}

// removeModule takes a handler that is unloaded out of /sys/modules and /sys/hosts.
func (f *front) removeModule(subtype string) error {
	f.mu.Lock()
	attributes := f.modules[subtype]
	delete(f.modules, subtype)
	f.mu.Unlock()
	err := f.tree.Rmdir(subtype, f.modulesDir)
	if attributes != nil {
		err = errors.Join(err, attributes.remove())
	}
	return err
}

// add makes a device and its node. Errors: those of plugin.Library.AddDevice and of the tree.
func (f *front) add(ctx context.Context, out io.Writer, args addArgs) error {
	device, err := f.lib.AddDevice(ctx, args.minor, args.config, args.options)
	if err != nil {
		return err
	}
	if err := f.addNode(device, args); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return errors.Join(err, f.lib.RemoveDevice(undo, args.minor))
	}
	mode := ""
	if device.ReadOnly() {
		mode = ", read-only"
	}
	_, _ = fmt.Fprintf(out, "%s: %s, %d bytes in blocks of %d%s\n", device.Name(), f.nodePath(device.Name()),
		device.Size(), device.BlockSize(), mode)
	return nil
}

// remove takes a device away that nobody has open. EBUSY: somebody has. ENODEV: there is none. Any other error comes
// from the device's last flush: the device is gone then, but not all of its data may have arrived.
func (f *front) remove(ctx context.Context, minor int) error {
	node := f.node(minor)
	if node == nil {
		return f.lib.RemoveDevice(ctx, minor) // finds the words for what is wrong with this minor
	}
	if err := f.removeNode(ctx, node); err != nil {
		return err
	}
	err := f.lib.RemoveDevice(ctx, minor)
	if err != nil && f.lib.HasDevice(minor) {
		// Still there, with requests that do not end: it must stay reachable for another try.
		return errors.Join(err, f.addNode(node.device, node.args))
	}
	return err
}

// addNode makes the node of a device that was added with these arguments, and its attributes.
func (f *front) addNode(device device, args addArgs) error {
	node := &deviceNode{device: device, gate: f.gate, args: args, sizeAtAdd: device.Size()}
	ops := node.ops()
	if node.wantsCover() {
		ops = node.coveredOps()
	}
	var err error
	node.node, err = f.tree.Add(device.Name(), f.devDir, args.access.permissions(deviceMode), ops, node)
	if err != nil {
		return err
	}
	args.access.apply(node.node)
	device.OnResize(node.updateSize)
	node.node.UpdateBlockSize(device.BlockSize())
	if node.wantsCover() {
		err = f.coverNode(node)
	}
	if err == nil {
		node.attributes, err = f.showDevice(node)
	}
	if err != nil {
		f.cutCover(node)
		return errors.Join(err, f.tree.Detach(device.Name(), f.devDir))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[device.Minor()] = node
	return nil
}

// removeNode takes the node of a device out of the tree when nobody has it open (EBUSY otherwise). A close(2) just
// before it counts as closed, even if the kernel has not said so yet.
func (f *front) removeNode(ctx context.Context, node *deviceNode) error {
	name := node.device.Name()
	ctx, cancel := context.WithTimeout(ctx, releaseGrace)
	defer cancel()
	// The tree waits for a close(2) that it has seen. A loop device lets go of its file without one.
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		err := f.uncover(node)
		if err == nil {
			err = f.tree.Remove(name, f.devDir)
		}
		if err == nil {
			f.forgetNode(node)
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			users := f.describeOpen(name, node.file().OpenCount())
			return failf(syscall.EBUSY, "%s; unmount or close it first", users)
		}
	}
}

// forgetNode drops a node that is not in the tree any more, with its attributes.
func (f *front) forgetNode(node *deviceNode) {
	f.mu.Lock()
	delete(f.nodes, node.device.Minor())
	f.mu.Unlock()
	if err := node.attributes.remove(); err != nil {
		f.log.Warn("taking the attributes of a device away", "device", node.device.Name(), "reason", err)
	}
}

// node is the node of the device with this minor, nil if there is none.
func (f *front) node(minor int) *deviceNode {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nodes[minor]
}

// allNodes lists the device nodes in no order.
func (f *front) allNodes() []*deviceNode {
	f.mu.Lock()
	defer f.mu.Unlock()
	nodes := make([]*deviceNode, 0, len(f.nodes))
	for _, node := range f.nodes {
		nodes = append(nodes, node)
	}
	return nodes
}

// allModules lists the subtypes in /sys/modules in no order.
func (f *front) allModules() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.modules))
}

// dump is the tree in words, and the state of what serves it.
func (f *front) dump() string { return f.tree.Format(f.blockDir, f.hostsDir) + f.states() }

// requestExit makes the program stop, unless a device is in use (EBUSY). When it succeeds, nothing can be opened any
// more.
func (f *front) requestExit() error {
	if open := f.gate.shutWhenIdle(releaseGrace); len(open) > 0 {
		return failf(syscall.EBUSY, "in use: %s; unmount or close first", f.describeAllOpen(open))
	}
	f.exitOnce.Do(func() { close(f.exitRequested) })
	return nil
}

// nodePath is where users find a device node.
func (f *front) nodePath(name string) string { return f.mountpoint + "/dev/" + name }

// ownMount finds out where this program's mount can be reached.
func (f *front) ownMount() ownMount { return findOwnMount(f.sys.proc, f.mountpoint) }

// describeOpen says how often a node is open, and by whom as far as that can be seen.
func (f *front) describeOpen(name string, opens int) string {
	text := fmt.Sprintf("%s is open %d times", name, opens)
	if opens == 1 {
		text = name + " is open once"
	}
	if holders := findHolders(f.sys, f.nodePath(name)); len(holders) > 0 {
		text += " (" + strings.Join(holders, ", ") + ")"
	}
	return text
}

// describeAllOpen is describeOpen for several nodes.
func (f *front) describeAllOpen(open []openDevice) string {
	texts := make([]string, 0, len(open))
	for _, device := range open {
		texts = append(texts, f.describeOpen(device.name, device.opens))
	}
	return strings.Join(texts, "; ")
}

// The two libraries as this program sees them; tests put their own in place.
type (
	library interface {
		LoadHandler(ctx context.Context, subtype string) error
		UnloadHandler(ctx context.Context, subtype string) error
		ForceUnloadHandler(subtype string) error
		ReloadHandler(ctx context.Context, subtype string) error
		AddDevice(ctx context.Context, minor int, config string, options plugin.DeviceOptions) (device, error)
		RemoveDevice(ctx context.Context, minor int) error
		ForceRemoveDevice(minor int) error
		HasDevice(minor int) bool
		Handlers() []plugin.HandlerInfo
		Deaths(minor int) []plugin.Death
		Shutdown(ctx context.Context) error
	}
	nodeTree interface {
		Root() *fusetree.Node
		Add(
			name string, parent *fusetree.Node, mode uint32, ops *fusetree.Ops, data any,
		) (*fusetree.Node, error)
		Remove(name string, parent *fusetree.Node) error
		Detach(name string, parent *fusetree.Node) error
		Mkdir(name string, parent *fusetree.Node) (*fusetree.Node, error)
		Rmdir(name string, parent *fusetree.Node) error
		Format(folded ...*fusetree.Node) string
	}
)
