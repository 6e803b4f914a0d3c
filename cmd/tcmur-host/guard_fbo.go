// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// fboBlock is the block size of optical media, bytes.
const fboBlock = 2048

// fboPath is the path in "option/option//path".
func fboPath(rest string) (string, bool) {
	for {
		i := strings.IndexByte(rest, '/')
		if i < 0 {
			return "", false
		}
		if i == 0 {
			return rest, true
		}
		rest = rest[i+1:]
	}
}

// guardsOfFbo is what devices of the handler get.
var guardsOfFbo = []string{
	"size: the file is there, and as long as the device (the handler makes an empty one, and reads for ever at its end)",
	"read errors: a read that the handler logs as failed, and reports as done, fails",
}

// measureFbo: the size of the file, which has to be there, and to be as long as the device.
func measureFbo(m measurement) (sizing, error) {
	if m.guardsOff && m.size != 0 {
		return sizing{size: m.size}, nil
	}
	path, ok := fboPath(m.rest)
	if !ok {
		return sizing{}, control.Failf(syscall.EINVAL, "%s/%s: give an absolute path, as in fbo//var/tmp/image.iso",
			m.subtype, m.rest)
	}
	info, err := statFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return sizing{}, control.Failf(syscall.ENOENT, "%v: make the file first, as with truncate -s 700M %s", err, path)
	}
	if err != nil {
		return sizing{}, err
	}
	if !info.Mode().IsRegular() {
		return sizing{}, control.Failf(syscall.EINVAL, "%s is not a regular file", path)
	}
	size := uint64(info.Size())
	if m.size > size {
		return sizing{}, refusal(syscall.EINVAL, "%s has %d bytes, fewer than size=%d: make it longer, as with "+
			"truncate -s %d", path, size, m.size, m.size)
	}
	if m.size != 0 {
		size = m.size
	}
	if size < fboBlock {
		return sizing{}, control.Failf(syscall.EINVAL, "%s is shorter than one block of %d bytes", path, fboBlock)
	}
	s := sizing{size: size - size%fboBlock}
	if !m.guardsOff {
		s.guard = guard{inForce: guardsOfFbo, readErrorsLogged: true}
	}
	return s, nil
}
