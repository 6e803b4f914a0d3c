// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

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

// guardsOfZbc is what devices of the handler get.
var guardsOfZbc = []string{
	"format: the file is never formatted unless that is asked for (the handler does when its size differs by a block, " +
		"or when the configuration has options)",
	"zones: requests are cut at the ends of zones (reads beyond one overflow the handler's buffer, writes fail)",
}

// zbcFile is what is at the path of a device before its open.
type zbcFile struct {
	path   string
	empty  bool // or not there
	valid  bool // header is that of an emulated zoned device
	length uint64
	header zbcHeader
}

// inspectZbc looks at a path. Nothing being there is no error.
func inspectZbc(path string) (zbcFile, error) {
	f := zbcFile{path: path}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		f.empty = true
		return f, nil
	}
	if err != nil {
		return f, control.Failf(errnoOf(err), "%v", err)
	}
	f.length = uint64(info.Size())
	head, err := readHead(path, zbcHeaderSize)
	if err != nil {
		return f, err
	}
	f.header, f.valid = parseZbcHeader(head)
	return f, nil
}

// unfit is why the handler would format the file when it is told the size (0: that of the header); nil if it would not.
func (f zbcFile) unfit(size uint64) error {
	refuse := func(format string, args ...any) error {
		return refusal(syscall.EINVAL, "%s %s: the handler would format it, and what is in it would be lost; to have that, "+
			"say format", f.path, fmt.Sprintf(format, args...))
	}
	h := f.header
	switch {
	case !f.valid:
		return refuse("is not empty and not an emulated zoned device")
	case size != 0 && size != h.size:
		return refuse("is an emulated zoned device of %d bytes, not of size=%d (leave size= out)", h.size, size)
	case f.length != h.metadataEnd+h.size:
		return refuse("has %d bytes, but by its header it should have %d", f.length, h.metadataEnd+h.size)
	case h.conventional >= h.zones || h.openLimit > h.zones:
		return refuse("has a header that the handler does not accept (%d zones, %d of them conventional, %d open)",
			h.zones, h.conventional, h.openLimit)
	}
	return nil
}

// measureZbc: the size in the file's metadata. The handler formats a file that does not fit what it is told to the last
// block, whatever is in it, so that everything it checks is checked here first. Options in front of the path ("@") have
// it format the file on each open: they are for a file that is not there yet, or with format, and a reopen drops them.
func measureZbc(m measurement) (sizing, error) {
	path := m.rest
	options, after, hasOptions := strings.Cut(m.rest, "@")
	if hasOptions {
		path = after
	}
	file, err := inspectZbc(path)
	if err != nil {
		return sizing{}, err
	}
	// The file is written at once, its metadata are mapped; a zone would refuse what it has got already.
	s := sizing{size: m.size, writesSurvive: true}
	if m.guardsOff {
		if s.size == 0 && file.valid {
			s.size = file.header.size
		}
		if s.size == 0 {
			return s, control.Failf(syscall.EINVAL, "the size of %s is not known: say size=", path)
		}
		return s, nil
	}
	s.guard.inForce = guardsOfZbc
	s.boundary = func() (uint64, error) { return zbcZoneBytes(path) }
	switch {
	case m.reopen && hasOptions:
		absolute, err := filepath.Abs(path)
		if err != nil || strings.Contains(absolute, "@") {
			return sizing{}, control.Failf(syscall.EINVAL, "%s cannot be opened again without being formatted by its "+
				"options %q", path, options)
		}
		s.config = m.subtype + "/" + absolute
	case m.reopen:
	case file.empty || m.format:
		if m.size == 0 && m.format && file.valid {
			s.size = file.header.size
		}
		if s.size == 0 {
			return sizing{}, control.Failf(syscall.ENOENT, "%s has no size yet: say size= to have it made", path)
		}
		if !hasOptions && m.format {
			s.config = m.subtype + "/@" + path // formats whatever is there, with the handler's own defaults
		}
		return s, nil
	case hasOptions:
		return sizing{}, refusal(syscall.EEXIST, "%s exists, and options make the handler format it, which loses what is in "+
			"it: give the path alone (%s/%s) to use what is there, or say format", path, m.subtype, path)
	}
	if file.empty {
		return sizing{}, control.Failf(syscall.ENOENT, "%s is not there or empty", path)
	}
	if err := file.unfit(m.size); err != nil {
		return sizing{}, err
	}
	s.size = file.header.size
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
