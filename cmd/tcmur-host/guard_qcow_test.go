// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// qemuTool runs one of qemu's programs.
func qemuTool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// isSound reports what qemu-img check thinks of an image; leaks are no damage.
func isSound(t *testing.T, image string) bool {
	t.Helper()
	out, err := exec.Command("qemu-img", "check", image).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
		t.Logf("qemu-img check: %v\n%s", err, out)
		return false
	}
	return true
}

// contents is what qemu reads in an image.
func contents(t *testing.T, image string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	qemuTool(t, "qemu-img", "convert", "-O", "raw", image, raw)
	data, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// startQcow starts a host with the distribution's handler.
func startQcow(t *testing.T) *front {
	t.Helper()
	f := startHost(t)
	f.mustLoad(debianHandler(t, "handler_qcow.so"), "qcow")
	return f
}

// qcowCase is a kind of image that the handler cannot deal with.
type qcowCase struct {
	name  string
	says  string                                        // in the refusal
	ro    bool                                          // it can be served read-only
	make  func(t *testing.T) string                     // the image, with 0x5a in its first 128 KiB
	shows func(t *testing.T, f *front, img string) bool // the bug, with the device open without guards
}

// filled makes an image of 16 MiB that begins with 128 KiB of 0x5a.
func filled(options ...string) func(t *testing.T) string {
	return func(t *testing.T) string {
		image := makeImage(t, append(append([]string{"-f", "qcow2"}, options...), "16M")...)
		qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 128k", image)
		return image
	}
}

// patched is filled with bytes changed afterwards.
func patched(at int64, data ...byte) func(t *testing.T) string {
	return func(t *testing.T) string {
		image := filled()(t)
		f, err := os.OpenFile(image, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
		return image
	}
}

var fiveA = bytes.Repeat([]byte{0x5a}, 4096)

// refusesAnyway: the handler itself does not open it; the guard says why.
func refusesAnyway(*testing.T, *front, string) bool { return true }

// misreads: what qemu has written is not what the handler reads.
func misreads(_ *testing.T, f *front, _ string) bool {
	got, err := f.read(0, 8192, 4096)
	return err != nil || !bytes.Equal(got, fiveA)
}

// damages: a write by the handler leaves an image that is not sound, or not what it should be.
func damages(t *testing.T, f *front, image string) bool {
	want := contents(t, image)
	data := pattern(3, 8192)
	copy(want[64<<10:], data)
	copy(want[1<<20:], data)
	if f.write(0, 64<<10, data) != nil || f.write(0, 1<<20, data) != nil || f.do(sqe{op: opFlush}) != nil {
		return true
	}
	return !isSound(t, image) || !bytes.Equal(contents(t, image), want)
}

// dies: the first write that allocates takes the process with it.
func dies(_ *testing.T, f *front, _ string) bool {
	f.push(sqe{op: opWrite, offset: 4 << 20, length: 4096})
	f.awaitLog("handler died of SIGABRT")
	return true
}

func qcowCases() []qcowCase {
	return []qcowCase{
		{"snapshots", "internal snapshots", true, func(t *testing.T) string {
			image := filled()(t)
			qemuTool(t, "qemu-img", "snapshot", "-c", "before", image)
			return image
		}, damages},
		{"extended L2", "extended L2", false, filled("-o", "extended_l2=on,cluster_size=16k"), func(
			t *testing.T, f *front, image string,
		) bool {
			return misreads(t, f, image) || damages(t, f, image)
		}},
		{"data file", "another file", false, func(t *testing.T) string {
			return filled("-o", "data_file="+filepath.Join(t.TempDir(), "data"))(t)
		}, func(t *testing.T, f *front, image string) bool { return misreads(t, f, image) || damages(t, f, image) }},
		{"64-bit refcounts", "refcounts of 64 bits", true, filled("-o", "refcount_bits=64"), dies},
		{"compressed clusters", "compressed clusters", false, func(t *testing.T) string {
			image := filepath.Join(t.TempDir(), "compressed")
			qemuTool(t, "qemu-img", "convert", "-c", "-O", "qcow2", filled()(t), image)
			return image
		}, misreads},
		{"zstd", "another method", false, filled("-o", "compression_type=zstd"), nil},
		{"shrunk", "it was shrunk", false, func(t *testing.T) string {
			image := makeImage(t, "-f", "qcow2", "4G")
			qemuTool(t, "qemu-img", "resize", "-q", "--shrink", image, "16M")
			return image
		}, refusesAnyway},
		{"small refcount table", "room for the refcounts", true, filled("-o", "cluster_size=512"), nil},
		{"zeroed cluster with space", "zeroed clusters", false, func(t *testing.T) string {
			image := filled()(t)
			// Behind the cluster that is read: one byte of it is what the handler gets from its neighbour.
			qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -z 0 64k", image)
			return image
		}, func(_ *testing.T, f *front, _ string) bool {
			got, err := f.read(0, 0, 4096)
			return err != nil || !bytes.Equal(got, make([]byte, 4096))
		}},
		{"dirty", "not closed properly", true, patched(79, qcowDirty), nil},
		{"corrupt", "marked as corrupt", true, patched(79, qcowCorrupt), nil},
		{"unknown feature", "does not know", false, patched(78, 1), nil},
		{"large clusters", "cluster_bits 21", false, filled("-o", "cluster_size=2M"), refusesAnyway},
		{"encrypted", "encrypted", false, patched(35, 1), refusesAnyway},
		{"L2 table elsewhere", "L2 table at", false, func(t *testing.T) string {
			image := filled()(t)
			img := mustParse(t, image)
			table := binary.BigEndian.AppendUint64(nil, 1<<40)
			return patchAt(t, image, int64(img.l1Offset), table)
		}, misreads},
	}
}

// mustParse reads an image's header.
func mustParse(t *testing.T, image string) *qcowImage {
	t.Helper()
	img, err := openQcow(image)
	if err != nil {
		t.Fatal(err)
	}
	img.close()
	return img
}

func patchAt(t *testing.T, image string, at int64, data []byte) string {
	t.Helper()
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
	return image
}

// TestGuardQcowPreflight: images that the handler reads wrongly, damages or dies of are refused with the reason and the
// cure, untouched, and served read-only where the handler reads them right.
func TestGuardQcowPreflight(t *testing.T) {
	for _, c := range qcowCases() {
		t.Run(c.name, func(t *testing.T) {
			f := startQcow(t)
			image := c.make(t)
			before, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image})
			wantErrno(t, err, syscall.EINVAL)
			for _, text := range []string{c.says, "run qemu-img", "guards=off"} {
				if err != nil && !strings.Contains(err.Error(), text) {
					t.Errorf("error %q does not say %q", err, text)
				}
			}
			if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
				t.Error("a refused open changed the image")
			}

			_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image, ReadOnly: true})
			if (err == nil) != c.ro {
				t.Errorf("read-only: %v", err)
			}
			if err == nil {
				if got, err := f.read(0, 8192, 4096); err != nil || !bytes.Equal(got, fiveA) {
					t.Errorf("read-only: error %v, data right: %v", err, bytes.Equal(got, fiveA))
				}
				if err := f.close(callCtx(t), 0); err != nil {
					t.Fatal(err)
				}
			}

			_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image, GuardsOff: true})
			if err != nil {
				wantErrno(t, err, syscall.EINVAL)
				return // a bug that harms nobody
			}
			if c.shows != nil && !c.shows(t, f, image) {
				t.Error("the bug is not there")
			}
		})
	}
}

