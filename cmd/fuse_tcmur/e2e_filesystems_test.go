// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mkfsAndMount makes an ext4 file system on a device and mounts it.
func (b *bed) mkfsAndMount(f *front, device string) (mountpoint string) {
	b.Helper()
	b.run("mkfs.ext4", "-q", "-F", f.path(device))
	return b.mountDevice(f.path(device))
}

// mountDevice mounts a device node or image file below the bed, with mount(8) as a user would.
func (b *bed) mountDevice(path string, options ...string) (mountpoint string) {
	b.Helper()
	mountpoint = filepath.Join(b.mounts, "on-"+filepath.Base(path))
	if err := os.MkdirAll(mountpoint, 0o755); err != nil {
		b.Fatal(err)
	}
	b.run("mount", append(options, path, mountpoint)...)
	return mountpoint
}

// dropCache makes the next reads of a file come from its device.
func (b *bed) dropCache(path string) {
	b.Helper()
	file, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	if err := unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

// fileSystem is one that is made on a device and checked there.
type fileSystem struct {
	name  string
	mkfs  []string
	check []string // must find nothing to repair, and repair nothing
}

// TestE2EFileSystems takes the tour that users take, for each handler and file system: make a device, put a file system
// on it, copy a source tree there, compare, check, remove the device and look at what is left in its backing file.
func TestE2EFileSystems(t *testing.T) {
	sources := []string{"net", "runtime"}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(strings.TrimSpace(string(goroot)), "src")
	for _, fs := range []fileSystem{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-f", "-n"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, []string{"btrfs", "check", "--readonly"}},
	} {
		for _, subtype := range []string{"ram", "file", "qcow"} {
			t.Run(fs.name+"-"+subtype, func(t *testing.T) {
				t.Parallel()
				b := newBed(t, 180*time.Second)
				f := b.start()
				image := filepath.Join(b.TempDir(), "image")
				add := "add 1 size=512M /ram/@"
				switch subtype {
				case "file":
					add = "add 1 size=512M /file/" + image
				case "qcow":
					b.run("qemu-img", "create", "-q", "-f", "qcow2", image, "2G")
					add = "add 1 /qcow/" + image // the size is in the image
				}
				f.must("load " + subtype + "\n" + add)
				node := f.path(subtype + "001")

				b.run(fs.mkfs[0], append(fs.mkfs[1:], node)...)
				mountpoint := b.mountDevice(node)
				for _, dir := range sources {
					b.run("cp", "-r", filepath.Join(root, dir), mountpoint)
				}
				b.compare(root, mountpoint, sources)
				b.run("umount", mountpoint)
				b.dropCache(node)
				b.run(fs.check[0], append(fs.check[1:], node)...)
				b.dropCache(node)
				b.mountDevice(node, "-o", "ro")
				b.compare(root, mountpoint, sources)
				b.run("umount", mountpoint)
				f.must("remove 1")

				switch subtype {
				case "ram":
					return
				case "qcow":
					b.run("qemu-img", "check", "-q", image)
					b.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, image+".raw")
					image += ".raw"
				}
				b.run(fs.check[0], append(fs.check[1:], image)...)
				mountpoint = b.mountDevice(image, "-o", "loop,ro")
				b.compare(root, mountpoint, sources)
				b.run("umount", mountpoint)
			})
		}
	}
}

// compare compares directories below a with those below b.
func (b *bed) compare(from, to string, dirs []string) {
	b.Helper()
	for _, dir := range dirs {
		b.run("diff", "-r", filepath.Join(from, dir), filepath.Join(to, dir))
	}
}

// TestE2EReadOnlyFileSystem mounts a device that was added read-only.
func TestE2EReadOnlyFileSystem(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	image := filepath.Join(b.TempDir(), "image")
	f.must("load file\nadd 0 size=64M /file/" + image)
	mountpoint := b.mkfsAndMount(f, "file000")
	if err := os.WriteFile(mountpoint+"/file", []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.run("umount", mountpoint)
	f.must("remove 0\nadd 0 ro /file/" + image)
	mountpoint = b.mountDevice(f.path("file000"), "-o", "ro")
	if text, err := os.ReadFile(mountpoint + "/file"); string(text) != "kept" || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	// A mounted device is in use: by whom is what the user has to know.
	out, err := f.ctl("remove 0")
	if err == nil || !strings.Contains(out, "/dev/loop") || !strings.Contains(out, mountpoint) {
		t.Errorf("remove of a mounted device: %v, %q; want the loop device and %s", err, out, mountpoint)
	}
	b.run("umount", mountpoint)
	b.run("e2fsck", "-fn", f.path("file000"))
	f.must(fmt.Sprintf("remove %d", 0))
}
