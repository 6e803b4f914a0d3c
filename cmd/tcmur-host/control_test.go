// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

func TestOpenErrors(t *testing.T) {
	f := startHost(t)
	_, err := f.open(&hostpb.OpenRequest{Config: "sync/", Size: 4096})
	wantErrno(t, err, syscall.ENODEV)
	f.mustLoad(buildHandler(t, "behave.c"), "sync")
	for _, c := range []struct {
		name string
		req  *hostpb.OpenRequest
		want syscall.Errno
		says string
	}{
		{"refused", &hostpb.OpenRequest{Config: "sync/refuse", Size: 4096}, syscall.ENXIO,
			"sync/refuse: no such thing: Invalid cross-device link; and no other"},
		{"no size", &hostpb.OpenRequest{Config: "sync/"}, syscall.EINVAL, "say size="},
		{"block size", &hostpb.OpenRequest{Config: "sync/", Size: 4096, BlockSize: 1000}, syscall.EINVAL, "block_size=1000"},
		{"max_xfer", &hostpb.OpenRequest{Config: "sync/", Size: 4096, MaxXfer: 100}, syscall.EINVAL, "max_xfer=100"},
		{"subtype", &hostpb.OpenRequest{Config: "syncx/", Size: 4096}, syscall.EINVAL, "begin with"},
		{"index", &hostpb.OpenRequest{Config: "sync/", Size: 4096, Device: 4096}, syscall.ENODEV, "4096"},
		{"long", &hostpb.OpenRequest{Config: "sync/" + strings.Repeat("x", 4096), Size: 4096}, syscall.ENAMETOOLONG, "4095"},
	} {
		_, err := f.open(c.req)
		wantErrno(t, err, c.want)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %q does not say %q", c.name, err, c.says)
		}
	}
	// All of that left nothing behind.
	f.mustOpen(&hostpb.OpenRequest{Config: "sync/", Size: 4096})
	_, err = f.open(&hostpb.OpenRequest{Config: "sync/", Size: 4096})
	wantErrno(t, err, syscall.EBUSY)

	_, err = f.rpc.CheckConfig(callCtx(t), &hostpb.CheckConfigRequest{Config: "sync/fine"})
	if err != nil {
		t.Error(err)
	}
	_, err = f.rpc.CheckConfig(callCtx(t), &hostpb.CheckConfigRequest{Config: "sync/unacceptable"})
	err = control.FromStatus(err)
	wantErrno(t, err, syscall.EINVAL)
	if err != nil && err.Error() != "I do not like it" {
		t.Errorf("reason is %q", err)
	}
}

// TestReopenMany opens and closes devices over and over, in parallel, with requests in flight.
func TestReopenMany(t *testing.T) {
	f := startHost(t)
	f.mustLoad(buildHandler(t, "behave.c"), "sync")
	for round := 0; round < 10; round++ {
		done := make(chan error, 16)
		for i := uint32(0); i < 16; i++ {
			go func() {
				_, err := f.open(&hostpb.OpenRequest{Device: i, Name: fmt.Sprint("d", i), Config: "sync/", Size: 1 << 20})
				done <- err
			}()
		}
		for i := 0; i < 16; i++ {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		var tags []uint32
		for i := 0; i < 256; i++ {
			tags = append(tags, f.push(sqe{op: opWrite, device: uint32(i % 16), length: 4096, payload: uint64(i) * 4096}))
		}
		for i := uint32(0); i < 16; i++ {
			go func() { done <- f.close(callCtx(t), i) }()
		}
		for i := 0; i < 16; i++ {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		for _, tag := range tags {
			if c := f.wait(tag); c.err != 0 && syscall.Errno(c.err) != syscall.ENODEV {
				t.Fatalf("errno %d", c.err)
			}
		}
	}
}

// TestHangUp: a host whose front is gone closes its devices and ends, and ^C does not end it before.
func TestHangUp(t *testing.T) {
	f := openBehave(t, false, "")
	if err := f.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := f.do(sqe{op: opFlush}); err != nil {
		t.Error(err)
	}
	if err := unix.Shutdown(f.liveness, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	f.awaitLog("the front is gone")
	f.awaitLog("closing; at most")
	deadline := time.After(testDeadline)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !f.client.Exited() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the process did not end")
		}
	}
	if f.cmd.ProcessState.ExitCode() != 0 {
		t.Errorf("the process ended with %v", f.cmd.ProcessState)
	}
}

// TestDescriptors: what a handler's children would inherit is nothing but the standard streams.
func TestDescriptors(t *testing.T) {
	f := openBehave(t, false, "")
	dir := fmt.Sprintf("/proc/%d/fdinfo", f.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if len(e.Name()) == 1 && e.Name() < "3" {
			continue
		}
		info, err := os.ReadFile(dir + "/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		var flags uint64
		for _, line := range strings.Split(string(info), "\n") {
			if _, err := fmt.Sscanf(line, "flags: %o", &flags); err == nil {
				break
			}
		}
		if flags&unix.O_CLOEXEC == 0 {
			target, _ := os.Readlink(strings.Replace(dir, "fdinfo", "fd", 1) + "/" + e.Name())
			t.Errorf("descriptor %s (%s) would be inherited", e.Name(), target)
		}
	}
}
