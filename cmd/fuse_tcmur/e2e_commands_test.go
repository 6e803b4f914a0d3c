// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// writeText makes a file below the bed, but not in a mount.
func (b *bed) writeText(name, text string) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

// TestE2ECommandErrors goes through the errors of fuse_tcmur(1), and of libtcmur(3) as far as commands can cause them:
// each twice, once for the text and once in a shell for the exit status and the message.
func TestE2ECommandErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t, 90*time.Second, "fault", "noinit", "initfails", "initdies")
	broken := filepath.Join(b.TempDir(), "handler_")
	if err := os.WriteFile(broken+"broken.so", []byte("not ELF"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := b.start("--handler-prefix", broken)
	f.must("load ram\nload fault\nadd 0 /ram/@")
	held := f.open("ram000", os.O_RDONLY)
	failing := b.writeText("failing", "echo one\n\nload ram\necho two\n")
	itself := b.writeText("itself", "")
	if err := os.WriteFile(itself, []byte("source "+itself), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(b.TempDir(), "link")
	if err := os.Symlink(f.mount, link); err != nil {
		t.Fatal(err)
	}
	before := namesIn(dumpOf(f))

	for _, tt := range []struct {
		command string
		errno   syscall.Errno
		texts   []string
	}{
		{"load nosuch", syscall.ENOENT, []string{"load", "handler_nosuch.so"}},
		{"load broken", syscall.ENOENT, []string{"handler_broken.so"}},
		{"load noinit", syscall.EBADF, []string{"handler_init"}},
		{"load initfails", syscall.EIO, []string{"on fire"}},
		{"load initdies", syscall.EIO, []string{"handler_init"}},
		{"load ram", syscall.EEXIST, []string{"ram"}},
		{"load", syscall.EINVAL, []string{"missing"}},
		{"load ram file", syscall.EINVAL, []string{"one"}},
		{"load ../handlers/ram", syscall.EINVAL, nil},
		{"unload file", syscall.ENOENT, []string{"file"}},
		{"unload ram", syscall.EBUSY, []string{"ram000"}},
		{"unload", syscall.EINVAL, nil},
		{"add 0 /nosuch/x", syscall.ENXIO, []string{"nosuch", "load"}},
		{"add 1 /ra/@", syscall.ENXIO, nil},
		{"add 1 ram/@", syscall.EINVAL, []string{"'/'"}},
		{"add 1 /ram/" + strings.Repeat("x", 4096), syscall.EINVAL, []string{"long"}},
		{"add 1 /ram/@/huge", syscall.EINVAL, []string{"512M"}},
		{"add 1 /fault/check=1", syscall.EINVAL, []string{"told to refuse"}},
		{"add 1 /fault/open=-13", syscall.EACCES, []string{"told to fail"}},
		{"add 1 /file//nonexistent/image", syscall.ENXIO, []string{"file"}},
		{"add 0 /ram/@/1M", syscall.EBUSY, []string{"ram000"}},
		{"add 1 /ram/@", syscall.EEXIST, []string{"ram000"}},
		{"add 256 /ram/@/1M", syscall.ENODEV, []string{"255"}},
		{"add -1 /ram/@/1M", syscall.ENODEV, []string{"-1"}},
		{"add 0x100000000 /ram/@/1M", syscall.ENODEV, nil},
		{"add 08 /ram/@/1M", syscall.EINVAL, []string{"08"}},
		{"add one /ram/@/1M", syscall.EINVAL, []string{"one"}},
		{"add /ram/@/1M", syscall.EINVAL, []string{"minor"}},
		{"add 1", syscall.EINVAL, []string{"config"}},
		{"add", syscall.EINVAL, []string{"minor"}},
		{"add 1 size=none /ram/@/1M", syscall.EINVAL, []string{"size", "none"}},
		{"add 1 size= /ram/@/1M", syscall.EINVAL, []string{"size=BYTES"}},
		{"add 1 size=0 /ram/@/1M", syscall.EINVAL, []string{"0"}},
		{"add 1 size=1M size=1M /ram/@/1M", syscall.EINVAL, []string{"twice"}},
		{"add 1 block_size=1000 /ram/@/1M", syscall.EINVAL, []string{"1000"}},
		{"add 1 max_xfer=2M /ram/@/1M", syscall.EINVAL, []string{"max_xfer"}},
		{"add 1 ro=yes /ram/@/1M", syscall.EINVAL, []string{"ro"}},
		{"add 1 colour=red /ram/@/1M", syscall.EINVAL, []string{"colour", "block_size"}},
		{"remove 1", syscall.ENODEV, []string{"1"}},
		{"remove 4711", syscall.ENODEV, []string{"4711"}},
		{"remove", syscall.EINVAL, nil},
		{"remove 0 1", syscall.EINVAL, nil},
		{"remove 0", syscall.EBUSY, []string{"ram000", "open once", fmt.Sprintf("process %d", os.Getpid())}},
		{"exit", syscall.EBUSY, []string{"ram000"}},
		{"exit now", syscall.EINVAL, []string{"now"}},
		{"dump all", syscall.EINVAL, []string{"all"}},
		{"help me", syscall.EINVAL, []string{"me"}},
		{"source", syscall.EINVAL, []string{"missing"}},
		{"source commands", syscall.EINVAL, []string{"absolute"}},
		{"source /nonexistent/commands", syscall.ENOENT, []string{"/nonexistent/commands"}},
		{"source /tmp", syscall.EINVAL, []string{"regular"}},
		{"source /dev/zero", syscall.EINVAL, []string{"regular"}},
		{"source " + failing, syscall.EEXIST, []string{"one\n", "two\n", failing + ":3: "}},
		{"source " + itself, syscall.ELOOP, []string{"deep"}},
		{"source " + f.ctlPath(), syscall.EDEADLK, []string{"own mount"}},
		{"source " + f.path("ram000"), syscall.EDEADLK, []string{"own mount"}},
		{"source " + link + "/dev/../sys/../dev/tcmur", syscall.EDEADLK, []string{"own mount"}},
		{"nonsense", syscall.EINVAL, []string{"nonsense", "help"}},
		{"e", syscall.EINVAL, []string{"echo", "exit"}},
	} {
		f.refused(tt.command, tt.errno, tt.texts...)
		if len(tt.command) > 4000 {
			continue // shells cut it in two
		}
		out, status := b.shell(f, "echo '"+tt.command+"' > $M/dev/tcmur")
		// Shells use the C library's words, Go its own, which differ in case only.
		if status == 0 || !strings.Contains(strings.ToLower(out), strings.ToLower(tt.errno.Error())) {
			t.Errorf("%.60q in a shell: status %d, message %q, want %q", tt.command, status, out, tt.errno)
		}
		f.wantLog("command failed", strings.Fields(tt.command)[0])
	}
	f.refused("echo \x00", syscall.EINVAL, "NUL")
	f.refused(strings.Repeat("# a long comment\n", 100_000), syscall.EINVAL, "source")

	if after := namesIn(dumpOf(f)); !slices.Equal(after, before) {
		t.Errorf("commands that failed changed the tree from %q to %q", before, after)
	}
	if !strings.Contains(dumpOf(f), "last failure: ") {
		t.Error("the node does not tell the last failure")
	}
	held.Close()
	f.must("remove 0")

	// A device whose last flush fails is gone, and whoever removes it is told.
	f.must("add 5 /fault/flush=4")
	f.refused("remove 5", syscall.EIO, "flush")
	f.refused("remove 5", syscall.ENODEV)
}

// dumpOf reads the node as somebody does who has written nothing to it.
func dumpOf(f *front) string {
	f.Helper()
	text, err := os.ReadFile(f.ctlPath())
	if err != nil {
		f.Fatal(err)
	}
	return string(text)
}

// namesIn is the last column of the tree in a dump: which nodes there are. What follows it is cut off.
func namesIn(dump string) []string {
	tree, _, _ := strings.Cut(dump, "\nlast failure:")
	tree, _, _ = strings.Cut(tree, "\nHANDLER")
	var names []string
	for line := range strings.Lines(tree) {
		fields := strings.Fields(line)
		names = append(names, fields[len(fields)-1])
	}
	return names
}

// TestE2EHandlerSlots is the ENOSPC of load.
func TestE2EHandlerSlots(t *testing.T) {
	t.Parallel()
	b := newBed(t, 120*time.Second)
	prefix := manySubtypes(b, plugin.MaxHandlers+1)
	f := b.start("--handler-prefix", prefix)
	for i := range plugin.MaxHandlers {
		f.load(fmt.Sprintf("h%d", i))
	}
	f.refused("load h64", syscall.ENOSPC, "64")
	f.must("unload h7\nload h64")
}

// manySubtypes makes handlers h0, h1, ... out of one by putting another subtype into the binary.
func manySubtypes(b *bed, n int) (prefix string) {
	b.Helper()
	library, err := os.ReadFile(testbed.BuildHandlers(b, "fault") + "fault.so")
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	for i := range n {
		name := fmt.Sprintf("h%d", i)
		subtype := append([]byte{0}, (name + "\x00\x00\x00\x00\x00")[:6]...)
		renamed := bytes.ReplaceAll(library, []byte("\x00fault\x00"), subtype)
		if err := os.WriteFile(filepath.Join(dir, "handler_"+name+".so"), renamed, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	return dir + "/handler_"
}

// TestE2ECommands goes through what works: every command, the forms they may take, and what they print.
func TestE2ECommands(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	exists := func(path string) bool {
		_, err := os.Stat(f.mount + path)
		return err == nil
	}

	f.load("ram")
	if entries, err := os.ReadDir(f.mount + "/sys/modules/ram"); err != nil || len(entries) != 0 {
		t.Errorf("sys/modules/ram: %v, %v; want an empty directory", entries, err)
	}
	if out := f.must("add 0 size=64M block_size=4096 /ram/@"); !strings.Contains(out, f.path("ram000")) {
		t.Errorf("add does not say where the device is: %q", out)
	}
	info, err := os.Stat(f.path("ram000"))
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	if !info.Mode().IsRegular() || info.Mode().Perm() != 0o660 || info.Size() != 64<<20 || stat.Blksize != 4096 {
		t.Errorf("ram000: mode %v, size %d, block size %d", info.Mode(), info.Size(), stat.Blksize)
	}
	info, err = os.Stat(f.ctlPath())
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 || info.Sys().(*syscall.Stat_t).Blksize != 4096 {
		t.Errorf("tcmur: mode %v, block size %d", info.Mode(), info.Sys().(*syscall.Stat_t).Blksize)
	}

	// Forms of commands: case, abbreviation, blanks, comments, several in one write, numbers in C's three bases.
	out := f.must("# a comment\n\n  LOAD\tfile   # another\r\nAd 0x0a /ram/@/1M\n" +
		"ADD 011 max_xfer=64k /ram/@/2M\nEcho  a  #b\n")
	for _, path := range []string{"/sys/modules/file", "/dev/ram010", "/dev/ram009"} {
		if !exists(path) {
			t.Errorf("%s is missing", path)
		}
	}
	if !strings.HasSuffix(out, "a\n") {
		t.Errorf("echo printed %q", out)
	}
	f.must("rem 10")
	f.must("rem 9\nun file")
	if exists("/dev/ram010") || exists("/dev/ram009") || exists("/sys/modules/file") {
		t.Error("remove or unload left its node")
	}

	// A failing line decides the errno; the others run all the same.
	f.refused("load nosuch\nload file\nadd 0 /nosuch/x\nadd 3 /ram/@/3M", syscall.ENOENT, "line 1: ", "line 3: ")
	if !exists("/sys/modules/file") || !exists("/dev/ram003") {
		t.Error("lines after a failing one did not run")
	}

	for _, name := range []string{"load", "unload", "add", "remove", "help", "source", "dump", "echo", "exit"} {
		if out := f.must("help"); !strings.Contains(out, "\n  "+name) && !strings.HasPrefix(out, "  "+name) {
			t.Errorf("help does not tell of %s:\n%s", name, out)
		}
		if out := f.must("help " + name); !strings.HasPrefix(out, name) {
			t.Errorf("help %s: %q", name, out)
		}
	}
	if out := f.must("help add"); !strings.Contains(out, "size=BYTES") {
		t.Errorf("help add does not tell of size=: %q", out)
	}

	dump := f.must("dump")
	for _, name := range []string{"ram000", "ram003", "modules", "tcmur"} {
		if !strings.Contains(dump, name) {
			t.Errorf("dump does not show %s:\n%s", name, dump)
		}
	}
	if fresh := dumpOf(f); !slices.Equal(namesIn(fresh), namesIn(dump)) {
		t.Errorf("a fresh descriptor reads\n%s\nbut dump says\n%s", fresh, dump)
	}

	inner := b.writeText("inner", "echo from inside\nadd 4 /ram/@/4M\n")
	outer := b.writeText("outer", "echo first\nsource "+inner+"\nremove 4\n")
	if out := f.must("source " + outer); !strings.HasPrefix(out, "first\nfrom inside\nram004") || exists("/dev/ram004") {
		t.Errorf("source printed %q", out)
	}
	// A command file can be copied to the node as well.
	if out, status := b.shell(f, "cat "+inner+" > $M/dev/tcmur && cp "+
		b.writeText("removal", "remove 4\n")+" $M/dev/tcmur"); status != 0 {
		t.Errorf("cat and cp to the node: %s", out)
	}

	f.commandsInShell(b)
	f.treeIsFixed()

	for _, want := range []string{"load nosuch", "from inside", "handler=ram", "device=ram003"} {
		f.wantLog(want)
	}
	if out, status := b.shell(f, "echo exit > $M/dev/tcmur"); status != 0 {
		t.Errorf("exit: %s", out)
	}
	f.wantExit(0)
	b.wantNothingLeft()
	if exists("/..") {
		t.Error("the mount point, which the front made, is still there")
	}
}

// commandsInShell has a shell use one descriptor for a dialogue, as the hints tell users to.
func (f *front) commandsInShell(b *bed) {
	f.Helper()
	out, status := b.shell(f, `exec 3<>$M/dev/tcmur; echo echo hello >&3; cat <&3; echo load nosuch >&3 2>/dev/null
		echo $?; cat <&3; exec 3>&-`)
	lines := strings.Split(out, "\n")
	if status != 0 || len(lines) != 4 || lines[0] != "hello" || !strings.Contains(out, "handler_nosuch.so") {
		f.Errorf("dialogue: status %d\n%s", status, out)
	}
}

// treeIsFixed tries what only commands can do.
func (f *front) treeIsFixed() {
	f.Helper()
	for what, err := range map[string]error{
		"mkdir":  os.Mkdir(f.mount+"/dev/new", 0o755),
		"create": os.WriteFile(f.mount+"/dev/new", nil, 0o600),
		"unlink": os.Remove(f.path("ram000")),
		"rename": os.Rename(f.path("ram000"), f.path("ram001")),
		"chmod":  os.Chmod(f.path("ram000"), 0o666),
		"chown":  os.Chown(f.ctlPath(), 1, 1),
	} {
		if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES) {
			f.Errorf("%s in the mount: %v, want EPERM", what, err)
		}
	}
	if _, err := os.Stat(f.path("ram200")); !errors.Is(err, syscall.ENOENT) {
		f.Errorf("a device that is not there: %v", err)
	}
}

// TestE2ESeedExamples types what the announcement and its man page show. There are no flags but the mount point.
func TestE2ESeedExamples(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.launch(filepath.Join(b.mounts, "tcmur"))
	f.awaitServing()
	for _, command := range []string{
		`echo "load ram" > $M/dev/tcmur`,
		`echo "add 0 /ram/@" > $M/dev/tcmur`,
		`test -d $M/sys/modules/ram && test -f $M/dev/ram000`,
		`head -c 3000000 /dev/urandom > $W/in`,
		`dd if=$W/in of=$M/dev/ram000 conv=notrunc`,
		`dd if=$M/dev/ram000 of=$W/out bs=1000000 count=3`,
		`cmp $W/in $W/out`,
		`mkfs.ext4 -q $M/dev/ram000`,
		`mkdir -p $W/mnt/k && mount $M/dev/ram000 $W/mnt/k`,
		`cp $W/in $W/mnt/k/file && ls -l $W/mnt/k/file && cmp $W/in $W/mnt/k/file`,
		`umount $W/mnt/k`,
		`mount $M/dev/ram000 $W/mnt/k && cmp $W/in $W/mnt/k/file && umount $W/mnt/k`,
		`cat $M/dev/tcmur`,
		`cat <<< dump > $M/dev/tcmur`,
		`echo "help" > $M/dev/tcmur`,
		`echo "remove 0" > $W/commands; echo "unload ram" >> $W/commands`,
		`echo "source $W/commands" > $M/dev/tcmur`,
		`test ! -e $M/dev/ram000 && test ! -e $M/sys/modules/ram`,
		`echo "exit" > $M/dev/tcmur`,
	} {
		if out, status := b.shell(f, command); status != 0 {
			t.Fatalf("%s\nended with status %d:\n%s", command, status, out)
		}
	}
	f.wantExit(0)
	b.wantNothingLeft()
}
