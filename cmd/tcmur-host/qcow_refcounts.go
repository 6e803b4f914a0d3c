// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// The refcounts of an image say which clusters of its file are in use. The handler links a new cluster first and counts
// it afterwards: when its process dies in between, the image has a cluster that is in use and counts as free, and the
// next process gives it out once more, to another part of the device. So before a device is opened to be written, what
// is linked is compared with what is counted, and what is missing is counted. The reverse, clusters that are counted
// and not linked, costs space only; qemu-img check -r leaks gives it back.

// qcowRefcounts are the refcounts of an image in memory, as far as they have been looked at.
type qcowRefcounts struct {
	img     *qcowImage
	table   []uint64          // offsets of the blocks; 0: a block that is not there
	blocks  map[uint64][]byte // by their index in table
	changed map[uint64]bool   // blocks to be written
	linked  bool              // table is to be written
}

func (img *qcowImage) refcounts() (*qcowRefcounts, error) {
	size := uint64(img.refTableClusters) << img.clusterBits
	switch {
	case img.refTable == 0 || img.refTable%img.cluster() != 0 || size == 0:
		return nil, tableError("has no proper refcount table (%d bytes at %d)", size, img.refTable)
	case size > qcowMaxTable || img.refTable+size > img.length:
		return nil, tableError("has its refcount table at %d, outside of the file of %d bytes", img.refTable, img.length)
	}
	raw, err := img.readAt(img.refTable, size)
	if err != nil {
		return nil, err
	}
	r := &qcowRefcounts{img: img, blocks: map[uint64][]byte{}, changed: map[uint64]bool{}}
	for i := 0; i < len(raw); i += 8 {
		offset := binary.BigEndian.Uint64(raw[i:]) &^ 0x1ff
		if offset%img.cluster() != 0 || offset >= img.length && offset != 0 {
			return nil, tableError("has a refcount block at %d, outside of the file of %d bytes", offset, img.length)
		}
		r.table = append(r.table, offset)
	}
	return r, nil
}

// perBlock is how many clusters a block counts.
func (r *qcowRefcounts) perBlock() uint64 { return r.img.cluster() * 8 >> r.img.refOrder }

// covered is how many clusters the table has room for.
func (r *qcowRefcounts) covered() uint64 { return uint64(len(r.table)) * r.perBlock() }

// use notes the table's own clusters, and those of its blocks.
func (r *qcowRefcounts) use(t *qcowTables) {
	t.use(r.img, r.img.refTable, uint64(r.img.refTableClusters))
	for _, offset := range r.table {
		if offset != 0 {
			t.use(r.img, offset, 1)
		}
	}
}

// block reads a block that is there.
func (r *qcowRefcounts) block(index uint64) ([]byte, error) {
	if block := r.blocks[index]; block != nil {
		return block, nil
	}
	// Blocks are looked at in order: one that needs no change does not have to be kept.
	for old := range r.blocks {
		if !r.changed[old] {
			delete(r.blocks, old)
		}
	}
	block, err := r.img.readAt(r.table[index], r.img.cluster())
	if err != nil {
		return nil, err
	}
	r.blocks[index] = block
	return block, nil
}

// isFree reports whether entry i of a block is 0; free makes it 1 then.
func (r *qcowRefcounts) isFree(block []byte, i uint64) bool {
	width := uint64(1) << r.img.refOrder
	if width < 8 {
		return block[i*width/8]>>(i*width%8)&(1<<width-1) == 0
	}
	return !slices.ContainsFunc(block[i*width/8:(i+1)*width/8], func(b byte) bool { return b != 0 })
}

func (r *qcowRefcounts) setOne(block []byte, i uint64) {
	width := uint64(1) << r.img.refOrder
	if width < 8 {
		block[i*width/8] |= 1 << (i * width % 8)
		return
	}
	block[(i+1)*width/8-1] = 1 // big-endian
}

