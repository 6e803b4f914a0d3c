// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// qcowMagic begins both versions of the format.
const qcowMagic = "QFI\xfb"

// Incompatible features of version 3: whoever does not know one must not open the image.
const (
	qcowDirty = 1 << iota
	qcowCorrupt
	qcowDataFile
	qcowCompressionType
	qcowExtendedL2
)

// Entries of the tables.
const (
	qcowOffset     = 0x00fffffffffffe00 // bits of an entry that are the offset of a cluster
	qcowCompressed = 1 << 62
	qcowZero       = 1 // version 3: reads as zeroes
)

// Offsets in the header, and sizes of what is there.
const (
	qcowHeaderV1     = 48
	qcowHeaderV2     = 72
	qcowHeaderV3     = 104
	qcowMaxBacking   = 1023
	qcowFormatMarker = 0xe2792aca // header extension: format of the backing file
	qcowMaxTable     = 32 << 20   // bytes of the first-level table, as in qemu
	qcowMaxChain     = 200        // backing files
)

// qcowImage is an image, or a raw file in its place.
type qcowImage struct {
	file    *os.File
	path    string
	length  uint64 // bytes of the file
	version uint32 // 1 to 3; 0: raw
	size    uint64 // bytes of the device

	clusterBits                         uint32
	crypt                               uint32
	l1Offset                            uint64
	l1Size                              uint32 // entries; version 1: computed
	l2Bits                              uint32 // of version 1
	refTable                            uint64
	refTableClusters                    uint32
	refOrder                            uint32
	snapshots                           uint32
	incompatible, compatible, autoclear uint64
	headerLength                        uint32
	backing                             string // as the header has it
	backingIsRaw                        bool   // the header says that it has no format
}

// openQcow opens an image as the handler will, for reading and writing, and reads its header.
func openQcow(path string) (img *qcowImage, err error) {
	// Also to read: the handler takes an image that it cannot write for a raw file.
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, control.Failf(errnoOf(err), "%v (the handler needs to write images, even if only to read)", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, control.Failf(errnoOf(err), "%v", err)
	}
	img = &qcowImage{file: f, path: path, length: uint64(end), size: uint64(end)}
	head, err := img.readAt(0, qcowHeaderV3)
	if err != nil {
		return nil, err
	}
	if string(head[:4]) != qcowMagic || img.length < qcowHeaderV1 {
		return img, nil
	}
	be32 := func(at int) uint32 { return binary.BigEndian.Uint32(head[at:]) }
	be64 := func(at int) uint64 { return binary.BigEndian.Uint64(head[at:]) }
	img.version, img.size = be32(4), be64(24)
	backing, backingLength := be64(8), be32(16)
	switch {
	case img.version == 1:
		img.clusterBits, img.l2Bits = uint32(head[32]), uint32(head[33])
		img.crypt, img.l1Offset = be32(36), be64(40)
		img.headerLength = qcowHeaderV1
	default:
		img.clusterBits, img.crypt = be32(20), be32(32)
		img.l1Size, img.l1Offset = be32(36), be64(40)
		img.refTable, img.refTableClusters, img.snapshots = be64(48), be32(56), be32(60)
		img.refOrder, img.headerLength = 4, qcowHeaderV2
	}
	if img.version >= 3 {
		img.incompatible, img.compatible, img.autoclear = be64(72), be64(80), be64(88)
		img.refOrder, img.headerLength = be32(96), be32(100)
	}
	if backing != 0 && backingLength != 0 {
		if backingLength > qcowMaxBacking {
			return nil, control.Failf(syscall.EINVAL, "%s: the name of its backing file has %d bytes", path, backingLength)
		}
		name, err := img.readAt(backing, uint64(backingLength))
		if err != nil {
			return nil, err
		}
		img.backing = string(name)
		if img.version > 1 {
			if img.backingIsRaw, err = img.saysRaw(backing); err != nil {
				return nil, err
			}
		}
	}
	return img, nil
}

// saysRaw looks for the format of the backing file among the header's extensions, which end at end at the latest.
func (img *qcowImage) saysRaw(end uint64) (bool, error) {
	for at := uint64(img.headerLength); at+8 <= end && at < 1<<16; {
		ext, err := img.readAt(at, 16)
		if err != nil {
			return false, err
		}
		kind, n := binary.BigEndian.Uint32(ext), binary.BigEndian.Uint32(ext[4:])
		switch kind {
		case 0:
			return false, nil
		case qcowFormatMarker:
			return n == 3 && string(ext[8:11]) == "raw", nil
		}
		at += 8 + (uint64(n)+7)/8*8
	}
	return false, nil
}

