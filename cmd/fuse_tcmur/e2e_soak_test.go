// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestE2ESoak kills the hosts of three handlers about once a second each, for soakTime (a minute in make test, ten in
// make soak), under fio with verification and a file system with archives unpacked and compared. One of the handlers
// acknowledges writes into its memory. Nobody sees an error, nothing that was acknowledged is lost, and the file system
// and the image file are in order at the end. It prints how long requests were held up at the kills.
func TestE2ESoak(t *testing.T) {
	b := newBed(t, soakTime+2*time.Minute, "fault")
	f := b.start()
	dir := b.TempDir()
	image := dir + "/image.qcow2"
	b.run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
	victims := []*victim{
		{subtype: "file", pid: f.load("file")},
		{subtype: "fault", pid: f.load("fault")},
		{subtype: "qcow", pid: f.load("qcow")},
	}
	f.must(fmt.Sprintf(`
		add 0 size=64M /file/%[1]s/file
		add 1 /fault/size=0x4000000,lazy=%[1]s/lazy
		add 2 /qcow/%[2]s
		add 3 size=256M /file/%[1]s/file-ext4
		add 4 /fault/size=0x10000000,lazy=%[1]s/lazy-ext4`, dir, image))
	mounts := []string{b.mkfsAndMount(f, "file003"), b.mkfsAndMount(f, "fault004")}
	archive, contents := b.sourceArchive()

	deadline := time.Now().Add(soakTime)
	var clients sync.WaitGroup
	if !soakQcow {
		victims = victims[:2]
	}
	for i, v := range victims {
		device := fmt.Sprintf("%s%03d", v.subtype, i)
		clients.Go(func() {
			for round := 0; time.Now().Before(deadline) && !t.Failed(); round++ {
				f.fio(device, "--rw=randwrite", "--bsrange=4k-16k", "--ioengine=io_uring", "--direct=1", "--iodepth=32",
					"--offset=1M", "--size=16M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
					fmt.Sprint("--randseed=", round))
			}
		})
		file := f.open(device, os.O_RDWR|syscall.O_DIRECT)
		clients.Go(func() { v.probe(t, file, deadline) })
	}
	for _, mount := range mounts {
		clients.Go(func() { b.unpackAndCompare(archive, contents, mount, deadline) })
	}

	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for time.Now().Before(deadline) && !t.Failed() {
		for _, v := range victims {
			time.Sleep(time.Duration(rng.IntN(int(2*time.Second) / len(victims))))
			if err := syscall.Kill(v.pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			v.killed = append(v.killed, time.Now())
			v.pid = f.awaitRecovery(v.subtype, len(v.killed))
		}
	}
	clients.Wait()
	var all []time.Duration
	for _, v := range victims {
		stalls := v.stalls()
		t.Logf("%-5s %3d kills; longest request at a kill: %s", v.subtype, len(v.killed), spread(stalls))
		t.Logf("%-5s requests at other times: %s", v.subtype, spread(v.calm()))
		all = append(all, stalls...)
	}
	t.Logf("all   longest request at a kill: %s", spread(all))
	for i, mount := range mounts {
		b.run("umount", mount)
		b.run("e2fsck", "-fn", f.path([]string{"file003", "fault004"}[i]))
	}
	f.must("remove 0\nremove 1\nremove 2\nremove 3\nremove 4")
	b.run("qemu-img", "check", image)
}

// victim is a handler whose host is killed, and what a client of it felt of that.
type victim struct {
	subtype string
	pid     int
	killed  []time.Time
	probes  []probe
}

// probe is one request.
type probe struct {
	began time.Time
	took  time.Duration
}

// probe writes and reads the first blocks of a device, one request at a time.
func (v *victim) probe(t *testing.T, file *os.File, deadline time.Time) {
	defer file.Close()
	got := make([]byte, 4096)
	for i := 0; time.Now().Before(deadline); i++ {
		off, want := int64(i%16)*4096, pattern(4096, byte(i))
		began := time.Now()
		if _, err := file.WriteAt(want, off); err != nil {
			t.Errorf("%s: %v", v.subtype, err)
			return
		}
		v.probes = append(v.probes, probe{began, time.Since(began)})
		if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: wrong contents (%v)", v.subtype, err)
			return
		}
		if i%100 == 0 {
			if err := file.Sync(); err != nil {
				t.Errorf("%s: fsync: %v", v.subtype, err)
				return
			}
		}
		time.Sleep(time.Millisecond) // fio makes the load
	}
}

// window is how long after a kill a request counts as held up by it.
const window = 500 * time.Millisecond

// stalls is for each kill the longest request that it can have held up.
func (v *victim) stalls() []time.Duration {
	var all []time.Duration
	for _, kill := range v.killed {
		var longest time.Duration
		for _, p := range v.probes {
			if p.began.Before(kill.Add(window)) && p.began.Add(p.took).After(kill) {
				longest = max(longest, p.took)
			}
		}
		all = append(all, longest)
	}
	return all
}

// calm is how long the other requests took.
func (v *victim) calm() []time.Duration {
	var all []time.Duration
	for _, p := range v.probes {
		if !slices.ContainsFunc(v.killed, func(kill time.Time) bool {
			return p.began.Before(kill.Add(window)) && p.began.Add(p.took).After(kill)
		}) {
			all = append(all, p.took)
		}
	}
	return all
}

// spread is the middle and the upper end of durations.
func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	slices.Sort(all)
	at := func(percent int) time.Duration { return all[(len(all)-1)*percent/100].Round(100 * time.Microsecond) }
	return fmt.Sprintf("median %v, p99 %v, max %v", at(50), at(99), at(100))
}

// sourceArchive packs a part of the Go sources, and returns the archive and the directory that it was made from.
func (b *bed) sourceArchive() (archive, contents string) {
	b.Helper()
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	contents = filepath.Join(strings.TrimSpace(string(goroot)), "src", "net")
	archive = filepath.Join(b.TempDir(), "archive.tar")
	b.run("tar", "-cf", archive, "-C", contents, ".")
	return archive, contents
}

// unpackAndCompare unpacks an archive again and again, and compares each time, reading the files from the device.
func (b *bed) unpackAndCompare(archive, contents, mount string, deadline time.Time) {
	for round := 0; time.Now().Before(deadline) && !b.Failed(); round++ {
		to := fmt.Sprintf("%s/%d", mount, round%4)
		script := `rm -rf "$1" && mkdir "$1" && tar -xf "$2" -C "$1" && sync -f "$1" &&
			echo 1 >/proc/sys/vm/drop_caches && diff -r "$3" "$1"`
		if out, err := b.try("sh", "-c", script, "-", to, archive, contents); err != nil {
			b.Errorf("round %d on %s: %v\n%s", round, mount, err, out)
		}
	}
}
