// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Who may use what: device nodes, the command node, and what connects a front with its hosts.

const (
	nobody      = 65534
	privateTeam = 54321 // a group that nobody is in
)

// as runs f on a thread of its own that belongs to another user and group, without any privilege.
func as(t *testing.T, uid, gid int, f func()) {
	t.Helper()
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		none := []uint32{}
		_, _, e1 := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(none)), 0, 0)
		_, _, e2 := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid))
		_, _, e3 := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		if e1 != 0 || e2 != 0 || e3 != 0 {
			failed <- fmt.Errorf("become user %d: %w, %w, %w", uid, e1, e2, e3)
			return
		}
		f()
		failed <- nil
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

// openable tries to open a file for a user.
func openable(t *testing.T, uid, gid int, path string, flags int) error {
	t.Helper()
	var err error
	as(t, uid, gid, func() {
		// Not os.Open: it must happen on this thread.
		fd, openErr := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err = openErr; err == nil {
			_ = unix.Close(fd)
		}
	})
	return err
}

// letThrough lets every user get as far as a directory below that for temporary files.
func letThrough(t *testing.T, dir string) {
	t.Helper()
	for ; dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err == nil && info.Mode().Perm()&1 == 0 {
			err = os.Chmod(dir, info.Mode().Perm()|0o11)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeviceAccess: mode=, owner= and group= are those of the node, and the kernel enforces them.
func TestDeviceAccess(t *testing.T) {
	b := newBed(t, time.Minute)
	f := b.start("-c", "load ram", "-c", "add 0 size=1M /ram/@", "-c", "add 1 mode=0640 group=54321 /ram/@/1M",
		"-c", "add 2 owner=nobody mode=600 /ram/@/2M")
	letThrough(t, b.mounts)
	if mounts, _ := os.ReadFile("/proc/mounts"); !hasLine(string(mounts), f.mount, "default_permissions") {
		t.Errorf("%s is mounted without default_permissions", f.mount)
	}
	for _, want := range []struct {
		device        string
		mode          uint32
		uid, gid      uint32
		nobody, group error // of an open for reading by nobody, and by a member of privateTeam
		write         error // of an open for writing by that member
	}{
		{"ram000", 0o660, 0, 0, unix.EACCES, unix.EACCES, unix.EACCES},
		{"ram001", 0o640, 0, privateTeam, unix.EACCES, nil, unix.EACCES},
		{"ram002", 0o600, nobody, 0, nil, unix.EACCES, unix.EACCES},
		{"tcmur", 0o600, 0, 0, unix.EACCES, unix.EACCES, unix.EACCES},
	} {
		var st unix.Stat_t
		if err := unix.Stat(f.path(want.device), &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode&0o7777 != want.mode || st.Uid != want.uid || st.Gid != want.gid {
			t.Errorf("%s: mode %o of %d:%d, want %o of %d:%d", want.device, st.Mode&0o7777, st.Uid, st.Gid,
				want.mode, want.uid, want.gid)
		}
		if err := openable(t, nobody, nobody, f.path(want.device), unix.O_RDONLY); !errors.Is(err, want.nobody) {
			t.Errorf("%s for nobody: %v, want %v", want.device, err, want.nobody)
		}
		if err := openable(t, 12345, privateTeam, f.path(want.device), unix.O_RDONLY); !errors.Is(err, want.group) {
			t.Errorf("%s for a member of the group: %v, want %v", want.device, err, want.group)
		}
		if err := openable(t, 12345, privateTeam, f.path(want.device), unix.O_WRONLY); !errors.Is(err, want.write) {
			t.Errorf("%s for a member of the group, to write: %v, want %v", want.device, err, want.write)
		}
	}
	f.refused("add 3 owner=nosuchuser /ram/@/3M", syscall.EINVAL, "nosuchuser")
	f.refused("add 3 mode=rw /ram/@/3M", syscall.EINVAL, "octal")
	f.refused("load ../ram", syscall.EINVAL, "../ram")
	f.refused("load a/b", syscall.EINVAL)
}

// TestCtlGroup: with --ctl-group its members give commands, and still nobody else.
func TestCtlGroup(t *testing.T) {
	b := newBed(t, time.Minute)
	f := b.start("--ctl-group", strconv.Itoa(privateTeam), "-c", "load ram")
	letThrough(t, b.mounts)
	if err := openable(t, 12345, privateTeam, f.ctlPath(), unix.O_WRONLY|unix.O_TRUNC); err != nil {
		t.Errorf("member of the group: %v", err)
	}
	if err := openable(t, nobody, nobody, f.ctlPath(), unix.O_WRONLY); !errors.Is(err, unix.EACCES) {
		t.Errorf("nobody: %v, want EACCES", err)
	}
	as(t, 12345, privateTeam, func() {
		fd, err := unix.Open(f.ctlPath(), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			_, err = unix.Write(fd, []byte("add 0 size=1M /ram/@"))
			_ = unix.Close(fd)
		}
		if err != nil {
			t.Errorf("command of a member of the group: %v", err)
		}
	})
	if _, err := os.Stat(f.path("ram000")); err != nil {
		t.Error(err)
	}
}

// TestUnsafeHandlerIsRefused: the reason and the way out reach the user.
func TestUnsafeHandlerIsRefused(t *testing.T) {
	b := newBed(t, time.Minute, "record")
	prefix := b.handlers[len(b.handlers)-1]
	if err := os.Chmod(filepath.Dir(prefix), 0o777); err != nil {
		t.Fatal(err)
	}
	f := b.start()
	f.refused("load record", syscall.EPERM, "everybody can change", "--allow-insecure-handlers")
	f.stop()
	b.start("--allow-insecure-handlers", "-c", "load record").stop()
}

// TestHostsAreClosed: the control connection of a host, its environment and its descriptors are out of reach for other
// users, and the connection for root as well.
func TestHostsAreClosed(t *testing.T) {
	b := newBed(t, time.Minute)
	// A descriptor that the front inherits without having asked for it must not reach a handler.
	stray, err := os.Create(t.TempDir() + "/stray")
	if err != nil {
		t.Fatal(err)
	}
	defer stray.Close()
	f := b.startInheriting(stray, "-c", "load ram", "-c", "add 0 size=1M /ram/@", "-c", "load file")
	hosts, sockets := f.awaitHosts(3) // of two handlers, and one in reserve
	for _, pid := range hosts {
		for _, what := range []string{"environ", "fd", "mem", "maps"} {
			path := fmt.Sprintf("/proc/%d/%s", pid, what)
			if err := openable(t, nobody, nobody, path, unix.O_RDONLY); !errors.Is(err, unix.EACCES) {
				t.Errorf("%s for nobody: %v, want EACCES", path, err)
			}
		}
	}
	letThrough(t, b.sockets) // so that what keeps others out is the directory of the socket itself
	for _, socket := range sockets {
		as(t, nobody, nobody, func() {
			if err := connect(socket); !errors.Is(err, unix.EACCES) {
				t.Errorf("nobody connects to %s: %v, want EACCES", socket, err)
			}
		})
		if info, err := os.Stat(filepath.Dir(socket)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory of %s: %v, %v, want mode 0700", socket, info.Mode(), err)
		}
		for name, config := range map[string]*tls.Config{
			"without a certificate": {InsecureSkipVerify: true},
			"with one of its own":   {InsecureSkipVerify: true, Certificates: []tls.Certificate{ownCertificate(t)}},
		} {
			config.NextProtos = []string{"h2"}
			if err := speak(socket, config); err == nil {
				t.Errorf("another process of root, %s, can talk to %s", name, socket)
			}
		}
	}
	checkDescriptors(t, f.cmd.Process.Pid, false)
	seen := map[string]int{}
	for _, pid := range hosts {
		for _, target := range checkDescriptors(t, pid, true) {
			if strings.HasPrefix(target, "/memfd:") || strings.HasPrefix(target, "socket:") {
				if other, ok := seen[target]; ok && !strings.HasPrefix(target, "/memfd:") {
					t.Errorf("hosts %d and %d both have %s", pid, other, target)
				}
				seen[target] = pid
			}
		}
	}
	// All this has not disturbed them.
	if out, err := os.ReadFile(f.path("ram000")); err != nil || len(out) != 1<<20 {
		t.Errorf("read after the attempts: %d bytes, %v", len(out), err)
	}
	f.must("load qcow")
}

// awaitHosts waits until there are so many hosts, and a socket for each.
func (f *front) awaitHosts(n int) (pids []int, sockets []string) {
	f.Helper()
	for deadline := time.Now().Add(graceful); ; time.Sleep(10 * time.Millisecond) {
		pids = nil
		for _, pid := range f.processes() {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == "tcmur-host\n" {
				pids = append(pids, pid)
			}
		}
		sockets, _ = filepath.Glob(f.sockets + "/plugin-dir*/*")
		if len(pids) == n && len(sockets) == n {
			return pids, sockets
		}
		if time.Now().After(deadline) {
			f.Fatalf("hosts %v and sockets %q, want %d of each", pids, sockets, n)
		}
	}
}

// connect connects to a socket on the calling thread.
func connect(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// speak connects, does the handshake, and waits for the first bytes of HTTP/2, which a server sends by itself.
func speak(path string, config *tls.Config) error {
	raw, err := net.DialTimeout("unix", path, graceful)
	if err != nil {
		return err
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(graceful))
	conn := tls.Client(raw, config)
	if err := conn.Handshake(); err != nil {
		return err
	}
	// With TLS 1.3 the server's verdict on the certificate comes after the handshake.
	_, err = io.ReadFull(conn, make([]byte, 9))
	return err
}

func ownCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

var fdFlags = regexp.MustCompile(`(?m)^flags:\s+([0-7]+)$`)

// checkDescriptors checks that everything a process has open, but for the standard three, is close-on-exec, and returns
// what it is. A host must not have the stray file.
func checkDescriptors(t *testing.T, pid int, isHost bool) []string {
	t.Helper()
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if len(fds) < 4 {
		t.Errorf("process %d has descriptors %q", pid, fds)
	}
	var targets []string
	for _, path := range fds {
		target, err := os.Readlink(path)
		info, infoErr := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(path)))
		if number, _ := strconv.Atoi(filepath.Base(path)); err != nil || infoErr != nil || number < 3 {
			continue // closed meanwhile
		}
		targets = append(targets, target)
		if isHost && strings.HasSuffix(target, "/stray") {
			t.Errorf("host %d has what the front has inherited: %s", pid, target)
		}
		flags := int64(0)
		if match := fdFlags.FindSubmatch(info); match != nil {
			flags, _ = strconv.ParseInt(string(match[1]), 8, 64)
		}
		if flags&unix.O_CLOEXEC == 0 {
			t.Errorf("process %d: %s (%s) is not close-on-exec", pid, path, target)
		}
	}
	return targets
}