// TestGuardQcowWholeClusters: a write of less than a cluster that is not in the image yet destroys what else the
// cluster shows. With the guard it does not.
func TestGuardQcowWholeClusters(t *testing.T) {
	for _, kind := range []string{"backing file", "zero clusters", "raw backing file"} {
		t.Run(kind, func(t *testing.T) {
			for _, guardsOff := range []bool{true, false} {
				base := filled("-o", "compat=1.1")(t)
				image := base + ".over"
				switch kind {
				case "zero clusters":
					image = base
					qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -z -u 0 16M", image)
				case "raw backing file":
					raw := base + ".raw"
					qemuTool(t, "qemu-img", "convert", "-O", "raw", base, raw)
					qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, image)
				default:
					qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", filepath.Base(base), image)
				}
				model := contents(t, image)
				f := startQcow(t)
				f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image, GuardsOff: guardsOff})
				for i, c := range []struct{ at, n int }{
					{4096, 4096}, {60 << 10, 512}, {64<<10 - 512, 1024}, {100 << 10, 200 << 10}, {8192, 512},
					{16<<20 - 4096, 4096}, {1<<20 + 512, 64<<10 - 512},
				} {
					data := pattern(byte(i), c.n)
					copy(model[c.at:], data)
					if err := f.write(0, uint64(c.at), data); err != nil {
						t.Fatal(err)
					}
				}
				if err := f.do(sqe{op: opZero, offset: 512, length: 512}); err != nil {
					t.Fatal(err)
				}
				clear(model[512:1024])
				if err := f.close(callCtx(t), 0); err != nil {
					t.Fatal(err)
				}
				right := bytes.Equal(contents(t, image), model)
				if right == guardsOff {
					t.Errorf("guards off %v: contents are right: %v", guardsOff, right)
				}
				if !guardsOff && !isSound(t, image) {
					t.Error("the image is not sound")
				}
			}
		})
	}
}

