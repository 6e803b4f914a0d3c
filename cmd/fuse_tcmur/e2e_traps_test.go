// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What Linux block devices let their users do, and FUSE makes hard: docs/testing.md lists each trap with its test.

// trapDevices starts a front with a ram and a file device of the same size.
func trapDevices(t *testing.T, size int64) (f *front, devices []string) {
	t.Helper()
	b := newBed(t, 90*time.Second)
	f = b.start()
	f.must(fmt.Sprintf("load ram\nload file\nadd 0 /ram/@/%d\nadd 1 size=%d /file/%s",
		size, size, filepath.Join(b.TempDir(), "image")))
	return f, []string{"ram000", "file001"}
}

// fill writes a pattern to the whole device, past the page cache, and returns it.
func (f *front) fill(device string, size int, seed byte) []byte {
	f.Helper()
	file := f.open(device, os.O_RDWR|unix.O_DIRECT)
	defer file.Close()
	model := pattern(size, seed)
	if _, err := file.WriteAt(model, 0); err != nil {
		f.Fatal(err)
	}
	return model
}

// wantContents compares the whole device with the model, as read past the page cache.
func (f *front) wantContents(device, what string, model []byte) {
	f.Helper()
	file := f.open(device, os.O_RDONLY|unix.O_DIRECT)
	defer file.Close()
	got := make([]byte, len(model)+1)
	n, err := file.ReadAt(got, 0)
	if n != len(model) || !errors.Is(err, io.EOF) {
		f.Fatalf("%s, %s: read %d bytes, %v; want %d and the end", device, what, n, err, len(model))
	}
	for i := range model {
		if got[i] != model[i] {
			f.Fatalf("%s, %s: differs from byte %d on", device, what, i)
		}
	}
}

// TestE2EMmap: a shared mapping changes the device, a private one does not; both show what others write.
func TestE2EMmap(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	f, devices := trapDevices(t, size)
	for _, device := range devices {
		model := f.fill(device, size, 1)
		file := f.open(device, os.O_RDWR)
		var shared, private []byte
		for _, m := range []struct {
			mapping *[]byte
			flag    int
		}{{&shared, unix.MAP_SHARED}, {&private, unix.MAP_PRIVATE}} {
			var err error
			*m.mapping, err = unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, m.flag)
			if err != nil {
				t.Fatalf("%s: mmap with flags %d: %v", device, m.flag, err)
			}
			if !bytes.Equal(*m.mapping, model) {
				t.Errorf("%s: a mapping with flags %d shows something else than the device has", device, m.flag)
			}
		}
		copy(shared[5000:], "shared")
		copy(model[5000:], "shared")
		copy(private[9000:], "private")
		if err := unix.Msync(shared, unix.MS_SYNC); err != nil {
			t.Errorf("%s: msync: %v", device, err)
		}
		f.wantContents(device, "after a change of the mappings", model)
		// A page that a private mapping has not written to is the device's.
		if _, err := file.WriteAt([]byte("write"), 20_000); err != nil {
			t.Error(err)
		}
		copy(model[20_000:], "write")
		if string(shared[20_000:20_005]) != "write" || string(private[20_000:20_005]) != "write" {
			t.Errorf("%s: the mappings do not show a write(2)", device)
		}
		if string(private[9000:9007]) != "private" || !bytes.Equal(shared, model) {
			t.Errorf("%s: the mappings are not what they should be", device)
		}
		if err := errors.Join(unix.Munmap(shared), unix.Munmap(private)); err != nil {
			t.Error(err)
		}
		file.Close()
		f.wantContents(device, "after munmap", model)
		// Past the page cache there is nothing to map shared, but it must be an error and no hang.
		direct := f.open(device, os.O_RDWR|unix.O_DIRECT)
		if mapping, err := unix.Mmap(int(direct.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED); err == nil {
			if !bytes.Equal(mapping, model) {
				t.Errorf("%s: a mapping of an O_DIRECT open shows something else", device)
			}
			if err := unix.Munmap(mapping); err != nil {
				t.Error(err)
			}
		} else if !errors.Is(err, syscall.ENODEV) {
			t.Errorf("%s: shared mapping of an O_DIRECT open: %v, want ENODEV", device, err)
		}
		direct.Close()
	}
}

