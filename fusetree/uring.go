// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// FUSE over io_uring. The kernel has a queue for each processor: a request goes to the queue of the processor that it
// is made on, and waits there if the queue has no entry (room for one request) to spare. Entries are given to the
// kernel by a command on a ring, whose completion means that the entry holds a request; one further command commits the
// reply and gives the entry back.
//
// Each processor has a thread here with a ring, which serves the entries of the processor's queue. It alone may touch
// the ring; others who complete a request leave the entry in a list and, if the thread is asleep, wake it.
//
// FORGET, INTERRUPT and messages to the kernel still go through /dev/fuse. When the connection ends, the kernel fails
// the command of each entry, those that are yet to come included; a thread ends when it has seen all of its own fail.

const (
	// queueDepth is how many entries a queue has to begin with, and how many more it gets at a time when they are about
	// to run out: a node whose requests hang must be no obstacle to others. It comes too late for what a burst has left
	// waiting in the kernel, which then proceeds as other requests end; so the depth is that of large bursts.
	queueDepth = 128
	// minPayload is the least room for payload that the kernel accepts, in bytes.
	minPayload = 8192

	// FUSE_IO_URING_CMD_*
	commandRegister = 1
	commandCommit   = 2
)

// IOUringMode tells whether requests are to arrive over io_uring instead of by reads from /dev/fuse.
type IOUringMode string

const (
	// IOUringOff does without; so does the empty mode.
	IOUringOff IOUringMode = "off"
	// IOUringAuto uses it where the kernel permits it.
	IOUringAuto IOUringMode = "auto"
	// IOUringOn makes Run fail where the kernel does not permit it.
	IOUringOn IOUringMode = "on"
)

// valid reports whether there is such a mode.
func (m IOUringMode) valid() bool {
	return m == "" || m == IOUringOff || m == IOUringAuto || m == IOUringOn
}

// uringTransport serves a connection over io_uring.
type uringTransport struct {
	*connection
	readers *deviceReaders
	rings   *ringSet
}

func (u *uringTransport) serve() {
	var both sync.WaitGroup
	both.Go(u.rings.serve)
	both.Go(u.readers.serve)
	both.Wait()
	u.drain()
}

func (u *uringTransport) close() {
	u.readers.close()
	u.rings.close()
	u.connection.close()
}

// ringSet is the threads of a connection, which go through their steps together.
type ringSet struct {
	threads []*ringThread
	ended   sync.WaitGroup
}

// newRingSet starts the threads, which prepare everything that can be prepared before the kernel knows of it. Whoever
// gets a set must call close. EOPNOTSUPP: the kernel does not offer it for this connection. Others: as newRing.
func newRingSet(c *connection) (*ringSet, error) {
	if err := c.offersUring(); err != nil {
		return nil, err
	}
	possible, err := possibleProcessors()
	if err != nil {
		return nil, err
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return nil, fmt.Errorf("sched_getaffinity(2): %w", err)
	}
	s := &ringSet{}
	byProcessor := make([]*ringThread, possible)
	for cpu := range possible {
		if allowed.IsSet(cpu) {
			byProcessor[cpu] = newRingThread(c, cpu)
			s.threads = append(s.threads, byProcessor[cpu])
		}
	}
	if len(s.threads) == 0 {
		return nil, fmt.Errorf("no processor is allowed: %w", syscall.EINVAL)
	}
	// Requests can also come from processors that are not ours to use, or that are yet to be switched on.
	for cpu, t := range byProcessor {
		if t == nil {
			t = s.threads[cpu%len(s.threads)]
		}
		t.queues = append(t.queues, &ringQueue{id: uint16(cpu)})
	}
	for _, t := range s.threads {
		s.ended.Go(t.run)
	}
	if err := s.await(); err != nil {
		s.close()
		return nil, explainRingError(err)
	}
	return s, nil
}

// register gives the entries to the kernel, which must have had its reply to INIT. After an error the kernel goes on
// without the rings.
func (s *ringSet) register() error {
	s.proceed()
	return s.await()
}

