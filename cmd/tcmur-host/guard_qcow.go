// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// guardsOfQcow is what devices of the handler get.
var guardsOfQcow = []string{
	"preflight: images that the handler would read wrongly or damage are refused, or served read-only where that is safe",
	"lock: nobody else writes the image meanwhile, by qemu's image locks",
	"refcounts: clusters that a dead process has linked and not counted are counted before the image is written",
	"whole clusters: images with backing files or zero clusters are written by the cluster (the handler loses the rest)",
	"lookups: the image is opened again before the handler's counters overflow, at which it crashes",
}

// qcowLookups is how many clusters may be looked up before a device is opened again; the handler's counters overflow at
// 2^31, and one lookup of ours may be two of the handler's. A variable, so that tests can be built with less.
var qcowLookups = "536870912"

// qcowCure is what helps with every image that can be read at all.
const qcowCure = "qemu-img convert -O qcow2 OLD NEW"

// measureQcow: the virtual size in an image's header, or the size of a raw file; the handler accepts no other. What is
// refused, and what is done to the image, is in guardsOfQcow.
func measureQcow(m measurement) (sizing, error) {
	img, err := openQcow(m.rest)
	if err != nil {
		return sizing{}, err
	}
	s := sizing{size: img.size}
	if err = img.checkSize(m.size); err == nil && !m.guardsOff {
		err = guardQcow(&s.guard, img, m.readOnly)
	}
	if err != nil || m.guardsOff {
		img.close()
	}
	if err != nil {
		s.guard.release()
		return sizing{}, err
	}
	return s, nil
}

// checkSize compares what the user wants (0: whatever it is) with what there is.
func (img *qcowImage) checkSize(wanted uint64) error {
	what := "a raw file"
	if img.version != 0 {
		what = "a qcow image"
	}
	switch {
	case wanted != 0 && wanted != img.size:
		return control.Failf(syscall.EINVAL, "%s is %s of %d bytes: size=%d cannot be had (leave size= out)",
			img.path, what, img.size, wanted)
	case img.size == 0:
		return control.Failf(syscall.EINVAL, "%s is %s of 0 bytes: make one with qemu-img create", img.path, what)
	}
	return nil
}

// guardQcow checks, locks and repairs an image and its backing files. On error g may hold some of the files.
func guardQcow(g *guard, img *qcowImage, readOnly bool) error {
	if err := lockImage(img.file, !readOnly); err != nil {
		return err
	}
	if img.version == 0 {
		g.hold = append(g.hold, img.file)
		g.inForce = guardsOfQcow[1:2]
		return nil
	}
	tables, err := img.preflight()
	if err != nil {
		return err
	}
	smallest := img.cluster()
	if img.backing != "" {
		if smallest, err = guardBacking(g, img); err != nil {
			return err
		}
	}
	if !readOnly {
		if err := img.prepareWrites(g, tables); err != nil {
			return err
		}
	}
	limit, err := strconv.ParseUint(qcowLookups, 10, 64)
	if err != nil {
		return fmt.Errorf("number of lookups: %w", err)
	}
	g.hold = append(g.hold, img.file)
	g.inForce = guardsOfQcow
	g.qcow = qcowCallouts{
		cluster: uint32(img.cluster()), whole: img.backing != "" || tables.zero != 0,
		smallest: uint32(smallest), lookups: limit,
	}
	return nil
}

// refuse is the error for an image that must not be opened as it is.
func (img *qcowImage) refuse(why, cure string) error {
	if cure == "" {
		cure = qcowCure
	}
	return refusal(syscall.EINVAL, "%s %s: run %s", img.path, why, cure)
}

// preflight refuses what the handler cannot read right.
func (img *qcowImage) preflight() (*qcowTables, error) {
	if why, cure := img.misread(); why != "" {
		return nil, img.refuse(why, cure)
	}
	tables, err := img.tables()
	if errors.Is(err, errQcowTables) {
		return nil, img.refuse(err.Error(), "")
	}
	return tables, err
}

// guardBacking checks and locks the backing files, and theirs. It returns the size of the smallest clusters.
func guardBacking(g *guard, top *qcowImage) (smallest uint64, err error) {
	smallest = top.cluster()
	for img := top; img.backing != ""; {
		if len(g.hold) > qcowMaxChain {
			return 0, control.Failf(syscall.ELOOP, "%s has more than %d backing files", top.path, qcowMaxChain)
		}
		path, err := img.backingPath()
		if err != nil {
			return 0, err
		}
		next, err := openQcow(path)
		if err != nil {
			return 0, fmt.Errorf("backing file of %s: %w", img.path, err)
		}
		g.hold = append(g.hold, next.file)
		switch {
		case next.version != 0 && img.backingIsRaw:
			return 0, next.refuse("is a raw backing file that begins like a qcow image, for which the handler takes it", "")
		case next.size != top.size:
			return 0, next.refuse(fmt.Sprintf("is a backing file of %d bytes, and the handler needs %d, the size of %s",
				next.size, top.size, top.path), "")
		}
		if err := lockImage(next.file, false); err != nil {
			return 0, err
		}
		if next.version == 0 {
			break
		}
		if _, err := next.preflight(); err != nil {
			return 0, err
		}
		smallest = min(smallest, next.cluster())
		img = next
	}
	return smallest, nil
}

// prepareWrites refuses what the handler would damage, and repairs what it can do without us to damage.
func (img *qcowImage) prepareWrites(g *guard, tables *qcowTables) error {
	const readable = " (or add it with ro: it can be read)"
	if why, cure := img.miswrite(); why != "" {
		if cure == "" {
			cure = qcowCure
		}
		return img.refuse(why, cure+readable)
	}
	if err := img.canAllocate(); err != nil || img.version == 1 {
		return err
	}
	done, err := img.repair(tables)
	if err != nil {
		if errors.Is(err, errQcowTables) || errors.Is(err, syscall.EINVAL) {
			return img.refuse(err.Error(), qcowCure+readable)
		}
		return err
	}
	if done != "" {
		g.notes = append(g.notes, img.path+": "+done)
	}
	if img.version < 3 || img.autoclear == 0 {
		return nil
	}
	// Whoever writes an image and does not know one of these features has to clear its flag; the handler does not.
	if _, err := img.file.WriteAt(make([]byte, 8), 88); err != nil {
		return control.Failf(errnoOf(err), "clear the features of %s that writing ends: %v", img.path, err)
	}
	if err := unix.Fdatasync(int(img.file.Fd())); err != nil {
		return control.Failf(errnoOf(err), "%s: %v", img.path, err)
	}
	g.notes = append(g.notes, fmt.Sprintf("%s: persistent bitmaps and the like are no longer valid, for the handler does "+
		"not keep them (autoclear features 0x%x)", img.path, img.autoclear))
	return nil
}

// canAllocate refuses images on file systems that cannot zero a range of a file, with which the handler begins each
// cluster.
func (img *qcowImage) canAllocate() error {
	dir := filepath.Dir(img.path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil //nolint:nilerr // then it cannot be found out, and the handler fails safely
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	if errors.Is(unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 0, 4096), syscall.EOPNOTSUPP) {
		return refusal(syscall.EOPNOTSUPP, "%s is on a file system that cannot zero ranges of files, such as tmpfs: the "+
			"handler cannot allocate there; move it to another one, or add it with ro", img.path)
	}
	return nil
}