// complete counts what t says is in use and is not counted, in memory. It returns how many clusters that were.
func (r *qcowRefcounts) complete(t *qcowTables) (counted uint64, err error) {
	per := r.perBlock()
	// A block that has to be made needs a cluster itself, at the end of the file, which in turn may need one.
	for again := true; again; {
		again = false
		for i := range r.table {
			first := uint64(i) * per
			if r.table[i] != 0 || !t.anyUsed(first, per) {
				continue
			}
			end := max(t.end, r.img.length)
			offset := (end + r.img.cluster() - 1) / r.img.cluster() * r.img.cluster()
			r.table[i], r.linked, r.changed[uint64(i)] = offset, true, true
			r.blocks[uint64(i)] = make([]byte, r.img.cluster())
			t.use(r.img, offset, 1)
			again = true
		}
	}
	if used := uint64(len(t.used)) * 64; used > r.covered() && t.anyUsed(r.covered(), used-r.covered()) {
		return 0, tableError("has clusters that its refcount table has no room for")
	}
	for i := range r.table {
		first := uint64(i) * per
		if r.table[i] == 0 || !t.anyUsed(first, per) {
			continue
		}
		block, err := r.block(uint64(i))
		if err != nil {
			return 0, err
		}
		for k := uint64(0); k < per && (first+k)/64 < uint64(len(t.used)); k++ {
			if t.used.has(first+k) && r.isFree(block, k) {
				r.setOne(block, k)
				r.changed[uint64(i)] = true
				counted++
			}
		}
	}
	return counted, nil
}

// anyUsed reports whether one of n clusters from first on is in use.
func (t *qcowTables) anyUsed(first, n uint64) bool {
	last := min(first+n, uint64(len(t.used))*64)
	for i := first; i < last; {
		if i%64 == 0 && t.used[i/64] == 0 {
			i += 64
			continue
		}
		if t.used.has(i) {
			return true
		}
		i++
	}
	return false
}

// write writes what has been changed: first the blocks, then the table that may link new ones.
func (r *qcowRefcounts) write() error {
	if len(r.changed) == 0 {
		return nil
	}
	write := func(data []byte, at uint64) error {
		if _, err := r.img.file.WriteAt(data, int64(at)); err != nil {
			return control.Failf(errnoOf(err), "repair the refcounts of %s: %v", r.img.path, err)
		}
		return nil
	}
	sync := func() error {
		if err := unix.Fdatasync(int(r.img.file.Fd())); err != nil {
			return control.Failf(errnoOf(err), "repair the refcounts of %s: %v", r.img.path, err)
		}
		return nil
	}
	for index := range r.changed {
		if err := write(r.blocks[index], r.table[index]); err != nil {
			return err
		}
	}
	if err := sync(); err != nil || !r.linked {
		return err
	}
	raw := make([]byte, 0, 8*len(r.table))
	for _, offset := range r.table {
		raw = binary.BigEndian.AppendUint64(raw, offset)
	}
	if err := write(raw, r.img.refTable); err != nil {
		return err
	}
	return sync()
}

// repair makes an image fit to be written: clusters that are in use and not counted are counted. It returns what was
// done, for people. EINVAL: its tables contradict each other, or have no room for what the device may still need.
func (img *qcowImage) repair(t *qcowTables) (done string, err error) {
	r, err := img.refcounts()
	if err != nil {
		return "", err
	}
	r.use(t)
	if t.twice != 0 {
		return "", tableError("uses the cluster at %d for two things at once: a part of the device shows what was written "+
			"to another one", t.twice)
	}
	// What the file may grow to: a cluster for each that is missing, tables for them, and their refcounts.
	most := max((img.length+img.cluster()-1)>>img.clusterBits, t.end>>img.clusterBits)
	most += t.unallocated + t.missingL2
	most += most/r.perBlock() + 2
	if most > r.covered() {
		return "", control.Failf(syscall.EINVAL, "has room for the refcounts of %d clusters and may grow to %d, at which "+
			"the handler writes beyond its table", r.covered(), most)
	}
	counted, err := r.complete(t)
	if err != nil {
		return "", err
	}
	if err := r.write(); err != nil {
		return "", err
	}
	if counted == 0 {
		return "", nil
	}
	return fmt.Sprintf("%d clusters were in use and counted as free, as when the handler's process dies while it "+
		"allocates: counted", counted), nil
}
