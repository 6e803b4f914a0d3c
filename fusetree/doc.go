// SPDX-License-Identifier: Apache-2.0

// Package fusetree serves a tree of directories and regular files that exists only in the memory of this process, as
// /proc does: it is fuse_tree(3) for Go. Only the program adds and removes nodes; users of the mount can open, read
// and write the files that permit it, and every such operation calls a function of the node (see [Ops]).
//
// A program calls [Init], populates the tree (before, during and after the mount), calls [Tree.Run] in a goroutine of
// its own, and ends with [Tree.Unmount] and [Tree.Exit]:
//
//	tree, err := fusetree.Init("/mnt/tree", fusetree.Options{})
//	...
//	dev, err := tree.Mkdir("dev", tree.Root())
//	node, err := tree.Add("zero", dev, 0o444, &fusetree.Ops{Read: readZeroes}, nil)
//	go func() { served <- tree.Run() }()
//	<-tree.Mounted()
//
// Every error that the package returns carries a [syscall.Errno], so that errors.Is(err, syscall.EBUSY) and the like
// work. All methods may be called from any goroutine, those of [Ops] members included, unless their comment says
// otherwise.
//
// # The program and its own mount
//
// A process must not use its own mount: a page fault, a chdir or an open there can wait for a goroutine that cannot
// run before it returns. (Tests do it with care: the Go runtime polls a file it opens, so Run makes the kernel settle
// poll(2) for the whole connection before it declares the tree mounted.)
//
// # Who owns what
//
//   - The [Tree] owns the nodes, the table of open files and the mount. Nothing in it runs unless Run does.
//   - A [Node] lives while it has a name, while the kernel remembers its inode number (lookup count), and while it is
//     open. Inode numbers are never used twice, so a late request can never meet another node.
//   - A [File] belongs to the tree from Open to Release. Its Data member belongs to the node's Ops.
//   - Buffers passed to Read and Write belong to the transport: they are valid until the function returns.
//
// # Locks
//
// In the order in which they may be taken:
//
//	Tree.runMu     state of Run and the mount; held while mounting and unmounting
//	Tree.mu        shape of the tree: names, lookup counts, open counts
//	Node.attrMu    attributes of one node
//	handleTable.mu allocation of file handles (reads of the table take no lock)
//
// No lock is held while a function of Ops runs or a message is sent to the kernel: the kernel answers an invalidation
// of a name only after it has the directory's lock, which a LOOKUP that waits for Tree.mu may hold.
//
// # Files
//
// tree.go and node.go are the API for the tree, ops.go that for the files' operations; raw.go translates FUSE
// requests into both and knows nothing of how requests arrive. They do so by one of two transports: devfuse.go reads
// them from /dev/fuse (follow.go, clients.go and replier.go see to it that requests and replies cost few interrupts
// of other processors; helper.go copies large ones side by side), and uring.go takes them from io_uring, with entries
// (ringentry.go) on rings (iouring.go). Both stand on connection.go, and on the fast path of reads and writes
// (Ops.Start) in io.go. notify.go tells the kernel what to forget, and writeback.go what it should know of sizes when
// it caches writes; run.go and mount.go mount, serve and unmount.
package fusetree
