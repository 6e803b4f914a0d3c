// SPDX-License-Identifier: Apache-2.0

// Command gofuse is a peer of the benchmark: memory as a file of an in-process go-fuse server, tuned as far as go-fuse
// allows. It shows what a FUSE server in Go costs without a second process.
//
//	gofuse MOUNTPOINT BYTES [writeback]
//
// The mount holds the same memory twice: "direct" bypasses the page cache, "cached" uses it, and writes through it
// unless told to write back.
// It runs until it is unmounted, or SIGINT or SIGTERM unmounts it.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Node numbers.
const (
	root = fuse.FUSE_ROOT_ID + iota
	direct
	cached
)

const (
	maxWrite      = 1 << 20
	maxBackground = 256
	// A page-cached file whose attributes expire costs a GETATTR per read.
	timeout = time.Hour
)

// memory answers what a benchmark asks. The rest is ENOSYS, which the kernel does not ask again.
type memory struct {
	fuse.RawFileSystem
	data []byte
}

func (m *memory) attr(node uint64, out *fuse.Attr) {
	*out = fuse.Attr{Ino: node, Mode: syscall.S_IFDIR | 0o700, Nlink: 1, Blksize: 4096}
	if node != root {
		out.Mode = syscall.S_IFREG | 0o600
		out.Size = uint64(len(m.data))
	}
}

func (m *memory) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	switch name {
	case "direct":
		out.NodeId = direct
	case "cached":
		out.NodeId = cached
	default:
		return fuse.ENOENT
	}
	out.SetEntryTimeout(timeout)
	out.SetAttrTimeout(timeout)
	m.attr(out.NodeId, &out.Attr)
	return fuse.OK
}

func (m *memory) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(timeout)
	m.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

// SetAttr is the kernel's: the times of a file that is written back.
func (m *memory) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(timeout)
	m.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

func (m *memory) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId == direct {
		out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	}
	return fuse.OK
}

// Read hands out the memory itself: it is copied once, by the kernel.
func (m *memory) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	size := uint64(len(m.data))
	begin := min(in.Offset, size)
	return fuse.ReadResultData(m.data[begin:min(begin+uint64(in.Size), size)]), fuse.OK
}

func (m *memory) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if in.Offset >= uint64(len(m.data)) {
		return 0, fuse.Status(syscall.ENOSPC)
	}
	return uint32(copy(m.data[in.Offset:], data)), fuse.OK
}

func (m *memory) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

func serve(mountpoint, bytes string, writeback bool) error {
	size, err := strconv.Atoi(bytes)
	if err != nil {
		return err
	}
	data, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory for %d bytes: %w", size, err)
	}
	fs := &memory{RawFileSystem: fuse.NewDefaultRawFileSystem(), data: data}
	capabilities := uint64(fuse.CAP_ASYNC_DIO)
	if writeback {
		capabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	server, err := fuse.NewServer(fs, mountpoint, &fuse.MountOptions{
		FsName: "bench-gofuse", Name: "bench", DirectMountStrict: true,
		MaxWrite: maxWrite, MaxBackground: maxBackground, CongestionThreshold: maxBackground,
		DisableSplice: true, DisableXAttrs: true,
		ExtraCapabilities: capabilities,
	})
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		for range signals {
			if err := server.Unmount(); err != nil {
				fmt.Fprintln(os.Stderr, "gofuse: unmount:", err)
			}
		}
	}()
	server.Serve()
	return nil
}

func main() {
	writeback := len(os.Args) == 4 && os.Args[3] == "writeback"
	if len(os.Args) != 3 && !writeback {
		fmt.Fprintln(os.Stderr, "usage: gofuse MOUNTPOINT BYTES [writeback]")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], writeback); err != nil {
		fmt.Fprintln(os.Stderr, "gofuse:", err)
		os.Exit(1)
	}
}
