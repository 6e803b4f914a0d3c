// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/shared"
)

// The format of a record is that of the device mapper's target log-writes, so that its replay tools read it. All
// numbers are little-endian. Sector 0 describes the record, then each entry has a sector for itself, followed by the
// data of a write:
//
//	sector 0    magic, version, number of entries (8 bytes each), bytes per sector (4 bytes)
//	entry       first sector, number of sectors, flags, bytes of text in a mark (8 bytes each), text of a mark
const (
	recordMagic   = 0x6a736677736872
	recordVersion = 1
	recordSector  = 512
	// recordHeader is the size of an entry's numbers, behind which the text of a mark begins.
	recordHeader = 32
)

// Flags of an entry. None: a write.
const (
	recordFlush   = 1 << 0
	recordDiscard = 1 << 2 // reads back zeroes from then on; no data follow
	recordMark    = 1 << 3 // a text, which changes nothing
)

// recorder writes down what happens to a device's contents: completed writes, discards and zeroing in the order of
// their completion, and flushes. A flush stands where it began, so that everything before it in the record was complete
// when the handler was told to flush; until it has succeeded a mark stands there instead. A request that fails is not
// recorded, although part of it may have arrived.
//
// Its methods may be called on a nil recorder, which does nothing.
type recorder struct {
	log hclog.Logger

	mu      sync.Mutex // guards the fields below
	file    *os.File   // nil when closed, or broken
	entries uint64
	next    int64  // where in the file the next entry goes
	buf     []byte // for an entry with its data
}

// newRecorder makes a record of a device at an absolute path. EINVAL: the path is not absolute. EEXIST: there is
// something already; a record is never overwritten. Otherwise the errno of what failed.
func newRecorder(path string, log hclog.Logger) (*recorder, error) {
	if !filepath.IsAbs(path) {
		return nil, control.Failf(syscall.EINVAL, "record %q: the path must be absolute", path)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	r := &recorder{log: log.With("record", path), file: file, next: recordSector, buf: make([]byte, recordSector)}
	r.writeSuper()
	if r.file == nil {
		return nil, errors.Join(control.Failf(syscall.EIO, "record %s: cannot be written", path), os.Remove(path))
	}
	return r, nil
}

// begin comes before a request is sent, end follows it with what begin has returned.
func (r *recorder) begin(op shared.Op) (at int64) {
	if r == nil || op != shared.OpFlush {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.append(0, 0, recordMark, []byte("flush begun"), nil)
}

// end records a request of n bytes at off, if it has succeeded; p is the data of a write.
func (r *recorder) end(at int64, op shared.Op, p []byte, n int, off int64, err error) {
	if r == nil || err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sector, sectors := uint64(off/recordSector), uint64(n/recordSector)
	switch op {
	case shared.OpWrite:
		r.append(sector, sectors, 0, nil, p)
	case shared.OpUnmap, shared.OpZero:
		r.append(sector, sectors, recordDiscard, nil, nil)
	case shared.OpFlush:
		r.write(r.entry(0, 0, recordFlush, nil), at)
		r.writeSuper()
	case shared.OpRead:
	}
}

// close ends the record; flushed says that the device was flushed as it was closed.
func (r *recorder) close(flushed bool) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if flushed {
		r.append(0, 0, recordFlush, nil, nil)
	}
	r.writeSuper()
	if r.file != nil {
		if err := r.file.Close(); err != nil {
			r.log.Error("closing the record failed", "error", err)
		}
		r.file = nil
	}
}

// discard ends the record of a device that never was, and removes it.
func (r *recorder) discard(path string) {
	if r != nil {
		r.close(false)
		_ = os.Remove(path)
	}
}

// append adds an entry and returns where it is; mu is held.
func (r *recorder) append(sector, sectors, flags uint64, text, data []byte) (at int64) {
	r.buf = append(r.entry(sector, sectors, flags, text), data...)
	at = r.next
	r.write(r.buf, at)
	r.next += int64(len(r.buf))
	r.entries++
	return at
}

// entry makes an entry without data in the buffer; mu is held.
func (r *recorder) entry(sector, sectors, flags uint64, text []byte) []byte {
	e := r.buf[:recordSector]
	clear(e)
	binary.LittleEndian.PutUint64(e[0:], sector)
	binary.LittleEndian.PutUint64(e[8:], sectors)
	binary.LittleEndian.PutUint64(e[16:], flags)
	binary.LittleEndian.PutUint64(e[24:], uint64(len(text)))
	copy(e[recordHeader:], text)
	return e
}

// writeSuper brings sector 0 up to date; mu is held, or nobody else has the recorder.
func (r *recorder) writeSuper() {
	super := make([]byte, recordSector)
	binary.LittleEndian.PutUint64(super[0:], recordMagic)
	binary.LittleEndian.PutUint64(super[8:], recordVersion)
	binary.LittleEndian.PutUint64(super[16:], r.entries)
	binary.LittleEndian.PutUint32(super[24:], recordSector)
	r.write(super, 0)
}

// write writes to the file. A record with a hole in it would be worse than none: the first failure ends it.
func (r *recorder) write(p []byte, at int64) {
	if r.file == nil {
		return
	}
	if _, err := r.file.WriteAt(p, at); err != nil {
		r.log.Error("the record ends here: writing to it failed", "error", err)
		_ = r.file.Close()
		r.file = nil
	}
}
