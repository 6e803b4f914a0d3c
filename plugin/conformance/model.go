// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// modelMax is how many bytes of a device are modelled: all of it, or as much from its start and its end together.
const modelMax = 64 << 20

// tailMax of these are at the end.
const tailMax = 1 << 20

// kind is what an operation is.
type kind uint8

const (
	opRead kind = iota
	opWrite
	opDiscard
	opZero
	opFlush
	opReopen
	opKill
)

func (k kind) String() string {
	return [...]string{"read", "write", "discard", "zero", "flush", "remove and add", "kill of the host"}[k]
}

// operation is one step of a history.
type operation struct {
	kind   kind
	length int32 // bytes
	offset int64
}

// isPlaced reports whether the operation concerns a place, and not the whole device.
func (o operation) isPlaced() bool { return o.kind < opFlush }

func (o operation) String() string {
	if !o.isPlaced() {
		return o.kind.String()
	}
	return fmt.Sprintf("%s of %d bytes at %d", o.kind, o.length, o.offset)
}

// touches reports whether the operation concerns any byte of [from, to), or all bytes.
func (o operation) touches(from, to int64) bool {
	return !o.isPlaced() || o.offset < to && o.offset+int64(o.length) > from
}

// span is a modelled part of a device.
type span struct {
	start int64
	bytes []byte
}

func (s span) end() int64 { return s.start + int64(len(s.bytes)) }

// model is what a device should hold, and how it came to hold it.
type model struct {
	seed    uint64
	spans   []span // one or two
	history []operation
}

// newModel reads what is on the device.
func newModel(b *bench) *model {
	b.Helper()
	m := &model{seed: b.Seed}
	if b.size <= modelMax {
		m.spans = []span{{0, make([]byte, b.size)}}
	} else {
		m.spans = []span{{0, make([]byte, modelMax-tailMax)}, {b.size - tailMax, make([]byte, tailMax)}}
	}
	for _, s := range m.spans {
		if n, err := b.dev.ReadAt(s.bytes, s.start); n != len(s.bytes) || err != nil {
			b.Fatalf("read of %d bytes at %d: %d, %v", len(s.bytes), s.start, n, err)
		}
	}
	return m
}

// at is the modelled bytes of an operation, which must lie in one span.
func (m *model) at(offset int64, length int) []byte {
	for _, s := range m.spans {
		if offset >= s.start && offset+int64(length) <= s.end() {
			return s.bytes[offset-s.start:][:length]
		}
	}
	panic("operation outside of the model")
}

// record notes an operation that is about to be done, and returns its number.
func (m *model) record(k kind, offset int64, length int) int {
	m.history = append(m.history, operation{kind: k, offset: offset, length: int32(length)})
	return len(m.history) - 1
}

// word is eight bytes of what an operation writes: different for each operation and each place, so that one look tells
// what has got where.
func word(seed uint64, op int, index uint64) uint64 {
	x := seed + uint64(op)*0x9e3779b97f4a7c15 + index*0xd1b54a32d192ed03
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// fill makes what operation op writes at offset.
func fill(p []byte, seed uint64, op int, offset int64) {
	index := uint64(offset) / 8
	if skip := int(offset % 8); skip != 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], word(seed, op, index))
		p = p[copy(p, w[skip:]):]
		index++
	}
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, word(seed, op, index))
		p = p[8:]
		index++
	}
	if len(p) > 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], word(seed, op, index))
		copy(p, w[:])
	}
}

// write does a write on the device and on the model.
func (m *model) write(d *plugin.Device, offset int64, length int) error {
	op := m.record(opWrite, offset, length)
	p := m.at(offset, length)
	fill(p, m.seed, op, offset)
	n, err := d.WriteAt(p, offset)
	if err == nil && n != length {
		err = fmt.Errorf("%d bytes were written", n)
	}
	return m.explain(op, err)
}

// read does a read and compares. buf holds length bytes at least.
func (m *model) read(d *plugin.Device, buf []byte, offset int64, length int) error {
	op := m.record(opRead, offset, length)
	n, err := d.ReadAt(buf[:length], offset)
	if err == nil && n != length {
		err = fmt.Errorf("%d bytes were read", n)
	}
	if err != nil {
		return m.explain(op, err)
	}
	want := m.at(offset, length)
	if bytes.Equal(buf[:length], want) {
		return nil
	}
	return m.mismatch(op, buf[:length], want)
}