func (img *qcowImage) cluster() uint64 { return 1 << img.clusterBits }

// readAt reads n bytes; beyond the end of the file there are zeroes.
func (img *qcowImage) readAt(at, n uint64) ([]byte, error) {
	data := make([]byte, n)
	if at >= 1<<62 {
		return data, nil
	}
	if _, err := img.file.ReadAt(data, int64(at)); err != nil && !errors.Is(err, io.EOF) {
		return nil, control.Failf(errnoOf(err), "%v", err)
	}
	return data, nil
}

// close gives up the file, and its locks.
func (img *qcowImage) close() { _ = img.file.Close() } // nothing is buffered

// l2Entries is how many entries a second-level table has.
func (img *qcowImage) l2Entries() uint64 {
	if img.version == 1 {
		return 1 << img.l2Bits
	}
	return img.cluster() / 8
}

// wantedL1 is how many entries the first-level table has to have.
func (img *qcowImage) wantedL1() uint64 {
	covered := img.cluster() * img.l2Entries()
	return img.size/covered + min(1, img.size%covered)
}

// misread is why the handler does not read the image right, whoever made it; "" if nothing in the header says so. cure
// is what to do, "" for what always helps.
func (img *qcowImage) misread() (why, cure string) {
	incompatible := img.incompatible
	const known = qcowDirty | qcowCorrupt | qcowDataFile | qcowCompressionType | qcowExtendedL2
	switch {
	case img.version == 0:
		return "", ""
	case img.version > 3:
		return fmt.Sprintf("is qcow version %d; the handler knows 1 to 3", img.version), ""
	case img.clusterBits < 9 || img.clusterBits > 16:
		return fmt.Sprintf("has clusters of %d bytes (cluster_bits %d); the handler knows 512 to 65536",
			uint64(1)<<min(img.clusterBits, 63), img.clusterBits), "qemu-img convert -O qcow2 -o cluster_size=64k OLD NEW"
	case img.crypt != 0:
		return "is encrypted, which the handler cannot do", ""
	case incompatible&qcowDataFile != 0:
		return "keeps its data in another file (data_file), which the handler would ignore", ""
	case incompatible&qcowExtendedL2 != 0:
		return "has extended L2 entries, which the handler takes for ordinary ones", ""
	case incompatible&qcowCompressionType != 0:
		return "is compressed with another method than zlib, which the handler does not know", ""
	case incompatible&^known != 0:
		return fmt.Sprintf("needs features that the handler does not know (incompatible features 0x%x)", incompatible), ""
	case img.version == 1 && (img.l2Bits < 6 || img.l2Bits > 13):
		return fmt.Sprintf("has L2 tables of 2^%d entries", img.l2Bits), ""
	case img.wantedL1()*8 > qcowMaxTable:
		return fmt.Sprintf("would have an L1 table of %d bytes", img.wantedL1()*8), ""
	case img.version > 1 && uint64(img.l1Size) != img.wantedL1():
		return fmt.Sprintf("has an L1 table of %d entries and needs %d: it was shrunk, and the handler refuses that",
			img.l1Size, img.wantedL1()), ""
	}
	return "", ""
}

// miswrite is why the handler would damage the image when it writes; "" if nothing in the header says so.
func (img *qcowImage) miswrite() (why, cure string) {
	const check = "qemu-img check -r all IMAGE"
	switch {
	case img.version <= 1:
		return "", ""
	case img.snapshots != 0:
		return fmt.Sprintf("has %d internal snapshots, which writes would change too", img.snapshots),
			"qemu-img snapshot -d NAME IMAGE for each, or qemu-img convert -O qcow2 OLD NEW"
	case img.refOrder > 5:
		return fmt.Sprintf("has refcounts of %d bits, at which the handler aborts", uint64(1)<<min(img.refOrder, 63)), ""
	case img.incompatible&qcowCorrupt != 0:
		return "is marked as corrupt", check
	case img.incompatible&qcowDirty != 0:
		return "was not closed properly, so that its refcounts may be wrong", check
	}
	return "", ""
}