// serve answers requests until the connection ends.
func (s *ringSet) serve() {
	s.proceed()
	s.ended.Wait()
}

// proceed lets each thread begin its next step; await waits for the step's end.

func (s *ringSet) proceed() {
	for _, t := range s.threads {
		t.steps <- struct{}{}
	}
}

func (s *ringSet) await() error {
	var failed error
	for _, t := range s.threads {
		err := <-t.results
		// After one failure the kernel refuses everything, which says nothing.
		if err != nil && (failed == nil || errors.Is(failed, syscall.EOPNOTSUPP)) {
			failed = err
		}
	}
	return failed
}

// close ends threads that do not serve, and frees everything. No request may be under way.
func (s *ringSet) close() {
	for _, t := range s.threads {
		close(t.steps)
	}
	s.ended.Wait()
	for _, t := range s.threads {
		t.free()
	}
}

// ringQueue is one of the kernel's queues. It belongs to its thread.
type ringQueue struct {
	id      uint16
	entries int // that the kernel knows of
	busy    int // of these, that hold a request
}

// ringThread is a thread with a ring and what is on it. Other threads call finished, and nothing else.
type ringThread struct {
	c       *connection
	cpu     int
	steps   chan struct{}
	results chan error

	ring    *ioRing
	queues  []*ringQueue
	entries []*ringEntry
	memory  [][]byte // what they consist of
	room    int      // bytes of an entry's payload
	most    int      // entries of a queue
	live    int      // entries that are the kernel's or ours, and not lost
	batch   batch
	failed  error // of Poll

	done   atomic.Pointer[ringEntry] // entries with a reply to commit, the last first
	asleep atomic.Bool               // or about to be: who sets it to false has to wake the thread
}

func newRingThread(c *connection, cpu int) *ringThread {
	page := os.Getpagesize()
	return &ringThread{
		c: c, cpu: cpu, steps: make(chan struct{}), results: make(chan error, 1),
		room: max(minPayload, (c.maxWrite+page-1)&^(page-1)),
		// All that the kernel may send in the background can be under way and users' own requests, too.
		most: queueDepth + c.tree.opts.MaxBackground,
	}
}

// run is the thread.
func (t *ringThread) run() {
	runtime.LockOSThread() // for good: the thread ends with the goroutine, and its place on a processor with it
	t.results <- t.prepare()
	if _, more := <-t.steps; !more {
		return
	}
	t.results <- t.register()
	if _, more := <-t.steps; !more {
		return
	}
	t.serve()
}

// prepare makes the ring and the first entries.
func (t *ringThread) prepare() error {
	// A request is best served where it was made, as long as its maker waits for it. A thread that may not be there is as
	// good, only slower.
	var here unix.CPUSet
	here.Set(t.cpu)
	_ = unix.SchedSetaffinity(0, &here)
	var err error
	if t.ring, err = newRing(); err != nil {
		return err
	}
	for _, q := range t.queues {
		if err := t.allocate(q); err != nil {
			return err
		}
	}
	return nil
}

// allocate makes entries for a queue.
func (t *ringThread) allocate(q *ringQueue) error {
	memory, entries, err := allocateEntries(queueDepth, t.room)
	if err != nil {
		return err
	}
	t.memory = append(t.memory, memory)
	for _, e := range entries {
		e.thread, e.queue, e.index = t, q, uint64(len(t.entries))
		t.entries = append(t.entries, e)
	}
	return nil
}

// register gives the first entries to the kernel. One for each queue is enough.
func (t *ringThread) register() error {
	if err := t.enlist(t.entries); err != nil {
		return err
	}
	// What failed is complete at once; a request cannot come before enter lets it.
	var failed error
	for {
		done, ok := t.ring.next()
		if !ok {
			break
		}
		if failed == nil {
			failed = syscall.Errno(-done.result)
		}
		t.lose(t.entries[done.userData])
	}
	for _, q := range t.queues {
		if q.entries == 0 {
			return fmt.Errorf("give the kernel entries for processor %d: %w", q.id, failed)
		}
	}
	return nil
}

