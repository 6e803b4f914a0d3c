// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The power-cut lab: a device is recorded while a file system or a database on it is at work. Then the power is cut at
// the flushes: an image is made of everything that the flush covers, and of a random half of what came after it and
// before the next. On each image everything must be intact that its user was promised before that next flush.

// powerCutLab is one recorded device.
type powerCutLab struct {
	*front
	path   string // what the file system is made on
	record string
	size   int64

	mu       sync.Mutex // guards the field below
	promises []promise
}

// promise is that a version of something, or a later one, is durable.
type promise struct {
	at      int64 // how long the record was when it was given
	name    string
	version uint64
}

// newPowerCutLab adds a recorded file device with more options of add.
func newPowerCutLab(b *bed, size int64, options ...string) *powerCutLab {
	b.Helper()
	f := b.start()
	l := &powerCutLab{front: f, size: size, path: f.path("file000"), record: filepath.Join(b.TempDir(), "record")}
	f.must(fmt.Sprintf("load file\nadd 0 size=%d record=%s %s /file/%s", size, l.record, strings.Join(options, " "),
		filepath.Join(b.TempDir(), "image")))
	return l
}

// recorded is the length of the record.
func (l *powerCutLab) recorded() int64 {
	info, err := os.Stat(l.record)
	if err != nil {
		l.Error(err)
		return 0
	}
	return info.Size()
}

// promise notes that a version is durable from now on.
func (l *powerCutLab) promise(name string, version uint64) {
	at := l.recorded()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.promises = append(l.promises, promise{at, name, version})
}

// promised are the versions that are promised at a place of the record.
func (l *powerCutLab) promised(until int64) map[string]uint64 {
	versions := map[string]uint64{}
	for _, p := range l.promises {
		if p.at <= until {
			versions[p.name] = max(versions[p.name], p.version)
		}
	}
	return versions
}

// volume is a file system as the lab uses it.
type volume struct {
	name  string
	size  int64
	mkfs  []string
	check []string // after a recovery: must find nothing to repair
}

func volumes() []volume {
	return []volume{
		{"ext4", 24 << 20, []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
		{"xfs", 300 << 20, []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-f", "-n"}},
	}
}

// TestE2EPowerCutFileSystem: whenever the power is cut, the file system recovers by itself, and every file is there
// that fsync(2) has made durable; also where the kernel writes to the device when it pleases.
func TestE2EPowerCutFileSystem(t *testing.T) {
	all := volumes()
	for _, tt := range []struct {
		volume
		options []string
	}{{all[0], nil}, {all[1], nil}, {all[0], []string{"cache=writeback"}}} {
		v := tt.volume
		t.Run(strings.Join(append([]string{v.name}, tt.options...), "-"), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, powerCutDeadline)
			l := newPowerCutLab(b, v.size, tt.options...)
			began := l.replaceFiles(v)
			l.must("remove 0")
			if err := l.cutPower(v, began, l.recorded(), powerCuts, l.checkFiles); err != nil {
				t.Error(err)
			}
		})
	}
}

// replaceFiles makes the file system and has two writers replace files on it, durably, until there is enough to cut. It
// returns where in the record their work began.
func (l *powerCutLab) replaceFiles(v volume) (began int64) {
	l.Helper()
	l.run(v.mkfs[0], append(v.mkfs[1:], l.path)...)
	mountpoint := l.mountDevice(l.path)
	began = l.recorded()
	l.writeFiles(mountpoint, 1, powerSteps)
	if err := l.umountIdle(mountpoint); err != nil {
		l.Fatal(err)
	}
	return began
}

// writeFiles makes versions from the first to before the last.
func (l *powerCutLab) writeFiles(mountpoint string, first, last uint64) {
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), first))
			for i := first + uint64(w); i < last; i += 2 {
				name := fmt.Sprintf("w%d-%d", w, rng.IntN(5))
				if err := replaceFile(mountpoint, name, i, 1+rng.IntN(40_000)); err != nil {
					l.Error(err)
					return
				}
				l.promise(name, i)
			}
		})
	}
	writers.Wait()
}

// replaceFile replaces a file as programs do that must not lose it: the new one is durable before it takes the name,
// and the name when this returns.
func replaceFile(dir, name string, version uint64, size int) error {
	next := filepath.Join(dir, "next-"+name)
	file, err := os.Create(next)
	if err != nil {
		return err
	}
	_, err = file.Write(versioned(version, size))
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(next, filepath.Join(dir, name))
	}
	if err != nil {
		return err
	}
	parent, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}

// versioned is the contents of a file, from which version and size can be told and everything else follows.
func versioned(version uint64, size int) []byte {
	p := binary.LittleEndian.AppendUint64(nil, version)
	p = binary.LittleEndian.AppendUint64(p, uint64(size))
	return append(p, pattern(size, byte(version))...)
}

