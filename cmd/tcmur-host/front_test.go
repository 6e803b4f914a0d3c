// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// A front with nothing but the protocol: it starts the real binary and submits single requests.

const (
	testArena    = 4 << 20
	arenaOffset  = 64 << 10
	ringOffset   = 4096
	ringEntries  = 512
	offBell      = 64
	offWaiting   = 128 // of cq_waiting in submit, of sq_sleepers in complete
	testDeadline = 20 * time.Second
)

const (
	opRead = iota + 1
	opWrite
	opFlush
	opUnmap
	opZero
)

// hostBinary is built once by TestMain. TCMUR_HOST_BUILD adds flags for that: -asan, -race.
var hostBinary string

func builtWith(flag string) bool { return strings.Contains(os.Getenv("TCMUR_HOST_BUILD"), flag) }

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "tcmur-host-test")
	if err != nil {
		panic(err)
	}
	hostBinary = filepath.Join(dir, "tcmur-host")
	args := []string{"build", "-o", hostBinary, "-ldflags=-X main.qcowLookups=1000"}
	args = append(args, strings.Fields(os.Getenv("TCMUR_HOST_BUILD"))...)
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		panic(string(out))
	}
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

// buildHandler compiles testdata/source to a shared object.
func buildHandler(t testing.TB, source string, flags ...string) string {
	t.Helper()
	so := filepath.Join(t.TempDir(), "handler_test.so")
	args := append([]string{
		"-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-pthread", "-I../../plugin/handlers",
		"-o", so, filepath.Join("testdata", source),
	}, flags...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return so
}

// logBuffer collects what the host logs.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
	new chan struct{}
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.new <- struct{}{}:
	default:
	}
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// front is one host and this side of its channel.
type front struct {
	t                testing.TB
	client           *goplugin.Client
	cmd              *exec.Cmd
	rpc              hostpb.HostClient
	log              *logBuffer
	submit, complete []byte
	liveness         int
	sqTail, cqHead   uint64
	tag              uint32
	early            map[uint32]cqe // completions that nobody has asked for yet
}

type cqe struct {
	tag, gen uint32
	sts, err int32
}

func segment(t testing.TB, name string) (int, []byte) {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, arenaOffset+testArena); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, arenaOffset+testArena, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return fd, mem
}

// startHost starts a host; it is ended with the test.
func startHost(t testing.TB, args ...string) *front {
	t.Helper()
	f := &front{t: t, log: &logBuffer{new: make(chan struct{}, 1)}, early: map[uint32]cqe{}}
	submitFD, submit := segment(t, "submit")
	completeFD, complete := segment(t, "complete")
	f.submit, f.complete = submit, complete
	binary.NativeEndian.PutUint32(submit[0:], 0x524d4354)
	binary.NativeEndian.PutUint32(submit[4:], 2)
	binary.NativeEndian.PutUint64(submit[8:], testArena)
	binary.NativeEndian.PutUint64(submit[16:], testArena)
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	if _, err := unix.FcntlInt(uintptr(completeFD), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(submitFD), unix.F_ADD_SEALS, seals|unix.F_SEAL_FUTURE_WRITE); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.liveness = pair[0]

	f.cmd = exec.Command(hostBinary, append([]string{"--submit-fd=3", "--complete-fd=4", "--liveness-fd=5"}, args...)...)
	files := []*os.File{
		os.NewFile(uintptr(submitFD), "submit"), os.NewFile(uintptr(completeFD), "complete"),
		os.NewFile(uintptr(pair[1]), "liveness"),
	}
	f.cmd.ExtraFiles = files
	f.cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir()) // where go-plugin leaves the socket of a host that died
	f.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  control.Handshake,
		Plugins:          goplugin.PluginSet{control.Name: &control.Plugin{}},
		Cmd:              f.cmd,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		Logger:           hclog.New(&hclog.LoggerOptions{Output: f.log, Level: hclog.Trace}),
	})
	t.Cleanup(func() {
		f.client.Kill()
		unix.Close(f.liveness)
		if t.Failed() {
			t.Logf("log of the host:\n%s", tail(f.log.String(), 8000))
		}
	})
	conn, err := f.client.Client()
	for _, file := range files {
		file.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	rpc, err := conn.Dispense(control.Name)
	if err != nil {
		t.Fatal(err)
	}
	f.rpc = rpc.(hostpb.HostClient)
	return f
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "..." + s[len(s)-n:]
}

func callCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testDeadline)
	t.Cleanup(cancel)
	return ctx
}

func (f *front) load(path, subtype string) (*hostpb.LoadReply, error) {
	reply, err := f.rpc.Load(callCtx(f.t), &hostpb.LoadRequest{Path: path, Subtype: subtype})
	return reply, control.FromStatus(err)
}

func (f *front) mustLoad(path, subtype string) *hostpb.LoadReply {
	f.t.Helper()
	reply, err := f.load(path, subtype)
	if err != nil {
		f.t.Fatalf("load: %v", err)
	}
	return reply
}

func (f *front) open(req *hostpb.OpenRequest) (*hostpb.OpenReply, error) {
	if req.GetName() == "" {
		req.Name = "test000"
	}
	reply, err := f.rpc.Open(callCtx(f.t), req)
	return reply, control.FromStatus(err)
}

func (f *front) mustOpen(req *hostpb.OpenRequest) *hostpb.OpenReply {
	f.t.Helper()
	reply, err := f.open(req)
	if err != nil {
		f.t.Fatalf("open: %v", err)
	}
	return reply
}