// clear discards a range, or zeroes it; both leave zeroes.
func (m *model) clear(d *plugin.Device, k kind, offset int64, length int) error {
	op := m.record(k, offset, length)
	clear(m.at(offset, length))
	do := d.Discard
	if k == opZero {
		do = d.Zero
	}
	return m.explain(op, do(offset, int64(length)))
}

// flush flushes the device.
func (m *model) flush(d *plugin.Device) error {
	return m.explain(m.record(opFlush, 0, 0), d.Flush())
}

// readAll compares everything that is modelled.
func (m *model) readAll(d *plugin.Device) error {
	buf := make([]byte, 1<<20)
	for _, s := range m.spans {
		for at := s.start; at < s.end(); at += int64(len(buf)) {
			if err := m.read(d, buf, at, int(min(int64(len(buf)), s.end()-at))); err != nil {
				return err
			}
		}
	}
	return nil
}

// explain says which operation an error belongs to.
func (m *model) explain(op int, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("operation %d, %s: %w (seed %d)", op, m.history[op], err, m.seed)
}

// traceGrain is the size of the aligned piece of the device whose history is told, and traceMost how much of it.
const (
	traceGrain = 4096
	traceMost  = 16
)

// mismatch tells what is wrong with what operation op has read, and what happened before to the piece of the device
// with the first wrong byte: the operations that a reproduction needs.
func (m *model) mismatch(op int, got, want []byte) error {
	first, wrong := -1, 0
	for i := range want {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			wrong++
		}
	}
	at := m.history[op].offset + int64(first)
	var text strings.Builder
	fmt.Fprintf(&text, "operation %d, %s: %d bytes are wrong, the first one at %d: %#02x, want %#02x\n",
		op, m.history[op], wrong, at, got[first], want[first])
	fmt.Fprintf(&text, "  there should be %s\n", m.origin(op, at, want[first:]))
	fmt.Fprintf(&text, "  there is        %s\n", m.origin(op, at, got[first:]))
	from := at - at%traceGrain
	fmt.Fprintf(&text, "  the last operations on bytes %d to %d (seed %d):\n", from, from+traceGrain-1, m.seed)
	for _, i := range m.last(op, from, from+traceGrain) {
		fmt.Fprintf(&text, "    %7d  %s\n", i, m.history[i])
	}
	return fmt.Errorf("%s", strings.TrimSuffix(text.String(), "\n"))
}

// last is the numbers of the last operations up to op that concern [from, to). Of reads only the last one counts, and
// of several flushes in a row, or kills, one.
func (m *model) last(op int, from, to int64) []int {
	var found []int
	for i := op; i >= 0 && len(found) < traceMost; i-- {
		o := m.history[i]
		if !o.touches(from, to) || o.kind == opRead && i != op {
			continue
		}
		if len(found) > 0 && !o.isPlaced() && o.kind == m.history[found[len(found)-1]].kind {
			continue
		}
		found = append(found, i)
	}
	for i, j := 0, len(found)-1; i < j; i, j = i+1, j-1 {
		found[i], found[j] = found[j], found[i]
	}
	return found
}

// origin says where bytes that begin at a place come from: the operation before op that wrote them, there or elsewhere.
func (m *model) origin(op int, at int64, p []byte) string {
	p = p[:min(len(p), 16)]
	if len(bytes.Trim(p, "\x00")) == 0 {
		return "zeroes"
	}
	buf := make([]byte, len(p))
	for i := op; i >= 0; i-- {
		o := m.history[i]
		if o.kind != opWrite {
			continue
		}
		if o.offset <= at && at < o.offset+int64(o.length) {
			n := int(min(int64(len(p)), o.offset+int64(o.length)-at))
			if fill(buf[:n], m.seed, i, at); n > 3 && bytes.Equal(buf[:n], p[:n]) {
				return fmt.Sprintf("what operation %d wrote there", i)
			}
		}
		for _, shift := range []int64{-65536, -4096, -2048, -512, -1, 1, 512, 2048, 4096, 65536} {
			if from := at + shift; o.offset <= from && from+int64(len(p)) <= o.offset+int64(o.length) {
				if fill(buf, m.seed, i, from); bytes.Equal(buf, p) {
					return fmt.Sprintf("what operation %d wrote %d bytes from there, at %d", i, shift, from)
				}
			}
		}
	}
	return fmt.Sprintf("%x, which no operation wrote there", p)
}
