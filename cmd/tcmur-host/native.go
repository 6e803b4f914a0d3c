// SPDX-License-Identifier: Apache-2.0

package main

// The border between Go and C: nothing else in this tree imports "C". Names and comments of what is called are in
// native.h.

// The unused parameter is one of cgo's own, in what it generates.
//
// -rdynamic puts the functions that handlers import into the dynamic symbol table, where dlopen looks for them.

/*
#cgo CFLAGS: -std=gnu11 -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -fvisibility=hidden
#cgo CFLAGS: -I${SRCDIR}/../../plugin/handlers -I${SRCDIR}/../../shared
#cgo LDFLAGS: -rdynamic -ldl -lpthread
#include <stdlib.h>
#include "native.h"
*/
import "C"

import (
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Limits that C and Go share.
const (
	maxDevices    = C.NATIVE_MAX_DEVICES
	maxConfig     = C.NATIVE_CONFIG_SIZE - 1
	maxName       = C.NATIVE_NAME_MAX - 1
	maxSubtype    = C.NATIVE_SUBTYPE_MAX - 1
	logRecordSize = C.sizeof_struct_log_record
)

// why is a buffer in C memory for the reason of a failure.
type why struct{ p *C.char }

func newWhy() why { return why{(*C.char)(C.calloc(1, C.NATIVE_WHY_SIZE))} }

// take returns the reason and frees the buffer.
func (w why) take() string {
	s := C.GoString(w.p)
	C.free(unsafe.Pointer(w.p))
	return s
}

// mapChannel maps the two segments; see channel_map. The descriptors stay open.
func mapChannel(submitFD, completeFD int) error {
	w := newWhy()
	errno := C.channel_map(C.int(submitFD), C.int(completeFD), w.p)
	if reason := w.take(); errno != 0 {
		return fmt.Errorf("the channel to the front: %s: %w", reason, syscall.Errno(errno))
	}
	return nil
}

func installCrashReports(fd int) error {
	if errno := C.crash_install(C.int(fd)); errno != 0 {
		return fmt.Errorf("install signal handlers: %w", syscall.Errno(errno))
	}
	return nil
}

func setCrashOutput(stdoutFD, stderrFD int) { C.crash_set_output(C.int(stdoutFD), C.int(stderrFD)) }

// setKeepSocket gives C the socket for memory that outlives this process.
func setKeepSocket(fd int) { C.keep_set_socket(C.int(fd)) }

func setSpin(micros uint) { C.worker_set_spin(C.uint(min(micros, 1000))) }

func setLogOutput(fd int) { C.log_set_output(C.int(fd)) }

// setLogThreshold takes a syslog number: messages above it are dropped before they are formatted.
func setLogThreshold(level int) { C.log_set_level(C.int(level)) }

func takeDroppedLogs() uint64 { return uint64(C.log_take_dropped()) }

func setLogDirectory(path string) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	C.log_set_directory(p)
}

// dlopen loads the shared object that this process is for.
func dlopen(path string) error {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	w := newWhy()
	errno := C.loader_open(p, w.p)
	if reason := w.take(); errno != 0 {
		return control.Failf(syscall.Errno(errno), "%s", reason)
	}
	return nil
}

// preload loads a library that the shared object needs, before that itself.
func preload(path string) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	C.loader_preload(p)
}

// keptObject asks the front for a descriptor of its copy of the shared object.
func keptObject() (*os.File, error) {
	fd := C.keep_object()
	if fd < 0 {
		return nil, syscall.Errno(-fd)
	}
	return os.NewFile(uintptr(fd), "shared object"), nil
}

// handlerInit calls the loaded object's handler_init. It returns handler_init's result and the error messages that the
// handler logged meanwhile.
func handlerInit(path string) (result int, logged string, err error) {
	var r C.int
	w := newWhy()
	errno := C.loader_init(&r, w.p)
	reason := w.take()
	if errno != 0 {
		return 0, "", control.Failf(syscall.Errno(errno), "%s is not a tcmu-runner handler: %s", path, reason)
	}
	return int(r), reason, nil
}