// checkFiles checks a recovered file system: that each file is there that was promised at this place of the record.
func (l *powerCutLab) checkFiles(mountpoint string, until int64) error {
	for name, promised := range l.promised(until) {
		got, err := os.ReadFile(filepath.Join(mountpoint, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s is lost; version %d was durable", name, promised)
		case err != nil:
			return err
		case len(got) < 16:
			return fmt.Errorf("%s has %d bytes left", name, len(got))
		}
		version, size := binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:])
		if size > 1<<20 || !bytes.Equal(got, versioned(version, int(size))) {
			return fmt.Errorf("%s is no version of itself", name)
		}
		if version < promised {
			return fmt.Errorf("%s is version %d; version %d was durable", name, version, promised)
		}
	}
	return nil
}

// cutPower cuts the power after at least so many flushes between two places in the record, and after the one that the
// longest time without a flush followed. It checks what is left each time and returns the first failure.
func (l *powerCutLab) cutPower(
	v volume, began, ended int64, cuts int, check func(mountpoint string, until int64) error,
) error {
	l.Helper()
	r, err := openRecord(l.record)
	if err != nil {
		return err
	}
	defer r.file.Close()
	r.truncate(ended)
	flushes := r.flushes(began)
	if len(flushes) < cuts {
		return fmt.Errorf("%d flushes are too few for %d cuts", len(flushes), cuts)
	}
	image, err := os.Create(filepath.Join(l.mounts, "cut"))
	if err != nil {
		return err
	}
	defer image.Close()
	if err := image.Truncate(l.size); err != nil {
		return err
	}
	step, longest := len(flushes)/cuts, longestGap(flushes, len(r.entries))
	done, made := 0, 0
	for i := range flushes {
		if i%step != 0 && i != longest {
			continue
		}
		covered := flushes[i] + 1
		next, until := len(r.entries), ended
		if i+1 < len(flushes) {
			next, until = flushes[i+1], r.entries[flushes[i+1]].at
		}
		if err := r.apply(image, done, covered, nil); err != nil {
			return err
		}
		done = covered
		if err := l.cutOnce(v, r, image, made, covered, next, until, check); err != nil {
			return fmt.Errorf("cut at flush %d of %d (entry %d): %w", i, len(flushes), flushes[i], err)
		}
		made++
	}
	l.Logf("%s: %d entries, %d flushes, %d cuts", v.name, len(r.entries), len(flushes), made)
	return nil
}

// longestGap is which of the flushes is followed by most entries before the next flush, or the end.
func longestGap(flushes []int, end int) int {
	longest, most := 0, 0
	for i, at := range flushes {
		next := end
		if i+1 < len(flushes) {
			next = flushes[i+1]
		}
		if next-at > most {
			longest, most = i, next-at
		}
	}
	return longest
}

// cutOnce checks one image: what is in the given one, and a random half of entries[covered:next].
func (l *powerCutLab) cutOnce(
	v volume, r *replay, image *os.File, seed, covered, next int, until int64,
	check func(mountpoint string, until int64) error,
) error {
	path := image.Name() + "-copy"
	if out, err := l.try("cp", "--sparse=always", image.Name(), path); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if next > covered {
		torn, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		err = errors.Join(r.apply(torn, covered, next, rand.New(rand.NewPCG(uint64(seed), 2))), torn.Close())
		if err != nil {
			return err
		}
	}
	mountpoint := filepath.Join(l.mounts, "recovered")
	if err := os.MkdirAll(mountpoint, 0o700); err != nil {
		return err
	}
	if out, err := l.try("mount", "-t", v.name, "-o", "loop", path, mountpoint); err != nil {
		return fmt.Errorf("it cannot be mounted: %w: %s", err, out)
	}
	err := check(mountpoint, until)
	if umountErr := l.umountIdle(mountpoint); umountErr != nil {
		return errors.Join(err, umountErr)
	}
	if err != nil {
		return err
	}
	if out, err := l.try(v.check[0], append(v.check[1:], path)...); err != nil {
		return fmt.Errorf("%s after the recovery: %w: %s", v.check[0], err, out)
	}
	return nil
}

// umountIdle unmounts what nobody uses any more, except for a moment those whom other tests have just forked: they have
// all of this process's files until they execute their program.
func (b *bed) umountIdle(mountpoint string) error {
	for deadline := time.Now().Add(graceful); ; {
		out, err := b.try("umount", mountpoint)
		if err == nil {
			return nil
		}
		if !strings.Contains(out, "busy") || time.Now().After(deadline) {
			return fmt.Errorf("umount: %w: %s", err, out)
		}
		time.Sleep(10 * time.Millisecond) // no event tells of it
	}
}

