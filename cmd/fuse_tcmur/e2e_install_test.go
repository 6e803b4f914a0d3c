// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// What make install, make uninstall and make deb do, in directories of the test's own.

// files lists the files below dir.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			found = append(found, strings.TrimPrefix(path, dir))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// make runs make in the source tree.
func (b *bed) make(args ...string) {
	b.Helper()
	b.run("make", append([]string{"--no-print-directory", "-C", testbed.Root()}, args...)...)
}

// wantInstalledServes starts the front that is installed below prefix, without telling it where anything is.
func (b *bed) wantInstalledServes(prefix string) {
	b.Helper()
	mount := b.mounts + "/installed"
	cmd := b.command("bash", "-euc", `"$P/bin/fuse_tcmur" --config= --mountpoint "$M" -c 'load ram' -c 'add 0 /ram/@/1M' &
		until [ -e "$M/dev/ram000" ]; do kill -0 $!; sleep 0.05; done
		echo hello > "$M/dev/ram000"; read -r line < "$M/dev/ram000"; [ "$line" = hello ]
		"$P/bin/fuse_tcmur" ctl --mountpoint "$M" exit; wait $!`)
	cmd.Env = append(os.Environ(), b.mark, "TMPDIR="+b.sockets, "P="+prefix, "M="+mount)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Errorf("what is installed below %s does not serve: %v\n%s", prefix, err, out)
	}
}

// TestInstall: what is installed works where it is, the unit is one that systemd understands, and uninstall leaves
// nothing.
func TestInstall(t *testing.T) {
	b := newBed(t, 2*time.Minute)
	prefix := t.TempDir() + "/usr/local"
	b.make("install", "PREFIX="+prefix)
	want := []string{
		"/bin/fuse_tcmur", "/bin/tcmur-host", "/lib/systemd/system/fuse_tcmur.service",
		"/lib/tcmu-runner/handler_file.so", "/lib/tcmu-runner/handler_ram.so",
		"/share/bash-completion/completions/fuse_tcmur", "/share/fish/vendor_completions.d/fuse_tcmur.fish",
		"/share/man/man1/fuse_tcmur.1", "/share/man/man3/fuse_tree.3", "/share/man/man3/libtcmur.3",
		"/share/man/man8/tcmur-host.8", "/share/zsh/site-functions/_fuse_tcmur",
	}
	if got := files(t, prefix); !slices.Equal(got, want) {
		t.Errorf("installed: %q\nwant %q", got, want)
	}
	b.wantInstalledServes(prefix)
	unit := prefix + "/lib/systemd/system/fuse_tcmur.service"
	out, err := b.try("systemd-analyze", "verify", "--man=no", unit)
	if err != nil || strings.Contains(out, "fuse_tcmur") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	b.run("bash", "-n", prefix+"/share/bash-completion/completions/fuse_tcmur")
	b.make("uninstall", "PREFIX="+prefix)
	if left := files(t, prefix); len(left) > 0 {
		t.Errorf("uninstall leaves %q", left)
	}
	dest := t.TempDir() + "/dest"
	b.make("install", "DESTDIR="+dest, "PREFIX=/usr")
	if text, _ := os.ReadFile(dest + "/usr/lib/systemd/system/fuse_tcmur.service"); !strings.Contains(string(text),
		"ExecStart=/usr/bin/fuse_tcmur\n") {
		t.Errorf("with DESTDIR the unit is\n%s", text)
	}
	b.make("uninstall", "DESTDIR="+dest, "PREFIX=/usr")
	if entries, err := os.ReadDir(dest); err != nil || len(entries) > 0 {
		t.Errorf("uninstall leaves %v in DESTDIR, %v", entries, err)
	}
}