// registered returns the addresses that were passed to tcmur_register_handler.
func registered() []uintptr {
	var addresses [C.NATIVE_MAX_REGISTERED]C.uintptr_t
	n := C.loader_registered(&addresses[0], C.NATIVE_MAX_REGISTERED)
	out := make([]uintptr, n)
	for i := range out {
		out[i] = uintptr(addresses[i])
	}
	return out
}

// process is the memory of this process, read without the risk of a fault.
type process struct{}

var _ memory = process{}

func (process) peek(address uintptr, size int) ([]byte, bool) {
	p := C.malloc(C.size_t(size))
	defer C.free(p)
	if !C.loader_peek(C.uintptr_t(address), p, C.size_t(size)) {
		return nil, false
	}
	return C.GoBytes(p, C.int(size)), true
}

func (process) image(address uintptr) (base uintptr, ok bool) {
	var b C.uintptr_t
	ok = bool(C.loader_image(C.uintptr_t(address), &b))
	return uintptr(b), ok
}

func (process) symbolSize(address uintptr) uint64 {
	return uint64(C.loader_symbol_size(C.uintptr_t(address)))
}

// adopt makes h the handler of this process and calls its init, whose result it returns.
func adopt(h *handlerStruct, q quirks) int {
	var n C.struct_native_handler
	for name, slot := range map[string]*C.uintptr_t{
		"check_config": &n.check_config, "reconfig": &n.reconfig, "open": &n.open, "close": &n.close,
		"handle_cmd": &n.handle_cmd,
		"read":       &n.read, "write": &n.write, "flush": &n.flush, "unmap": &n.unmap, "writesame": &n.writesame,
		"init": &n.init, "destroy": &n.destroy,
	} {
		*slot = C.uintptr_t(h.callbacks[name])
	}
	for i, c := range []byte(h.subtype) {
		n.subtype[i] = C.char(c)
	}
	n.nr_threads = C.int(h.threads)
	n.serial = C.bool(q.serial)
	return int(C.loader_adopt(&n))
}

// threading is how the adopted handler is driven.
type threading struct {
	concurrency  uint32 // callouts at a time for one device
	async, byCDB bool
}

func handlerThreading() threading {
	var t C.struct_native_threading
	C.loader_threading(&t)
	return threading{concurrency: uint32(t.concurrency), async: bool(t.async), byCDB: bool(t.by_cdb)}
}

func destroyHandler() { C.loader_destroy() }

// checkConfig asks the handler. The reason may be empty.
func checkConfig(config string) (ok bool, reason string) {
	p := C.CString(config)
	defer C.free(unsafe.Pointer(p))
	w := newWhy()
	ok = bool(C.loader_check_config(p, w.p))
	return ok, w.take()
}

// openParams is what a handler is told about a device before its open.
type openParams struct {
	index     uint32
	name      string
	config    string
	size      uint64 // bytes
	blockSize uint32 // bytes
	maxXfer   uint32 // bytes, a multiple of blockSize
	alignment uint32 // bytes; 0: whatever the way of I/O needs
	retry     time.Duration
	readOnly  bool
	reopen    bool
	// readErrorsLogged: see guard.
	readErrorsLogged bool
	qcow             qcowCallouts
	probing          bool // it will be refused, and the refusal tells what is asked for: not worth an error in the log
}

// openDevice calls the handler's open and returns its result and what the handler logged as errors meanwhile.
func openDevice(p openParams) (result int, logged string, err error) {
	var how C.struct_native_open
	how.index = C.uint32_t(p.index)
	how.name = C.CString(p.name)
	defer C.free(unsafe.Pointer(how.name))
	how.config = C.CString(p.config)
	defer C.free(unsafe.Pointer(how.config))
	how.size = C.uint64_t(p.size)
	how.block_size = C.uint32_t(p.blockSize)
	how.max_xfer = C.uint32_t(p.maxXfer)
	how.alignment = C.uint32_t(p.alignment)
	how.retry_ns = C.uint64_t(p.retry.Nanoseconds())
	how.read_only = C.bool(p.readOnly)
	how.reopen = C.bool(p.reopen)
	how.probing = C.bool(p.probing)
	how.read_errors_logged = C.bool(p.readErrorsLogged)
	how.qcow_cluster = C.uint32_t(p.qcow.cluster)
	how.qcow_whole = C.bool(p.qcow.whole)
	how.qcow_smallest = C.uint32_t(p.qcow.smallest)
	how.qcow_lookups = C.uint64_t(p.qcow.lookups)

	var r C.int
	w := newWhy()
	errno := C.device_open(&how, &r, w.p)
	logged = w.take()
	if errno != 0 {
		return 0, "", fmt.Errorf("device %d: %w", p.index, syscall.Errno(errno))
	}
	return int(r), logged, nil
}