// backingPath is the path of the backing file, which is relative to the image's own.
func (img *qcowImage) backingPath() (string, error) {
	name := strings.TrimPrefix(img.backing, "file:")
	if strings.HasPrefix(name, "json:") || strings.ContainsRune(name, 0) {
		return "", control.Failf(syscall.EINVAL, "%s has the backing file %q, which is not a path", img.path, name)
	}
	if filepath.IsAbs(name) {
		return name, nil
	}
	resolved, err := filepath.EvalSymlinks(img.path) // the handler goes by /proc/self/fd
	if err != nil {
		return "", control.Failf(errnoOf(err), "%v", err)
	}
	return filepath.Join(filepath.Dir(resolved), name), nil
}

// tables is what the mapping tables of an image consist of.
type qcowTables struct {
	used        bitmap // clusters of the file that something in the image refers to
	twice       uint64 // one of those with two references; 0: there is none
	unallocated uint64 // clusters of the device that have none in the file
	missingL2   uint64 // second-level tables that are not there
	zero        uint64 // clusters that read as zeroes, without data
	end         uint64 // of what is referred to, bytes
}

// bitmap is a set of small numbers.
type bitmap []uint64

func (b bitmap) has(i uint64) bool { return b[i/64]>>(i%64)&1 != 0 }

// use notes a reference to n clusters of the file.
func (t *qcowTables) use(img *qcowImage, offset, n uint64) {
	first := offset >> img.clusterBits
	t.end = max(t.end, (first+n)<<img.clusterBits)
	for i := first; i < first+n; i++ {
		for i/64 >= uint64(len(t.used)) {
			t.used = append(t.used, make(bitmap, max(64, len(t.used)))...)
		}
		if t.used.has(i) && t.twice == 0 {
			t.twice = i << img.clusterBits
		}
		t.used[i/64] |= 1 << (i % 64)
	}
}

// errQcowTables is wrapped by what says that the handler cannot read an image right because of its tables.
var errQcowTables = errors.New("tables")

func tableError(format string, args ...any) error {
	return fmt.Errorf("%w%s", errQcowTables, fmt.Sprintf(format, args...))
}

// tables walks the mapping tables. errQcowTables: there is something in them that the handler reads wrongly.
func (img *qcowImage) tables() (*qcowTables, error) {
	t := &qcowTables{}
	if img.version == 1 {
		return t, nil // it keeps no refcounts, and qemu makes neither kind of cluster that harms
	}
	inside := func(offset uint64) bool { return offset%img.cluster() == 0 && offset < img.length }
	l1 := uint64(img.l1Size) * 8
	if img.l1Offset%img.cluster() != 0 || img.l1Offset+l1 > img.length && l1 != 0 {
		return nil, tableError("has its L1 table at %d, outside of the file of %d bytes", img.l1Offset, img.length)
	}
	table, err := img.readAt(img.l1Offset, l1)
	if err != nil {
		return nil, err
	}
	t.use(img, 0, 1)
	t.use(img, img.l1Offset, (l1+img.cluster()-1)>>img.clusterBits)
	guest := (img.size + img.cluster() - 1) >> img.clusterBits // clusters of the device that no L2 was seen for yet
	for i := range uint64(img.l1Size) {
		n := min(guest, img.l2Entries())
		guest -= n
		offset := binary.BigEndian.Uint64(table[8*i:]) & qcowOffset
		if offset == 0 {
			t.missingL2++
			t.unallocated += n
			continue
		}
		if !inside(offset) {
			return nil, tableError("has an L2 table at %d, outside of the file of %d bytes", offset, img.length)
		}
		t.use(img, offset, 1)
		l2, err := img.readAt(offset, img.cluster())
		if err != nil {
			return nil, err
		}
		for k := range img.l2Entries() {
			if err := t.useEntry(img, binary.BigEndian.Uint64(l2[8*k:]), k < n); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}

// useEntry notes what an entry of a second-level table refers to; visible: it is for a cluster of the device.
func (t *qcowTables) useEntry(img *qcowImage, entry uint64, visible bool) error {
	offset, zero := entry&qcowOffset, img.version >= 3 && entry&qcowZero != 0
	switch {
	case entry&qcowCompressed != 0:
		return tableError("has compressed clusters, which the handler cannot read")
	case zero && offset != 0:
		return tableError("has zeroed clusters with space of their own, which the handler reads and writes wrongly")
	case offset%img.cluster() != 0:
		return tableError("has a cluster at %d, which is no multiple of %d", offset, img.cluster())
	case offset >= img.length:
		return tableError("has a cluster at %d, beyond the end of the file of %d bytes", offset, img.length)
	case offset != 0:
		t.use(img, offset, 1)
		return nil
	case zero:
		t.zero++
	}
	if visible {
		t.unallocated++
	}
	return nil
}