// TestE2EPowerCutSqlite: whenever the power is cut, a database is intact, and has every transaction whose commit was
// reported; with a rollback journal and with a write-ahead log.
func TestE2EPowerCutSqlite(t *testing.T) {
	for _, journal := range []string{"delete", "wal"} {
		t.Run(journal, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, powerCutDeadline)
			v := volumes()[0]
			l := newPowerCutLab(b, v.size)
			b.run(v.mkfs[0], append(v.mkfs[1:], l.path)...)
			mountpoint := b.mountDevice(l.path)
			began := l.transactions(mountpoint, journal)
			if err := b.umountIdle(mountpoint); err != nil {
				t.Fatal(err)
			}
			l.must("remove 0")
			if err := l.cutPower(v, began, l.recorded(), powerCuts, l.checkDatabase); err != nil {
				t.Error(err)
			}
		})
	}
}

// transactions has sqlite3 commit transactions, each of which is promised when it says so. It returns where in the
// record the first one began.
func (l *powerCutLab) transactions(mountpoint, journal string) (began int64) {
	l.Helper()
	cmd := l.command("stdbuf", "-oL", "sqlite3", "-batch", "-bail", filepath.Join(mountpoint, "db"))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		l.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		l.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		l.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	do := func(statements, answer string) {
		l.Helper()
		if _, err := fmt.Fprintln(stdin, statements, "SELECT", "'"+answer+"';"); err != nil {
			l.Fatal(err)
		}
		for lines.Scan() {
			if lines.Text() == answer {
				return
			}
		}
		l.Fatalf("sqlite3 ended at %q (%v)", statements, lines.Err())
	}
	do("PRAGMA journal_mode="+journal+"; PRAGMA synchronous=EXTRA; PRAGMA wal_autocheckpoint=20;"+
		"CREATE TABLE t (id INTEGER PRIMARY KEY, sum INTEGER, text BLOB);", "ready")
	l.run("sync", "-f", filepath.Join(mountpoint, "db"))
	began = l.recorded()
	for i := 1; i <= powerSteps; i++ {
		do(fmt.Sprintf("BEGIN; INSERT INTO t VALUES (%d, %d, randomblob(%d)); "+
			"UPDATE t SET text = randomblob(length(text)) WHERE id %% 7 = %d AND id > %d; COMMIT;",
			i, i*7, 1+i*37%3000, i%7, i-30), "done "+strconv.Itoa(i))
		l.promise("transaction", uint64(i))
	}
	if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
		l.Fatal(err)
	}
	return began
}

// checkDatabase checks a recovered database.
func (l *powerCutLab) checkDatabase(mountpoint string, until int64) error {
	out, err := l.try("sqlite3", "-batch", "-bail", filepath.Join(mountpoint, "db"),
		"PRAGMA integrity_check; SELECT count(*) = coalesce(max(id), 0) AND total(sum) = total(id * 7) FROM t;"+
			"SELECT coalesce(max(id), 0) FROM t;")
	if err != nil {
		return fmt.Errorf("sqlite3: %w: %s", err, out)
	}
	lines := strings.Fields(out)
	if len(lines) != 3 || lines[0] != "ok" || lines[1] != "1" {
		return fmt.Errorf("the database is damaged: %s", out)
	}
	last, err := strconv.ParseUint(lines[2], 10, 64)
	if promised := l.promised(until)["transaction"]; err != nil || last < promised {
		return fmt.Errorf("the last transaction is %s; %d was committed", lines[2], promised)
	}
	return nil
}

// TestE2EPowerCutFindsDroppedFlushes: the lab can fail. Between the file system and the recorded device there is one
// that says that it has flushed, and has not.
func TestE2EPowerCutFindsDroppedFlushes(t *testing.T) {
	t.Parallel()
	b := newBed(t, powerCutDeadline, "noflush")
	v := volumes()[0]
	l := newPowerCutLab(b, v.size)
	liar := b.start()
	lie := filepath.Join(b.TempDir(), "lie")
	liar.must(fmt.Sprintf("load noflush\nadd 0 retain=1G /noflush/%s:%s", l.path, lie))
	b.run(v.mkfs[0], append(v.mkfs[1:], liar.path("noflush000"))...)
	mountpoint := b.mountDevice(liar.path("noflush000"))
	began := l.recorded()

	// First the truth, which must pass; then lies.
	l.writeFiles(mountpoint, 1, 20)
	truth := l.recorded()
	b.writeTo(lie)
	l.writeFiles(mountpoint, 20, 40)
	if err := os.Remove(lie); err != nil {
		t.Fatal(err)
	}
	if err := b.umountIdle(mountpoint); err != nil {
		t.Fatal(err)
	}
	liar.must("remove 0")
	liar.stop()
	l.must("remove 0")

	if err := l.cutPower(v, began, truth, 10, l.checkFiles); err != nil {
		t.Errorf("without a lie: %v", err)
	}
	err := l.cutPower(v, began, l.recorded(), 10, l.checkFiles)
	if err == nil {
		t.Error("the lab did not notice that flushes were dropped")
	}
	t.Logf("found: %v", err)
}

// writeTo makes an empty file.
func (b *bed) writeTo(path string) {
	b.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.Fatal(err)
	}
}

// powerCutDeadline is for each test of the lab.
const powerCutDeadline = 3*time.Minute + powerCuts*4*time.Second