// TestE2EKernelCopies: sendfile and splice between a device and a plain file, copy_file_range between two devices, at
// offsets that fit nothing.
func TestE2EKernelCopies(t *testing.T) {
	t.Parallel()
	const (
		size = 4 << 20
		from = 12345
		to   = 1_500_001
		n    = 1_000_003
	)
	f, devices := trapDevices(t, size)
	plainPath := filepath.Join(t.TempDir(), "plain")
	for name, copyBytes := range map[string]func(dst, src *os.File) (int, error){
		"sendfile": func(dst, src *os.File) (int, error) {
			off := int64(from)
			return again(n, func(left int) (int, error) {
				return unix.Sendfile(int(dst.Fd()), int(src.Fd()), &off, left)
			})
		},
		"splice": spliceAll(from, n),
	} {
		for _, device := range devices {
			for _, flags := range []int{0, unix.O_DIRECT} {
				model := f.fill(device, size, byte(len(name)+flags))
				plain := patternFile(t, plainPath, size, 77)
				node := f.open(device, os.O_RDWR|flags)
				what := fmt.Sprintf("%s, flags %#x", name, flags)

				seekTo(t, plain, to)
				if copied, err := copyBytes(plain, node); copied != n || err != nil {
					t.Errorf("%s, %s from the device: %d, %v", device, what, copied, err)
				}
				got := make([]byte, n)
				if _, err := plain.ReadAt(got, to); err != nil || !bytes.Equal(got, model[from:from+n]) {
					t.Errorf("%s, %s from the device: the file got something else (%v)", device, what, err)
				}

				seekTo(t, node, to)
				if copied, err := copyBytes(node, plain); copied != n || err != nil {
					t.Errorf("%s, %s to the device: %d, %v", device, what, copied, err)
				}
				if _, err := plain.ReadAt(model[to:to+n], from); err != nil {
					t.Error(err)
				}
				if err := node.Sync(); err != nil {
					t.Error(err)
				}
				node.Close()
				plain.Close()
				f.wantContents(device, what, model)
			}
		}
	}

	// The kernel has copy_file_range(2) within one file system only; across them it is EXDEV, and cp(1) copies itself.
	for i, device := range devices {
		model, source := f.fill(device, size, 91), f.fill(devices[1-i], size, 92)
		dst, src := f.open(device, os.O_RDWR), f.open(devices[1-i], os.O_RDONLY)
		in, out := int64(from), int64(to)
		copied, err := again(n, func(left int) (int, error) {
			return unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, left, 0)
		})
		if copied != n || err != nil {
			t.Errorf("copy_file_range to %s: %d, %v", device, copied, err)
		}
		if err := dst.Sync(); err != nil {
			t.Error(err)
		}
		dst.Close()
		src.Close()
		copy(model[to:to+n], source[from:])
		f.wantContents(device, "copy_file_range", model)
		f.run("cp", f.path(device), plainPath)
		f.run("cmp", f.path(device), plainPath)
	}
}

// again repeats a call that may do less than it was asked for until n bytes are done.
func again(n int, call func(left int) (int, error)) (done int, err error) {
	for done < n {
		some, err := call(n - done)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || some == 0 {
			return done, err
		}
		done += some
	}
	return done, nil
}

// spliceAll moves n bytes from offset from on through a pipe to where dst stands.
func spliceAll(from int64, n int) func(dst, src *os.File) (int, error) {
	return func(dst, src *os.File) (int, error) {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			return 0, err
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		off := from
		return again(n, func(left int) (int, error) {
			in, err := unix.Splice(int(src.Fd()), &off, pipe[1], nil, left, unix.SPLICE_F_MOVE)
			if err != nil {
				return 0, err
			}
			return again(int(in), func(left int) (int, error) {
				out, err := unix.Splice(pipe[0], nil, int(dst.Fd()), nil, left, unix.SPLICE_F_MOVE)
				return int(out), err
			})
		})
	}
}