func (f *front) close(ctx context.Context, index uint32) error {
	_, err := f.rpc.Close(ctx, &hostpb.CloseRequest{Device: index})
	return control.FromStatus(err)
}

func word32(mem []byte, at int) *uint32 { return (*uint32)(unsafe.Pointer(&mem[at])) }
func word64(mem []byte, at int) *uint64 { return (*uint64)(unsafe.Pointer(&mem[at])) }

func futex(word *uint32, op int, val uint32, timeout time.Duration) {
	ts := unix.NsecToTimespec(timeout.Nanoseconds())
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), uintptr(op), uintptr(val),
		uintptr(unsafe.Pointer(&ts)), 0, 0)
}

// sqe is a request.
type sqe struct {
	op, device      uint32
	offset, length  uint64
	payload         uint64
	tag             uint32 // 0: the next free one
	withoutDoorbell bool
}

// push submits a request and returns its tag.
func (f *front) push(s sqe) uint32 {
	if s.tag == 0 {
		f.tag++
		s.tag = f.tag
	}
	at := ringOffset + int(f.sqTail%ringEntries)*64
	e := f.submit[at : at+64]
	binary.NativeEndian.PutUint32(e[8:], s.tag)
	binary.NativeEndian.PutUint32(e[12:], s.tag^0x5555)
	binary.NativeEndian.PutUint32(e[16:], s.op)
	binary.NativeEndian.PutUint32(e[20:], s.device)
	binary.NativeEndian.PutUint64(e[24:], s.offset)
	binary.NativeEndian.PutUint64(e[32:], s.length)
	binary.NativeEndian.PutUint64(e[40:], s.payload)
	f.sqTail++
	atomic.StoreUint64(word64(f.submit, at), f.sqTail)
	if !s.withoutDoorbell {
		f.ring()
	}
	return s.tag
}

func (f *front) ring() {
	// Go's atomics are sequentially consistent: the publication above comes before this look.
	if atomic.LoadUint32(word32(f.complete, offWaiting)) != 0 {
		atomic.AddUint32(word32(f.submit, offBell), 1)
		futex(word32(f.submit, offBell), 1 /* FUTEX_WAKE */, 1, 0)
	}
}

func (f *front) poll() (cqe, bool) {
	at := ringOffset + int(f.cqHead%ringEntries)*32
	if atomic.LoadUint64(word64(f.complete, at)) != f.cqHead+1 {
		return cqe{}, false
	}
	e := f.complete[at : at+32]
	f.cqHead++
	return cqe{
		tag: binary.NativeEndian.Uint32(e[8:]), gen: binary.NativeEndian.Uint32(e[12:]),
		sts: int32(binary.NativeEndian.Uint32(e[16:])), err: int32(binary.NativeEndian.Uint32(e[20:])),
	}, true
}

// next waits for a completion.
func (f *front) next(timeout time.Duration) (cqe, bool) {
	end := time.Now().Add(timeout)
	for time.Now().Before(end) {
		if c, ok := f.poll(); ok {
			return c, true
		}
		atomic.StoreUint32(word32(f.submit, offWaiting), 1)
		bell := atomic.LoadUint32(word32(f.complete, offBell))
		c, ok := f.poll()
		if !ok {
			futex(word32(f.complete, offBell), 0 /* FUTEX_WAIT */, bell, time.Until(end))
		}
		atomic.StoreUint32(word32(f.submit, offWaiting), 0)
		if ok {
			return c, true
		}
	}
	return cqe{}, false
}

// wait waits for the completion of tag.
func (f *front) wait(tag uint32) cqe {
	f.t.Helper()
	for {
		if c, ok := f.early[tag]; ok {
			delete(f.early, tag)
			return c
		}
		c, ok := f.next(testDeadline)
		if !ok {
			f.t.Fatalf("request %d did not complete", tag)
		}
		if c.gen != c.tag^0x5555 {
			f.t.Fatalf("completion %+v has a generation that was not submitted", c)
		}
		f.early[c.tag] = c
	}
}

// do submits and waits; the result is an errno or nil.
func (f *front) do(s sqe) error {
	f.t.Helper()
	if c := f.wait(f.push(s)); c.err != 0 {
		return syscall.Errno(c.err)
	}
	return nil
}

func (f *front) read(device uint32, offset uint64, n int) ([]byte, error) {
	f.t.Helper()
	buf := f.complete[arenaOffset : arenaOffset+n]
	for i := range buf {
		buf[i] = 0xA5
	}
	err := f.do(sqe{op: opRead, device: device, offset: offset, length: uint64(n)})
	return append([]byte(nil), buf...), err
}

func (f *front) write(device uint32, offset uint64, data []byte) error {
	f.t.Helper()
	copy(f.submit[arenaOffset:], data)
	return f.do(sqe{op: opWrite, device: device, offset: offset, length: uint64(len(data))})
}

// awaitLog waits until the host has logged text.
func (f *front) awaitLog(text string) {
	f.t.Helper()
	timeout := time.After(testDeadline)
	for !strings.Contains(f.log.String(), text) {
		select {
		case <-f.log.new:
		case <-timeout:
			f.t.Fatalf("the log does not say %q", text)
		}
	}
}

// pattern is recognisable data.
func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i>>9) + byte(i)
	}
	return p
}

func wantErrno(t *testing.T, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}