// TestGuardQcowBacking: backing files are checked and locked like images.
func TestGuardQcowBacking(t *testing.T) {
	f := startQcow(t)
	over := func(base string, options ...string) string {
		image := filepath.Join(t.TempDir(), "over")
		qemuTool(t, append(append([]string{"qemu-img", "create", "-q", "-f", "qcow2", "-b", base}, options...), image)...)
		return image
	}
	for _, c := range []struct{ name, image, says string }{
		{"other size", over(filled()(t), "-F", "qcow2"), ""},
		{"misread", over(filled("-o", "extended_l2=on,cluster_size=16k")(t), "-F", "qcow2"), "extended L2"},
		{"taken for qcow", over(filled()(t), "-F", "raw"), "takes it"},
	} {
		if c.name == "other size" {
			qemuTool(t, "qemu-img", "resize", "-q", c.image, "32M")
			c.says = "needs 33554432"
		}
		_, err := f.open(&hostpb.OpenRequest{Config: "qcow/" + c.image})
		wantErrno(t, err, syscall.EINVAL)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %q does not say %q", c.name, err, c.says)
		}
	}
	base := filled()(t)
	image := over(base, "-F", "qcow2")
	if err := os.Rename(base, base+".gone"); err != nil {
		t.Fatal(err)
	}
	_, err := f.open(&hostpb.OpenRequest{Config: "qcow/" + image})
	wantErrno(t, err, syscall.ENOENT)
}

// TestGuardQcowUncounted: an image as a process leaves it that dies after it has linked a cluster and before it has
// counted it. The handler gives the cluster out once more; with the guard it is counted first.
func TestGuardQcowUncounted(t *testing.T) {
	for _, c := range []struct {
		name    string
		options []string
		block   bool // the refcount block as a whole is not there
	}{
		{"entry", nil, false},
		{"entry of 1 bit", []string{"-o", "refcount_bits=1"}, false},
		{"entry of 8 bits", []string{"-o", "refcount_bits=8"}, false},
		{"block", []string{"-o", "cluster_size=4k"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, guardsOff := range []bool{true, false} {
				image := filled(c.options...)(t)
				uncount(t, image, c.block)
				model := contents(t, image)
				f := startQcow(t)
				f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image, GuardsOff: guardsOff})
				for i := range 8 {
					data := pattern(byte(i), 64<<10)
					copy(model[4<<20+i<<20:], data)
					if err := f.write(0, uint64(4<<20+i<<20), data); err != nil && !guardsOff {
						t.Fatal(err)
					}
				}
				if err := f.close(callCtx(t), 0); err != nil {
					t.Fatal(err)
				}
				if guardsOff {
					if bytes.Equal(contents(t, image), model) {
						t.Error("the bug is not there")
					}
					continue
				}
				f.awaitLog("clusters were in use and counted as free")
				if !bytes.Equal(contents(t, image), model) {
					t.Error("contents are wrong")
				}
				if !isSound(t, image) {
					t.Error("the image is not sound")
				}
			}
		})
	}
}

// uncount makes the second data cluster of an image count as free; with block, everything.
func uncount(t *testing.T, image string, block bool) {
	t.Helper()
	img := mustParse(t, image)
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := func(offset uint64) uint64 { return binary.BigEndian.Uint64(raw[offset:]) & qcowOffset }
	if block {
		patchAt(t, image, int64(img.refTable), make([]byte, 8))
		return
	}
	l2 := at(img.l1Offset)
	cluster := at(l2+8) >> img.clusterBits
	width := uint64(1) << img.refOrder
	place := at(img.refTable) + cluster*width/8
	entry := raw[place : place+max(width/8, 1)]
	if width < 8 {
		entry[0] &^= 1 << (cluster * width % 8)
	} else {
		clear(entry)
	}
	patchAt(t, image, int64(place), entry)
}

// TestGuardQcowSharedCluster: an image in which that has happened already is not made worse.
func TestGuardQcowSharedCluster(t *testing.T) {
	image := filled()(t)
	img := mustParse(t, image)
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	l2 := binary.BigEndian.Uint64(raw[img.l1Offset:]) & qcowOffset
	patchAt(t, image, int64(l2+8), raw[l2:l2+8])
	f := startQcow(t)
	_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image})
	wantErrno(t, err, syscall.EINVAL)
	if err != nil && !strings.Contains(err.Error(), "two things at once") {
		t.Errorf("error is %q", err)
	}
}