// patternFile makes a plain file with a pattern in it.
func patternFile(t *testing.T, path string, size int, seed byte) *os.File {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		_, err = file.WriteAt(pattern(size, seed), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func seekTo(t *testing.T, file *os.File, off int64) {
	t.Helper()
	if _, err := file.Seek(off, io.SeekStart); err != nil {
		t.Fatal(err)
	}
}

// TestE2EDirectOddAlignment: with O_DIRECT neither offset nor length nor the buffer's address need be aligned, and an
// aligned write beside an unaligned one loses nothing.
func TestE2EDirectOddAlignment(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	f, devices := trapDevices(t, size)
	for _, device := range devices {
		model := f.fill(device, size, 3)
		file := f.open(device, os.O_RDWR|unix.O_DIRECT)
		memory := make([]byte, 3*size)
		base := int(-uintptr(unsafe.Pointer(&memory[0])) & 4095)
		rng := rand.New(rand.NewPCG(11, 12))
		for _, shift := range []int{0, 1, 4, 511, 512, 4095} {
			for _, off := range []int{0, 1, 511, 512, 4095, 4096, 65537} {
				for _, n := range []int{1, 511, 512, 513, 4096, 4097, 131072 + 1, 600_000} {
					buf := memory[base+shift : base+shift+n]
					copy(buf, pattern(n, byte(rng.Uint32())))
					copy(model[off:], buf)
					if _, err := file.WriteAt(buf, int64(off)); err != nil {
						t.Fatalf("%s: write of %d at %d from an address %d past a page: %v", device, n, off, shift, err)
					}
					clear(buf)
					if _, err := file.ReadAt(buf, int64(off)); err != nil || !bytes.Equal(buf, model[off:off+n]) {
						t.Fatalf("%s: read of %d at %d to an address %d past a page: equal %v, %v", device, n, off, shift,
							bytes.Equal(buf, model[off:off+n]), err)
					}
				}
			}
		}
		file.Close()
		f.wantContents(device, "after all", model)
	}
}

// TestE2EVectoredIO: readv, writev, preadv, pwritev, and their second versions with flags, in pieces of any length.
func TestE2EVectoredIO(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	const rwfDSync, rwfSync, rwfHiPri, rwfAppend = 2, 4, 1, 16
	f, devices := trapDevices(t, size)
	lengths := []int{1, 511, 4096, 0, 70_000, 3, 8192, 100_000}
	total := 0
	for _, n := range lengths {
		total += n
	}
	cut := func(p []byte) (pieces [][]byte) {
		for _, n := range lengths {
			pieces, p = append(pieces, p[:n:n]), p[n:]
		}
		return pieces
	}
	for _, device := range devices {
		model := f.fill(device, size, 4)
		for _, flags := range []int{0, unix.O_DIRECT} {
			file := f.open(device, os.O_RDWR|flags)
			fd := int(file.Fd())
			for i, tt := range []struct {
				name  string
				write func(pieces [][]byte, off int64) (int, error)
				read  func(pieces [][]byte, off int64) (int, error)
			}{
				{"readv and writev", func(pieces [][]byte, off int64) (int, error) {
					seekTo(t, file, off)
					return unix.Writev(fd, pieces)
				}, func(pieces [][]byte, off int64) (int, error) {
					seekTo(t, file, off)
					return unix.Readv(fd, pieces)
				}},
				{"preadv and pwritev", func(pieces [][]byte, off int64) (int, error) {
					return unix.Pwritev(fd, pieces, off)
				}, func(pieces [][]byte, off int64) (int, error) {
					return unix.Preadv(fd, pieces, off)
				}},
				{"preadv2 and pwritev2 with RWF_DSYNC", func(pieces [][]byte, off int64) (int, error) {
					return unix.Pwritev2(fd, pieces, off, rwfDSync)
				}, func(pieces [][]byte, off int64) (int, error) {
					return unix.Preadv2(fd, pieces, off, 0)
				}},
				{"preadv2 and pwritev2 with RWF_SYNC and RWF_HIPRI", func(pieces [][]byte, off int64) (int, error) {
					return unix.Pwritev2(fd, pieces, off, rwfSync|rwfHiPri)
				}, func(pieces [][]byte, off int64) (int, error) {
					return unix.Preadv2(fd, pieces, off, rwfHiPri)
				}},
			} {
				off := int64(100_000*i + 7)
				data := pattern(total, byte(20+i))
				if n, err := tt.write(cut(data), off); n != total || err != nil {
					t.Errorf("%s, flags %#x, %s: wrote %d of %d, %v", device, flags, tt.name, n, total, err)
				}
				copy(model[off:], data)
				got := make([]byte, total)
				if n, err := tt.read(cut(got), off); n != total || err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, flags %#x, %s: read %d of %d, %v", device, flags, tt.name, n, total, err)
				}
			}
			if n, err := unix.Pwritev2(fd, cut(make([]byte, total)), 0, rwfAppend); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%s, flags %#x: pwritev2 with RWF_APPEND: %d, %v, want ENOSPC", device, flags, n, err)
			}
			if err := file.Sync(); err != nil {
				t.Error(err)
			}
			file.Close()
			f.wantContents(device, fmt.Sprintf("flags %#x", flags), model)
		}
	}
}