// geometry is what a device looks like after its open; sizes are bytes.
type geometry struct {
	size                                  uint64
	blockSize, maxXfer, alignment         uint32
	canWrite, canFlush, canUnmap, canZero bool
	canWriteSame, unmapZeroes, canSeek    bool
	writeCache, rotational, writesSurvive bool
	contents                              string // of which kept memory the device consists, if any
}

func deviceGeometry(index uint32) geometry {
	var g C.struct_native_geometry
	C.device_geometry(C.uint32_t(index), &g)
	return geometry{
		size: uint64(g.size), blockSize: uint32(g.block_size), maxXfer: uint32(g.max_xfer),
		alignment: uint32(g.alignment), canWrite: bool(g.can_write), canFlush: bool(g.can_flush),
		canUnmap: bool(g.can_unmap), canZero: bool(g.can_zero), writeCache: bool(g.write_cache),
		rotational: bool(g.rotational), writesSurvive: bool(g.writes_survive),
		canWriteSame: bool(g.can_write_same), unmapZeroes: bool(g.unmap_zeroes),
		canSeek: bool(g.can_seek), contents: C.GoString(&g.contents[0]),
	}
}

// startDevice lets requests in. boundary: no callout crosses a multiple of that many bytes; 0: none.
func startDevice(index uint32, boundary uint64) error {
	if errno := C.device_start(C.uint32_t(index), C.uint64_t(boundary)); errno != 0 {
		return syscall.Errno(errno)
	}
	return nil
}

// resizeDevice calls the handler's reconfig and returns its result and what the handler logged as errors meanwhile.
func resizeDevice(index uint32, size uint64) (result int, logged string, err error) {
	var r C.int
	w := newWhy()
	errno := C.device_resize(C.uint32_t(index), C.uint64_t(size), &r, w.p)
	logged = w.take()
	if errno != 0 {
		return 0, "", syscall.Errno(errno)
	}
	return int(r), logged, nil
}

// seekDevice returns where data, or a hole, begins; see device_seek.
func seekDevice(index uint32, offset uint64, hole bool) (uint64, error) {
	at := int64(C.device_seek(C.uint32_t(index), C.uint64_t(offset), C.bool(hole)))
	if at < 0 {
		return 0, syscall.Errno(-at)
	}
	return uint64(at), nil
}

// sizeEvents returns an eventfd; see device_size_events.
func sizeEvents() (int, error) {
	fd, err := C.device_size_events()
	if fd < 0 {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return int(fd), nil
}

// abandonDevice closes a device that was opened but not started.
func abandonDevice(index uint32) { C.device_abandon(C.uint32_t(index)) }

// closeDevice drains, flushes and closes; timeout < 0: no limit. See device_close for the errors.
func closeDevice(index uint32, timeout time.Duration) (flushErr, err error) {
	var flush C.int
	ns := C.int64_t(-1)
	if timeout >= 0 {
		ns = C.int64_t(timeout.Nanoseconds())
	}
	if errno := C.device_close(C.uint32_t(index), ns, &flush); errno != 0 {
		return nil, syscall.Errno(errno)
	}
	if flush != 0 {
		return syscall.Errno(flush), nil
	}
	return nil, nil
}

// interruptDevice ends a closeDevice that waits.
func interruptDevice(index uint32) { C.device_interrupt(C.uint32_t(index)) }
