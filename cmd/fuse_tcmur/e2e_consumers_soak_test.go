// SPDX-License-Identifier: Apache-2.0

//go:build soak

package main_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// These take minutes, and packages that make test does without: make soak-deps.

// TestSoakFileSystems has stress-ng work on each file system on a loop device on each handler, and verify. Then the
// file system's checker must find nothing.
func TestSoakFileSystems(t *testing.T) {
	for _, v := range []struct {
		name  string
		mkfs  []string
		check []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, []string{"btrfs", "check", "--readonly"}},
	} {
		for _, subtype := range []string{"ram", "file", "qcow"} {
			t.Run(v.name+"-"+subtype, func(t *testing.T) {
				b := newBed(t, 5*time.Minute)
				f := b.start()
				device, image := f.addAnyDevice(subtype, 768)
				loop := strings.TrimSpace(b.run("losetup", "--show", "-f", "--direct-io=on", f.path(device)))
				defer b.detach(loop)
				b.run(v.mkfs[0], append(v.mkfs[1:], loop)...)
				mountpoint := b.mountDevice(loop)
				b.run("stress-ng", "--temp-path", mountpoint, "--hdd", "2", "--hdd-opts", "direct,fsync", "--hdd-bytes",
					"64m", "--iomix", "1", "--iomix-bytes", "64m", "--verify", "-t", "15", "--quiet")
				b.run("sync", "-f", mountpoint)
				if v.name == "btrfs" {
					out := b.run("btrfs", "scrub", "start", "-B", mountpoint)
					if !strings.Contains(out, "no errors found") {
						t.Errorf("scrub: %s", out)
					}
				}
				b.run("fstrim", mountpoint)
				if err := b.umountIdle(mountpoint); err != nil {
					t.Fatal(err)
				}
				b.run(v.check[0], append(v.check[1:], loop)...)
				b.detach(loop)
				f.must("remove 0")
				if subtype == "qcow" {
					b.run("qemu-img", "check", "-q", image)
				}
			})
		}
	}
}

// detach takes a loop device away, if it is there.
func (b *bed) detach(loop string) {
	if _, err := os.Stat("/sys/block/" + filepath.Base(loop) + "/loop"); err == nil {
		b.run("losetup", "-d", loop)
	}
}

