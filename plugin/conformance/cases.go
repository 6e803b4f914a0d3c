// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
)

// testBoundary looks at both ends of the device, and beyond.
func testBoundary(b *bench) {
	d, size, block := b.dev, b.dev.Size(), int64(b.dev.BlockSize())
	if size%block != 0 {
		b.Logf("the device's size, %d bytes, is not a multiple of its block size, %d", size, block)
	}
	p := make([]byte, 4*block)
	if b.size == size { // the end may be written to
		m := newModel(b)
		for _, n := range []int64{block, 3 * block, 1} {
			b.must(m.write(d, size-n, int(n)))
			b.must(m.write(d, 0, int(n)))
		}
		b.must(m.readAll(d))
		if n, err := d.WriteAt(m.at(size-block, int(block)), size-block); n != int(block) || err != nil {
			b.Errorf("write of the last block: %d, %v", n, err)
		}
		across := append(bytes.Clone(m.at(size-block, int(block))), p[:block]...)
		if n, err := d.WriteAt(across, size-block); n != int(block) || err != nil {
			b.Errorf("write across the end: %d, %v; want %d and no error", n, err, block)
		}
		b.must(m.readAll(d))
	}
	for _, tt := range []struct {
		offset, length, want int64
	}{
		{size - block, 2 * block, block}, {size - 1, block, 1}, {size, block, 0}, {size + block, block, 0},
		{1 << 62, block, 0}, {0, 0, 0}, {size, 0, 0}, {size - block, block, block},
	} {
		if n, err := d.ReadAt(p[:tt.length], tt.offset); int64(n) != tt.want || err != nil {
			b.Errorf("read of %d bytes at %d: %d, %v; want %d and no error", tt.length, tt.offset, n, err, tt.want)
		}
	}
	for _, offset := range []int64{size, size + 1, size + block, 1 << 62} {
		if n, err := d.WriteAt(p[:block], offset); n != 0 || !errors.Is(err, syscall.ENOSPC) {
			b.Errorf("write at %d, beyond the end: %d, %v; want ENOSPC", offset, n, err)
		}
	}
	if _, err := d.ReadAt(p[:block], -block); !errors.Is(err, syscall.EINVAL) {
		b.Errorf("read at a negative offset: %v; want EINVAL", err)
	}
	if _, err := d.WriteAt(p[:block], -block); !errors.Is(err, syscall.EINVAL) {
		b.Errorf("write at a negative offset: %v; want EINVAL", err)
	}
}

// must ends the test on an error.
func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// testAlignment writes and reads at odd places: what is beside them stays as it is.
func testAlignment(b *bench) {
	m := newModel(b)
	buf := make([]byte, 1<<20)
	block := int64(b.dev.BlockSize())
	for _, base := range []int64{0, 65536 - block, 7 * block} {
		if base+16*block > b.size {
			continue
		}
		for _, skew := range []int64{0, 1, 2, 3, 511, 512, 513, block - 1, block, block + 1} {
			for _, n := range []int64{1, 2, 7, 511, 512, 513, block - 1, block, block + 1, 3*block + 5} {
				if base+skew+n+block > b.size {
					continue
				}
				b.must(m.write(b.dev, base+skew, int(n)))
				b.must(m.read(b.dev, buf, base+skew, int(n)))
				b.must(m.read(b.dev, buf, base, int(min(skew+n+block, b.size-base))))
			}
		}
	}
	b.must(m.readAll(b.dev))
}

// testRequests has requests of all sizes up to several times what the handler is given at once.
func testRequests(b *bench) {
	m := newModel(b)
	buf := make([]byte, 4*b.dev.MaxXfer())
	block := int64(b.dev.BlockSize())
	var lengths []int64
	for n := block; n <= int64(len(buf)); n *= 2 {
		lengths = append(lengths, n-block, n, n+block)
	}
	for _, n := range lengths {
		room := int64(len(m.spans[0].bytes)) - n
		if n == 0 || room < 0 || n > int64(len(buf)) {
			continue
		}
		for _, offset := range []int64{0, min(room, 3*block), room - room%block} {
			b.must(m.write(b.dev, offset, int(n)))
			b.must(m.read(b.dev, buf, offset, int(n)))
		}
	}
	b.must(m.readAll(b.dev))
}