// enlist gives new entries to the kernel.
func (t *ringThread) enlist(entries []*ringEntry) error {
	for _, e := range entries {
		e.queue.entries++
		t.live++
		if err := t.push(commandRegister, e); err != nil {
			return err
		}
	}
	return t.ring.submit()
}

func (t *ringThread) push(code uint32, e *ringEntry) error {
	if t.ring.full() {
		if err := t.ring.submit(); err != nil {
			return err
		}
	}
	if code == commandRegister {
		t.ring.push(t.c.fd, code, &e.memory.where[0], len(e.memory.where), e.index, 0, e.queue.id)
	} else {
		t.ring.push(t.c.fd, code, nil, 0, e.index, e.commitID, e.queue.id)
	}
	return nil
}

// lose takes note that the kernel has given an entry up.
func (t *ringThread) lose(e *ringEntry) {
	e.queue.entries--
	t.live--
}

// serve answers requests until the kernel has given up every entry.
func (t *ringThread) serve() {
	for t.live > 0 {
		err := t.commitReplies()
		if err == nil {
			err = t.ring.enter(t.mayRest())
		}
		t.asleep.Store(false)
		if err == nil {
			if t.startRequests() {
				t.batch.commit(t)
			}
			err = t.failed
		}
		if err != nil {
			// Nobody else can serve this queue.
			t.c.tree.log.Error("serving FUSE over io_uring failed, aborting the mount", "error", err)
			go func() { _ = t.c.tree.Abort() }()
			return
		}
	}
}

// Pending implements Poller.
func (t *ringThread) Pending() int { return t.batch.Pending() }

// Poll implements Poller.
func (t *ringThread) Poll() bool {
	if t.failed != nil {
		return false
	}
	t.failed = t.commitReplies()
	if t.failed == nil && t.ring.due() {
		t.failed = t.ring.enter(false)
	}
	if !t.startRequests() {
		return false
	}
	t.batch.begin()
	return true
}

// mayRest reports whether there is nothing to do before the next completion. If so, finished will wake the thread.
func (t *ringThread) mayRest() bool {
	if t.ring.ready() {
		return false
	}
	t.asleep.Store(true)
	return t.done.Load() == nil
}

// finished is called when an entry's reply is in place, on any thread.
func (t *ringThread) finished(e *ringEntry) {
	for {
		e.next = t.done.Load()
		if t.done.CompareAndSwap(e.next, e) {
			break
		}
	}
	if t.asleep.CompareAndSwap(true, false) {
		if err := t.ring.wake(); err != nil {
			t.c.tree.log.Error("cannot wake a thread, replies may be late", "error", err)
		}
	}
}

// commitReplies has the kernel take the replies that are ready when it is entered next.
func (t *ringThread) commitReplies() error {
	for e := t.done.Swap(nil); e != nil; {
		next := e.next
		e.next = nil
		e.queue.busy--
		if err := t.push(commandCommit, e); err != nil {
			return err
		}
		e = next
	}
	return nil
}

// startRequests begins what has come in, and reports whether the Commit of a node is due. As with reads from /dev/fuse,
// the first request is on its way at once and the others share a doorbell, unless there is just the one.
func (t *ringThread) startRequests() bool {
	started := 0
	for range maxBatch {
		done, ok := t.ring.next()
		if !ok {
			break
		}
		if done.userData == wakeUp {
			continue
		}
		e := t.entries[done.userData]
		if done.result < 0 {
			t.lost(e, syscall.Errno(-done.result))
			continue
		}
		if t.startRequest(e) {
			if started++; started == 1 && t.c.inFlight.Load() > 1 {
				t.batch.begin()
			}
		}
	}
	return started > 0
}