// TestE2EAsyncEngines: what asynchronous engines write they read back: Linux aio, and io_uring with buffers and files
// registered, past the page cache and through it.
func TestE2EAsyncEngines(t *testing.T) {
	t.Parallel()
	f, devices := trapDevices(t, 4<<20)
	for _, device := range devices {
		for _, engine := range [][]string{
			{"--ioengine=libaio"},
			{"--ioengine=io_uring", "--fixedbufs=1"},
			{"--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1", "--nonvectored=1"},
		} {
			for _, direct := range []string{"0", "1"} {
				f.fio(device, append(engine, "--direct="+direct, "--rw=randwrite", "--bsrange=512-128k",
					"--blockalign=512", "--size=4M", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1",
					"--do_verify=1")...)
			}
		}
	}
}

// TestE2ELoopSectors: loop devices with sectors of 512 and 4096 bytes, direct and buffered, hold what is written.
func TestE2ELoopSectors(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	f, devices := trapDevices(t, size)
	for _, device := range devices {
		for i, sector := range []string{"512", "4096"} {
			for j, directIO := range []string{"on", "off"} {
				what := "sectors of " + sector + ", direct-io " + directIO
				model := pattern(size, byte(30+2*i+j))
				source := f.writeText("source", string(model))
				loop := strings.TrimSpace(f.run("losetup", "--show", "-f", "-b", sector, "--direct-io="+directIO,
					f.path(device)))
				state := strings.Fields(f.run("losetup", "-n", "-O", "LOG-SEC,DIO", loop))
				if want := map[string]string{"on": "1", "off": "0"}[directIO]; state[0] != sector || state[1] != want {
					t.Errorf("%s, %s: the loop device has %q", device, what, state)
				}
				f.run("dd", "if="+source, "of="+loop, "bs=4k", "oflag=direct", "conv=fsync", "status=none")
				f.wantContents(device, what, model)
				f.run("dd", "if="+source, "of="+loop, "bs="+sector, "skip=3", "seek=9", "count=500", "conv=fsync",
					"status=none")
				n, _ := strconv.Atoi(sector)
				copy(model[9*n:], bytes.Clone(model[3*n:503*n]))
				f.run("losetup", "-d", loop)
				f.wantContents(device, what+", dd by sectors", model)
			}
		}
	}
}

// TestE2ESeveralOpens: a device is open many times at once, in different ways; each open ends for itself, and the
// device is in use until the last one has.
func TestE2ESeveralOpens(t *testing.T) {
	t.Parallel()
	f, devices := trapDevices(t, 1<<20)
	for minor, device := range devices {
		var files []*os.File
		for i := range 60 {
			flags := []int{os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | unix.O_DIRECT, os.O_RDWR | unix.O_DSYNC}[i%5]
			files = append(files, f.open(device, flags))
		}
		rand.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
		for i, file := range files {
			if i == len(files)-1 {
				f.refused(fmt.Sprint("remove ", minor), syscall.EBUSY, "open once")
			}
			name := fmt.Sprintf("/proc/self/fd/%d", file.Fd())
			again, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			want := pattern(600, byte(i))
			if _, err := again.WriteAt(want, int64(i*700)); err != nil {
				t.Error(err)
			}
			file.Close()
			got := make([]byte, len(want))
			if _, err := again.ReadAt(got, int64(i*700)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: after a close another open reads something else (%v)", device, err)
			}
			again.Close()
		}
		f.must(fmt.Sprint("remove ", minor))
	}
}

