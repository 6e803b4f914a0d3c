// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"os"
	"regexp"
	"strconv"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Sizes of devices, found out before their open: several handlers refuse every size but the right one, and one of them
// formats the file instead.

// errnoOf is the errno in err, EIO if there is none.
func errnoOf(err error) syscall.Errno {
	errno := syscall.EIO
	errors.As(err, &errno)
	return errno
}

// statFile stats what a device is to be made of.
func statFile(path string) (os.FileInfo, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, control.Failf(errnoOf(err), "%v", err)
	}
	return info, nil
}

// readHead returns the first n bytes of a file, fewer if it is shorter.
func readHead(path string, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, control.Failf(errnoOf(err), "%v", err)
	}
	defer f.Close()
	head := make([]byte, n)
	got, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, control.Failf(errnoOf(err), "%v", err)
	}
	return head[:got], nil
}

// measureFile: the size of a regular file. Of a block device, or where there is nothing yet, the handler knows best.
func measureFile(m measurement) (sizing, error) {
	if m.size != 0 {
		return sizing{size: m.size}, nil
	}
	if info, err := os.Stat(m.rest); err == nil && info.Mode().IsRegular() {
		return sizing{size: uint64(info.Size())}, nil
	}
	return sizing{}, nil
}

// rbdRefusal is what handler_rbd.so logs, in all versions, when it is told another size than that of the image.
var rbdRefusal = regexp.MustCompile(`RBD image size (\d+)\. Requested new size \d+`)

// rbdSizeInRefusal finds the image's size. Only the cluster knows it, and only the handler can talk to the cluster.
func rbdSizeInRefusal(logged string) (uint64, bool) {
	match := rbdRefusal.FindStringSubmatch(logged)
	if match == nil {
		return 0, false
	}
	size, err := strconv.ParseUint(match[1], 10, 64)
	return size, err == nil && size != 0
}
