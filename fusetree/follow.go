// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"bytes"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// followOften is how often a follower looks where the client is, while it finds it elsewhere.
	followOften = 2 * time.Millisecond
	// followAnswer is when it looks for the answer of a look.
	followAnswer = 200 * time.Microsecond
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
	places   places
}

// follow is called by the reader thread, with the thread whose request it has read.
func (f *follower) follow(tid uint32) {
	now := time.Now()
	if now.Before(f.due) {
		return
	}
	cpu, known, ok := f.sleepsOn(tid)
	if !known {
		f.due = now.Add(followAnswer)
		return
	}
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

// sleepsOn returns the processor on which a thread went to sleep; known is false if the answer is not there yet, ok
// if it does not sleep.
func (f *follower) sleepsOn(tid uint32) (cpu int, known, ok bool) {
	p, known := f.places.of(tid)
	return p.cpu, known, p.ok && !p.running
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

// places asks /proc where threads are. Some kernels make who reads that wait for a lock that execve(2) holds while it
// closes files, which may be ours: its flush, which the reader has to serve, would wait for the reader. So others read,
// and the answer is there the next time. The zero value is ready.
type places struct {
	asking atomic.Bool
	answer atomic.Pointer[place]
}

// place is what /proc says of a thread.
type place struct {
	tid     uint32
	cpu     int  // on which it runs, or went to sleep
	running bool // or wants to
	ok      bool // it could be told
}

// of returns the answer to the question before this one if it is about the same thread; otherwise it is false. It does
// not wait.
func (p *places) of(tid uint32) (_ place, ok bool) {
	if tid == 0 { // of another PID namespace
		return place{}, true
	}
	if last := p.answer.Swap(nil); last != nil && last.tid == tid {
		return *last, true
	}
	if p.asking.CompareAndSwap(false, true) {
		go func() {
			last := readPlace(tid)
			p.answer.Store(&last)
			p.asking.Store(false)
		}()
	}
	return place{}, false
}

// readPlace asks for a thread. It may take until execve(2) has ended there.
func readPlace(tid uint32) place {
	p := place{tid: tid}
	fd, err := unix.Open("/proc/"+strconv.Itoa(int(tid))+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return p
	}
	var text [512]byte
	n, err := unix.Read(fd, text[:])
	_ = unix.Close(fd)
	if err != nil {
		return p
	}
	// proc_pid_stat(5): the state follows the command, and 36 fields after it comes the processor.
	fields := bytes.Fields(text[bytes.LastIndexByte(text[:n], ')')+1 : n])
	const state, last = 0, 36
	if len(fields) <= last {
		return p
	}
	p.cpu, err = strconv.Atoi(string(fields[last]))
	p.running, p.ok = fields[state][0] == 'R', err == nil
	return p
}