// TestE2EPermissions: the kernel checks modes and owners, so that others than root get at a device only when they may.
func TestE2EPermissions(t *testing.T) {
	t.Parallel()
	f, devices := trapDevices(t, 1<<20)
	const other = 65534
	// The way to the mount must be open, and is in a directory of root's.
	for dir := f.mounts; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	as := func(uid, gid uint32, script string) (string, error) {
		cmd := f.command("sh", "-c", script)
		cmd.Env = append(os.Environ(), "M="+f.mount)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, script := range []string{
		"head -c1 $M/dev/" + devices[0], "printf x 1<>$M/dev/" + devices[0], "cat $M/dev/tcmur",
		"echo help >$M/dev/tcmur", ": >$M/new", "mkdir $M/dev/new", "rm -f $M/dev/" + devices[0],
		"mv $M/dev/" + devices[0] + " $M/dev/x", "chmod 666 $M/dev/" + devices[0],
	} {
		out, err := as(other, other, script)
		if err == nil || !strings.Contains(out, "denied") && !strings.Contains(out, "not permitted") {
			t.Errorf("as another user: %s: %v, %q; want it denied", script, err, out)
		}
	}
	if out, err := as(other, other, "ls -lR $M >/dev/null && stat $M/dev/"+devices[0]); err != nil {
		t.Errorf("another user cannot look around: %v, %s", err, out)
	}
	// Root's group may, as with block devices.
	if out, err := as(other, 0, "head -c1 $M/dev/"+devices[0]+" && printf x 1<>$M/dev/"+devices[0]); err != nil {
		t.Errorf("as a member of the node's group: %v, %s", err, out)
	}
	if out, err := as(other, 0, "cat $M/dev/tcmur"); err == nil {
		t.Errorf("a member of the group reads the command node: %q", out)
	}
}

// TestE2EListings: ls, find, du, df and stat show devices as they are.
func TestE2EListings(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	f, devices := trapDevices(t, size)
	for _, tt := range []struct{ script, want string }{
		{"ls -1 $M/dev", strings.Join([]string{devices[1], devices[0], "tcmur"}, "\n")},
		{"ls -ln $M/dev/ram000 | cut -d' ' -f1-5", "-rw-rw---- 1 0 0 1048576"},
		{"ls -ln $M/dev/tcmur | cut -c1-10", "-rw-------"},
		{"find $M -type f -name '*00*' -printf '%P %s\\n' | sort", "dev/file001 1048576\ndev/ram000 1048576"},
		{"find $M -maxdepth 1 -type d -printf '%P\\n' | sort", "\ndev\nsys"},
		{"find $M/sys/modules -type d -printf '%P\\n' | sort", "\nfile\nram"},
		{"find $M -printf '%P\\n' | sort | uniq -d", ""},
		{"find $M/dev -size +1000k -printf '%f\\n' | sort", "file001\nram000"},
		{"du --apparent-size -b $M/dev/ram000 | cut -f1", "1048576"},
		{"stat -c '%F %s %h' $M/dev/file001", "regular file 1048576 1"},
		{"df --output=fstype $M | tail -1 | cut -d. -f1", "fuse"},
		{"df $M >/dev/null && df -i $M >/dev/null && du -s $M >/dev/null && echo fine", "fine"},
		{"cd $M/dev && ls -la .. >/dev/null && stat -c %F ../sys && pwd -P | xargs basename", "directory\ndev"},
	} {
		out, status := f.shell(f, tt.script)
		if strings.TrimRight(out, "\n ") != tt.want || status != 0 {
			t.Errorf("%s: %q (status %d), want %q", tt.script, out, status, tt.want)
		}
	}
}

// TestE2EInotify: who watches a node learns of what others do with it by system calls.
func TestE2EInotify(t *testing.T) {
	t.Parallel()
	f, devices := trapDevices(t, 1<<20)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const mask = unix.IN_OPEN | unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ACCESS
	if _, err := unix.InotifyAddWatch(fd, f.path(devices[0]), mask); err != nil {
		t.Fatal(err)
	}
	file := f.open(devices[0], os.O_RDWR)
	if _, err := file.WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	if _, err := file.ReadAt(make([]byte, 1), 0); err != nil {
		t.Error(err)
	}
	file.Close()
	var seen uint32
	buf := make([]byte, 4096)
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for seen&mask != mask {
		if n, err := unix.Poll(poll, 10_000); n != 1 && !errors.Is(err, syscall.EINTR) {
			t.Fatalf("inotify told of %#x, want %#x (%v)", seen, mask, err)
		}
		n, err := unix.Read(fd, buf)
		if err != nil {
			continue
		}
		for at := 0; at+unix.SizeofInotifyEvent <= n; {
			event := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at]))
			seen |= event.Mask
			at += unix.SizeofInotifyEvent + int(event.Len)
		}
	}
	// A watch holds nothing open.
	f.must("remove 0")
}

