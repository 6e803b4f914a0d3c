// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
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

// qcowMagic begins both versions of the format.
const qcowMagic = "QFI\xfb"

// measureQcow: the virtual size in an image's header, or the size of a raw file. The handler accepts no other.
func measureQcow(m measurement) (sizing, error) {
	info, err := statFile(m.rest)
	if err != nil {
		return sizing{}, err
	}
	head, err := readHead(m.rest, 32)
	if err != nil {
		return sizing{}, err
	}
	size, what := uint64(info.Size()), "a raw file"
	if len(head) == 32 && string(head[:4]) == qcowMagic {
		size, what = binary.BigEndian.Uint64(head[24:]), "a qcow image"
	}
	if m.size != 0 && m.size != size {
		return sizing{}, control.Failf(syscall.EINVAL, "%s is %s of %d bytes: size=%d cannot be had (leave size= out)",
			m.rest, what, size, m.size)
	}
	if size == 0 {
		return sizing{}, control.Failf(syscall.EINVAL, "%s is %s of 0 bytes: make one with qemu-img create", m.rest, what)
	}
	return sizing{size: size}, nil
}

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

// measureFbo: the size of the file, which has to be there, and to be as long as the device: the handler would create an
// empty one, and then read for ever at its end.
func measureFbo(m measurement) (sizing, error) {
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
		return sizing{}, control.Failf(syscall.EINVAL, "%s has %d bytes, fewer than size=%d", path, size, m.size)
	}
	if m.size != 0 {
		size = m.size
	}
	if size < fboBlock {
		return sizing{}, control.Failf(syscall.EINVAL, "%s is shorter than one block of %d bytes", path, fboBlock)
	}
	return sizing{size: size - size%fboBlock}, nil
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

// zbcMagic begins the metadata of an emulated zoned device: "CBZU".
const zbcMagic = 0x555A4243

// Bytes of the metadata's header, and of one zone's entry in it; data follow at the next multiple of the page size.
const (
	zbcHeaderSize = 48
	zbcZoneSize   = 64
	zbcPage       = 4096
)

// zbcHeader is the part of the metadata that decides whether the handler takes the file as it is.
type zbcHeader struct {
	capacity          uint64 // logical blocks
	blockSize         uint32 // bytes
	zoneSize          uint32 // logical blocks
	zones             uint32
	conventional      uint32
	openLimit         uint32
	size, metadataEnd uint64 // bytes
}

func parseZbcHeader(head []byte) (zbcHeader, bool) {
	if len(head) < zbcHeaderSize || binary.NativeEndian.Uint32(head) != zbcMagic {
		return zbcHeader{}, false
	}
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(head[at:]) }
	h := zbcHeader{
		capacity: binary.NativeEndian.Uint64(head[8:]), blockSize: u32(16), zoneSize: u32(20), zones: u32(24),
		conventional: u32(28), openLimit: u32(32),
	}
	if h.blockSize != 512 && h.blockSize != 4096 || h.capacity == 0 || h.zoneSize == 0 || h.zones == 0 {
		return zbcHeader{}, false
	}
	if h.capacity > 1<<62/uint64(h.blockSize) {
		return zbcHeader{}, false
	}
	h.size = h.capacity * uint64(h.blockSize)
	h.metadataEnd = zbcHeaderSize + uint64(h.zones)*zbcZoneSize
	h.metadataEnd = (h.metadataEnd + zbcPage - 1) / zbcPage * zbcPage
	return h, true
}

// measureZbc: the size in the file's metadata. The handler formats a file that does not fit what it is told to the last
// block, whatever is in it, so that everything it checks is checked here first. Options in front of the path ("@") ask
// for that, but once only: a reopen must find the data.
func measureZbc(m measurement) (sizing, error) {
	path := m.rest
	options, after, format := strings.Cut(m.rest, "@")
	if format {
		path = after
	}
	s := sizing{size: m.size, boundary: func() (uint64, error) { return zbcZoneBytes(path) }}
	if format && !m.reopen {
		if m.size == 0 {
			return sizing{}, control.Failf(syscall.EINVAL, "%s/%s formats %s anew: say size= as well, or give the path alone "+
				"to use what is there", m.subtype, m.rest, path)
		}
		return s, nil
	}
	if format {
		absolute, err := filepath.Abs(path)
		if err != nil || strings.Contains(absolute, "@") {
			return sizing{}, control.Failf(syscall.EINVAL, "%s cannot be opened again without being formatted by its "+
				"options %q", path, options)
		}
		path, s.config = absolute, m.subtype+"/"+absolute
	}

	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		if m.size == 0 || m.reopen {
			return sizing{}, control.Failf(syscall.ENOENT, "%s is not there or empty: say size= to have it made", path)
		}
		return s, nil
	}
	if err != nil {
		return sizing{}, control.Failf(errnoOf(err), "%v", err)
	}
	refuse := func(format string, args ...any) (sizing, error) {
		return sizing{}, control.Failf(syscall.EINVAL, "%s %s: the handler would format it, and what is in it would be lost",
			path, fmt.Sprintf(format, args...))
	}
	head, err := readHead(path, zbcHeaderSize)
	if err != nil {
		return sizing{}, err
	}
	h, ok := parseZbcHeader(head)
	switch {
	case !ok:
		return refuse("is not empty and not an emulated zoned device")
	case m.size != 0 && m.size != h.size:
		return refuse("is an emulated zoned device of %d bytes, not of size=%d (leave size= out)", h.size, m.size)
	case uint64(info.Size()) != h.metadataEnd+h.size:
		return refuse("has %d bytes, but by its header it should have %d", info.Size(), h.metadataEnd+h.size)
	case h.conventional >= h.zones || h.openLimit > h.zones:
		return refuse("has a header that the handler does not accept (%d zones, %d of them conventional, %d open)",
			h.zones, h.conventional, h.openLimit)
	}
	s.size = h.size
	return s, nil
}

// zbcZoneBytes is the length of a zone: reads and writes that cross the end of one corrupt memory or fail.
func zbcZoneBytes(path string) (uint64, error) {
	head, err := readHead(path, zbcHeaderSize)
	if err != nil {
		return 0, err
	}
	h, ok := parseZbcHeader(head)
	if !ok {
		return 0, control.Failf(syscall.EINVAL, "%s has no metadata of zones, although the handler opened it", path)
	}
	return uint64(h.zoneSize) * uint64(h.blockSize), nil
}