// testClear discards and zeroes ranges of all kinds, also such as handlers cannot do themselves.
func testClear(b *bench) {
	m := newModel(b)
	s := m.spans[0]
	most := min(int64(len(s.bytes)), 8<<20)
	for _, k := range []kind{opDiscard, opZero} {
		for _, tt := range []struct{ offset, length int64 }{
			{0, 1}, {5, 4096}, {4096, 4096}, {65536, 65536}, {65536 - 512, 65536 + 1024}, {1 << 20, 3<<20 + 1}, {0, most},
		} {
			if tt.offset+tt.length > most {
				continue
			}
			from := max(0, tt.offset-4096)
			to := min(most, tt.offset+tt.length+4096)
			b.must(m.write(b.dev, from, int(to-from)))
			b.must(m.clear(b.dev, k, tt.offset, int(tt.length)))
			b.must(m.readAll(b.dev))
		}
		b.must(m.flush(b.dev))
		b.must(m.clear(b.dev, k, 0, 0))
	}
	b.must(m.readAll(b.dev))
}

// testFlush flushes with nothing to do, twice, and between writes.
func testFlush(b *bench) {
	m := newModel(b)
	b.must(m.flush(b.dev))
	b.must(m.flush(b.dev))
	block := b.dev.BlockSize()
	for i := range int64(32) {
		b.must(m.write(b.dev, i*int64(block), block))
		b.must(m.flush(b.dev))
	}
	b.must(m.readAll(b.dev))
}

// testReadOnly: a device that is added read-only can be read, and not written to.
func testReadOnly(b *bench) {
	if b.Volatile {
		return
	}
	m := newModel(b)
	b.must(m.write(b.dev, 0, b.dev.BlockSize()))
	b.remove()
	opts := b.Options
	opts.ReadOnly = true
	b.addWith(opts)
	b.must(m.readAll(b.dev))
	if _, err := b.dev.WriteAt(make([]byte, b.dev.BlockSize()), 0); !errors.Is(err, syscall.EROFS) {
		b.Errorf("write to a read-only device: %v; want EROFS", err)
	}
	b.must(b.dev.Flush())
	b.must(m.readAll(b.dev))
}

// testReopen: what has been written is there after the device was removed and added, flushed before or not.
func testReopen(b *bench) {
	if b.Volatile {
		b.Log("the contents are gone with the device: only that it can be removed and added is tested")
		for range 5 {
			b.remove()
			b.add()
		}
		return
	}
	m := newModel(b)
	for round := range int64(6) {
		for i := range int64(16) {
			offset := (round*16 + i) * 5 * int64(b.dev.BlockSize()) % (b.size / 2)
			b.must(m.write(b.dev, offset-offset%int64(b.dev.BlockSize()), b.dev.BlockSize()))
		}
		if round%2 == 0 {
			b.must(m.flush(b.dev))
		}
		b.reopen(m)
		b.must(m.readAll(b.dev))
	}
}

// testKill: what has been written is there after the handler's process was killed, flushed before or not.
func testKill(b *bench) {
	if b.Kills == KillNever {
		b.Log("no kills")
		return
	}
	m := newModel(b)
	for round := range 6 {
		for i := range int64(16) {
			b.must(m.write(b.dev, i*3*int64(b.dev.BlockSize()), b.dev.BlockSize()))
		}
		if round%2 == 0 {
			b.must(m.flush(b.dev))
		}
		b.killIdle(m)
		if err := m.readAll(b.dev); err != nil {
			b.Fatal(fmt.Errorf("round %d: %w", round, err))
		}
	}
}