// TestGuardQcowBitmaps: persistent bitmaps that writes make wrong are declared so.
func TestGuardQcowBitmaps(t *testing.T) {
	for _, guardsOff := range []bool{true, false} {
		image := filled()(t)
		qemuTool(t, "qemu-img", "bitmap", "--add", image, "changes")
		f := startQcow(t)
		f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image, GuardsOff: guardsOff})
		if err := f.write(0, 0, pattern(1, 4096)); err != nil {
			t.Fatal(err)
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}
		if valid := mustParse(t, image).autoclear != 0; valid != guardsOff {
			t.Errorf("guards off %v: bitmaps are valid: %v", guardsOff, valid)
		}
		if !guardsOff {
			f.awaitLog("persistent bitmaps")
		}
	}
}

// TestGuardQcowLock: qemu and we do not write an image at the same time, whoever comes first.
func TestGuardQcowLock(t *testing.T) {
	base := filled()(t)
	image := base + ".over"
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
	raw := makeFile(t, fiveA, 1<<20)
	qemuWrites := func(format, path string) bool {
		return exec.Command("qemu-io", "-f", format, "-c", "write 0 512", path).Run() == nil
	}
	f := startQcow(t)
	for _, c := range []struct {
		image, format, locked string
	}{{image, "qcow2", image}, {image, "qcow2", base}, {raw, "raw", raw}} {
		f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + c.image})
		if qemuWrites(c.format, c.locked) {
			t.Errorf("%s: qemu writes what we have open", c.locked)
		}
		if c.format == "qcow2" {
			qemuTool(t, "qemu-img", "info", "-U", c.locked)
		}
		other := startQcow(t)
		_, err := other.open(&hostpb.OpenRequest{Config: "qcow/" + c.image})
		wantErrno(t, err, syscall.EBUSY)
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}

		f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + c.image, GuardsOff: true})
		if c.format != "qcow2" && !qemuWrites(c.format, c.locked) {
			t.Errorf("%s: the bug is not there", c.locked)
		}
		if err := f.close(callCtx(t), 0); err != nil {
			t.Fatal(err)
		}
		if c.locked == c.image && !qemuWrites(c.format, c.locked) {
			t.Errorf("%s: still locked after close", c.locked)
		}
	}

	qemu := exec.Command("qemu-io", "-f", "qcow2", image)
	in, err := qemu.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = qemu.Wait() }()
	defer in.Close()
	stop := time.AfterFunc(testDeadline, func() { _ = qemu.Process.Kill() })
	defer stop.Stop()
	if _, err := in.Write([]byte("read 0 512\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image})
	wantErrno(t, err, syscall.EBUSY)
	if err != nil && !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("error is %q", err)
	}
	_, err = f.open(&hostpb.OpenRequest{Config: "qcow/" + image, ReadOnly: true})
	wantErrno(t, err, syscall.EBUSY)
}

// TestGuardQcowLookups: the device is opened again before the handler's counters overflow, unnoticed by requests in
// flight. The host of the tests does that every thousand clusters.
func TestGuardQcowLookups(t *testing.T) {
	image := makeImage(t, "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", "4M")
	f := startQcow(t)
	f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image})
	model := exercise(t, f, 4<<20, 512, 120)
	if n := strings.Count(f.log.String(), "opening the image again"); n < 2 {
		t.Errorf("opened again %d times", n)
	}
	if err := f.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
	if !isSound(t, image) || !bytes.Equal(contents(t, image), model) {
		t.Error("the image is damaged, or its contents are wrong")
	}
}

// TestGuardQcowReopen: a device whose image has been changed by a death in the middle comes back with what was linked
// counted, and a killed host leaves no lock behind.
func TestGuardQcowReopen(t *testing.T) {
	image := filled()(t)
	f := startQcow(t)
	f.mustOpen(&hostpb.OpenRequest{Config: "qcow/" + image})
	if err := f.write(0, 1<<20, pattern(1, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := f.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, err := f.open(&hostpb.OpenRequest{Device: 1, Config: "qcow/" + image})
	if !errors.Is(err, control.ErrHostGone) {
		t.Fatalf("got %v", err)
	}
	uncount(t, image, false)
	next := startQcow(t)
	deadline := time.Now().Add(testDeadline)
	for {
		_, err := next.open(&hostpb.OpenRequest{Config: "qcow/" + image, Reopen: true})
		if err == nil {
			break
		}
		// The connection can end a little before the process, and its locks, do.
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	next.awaitLog("clusters were in use and counted as free")
	if err := next.close(callCtx(t), 0); err != nil {
		t.Fatal(err)
	}
	if !isSound(t, image) {
		t.Error("the image is not sound")
	}
}