// startRequest begins one request, and reports whether that has made a node's Commit due.
func (t *ringThread) startRequest(e *ringEntry) bool {
	e.commitID = e.memory.commitID
	e.queue.busy++
	if e.queue.busy*4 >= e.queue.entries*3 {
		t.grow(e.queue)
	}
	h := e.header()
	if _, payload, err := e.request(); err == nil {
		if _, taken := t.c.startIO(&t.batch, e, h, e.argument(), payload, nil); taken {
			return true
		}
	}
	if answersAtOnce(h.Opcode) {
		e.answer()
	} else {
		t.c.slow.Go(e.answer)
	}
	return false
}

// lost takes note of an entry that the kernel has given up, as it does with all of them at the end of the connection.
func (t *ringThread) lost(e *ringEntry, reason syscall.Errno) {
	t.lose(e)
	switch reason {
	case unix.ENOTCONN, unix.ECONNABORTED, unix.ENODEV, unix.ECANCELED, unix.ENOENT:
	default:
		t.c.tree.log.Error("the kernel refuses room for requests", "processor", e.queue.id, "error", reason)
		t.most = 0
	}
}

// grow gives a queue more entries, if it may have more. Without them requests wait for others to end.
func (t *ringThread) grow(q *ringQueue) {
	if q.entries >= t.most {
		return
	}
	first := len(t.entries)
	err := t.allocate(q)
	if err == nil {
		err = t.enlist(t.entries[first:])
	}
	if err != nil {
		t.c.tree.log.Warn("no room for more FUSE requests at a time", "processor", q.id, "error", err)
		t.most = 0
	}
}

// free gives back what the thread has had, when it has ended.
func (t *ringThread) free() {
	if t.ring != nil {
		t.ring.close()
	}
	for _, memory := range t.memory {
		_ = unix.Munmap(memory)
	}
}

// Why it may not be possible.

const (
	parameterFile = "/sys/module/fuse/parameters/enable_uring"
	sysctlFile    = "/proc/sys/kernel/io_uring_disabled"
)

// offersUring reports with an error why the kernel does not offer io_uring for the connection.
func (c *connection) offersUring() error {
	if c.initFlags()&fuse.CAP_OVER_IO_URING != 0 {
		return nil
	}
	value, err := os.ReadFile(parameterFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("this kernel cannot do FUSE over io_uring, which needs Linux 6.14 or later with "+
			"CONFIG_FUSE_IO_URING: %w", syscall.EOPNOTSUPP)
	case err == nil && strings.TrimSpace(string(value)) != "Y":
		return fmt.Errorf("FUSE over io_uring is switched off, switch it on with: echo Y > %s: %w",
			parameterFile, syscall.EOPNOTSUPP)
	}
	return fmt.Errorf("the kernel does not offer FUSE over io_uring: %w", syscall.EOPNOTSUPP)
}

// explainRingError adds what to do about it.
func explainRingError(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSYS):
		return fmt.Errorf("this kernel is without io_uring (CONFIG_IO_URING): %w", err)
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		value, _ := os.ReadFile(sysctlFile)
		if v := strings.TrimSpace(string(value)); v != "" && v != "0" {
			return fmt.Errorf("io_uring is restricted, permit it with: echo 0 > %s: %w", sysctlFile, err)
		}
		return fmt.Errorf("io_uring is not permitted here, perhaps by a container's seccomp profile: %w", err)
	}
	return err
}

// possibleProcessors is how many queues the kernel has: one for each processor that there could be.
func possibleProcessors() (int, error) {
	const file = "/sys/devices/system/cpu/possible"
	list, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	count, err := countProcessors(strings.TrimSpace(string(list)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return count, nil
}

// countProcessors counts the members of a list such as "0-3,8".
func countProcessors(list string) (int, error) {
	count := 0
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		first, err := strconv.ParseUint(from, 10, 16)
		last := first
		if err == nil && isRange {
			last, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || last < first {
			return 0, fmt.Errorf("no list of processors: %q: %w", list, syscall.EINVAL)
		}
		count += int(last-first) + 1
	}
	return count, nil
}