// TestUnitHasNoMountNamespace: each of these settings would keep the mount from the rest of the system.
func TestUnitHasNoMountNamespace(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(testbed.Root(), "cmd/fuse_tcmur/systemd/fuse_tcmur.service.in"))
	if err != nil {
		t.Fatal(err)
	}
	namespace := regexp.MustCompile(`(?m)^(Private(Tmp|Devices|Mounts|Users|IPC|Network)|Protect(System|Home|Proc|Clock|` +
		`Kernel\w+|ControlGroups|Hostname)|Root\w+|DynamicUser|MountAPIVFS|Mount\w+|\w+Paths|\w+Directory|Temporary\w+)=`)
	if found := namespace.FindAllString(string(text), -1); len(found) > 0 {
		t.Errorf("the unit has %q", found)
	}
	for _, line := range []string{
		"Type=notify", "ExecStop=-@BINDIR@/fuse_tcmur release", "WatchdogSec=30", "KillMode=mixed", "NoNewPrivileges=yes",
	} {
		if !strings.Contains(string(text), "\n"+line+"\n") {
			t.Errorf("the unit does not have %s", line)
		}
	}
}

// TestDebianPackage: the package installs into an empty root, serves there, and leaves nothing when it is purged.
func TestDebianPackage(t *testing.T) {
	b := newBed(t, 4*time.Minute)
	b.make("deb")
	deb := filepath.Join(testbed.Root(), "fuse-tcmur.deb")
	t.Cleanup(func() { os.Remove(deb) })
	root := t.TempDir()
	for _, dir := range []string{"info", "updates", "triggers"} {
		if err := os.MkdirAll(root+"/var/lib/dpkg/"+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"status", "available"} {
		if err := os.WriteFile(root+"/var/lib/dpkg/"+file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// There is no shell in the root, and none of what the package depends on.
	dpkg := []string{"--root=" + root, "--force-script-chrootless", "--force-depends", "--log=/dev/null"}
	b.run("dpkg", append(dpkg, "--install", deb)...)
	if out := b.run("dpkg-query", "--admindir="+root+"/var/lib/dpkg", "-W", "-f", "${db:Status-Status}",
		"fuse-tcmur"); out != "installed" {
		t.Errorf("the package is %q", out)
	}
	b.wantInstalledServes(root + "/usr")
	if err := os.WriteFile(root+"/etc/tcmur/tcmur.conf", []byte("load ram\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.run("dpkg", append(dpkg, "--remove", "fuse-tcmur")...)
	if _, err := os.Stat(root + "/etc/tcmur/tcmur.conf"); err != nil {
		t.Errorf("remove, unlike purge, keeps the configuration: %v", err)
	}
	b.run("dpkg", append(dpkg, "--purge", "fuse-tcmur")...)
	for _, file := range files(t, root) {
		if !strings.HasPrefix(file, "/var/lib/dpkg/") {
			t.Errorf("purge leaves %s", file)
		}
	}
	if entries, _ := os.ReadDir(root); len(entries) != 1 {
		t.Errorf("purge leaves %v", entries)
	}
}

// TestRelease: whatever uses the devices is unmounted, the innermost first, and what is in use is named and stays.
func TestRelease(t *testing.T) {
	b := newBed(t, time.Minute)
	f := b.start("-c", "load ram", "-c", "add 0 /ram/@/64M", "-c", "add 1 /ram/@/32M", "-c", "add 2 /ram/@/16M")
	program := testbed.Program(t, "fuse_tcmur")
	for _, device := range []string{"ram000", "ram001"} {
		b.run("mkfs.ext4", "-q", f.path(device))
	}
	outer := b.mounts + "/outer"
	inner := outer + "/inner"
	if err := os.Mkdir(outer, 0o755); err != nil {
		t.Fatal(err)
	}
	b.run("mount", f.path("ram000"), outer)
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	b.run("mount", f.path("ram001"), inner)
	b.run("losetup", "-f", f.path("ram002"))
	busy, err := os.Create(inner + "/busy")
	if err != nil {
		t.Fatal(err)
	}
	out, err := b.try(program, "release", "--mountpoint", f.mount)
	if err == nil || !strings.Contains(out, inner+" cannot be unmounted") || !strings.Contains(out, "used by: process ") {
		t.Errorf("release with an open file: %v\n%s", err, out)
	}
	busy.Close()
	b.run(program, "release", "--mountpoint", f.mount)
	if left := b.mountsBelow(outer); len(left) > 0 {
		t.Errorf("still mounted: %v", left)
	}
	if left := loopsBelow(f.mount); len(left) > 0 {
		t.Errorf("loop devices are left: %q", left)
	}
	b.run(program, "release", "--mountpoint", f.mount) // nothing to do is fine
	f.must("exit")
	f.wantExit(0)
}
