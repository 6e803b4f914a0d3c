// SPDX-License-Identifier: Apache-2.0

// Command fuse_tcmur gives access to tcmu-runner storage handlers through a FUSE mount.
//
// It links two packages that know nothing of each other: fusetree, a /proc-like tree of nodes, and plugin, which
// runs each handler in a process of its own. What lies here is the translation between them: the device nodes, the
// command node with its little language, and the life of the program from mount to unmount.
//
// Lock order: the interpreter's turn, then front.mu, then gate.mu. No lock is held across a call into plugin.
package main

import "os"

func main() {
	os.Exit(report(newRootCommand().Execute(), os.Stderr))
}
