// SPDX-License-Identifier: Apache-2.0

// Package uringtest switches FUSE over io_uring on for tests. The switch holds for all mounts that the machine makes
// while it is on, and a mount keeps to what it was made with.
package uringtest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// Variable names the environment variable that chooses the transport of tests that can run over any: "uring", or empty.
const Variable = "FUSETREE_TRANSPORT"

// Wanted reports whether tests are to run over io_uring.
func Wanted() bool { return os.Getenv(Variable) == "uring" }

const (
	parameter = "/sys/module/fuse/parameters/enable_uring"
	sysctl    = "/proc/sys/kernel/io_uring_disabled"
)

// The switch belongs to all processes that hold the lock on lockName in turn, and to all tests of this process while
// one of them needs it.
const lockName = "fuse-enable-uring.lock"

var (
	mu     sync.Mutex // guards what follows
	value  []byte     // what the switch is on, of the tests in users
	users  int
	before []byte // what the switch was on
	lock   *os.File
)

// Enable switches on, and restore switches back; between the two a mount is made, and nothing that takes long: other
// programs of the machine may make mounts, too. The test is skipped if the kernel or a lack of privileges forbids it.
func Enable(t testing.TB) (restore func()) {
	t.Helper()
	return set(t, "Y\n")
}

// Disable is the opposite: between the two, new mounts cannot use io_uring.
func Disable(t testing.TB) (restore func()) {
	t.Helper()
	return set(t, "N\n")
}

var turn = sync.NewCond(&mu)

func set(t testing.TB, wanted string) (restore func()) {
	t.Helper()
	if disabled, err := os.ReadFile(sysctl); err != nil || bytes.TrimSpace(disabled)[0] != '0' {
		t.Skipf("no io_uring for everybody: %q, %v", disabled, err)
	}
	mu.Lock()
	defer mu.Unlock()
	for users > 0 && string(value) != wanted {
		turn.Wait()
	}
	if users == 0 {
		err := acquire(wanted)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
			t.Skipf("FUSE over io_uring cannot be switched: %v", err)
		case err != nil:
			t.Fatal(err)
		}
		value = []byte(wanted)
	}
	users++
	return sync.OnceFunc(func() {
		mu.Lock()
		defer mu.Unlock()
		if users--; users == 0 {
			if err := os.WriteFile(parameter, before, 0); err != nil {
				t.Errorf("restore the switch of FUSE over io_uring: %v", err)
			}
			lock.Close()
			turn.Broadcast()
		}
	})
}

// acquire needs mu.
func acquire(wanted string) error {
	if _, err := os.Stat(parameter); err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join("/tmp", lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
	if err == nil {
		if before, err = os.ReadFile(parameter); err == nil {
			err = os.WriteFile(parameter, []byte(wanted), 0)
		}
	}
	if err != nil {
		file.Close()
		return err
	}
	lock = file
	return nil
}
