// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/conformance"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// cluster is a Ceph cluster of one monitor and one OSD, as .ci/ceph serves it.
type cluster struct {
	*bed
	dir    string
	output watched
	exited chan struct{}
}

// startCluster starts a cluster, which ends with the test after its fronts. It takes about ten seconds.
func (b *bed) startCluster() *cluster {
	b.Helper()
	for _, program := range []string{"ceph", "ceph-mon", "ceph-osd", "rbd"} {
		if _, err := exec.LookPath(program); err != nil {
			b.Skipf("%v: install ceph-common, ceph-mon and ceph-osd (make test does, where apt-get has them)", err)
		}
	}
	c := &cluster{bed: b, dir: filepath.Join(b.TempDir(), "ceph"), exited: make(chan struct{})}
	cmd := exec.Command(filepath.Join(testbed.Root(), ".ci", "ceph"), c.dir)
	cmd.Env = append(os.Environ(), b.mark)
	cmd.Stdout, cmd.Stderr = &c.output, &c.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	starter() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		b.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(c.exited)
	}()
	b.Cleanup(func() {
		for _, f := range b.fronts {
			if f.running() && !b.Failed() {
				f.stop()
			}
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-c.exited:
		case <-time.After(graceful):
			b.Errorf(".ci/ceph did not end within %v", graceful)
		}
		if b.Failed() {
			b.Logf(".ci/ceph printed:\n%s", c.output.tail())
		}
	})
	for range 4 { // one await is not enough on a busy machine
		if c.output.await(0, c.exited, "serving "+c.conf()) {
			return c
		}
	}
	b.Fatalf(".ci/ceph does not serve:\n%s", c.output.tail())
	return nil
}

func (c *cluster) conf() string { return c.dir + "/ceph.conf" }

// rbd runs the rbd program on the cluster.
func (c *cluster) rbd(args ...string) string {
	c.Helper()
	return c.run("rbd", append([]string{"--conf", c.conf()}, args...)...)
}

// osd runs ceph osd on the cluster.
func (c *cluster) osd(args ...string) string {
	c.Helper()
	return c.run("ceph", append([]string{"--conf", c.conf(), "osd"}, args...)...)
}

// killOSD ends the OSD as a crash would, and waits until .ci/ceph has noticed, which starts it again.
func (c *cluster) killOSD() {
	c.Helper()
	text, err := os.ReadFile(c.dir + "/osd.0.pid")
	if err != nil {
		c.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		c.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		c.Fatal(err)
	}
	if !c.output.await(0, c.exited, "osd.0", fmt.Sprintf("process %d", pid), "has ended") {
		c.Fatalf(".ci/ceph does not notice the end of the OSD:\n%s", c.output.tail())
	}
}

// client is the address by which the cluster knows who has an image open.
func (c *cluster) client(image string) string {
	c.Helper()
	_, address, _ := strings.Cut(c.rbd("status", image), "watcher=")
	address, _, _ = strings.Cut(address, " ")
	if address == "" {
		c.Fatalf("nobody has image %s open", image)
	}
	return address
}

// wantExport compares a device with what the cluster says is in its image.
func (c *cluster) wantExport(f *front, device, image string) {
	c.Helper()
	file := f.open(device, os.O_RDWR)
	defer file.Close()
	if err := file.Sync(); err != nil {
		c.Error(err)
	}
	to := filepath.Join(c.TempDir(), "export")
	c.rbd("export", "--no-progress", image, to)
	c.dropCache(f.path(device))
	c.run("cmp", to, f.path(device))
	os.Remove(to)
}

