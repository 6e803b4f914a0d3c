// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bytes"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// followOften is how often a follower looks where the client is, while it finds it elsewhere.
	followOften = 2 * time.Millisecond
	// followSeldom is how seldom it looks at most.
	followSeldom = 16 * time.Millisecond
	// followMoves is how many moves in a row it takes to see that the scheduler has other plans, and look more seldom.
	followMoves = 8
)

// follower keeps a reader thread on the processor of a client that has one request at a time and sleeps meanwhile: to
// wake a thread on its own processor takes a client a tenth of what it takes to get another one out of its sleep. It is
// only a hint to the scheduler: the thread may run everywhere, as before. The zero value is ready.
type follower struct {
	due      time.Time     // of the next look
	interval time.Duration // between looks
	moves    int           // in a row
	file     statFile
}

// follow is called by the reader thread, with the thread whose request it has read.
func (f *follower) follow(tid uint32) {
	now := time.Now()
	if now.Before(f.due) {
		return
	}
	cpu, ok := f.sleepsOn(tid)
	f.due = now.Add(f.wait(ok && moveTo(cpu)))
}

// wait returns when to look next, after a look that made the thread move or did not.
func (f *follower) wait(moved bool) time.Duration {
	f.interval = min(max(2*f.interval, followOften), followSeldom)
	if !moved {
		f.moves = 0
	} else if f.moves++; f.moves <= followMoves {
		f.interval = followOften
	}
	return f.interval
}

// sleepsOn returns the processor on which a thread went to sleep; false if it does not sleep.
func (f *follower) sleepsOn(tid uint32) (cpu int, ok bool) {
	cpu, running, ok := f.file.read(tid)
	return cpu, ok && !running
}

// moveTo moves the calling thread to a processor, and reports whether it had been on another one.
func moveTo(cpu int) bool {
	if here, ok := processor(); !ok || here == cpu {
		return false
	}
	var all, one unix.CPUSet
	if unix.SchedGetaffinity(0, &all) != nil || !all.IsSet(cpu) {
		return false
	}
	one.Set(cpu)
	moved := unix.SchedSetaffinity(0, &one) == nil
	_ = unix.SchedSetaffinity(0, &all)
	return moved
}

// processor returns the one that the calling thread runs on.
func processor() (cpu int, ok bool) {
	var n uint32
	_, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&n)), 0, 0)
	return int(n), errno == 0
}

// statFile reads what /proc says of threads.
type statFile struct{ text [512]byte }

// read returns the processor on which a thread runs, or went to sleep; false if that cannot be told. No read of this
// file waits for a lock that a client may hold while it waits for us, such as its mmap_lock.
func (f *statFile) read(tid uint32) (cpu int, running, ok bool) {
	if tid == 0 {
		return 0, false, false // of another PID namespace
	}
	fd, err := unix.Open("/proc/"+strconv.Itoa(int(tid))+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false, false
	}
	n, err := unix.Read(fd, f.text[:])
	_ = unix.Close(fd)
	if err != nil {
		return 0, false, false
	}
	// proc_pid_stat(5): the state follows the command, and 36 fields after it comes the processor.
	fields := bytes.Fields(f.text[bytes.LastIndexByte(f.text[:n], ')')+1 : n])
	const state, last = 0, 36
	if len(fields) <= last {
		return 0, false, false
	}
	cpu, err = strconv.Atoi(string(fields[last]))
	return cpu, fields[state][0] == 'R', err == nil
}
