// SPDX-License-Identifier: Apache-2.0

// Command tcmur-host runs one tcmu-runner storage handler for fuse_tcmur. The front starts it, tells it over gRPC
// (package plugin/hostpb) which handler_*.so to load and which devices to open, and submits I/O through shared memory
// (shared/channel.h). It is not meant to be started by hand.
//
// Everything a handler touches is C: its ABI (shims_*.c), the threads that call it (worker.c, control.c) and the memory
// that it is given. Go decides: what a shared object is, how a subtype wants its devices, what the front is told.
// native.go is the only file that crosses between the two.
package main

import "os"

func main() {
	os.Exit(run(os.Args[1:]))
}