// TestE2EUnmountWhileOpen: umount refuses while a device is open; umount -l takes the mount away, the open device goes
// on working, and the program ends when the last one is closed.
func TestE2EUnmountWhileOpen(t *testing.T) {
	t.Parallel()
	f, devices := trapDevices(t, 1<<20)
	file := f.open(devices[0], os.O_RDWR)
	if out, err := f.try("umount", f.mount); err == nil || !strings.Contains(out, "busy") {
		t.Errorf("umount of a mount in use: %v, %q", err, out)
	}
	f.run("umount", "-l", f.mount)
	want := pattern(5000, 9)
	if _, err := file.WriteAt(want, 100); err != nil {
		t.Errorf("write after umount -l: %v", err)
	}
	got := make([]byte, len(want))
	if _, err := file.ReadAt(got, 100); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read after umount -l: %v", err)
	}
	if err := file.Sync(); err != nil {
		t.Errorf("fsync after umount -l: %v", err)
	}
	file.Close()
	f.wantExit(0)
}

// TestE2EUnsupportedIsNotCached: what one node does not support must not be switched off for the others. The kernel
// takes ENOSYS as the answer of the whole mount.
func TestE2EUnsupportedIsNotCached(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second, "record")
	f := b.start()
	f.must("load record\nload ram\nadd 1 /ram/@/1M")
	r := f.record(0)
	for _, path := range []string{f.ctlPath(), f.path("ram001"), f.mount, f.mount + "/sys"} {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		fd := int(file.Fd())
		for what, err := range map[string]error{
			"fsync":     unix.Fsync(fd),
			"fdatasync": unix.Fdatasync(fd),
			"flock":     unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB),
			"fallocate": unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096),
		} {
			if errors.Is(err, syscall.ENOSYS) {
				t.Errorf("%s of %s: ENOSYS", what, path)
			}
		}
		for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
			if _, err := unix.Seek(fd, 0, whence); errors.Is(err, syscall.ENOSYS) {
				t.Errorf("lseek %d of %s: ENOSYS", whence, path)
			}
		}
		file.Close()
	}
	file := f.open(r.device, os.O_RDWR)
	r.news()
	if _, err := file.WriteAt(pattern(4096, 1), 0); err != nil {
		t.Error(err)
	}
	if err := file.Sync(); err != nil {
		t.Error(err)
	}
	r.wantFlushed(r.news(), 0, 4096)
	if err := unix.Fdatasync(int(file.Fd())); err != nil {
		t.Error(err)
	}
	if lines := r.news(); len(lines) != 1 || lines[0] != "flush" {
		t.Errorf("fdatasync became %v, want one flush", lines)
	}
	file.Close()
}

// TestE2EIOFlusher: all threads of the front and of a host are exempt from waiting for their own write-back.
func TestE2EIOFlusher(t *testing.T) {
	t.Parallel()
	b := newBed(t, 60*time.Second)
	f := b.start()
	host := f.load("ram")
	permitted := !strings.Contains(f.log.String(), "running without PR_SET_IO_FLUSHER")
	var status struct {
		IOFlusher *bool `json:"io_flusher"`
	}
	text, err := os.ReadFile(f.mount + "/sys/status")
	if err == nil {
		err = json.Unmarshal(text, &status)
	}
	if err != nil || status.IOFlusher == nil || *status.IOFlusher != permitted {
		t.Errorf("the status says something else than the log, %v: %s (%v)", permitted, text, err)
	}
	if !permitted {
		t.Log("this system does not permit it, and the log says so")
		return
	}
	// PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of include/linux/sched.h.
	const flags = 0x00080000 | 0x00100000
	for _, pid := range []int{f.cmd.Process.Pid, host} {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(stats) == 0 {
			t.Fatalf("no threads of %d (%v)", pid, err)
		}
		for _, stat := range stats {
			text, err := os.ReadFile(stat)
			if err != nil {
				continue // the thread has ended
			}
			fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
			if got, err := strconv.ParseUint(fields[6], 10, 64); err != nil || got&flags != flags {
				t.Errorf("%s: flags %#x, want those of an I/O flusher, %#x (%v)", stat, got, flags, err)
			}
		}
	}
}
