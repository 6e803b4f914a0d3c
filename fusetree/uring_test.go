// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree/uringtest"
)

// transportOf is what serves the tree.
func transportOf(s *served) notifier {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kernel
}

// Requests do arrive over io_uring, on every processor that can be used.
func TestIOUringIsUsed(t *testing.T) {
	t.Parallel()
	s := serve(t, Options{IOUring: IOUringOn})
	newDirectMemory(t, s.Tree, "file", 4096)
	u, isUring := transportOf(s).(*uringTransport)
	if !isUring {
		t.Fatalf("transport is %T", transportOf(s))
	}
	f := open(t, s.path("file"), os.O_RDONLY)
	for _, thread := range u.rings.threads {
		readOn(t, thread.cpu, f)
	}
	ok(t, "close", f.Close())
	ok(t, "Abort", s.Abort())
	s.wantRun(t, nil)
	for _, thread := range u.rings.threads {
		used := false
		for _, e := range thread.entries {
			used = used || e.commitID != 0
		}
		if !used {
			t.Errorf("no request came through the ring of processor %d", thread.cpu)
		}
		if thread.live != 0 || thread.done.Load() != nil {
			t.Errorf("processor %d: %d entries are left, %v", thread.cpu, thread.live, thread.done.Load())
		}
	}
}

// readOn reads from a thread that stays on one processor.
func readOn(t *testing.T, cpu int, f *os.File) {
	t.Helper()
	fd := int(f.Fd())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with this
		var here unix.CPUSet
		here.Set(cpu)
		err := unix.SchedSetaffinity(0, &here)
		if err == nil {
			_, err = unix.Pread(fd, make([]byte, 16), 0)
		}
		done <- err
	}()
	ok(t, "read", await(t, "read", done))
}

// What is not possible is said by on, and passed over by auto.
func TestIOUringSwitchedOff(t *testing.T) {
	t.Parallel()
	s := newServed(t, Options{IOUring: IOUringOn})
	restore := uringtest.Disable(t)
	defer restore()
	err := s.Run()
	wantErr(t, "Run", err, syscall.EOPNOTSUPP)
	if err != nil && !strings.Contains(err.Error(), "echo Y > "+parameterFile) {
		t.Errorf("the error does not say what to do: %v", err)
	}
	if mounts := string(must(os.ReadFile("/proc/self/mounts"))(t)); strings.Contains(mounts, s.dir) {
		t.Error("a mount is left behind")
	}
	ok(t, "Exit", s.Exit())

	auto := serve(t, Options{IOUring: IOUringAuto})
	if kind, isDevice := transportOf(auto).(*deviceTransport); !isDevice {
		t.Errorf("transport is %T", kind)
	}
	must(os.ReadDir(auto.dir))(t)
}

func TestIOUringAuto(t *testing.T) {
	t.Parallel()
	restore := uringtest.Enable(t)
	defer restore()
	s := serve(t, Options{IOUring: IOUringAuto})
	restore()
	if kind, isUring := transportOf(s).(*uringTransport); !isUring {
		t.Errorf("transport is %T", kind)
	}
	must(os.ReadDir(s.dir))(t)
}

// The kernel has agreed to rings and then refuses them: it must not wait for them.
func TestIOUringRegistrationFails(t *testing.T) {
	t.Parallel()
	for _, mode := range []IOUringMode{IOUringAuto, IOUringOn} {
		s := newServed(t, Options{IOUring: mode})
		opts := s.serverOptions()
		restore := uringtest.Enable(t)
		defer restore()
		mnt, fd, err := newMount(s.dir, false, opts)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ok(t, "unmount", mnt.unmount(true)) })
		c := newConnection(s.Tree, fd, opts)
		ok(t, "read INIT", c.readInit())
		rings, err := c.wantedRings()
		if rings == nil {
			t.Fatalf("no rings: %v", err)
		}
		for _, e := range rings.threads[len(rings.threads)-1].entries {
			e.memory.where[1].SetLen(minPayload / 2)
		}
		ok(t, "answer INIT", c.answerInit(opts, true))
		restore()
		rings, err = c.agreedRings(rings)
		if rings != nil {
			t.Fatal("rings without entries")
		}
		if mode == IOUringOn {
			wantErr(t, "register", err, syscall.EINVAL)
			c.close()
			continue
		}
		ok(t, "register", err)
		readers := must(newDeviceReaders(c, maxReaders, false))(t)
		device := &deviceTransport{c, readers}
		done := make(chan struct{})
		go func() {
			defer close(done)
			device.serve()
		}()
		must(os.ReadDir(s.dir))(t)
		ok(t, "unmount", mnt.unmount(true))
		await(t, "end of the connection", done)
		device.close()
	}
}

func TestIOUringMode(t *testing.T) {
	t.Parallel()
	_, err := Init("/m", Options{IOUring: "perhaps"})
	wantErr(t, "Init", err, syscall.EINVAL)
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8": 5, "0,2,4-5": 4} {
		if got, err := countProcessors(list); got != want || err != nil {
			t.Errorf("%q: %d processors, %v", list, got, err)
		}
	}
	for _, list := range []string{"", "x", "3-1", "0-", "-1", "0,"} {
		_, err := countProcessors(list)
		wantErr(t, list, err, syscall.EINVAL)
	}
}