// TestSoakPostgres: PostgreSQL on ext4 on a loop device is stopped without a chance to write anything, several times.
// It recovers, its books are balanced, and its checksums and indexes are right.
func TestSoakPostgres(t *testing.T) {
	binaries, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(binaries) == 0 {
		t.Fatal("no PostgreSQL: make soak-deps installs it")
	}
	for _, subtype := range []string{"ram", "file", "qcow"} {
		t.Run(subtype, func(t *testing.T) {
			b := newBed(t, 6*time.Minute)
			for dir := b.mounts; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
				if err := os.Chmod(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			f := b.start()
			device, _ := f.addAnyDevice(subtype, 768)
			mountpoint := b.mkfsAndMount(f, device)
			data := filepath.Join(mountpoint, "data")
			b.run("install", "-d", "-o", "postgres", "-m", "700", data)
			tool := func(name string, args ...string) (string, error) {
				b.Helper()
				return b.try("setpriv", append([]string{"--reuid=postgres", "--regid=postgres", "--clear-groups", "env",
					"--chdir=/", "PGHOST=" + data, filepath.Join(binaries[0], name)}, args...)...)
			}
			must := func(name string, args ...string) string {
				b.Helper()
				out, err := tool(name, args...)
				if err != nil {
					log, _ := os.ReadFile(filepath.Join(data, "log"))
					t.Fatalf("%s %v: %v\n%s\n%s", name, args, err, out, log)
				}
				return out
			}
			start := func() {
				b.Helper()
				must("pg_ctl", "-D", data, "-w", "-l", data+"/log", "-o", "-k "+data+" -c listen_addresses=", "start")
			}
			defer func() { _, _ = tool("pg_ctl", "-D", data, "-m", "immediate", "stop") }()
			must("initdb", "-k", "-D", data)
			start()
			must("createdb", "bench")
			must("pgbench", "-q", "-i", "-s", "4", "bench")
			for round := range 3 {
				must("pgbench", "-c", "4", "-T", "6", "-n", "bench")
				must("pg_ctl", "-D", data, "-m", "immediate", "stop")
				start()
				balanced := must("psql", "-At", "bench", "-c", "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = "+
					"(SELECT sum(bbalance) FROM pgbench_branches) AND (SELECT sum(tbalance) FROM pgbench_tellers) = "+
					"(SELECT sum(delta) FROM pgbench_history)")
				if strings.TrimSpace(balanced) != "t" {
					t.Errorf("round %d: the books are not balanced: %q", round, balanced)
				}
			}
			must("pg_amcheck", "--install-missing", "-d", "bench")
			must("pg_ctl", "-D", data, "-m", "fast", "stop")
			must("pg_checksums", "--check", "-D", data)
			if err := b.umountIdle(mountpoint); err != nil {
				t.Fatal(err)
			}
			b.run("e2fsck", "-fn", f.path(device))
		})
	}
}

// TestSoakSqlite: a database with a write-ahead log and 200000 rows.
func TestSoakSqlite(t *testing.T) {
	for _, subtype := range []string{"ram", "file", "qcow"} {
		t.Run(subtype, func(t *testing.T) {
			b := newBed(t, 5*time.Minute)
			f := b.start()
			device, _ := f.addAnyDevice(subtype, 512)
			mountpoint := b.mkfsAndMount(f, device)
			database := filepath.Join(mountpoint, "db")
			const statements = `PRAGMA journal_mode=wal; CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB, n INTEGER);
				CREATE INDEX i ON t (n);
				WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 200000)
				INSERT INTO t SELECT x, randomblob(200), x * 7919 % 100003 FROM c;
				UPDATE t SET v = randomblob(300) WHERE id % 3 = 0; DELETE FROM t WHERE id % 5 = 0; VACUUM;`
			b.run("sqlite3", "-bail", database, statements)
			if err := b.umountIdle(mountpoint); err != nil {
				t.Fatal(err)
			}
			f.dropCache(f.path(device))
			b.mountDevice(f.path(device))
			out := b.run("sqlite3", "-bail", database, "PRAGMA integrity_check; SELECT count(*) FROM t;")
			if strings.Fields(out)[0] != "ok" || strings.Fields(out)[1] != "160000" {
				t.Errorf("the database is damaged: %s", out)
			}
			if err := b.umountIdle(mountpoint); err != nil {
				t.Fatal(err)
			}
			b.run("e2fsck", "-fn", f.path(device))
		})
	}
}

// TestSoakNBD: nbdkit serves a device, and nbdcopy copies from and to it.
func TestSoakNBD(t *testing.T) {
	for _, subtype := range []string{"ram", "file", "qcow"} {
		b := newBed(t, 3*time.Minute)
		f := b.start()
		device, _ := f.addAnyDevice(subtype, 256)
		source, out := filepath.Join(b.TempDir(), "source"), filepath.Join(b.TempDir(), "out")
		if err := os.WriteFile(source, pattern(256<<20, 3), 0o600); err != nil {
			t.Fatal(err)
		}
		b.run("nbdkit", "-U", "-", "file", f.path(device), "--run", "nbdcopy --flush "+source+" $uri")
		f.dropCache(f.path(device))
		b.run("cmp", source, f.path(device))
		b.run("nbdkit", "-U", "-", "file", f.path(device), "--run", "nbdcopy $uri "+out)
		b.run("cmp", source, out)
		f.stop()
	}
}

// TestSoakBadblocks is TestE2EBadblocks with all patterns, through the page cache and on a loop device past it.
func TestSoakBadblocks(t *testing.T) {
	for _, subtype := range []string{"ram", "file", "qcow"} {
		b := newBed(t, 5*time.Minute)
		f := b.start()
		device, _ := f.addAnyDevice(subtype, 64)
		loop := strings.TrimSpace(b.run("losetup", "--show", "-f", "--direct-io=on", f.path(device)))
		for _, path := range []string{f.path(device), loop} {
			if out, err := b.try("badblocks", "-w", "-b", "4096", path); err != nil || strings.TrimSpace(out) != "" {
				t.Errorf("badblocks of %s: %v", path, errors.Join(err, fmt.Errorf("%s", out)))
			}
		}
		b.detach(loop)
		f.stop()
	}
}