// TestE2ERbd takes the distribution's handler_rbd.so, as it is, to a real cluster: contents are what the cluster says
// they are, a file system works, and whatever goes wrong in the cluster or with the host under load, nobody has an
// error and nothing is lost.
func TestE2ERbd(t *testing.T) {
	b := newBed(t, 4*time.Minute)
	c := b.startCluster()
	f := b.start()
	f.runPage("rbd", b.TempDir(), "/etc/ceph/ceph.conf", c.conf())
	f.must("unload rbd")
	host := f.load("rbd")
	c.rbd("create", "--size", "64M", "data")
	c.rbd("create", "--size", "256M", "tree")
	// Four seconds are enough for .ci/ceph's heartbeat.
	const addData = "add 0 /rbd/rbd/data;conf=%s;osd_op_timeout=4"
	f.must(fmt.Sprintf(addData+"\nadd 1 /rbd/rbd/tree;conf=%[1]s;osd_op_timeout=4", c.conf()))
	if info, err := os.Stat(f.path("rbd000")); err != nil || info.Size() != 64<<20 {
		t.Errorf("the device of an image of 64 MiB: %v, error %v", info, err)
	}
	f.refused("add 2 size=1M /rbd/rbd/data;id=admin;conf="+c.conf(), syscall.EINVAL, "67108864")
	f.refused("add 2 /rbd/rbd/nosuch;conf="+c.conf(), syscall.ENOENT, "nosuch")

	began := time.Now()
	step := func(what string) {
		t.Logf("%-28s %5.1f s", what, time.Since(began).Seconds())
		began = time.Now()
	}
	f.writeAndCheck("rbd000", 12345, 3<<20, 1)
	c.wantExport(f, "rbd000", "data")
	f.fio("rbd000", "--rw=randwrite", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1", "--iodepth=16",
		"--size=32M", "--ioengine=io_uring", "--direct=1", "--do_verify=1")
	c.wantExport(f, "rbd000", "data")
	step("read, write, flush, fio")

	// What the cluster does not hold any more after a discard, and what it only reads as zeroes.
	file := f.open("rbd000", os.O_RDWR)
	for _, hole := range []struct{ mode, offset, length int64 }{
		{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, 4 << 20, 8 << 20},
		{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, 1000, 5000},
		{unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE, 13 << 20, 1<<20 + 512},
	} {
		if err := unix.Fallocate(int(file.Fd()), uint32(hole.mode), hole.offset, hole.length); err != nil {
			t.Errorf("fallocate of %d bytes at %d, mode %#x: %v", hole.length, hole.offset, hole.mode, err)
		}
		got := make([]byte, hole.length)
		if _, err := file.ReadAt(got, hole.offset); err != nil || !bytes.Equal(got, make([]byte, hole.length)) {
			t.Errorf("hole of %d bytes at %d: not zeroes (%v)", hole.length, hole.offset, err)
		}
	}
	file.Close()
	c.wantExport(f, "rbd000", "data")
	step("discard, zero")

	mountpoint := b.mkfsAndMount(f, "rbd001")
	archive, contents := b.sourceArchive()
	b.unpackAndCompare(archive, contents, mountpoint, time.Now().Add(time.Nanosecond))
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", f.path("rbd001"))
	c.wantExport(f, "rbd001", "tree")
	f.must("remove 1")
	step("ext4")

	f.underLoad("rbd000", func() {
		if err := syscall.Kill(host, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// The image's lock belongs to a client that does not answer any more.
		f.awaitRecovery("rbd", 1)
	})
	step("kill -9 of the host")
	f.underLoad("rbd000", c.killOSD)
	step("kill -9 of the OSD")
	f.underLoad("rbd000", func() {
		since := f.logSoFar()
		c.osd("pause")
		f.wantLogSince(since, "storage did not answer in time", "rbd000")
		c.osd("unpause")
	})
	step("time-out")
	f.underLoad("rbd000", func() {
		since := f.logSoFar()
		c.osd("blocklist", "add", c.client("data"))
		f.wantLogSince(since, "storage has shut this client out", "rbd000")
		f.wantLogSince(since, "opened again", "rbd000")
	})
	step("blocklisted")
	c.wantExport(f, "rbd000", "data")

	// A device whose storage is away for longer than its time-out fails, in good time, and can be had again.
	f.must("remove 0\n" + fmt.Sprintf("add 0 timeout=2 "+strings.TrimPrefix(addData, "add 0 "), c.conf()))
	c.osd("pause")
	file = f.open("rbd000", os.O_RDWR|syscall.O_DIRECT)
	if _, err := file.WriteAt(pattern(4096, 1), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("write while the storage is away for longer than timeout=: %v", err)
	}
	file.Close()
	f.wantLog("device has failed", "rbd000")
	c.osd("unpause")
	_, _ = f.ctl("remove 0") // says that a write may be lost, or not, as it was cut off
	f.must(fmt.Sprintf(addData, c.conf()))
	f.writeAndCheck("rbd000", 0, 4096, 2)
	f.must("remove 0\nunload rbd")
	step("longer than timeout=")

	// Without the lock a new client need not wait until the one that was killed has timed out.
	c.rbd("create", "--size", "16M", "--image-feature", "layering", "conformance")
	conformance.Run(t, conformance.Handler{
		Path: testbed.SystemHandlers(t) + "rbd.so", HostBinary: testbed.Program(t, "tcmur-host"),
		Config: "/rbd/rbd/conformance;conf=" + c.conf(), Kills: conformance.KillIdle,
		Operations: rbdOperations, Seed: uint64(time.Now().UnixNano()),
	})
	step("conformance")
}

// logSoFar is a place in the log, for wantLogSince.
func (f *front) logSoFar() int { return len(f.log.String()) }

// underLoad has clients write to a device, and check what they have written, while something happens to it. It returns
// when each of them has been served again after that, and none has had an error.
func (f *front) underLoad(device string, happens func()) {
	f.Helper()
	before := f.startClients()
	for i := range int64(8) {
		flags := os.O_RDWR
		if i%2 == 1 {
			flags |= syscall.O_DIRECT
		}
		before.writer(f.path(device), flags, i<<20, 256<<10)
	}
	before.first.Wait()
	var fio sync.WaitGroup
	fio.Go(func() {
		f.fio(device, "--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
			"--ioengine=io_uring", "--direct=1", "--iodepth=16", "--offset=32M", "--size=8M")
	})
	happens()
	after := f.startClients()
	for i := range int64(4) {
		after.writer(f.path(device), os.O_RDWR|syscall.O_DIRECT, (16+i)<<20, 256<<10)
	}
	after.first.Wait()
	after.end()
	before.end()
	fio.Wait()
	want, got := pattern(64<<10, 7), make([]byte, 64<<10)
	file := f.open(device, os.O_RDWR|syscall.O_DIRECT)
	defer file.Close()
	if _, err := file.WriteAt(want, 60<<20); err != nil {
		f.Error(err)
	}
	if _, err := file.ReadAt(got, 60<<20); err != nil || !bytes.Equal(got, want) {
		f.Errorf("%s afterwards: wrong contents (%v)", device, err)
	}
}
