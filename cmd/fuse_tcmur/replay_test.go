// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"

	"golang.org/x/sys/unix"
)

// replay is what "add record=FILE" has written. It is read here by the description of dm-log-writes, and not with the
// recorder's code.
type replay struct {
	file    *os.File
	entries []replayEntry
}

type replayEntry struct {
	at      int64 // in the record
	off, n  int64 // bytes on the device
	flush   bool
	discard bool
	mark    string
}

// openRecord reads the entries of a record that is complete.
func openRecord(path string) (*replay, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &replay{file: file}
	if err := r.parse(); err != nil {
		file.Close()
		return nil, fmt.Errorf("record %s: %w", path, err)
	}
	return r, nil
}

func (r *replay) parse() error {
	const sector = 512
	number := func(p []byte, i int) uint64 { return binary.LittleEndian.Uint64(p[8*i:]) }
	buf := make([]byte, sector)
	if _, err := r.file.ReadAt(buf, 0); err != nil {
		return err
	}
	if number(buf, 0) != 0x6a736677736872 || number(buf, 1) != 1 || binary.LittleEndian.Uint32(buf[24:]) != sector {
		return fmt.Errorf("bad super block % x", buf[:28])
	}
	count, at := number(buf, 2), int64(sector)
	for range count {
		if _, err := r.file.ReadAt(buf, at); err != nil {
			return fmt.Errorf("entry at %d: %w", at, err)
		}
		e := replayEntry{at: at, off: int64(number(buf, 0)) * sector, n: int64(number(buf, 1)) * sector}
		flags, text := number(buf, 2), number(buf, 3)
		at += sector
		switch flags {
		case 0:
			at += e.n
		case 1:
			e.flush = true
		case 4:
			e.discard = true
		case 8:
			e.mark = string(buf[32 : 32+text])
		default:
			return fmt.Errorf("entry at %d: flags %#x", e.at, flags)
		}
		if flags == 0 && e.n == 0 || flags != 8 && text != 0 {
			return fmt.Errorf("entry at %d makes no sense: % x", e.at, buf[:32])
		}
		r.entries = append(r.entries, e)
	}
	if info, err := r.file.Stat(); err != nil || info.Size() != at {
		return fmt.Errorf("%d entries end at %d, the file does not (%w)", count, at, err)
	}
	return nil
}

// truncate forgets the entries that begin at or behind a place in the record.
func (r *replay) truncate(end int64) {
	for i, e := range r.entries {
		if e.at >= end {
			r.entries = r.entries[:i]
			return
		}
	}
}

// flushes are the indexes of all flushes that begin at or behind a place in the record.
func (r *replay) flushes(from int64) []int {
	var found []int
	for i, e := range r.entries {
		if e.flush && e.at >= from {
			found = append(found, i)
		}
	}
	return found
}

// apply does what entries[from:to] did to a device to an image of it. With a generator, it leaves out every other one
// at random, as a device may that has lost its power before a flush.
func (r *replay) apply(image *os.File, from, to int, some *rand.Rand) error {
	for _, e := range r.entries[from:to] {
		if e.flush || e.mark != "" || some != nil && some.IntN(2) == 0 {
			continue
		}
		var from io.Reader = zeroes{}
		if !e.discard {
			from = io.NewSectionReader(r.file, e.at+512, e.n)
		}
		if err := copySparse(image, from, e.off, e.n); err != nil {
			return err
		}
	}
	return nil
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// copySparse copies n bytes to an offset. Pieces of zeroes become holes.
func copySparse(image *os.File, from io.Reader, off, n int64) error {
	buf := make([]byte, min(n, 64<<10))
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if _, err := io.ReadFull(from, p); err != nil {
			return err
		}
		var err error
		if allZero(p) {
			err = unix.Fallocate(int(image.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(p)))
		} else {
			_, err = image.WriteAt(p, off)
		}
		if err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
