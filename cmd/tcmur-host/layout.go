// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// layout is one form that struct tcmur_handler has had. Nothing in a shared object says which one it was built for, and
// reading it by the wrong one calls garbage.
type layout struct {
	name string
	size int
	// offsets of the callbacks, by name.
	offsets map[string]int
	// dbus is the offset of _is_dbus_handler, which is false in every shared object; -1 where it cannot be told.
	dbus int
}

// Members at the same place in all layouts since 1.5.0.
const (
	offName     = 0
	offSubtype  = 8
	offCfgDesc  = 16
	offThreads  = 64
	prefixSize  = 112
	maxThreads  = 1024
	maxTextSize = 4096 // of name and cfg_desc
)

// callbackOrder is the order of the callbacks in the struct.
var callbackOrder = []string{
	"check_config", "reconfig", "open", "close", "handle_cmd", "read", "write", "flush", "unmap",
	"writesame", "caw", "report_event", "lock", "unlock", "get_lock_tag", "get_lock_state", "update_logdir",
	"init", "destroy",
}

// newLayout adds the callbacks after unmap, which is where versions differ, to those before.
func newLayout(name string, size, dbus int, tail map[string]int) *layout {
	l := &layout{name: name, size: size, dbus: dbus, offsets: map[string]int{
		"check_config": 32, "reconfig": 40, "open": 48, "close": 56, "handle_cmd": 72, "read": 80, "write": 88,
		"flush": 96, "unmap": 104,
	}}
	for callback, offset := range tail {
		l.offsets[callback] = offset
	}
	return l
}

var (
	layout152 = newLayout("1.5.0-1.5.2", 160, 144, map[string]int{
		"lock": 112, "unlock": 120, "get_lock_tag": 128, "get_lock_state": 136, "update_logdir": 152,
	})
	layout153 = newLayout("1.5.3", 184, 152, map[string]int{
		"report_event": 112, "lock": 120, "unlock": 128, "get_lock_tag": 136, "get_lock_state": 144,
		"update_logdir": 160, "init": 168, "destroy": 176,
	})
	layout154 = newLayout("1.5.4-1.6.2", 200, 168, map[string]int{
		"writesame": 112, "caw": 120, "report_event": 128, "lock": 136, "unlock": 144, "get_lock_tag": 152,
		"get_lock_state": 160, "update_logdir": 176, "init": 184, "destroy": 192,
	})
	// layoutPrefix uses only what all versions have in common. It costs nothing with the handlers whose version
	// cannot be told: they are those that have nothing else.
	layoutPrefix = newLayout("prefix", prefixSize, -1, nil)

	layoutsBySize = map[uint64]*layout{160: layout152, 184: layout153, 200: layout154}
	layoutsByABI  = map[string]*layout{
		"1.5.0": layout152, "1.5.1": layout152, "1.5.2": layout152, "1.5.3": layout153, "1.5.4": layout154,
		"1.6.0": layout154, "1.6.1": layout154, "1.6.2": layout154,
	}
)

// evidence is what there is to tell the layout by.
type evidence struct {
	override   string // of the user; "": none
	symbolSize uint64 // of the struct's symbol; 0: it has none
	imports    importSet
}

// choose picks the layout, by the strongest evidence first: the user's word, the size of the struct's symbol, what the
// object imports.
func choose(e evidence) (*layout, error) {
	if e.override != "" {
		l, ok := layoutsByABI[e.override]
		if !ok {
			return nil, control.Failf(syscall.EINVAL,
				"abi=%s is not a version that is known: say 1.5.2 (for 1.5.0 to 1.5.2), 1.5.3, or 1.5.4 (to 1.6.2)",
				e.override)
		}
		return l, nil
	}
	if l, ok := layoutsBySize[e.symbolSize]; ok {
		return l, nil
	}
	i := e.imports
	switch {
	case i.any("tcmu_dev_get_write_protect_enabled", "tcmu_dev_set_unmap_gran_align"):
		return layout154, nil
	case i.any("tcmur_handle_writesame", "tcmur_handle_caw"):
		if i.any("tcmu_notify_cmd_timed_out", "tcmu_dev_get_private", "tcmu_set_thread_name") {
			return layout153, nil
		}
		return layout152, nil
	}
	return layoutPrefix, nil
}

// memory is what a struct is read from; in the process itself any address may be tried.
type memory interface {
	peek(address uintptr, size int) ([]byte, bool)
	image(address uintptr) (base uintptr, ok bool)
	symbolSize(address uintptr) uint64
}

// handlerStruct is a struct tcmur_handler, read and found to be sane.
type handlerStruct struct {
	layout                 *layout
	name, subtype, cfgDesc string
	threads                int
	callbacks              map[string]uintptr // those that are not NULL
}

// readText reads a C string of at most limit bytes.
func readText(m memory, address uintptr, limit int) (string, bool) {
	const page = 4096
	var text []byte
	for len(text) <= limit {
		// Never beyond a page that the text is known to reach into.
		at := address + uintptr(len(text))
		chunk, ok := m.peek(at, page-int(at%page))
		if !ok {
			return "", false
		}
		if n := bytes.IndexByte(chunk, 0); n >= 0 {
			text = append(text, chunk[:n]...)
			return string(text), len(text) <= limit
		}
		text = append(text, chunk...)
	}
	return "", false
}

// readSubtype reads no more of the struct at address than its subtype.
func readSubtype(m memory, address uintptr) (string, bool) {
	raw, ok := m.peek(address+offSubtype, 8)
	if !ok {
		return "", false
	}
	return readText(m, uintptr(binary.NativeEndian.Uint64(raw)), maxSubtype)
}

// readHandler reads the struct at address by layout l. Whatever it finds there, it returns an error (ENOEXEC: the
// object is not something that can be run) rather than fault.
func readHandler(m memory, address uintptr, l *layout) (*handlerStruct, error) {
	bad := func(format string, args ...any) error {
		return control.Failf(syscall.ENOEXEC, "its struct tcmur_handler, read as version %s, is malformed: %s",
			l.name, fmt.Sprintf(format, args...))
	}
	raw, ok := m.peek(address, l.size)
	if !ok {
		return nil, bad("it is not in readable memory")
	}
	word := func(offset int) uintptr { return uintptr(binary.NativeEndian.Uint64(raw[offset:])) }

	h := &handlerStruct{layout: l, callbacks: map[string]uintptr{}}
	for _, text := range []struct {
		what   string
		offset int
		limit  int
		to     *string
	}{
		{"name", offName, maxTextSize, &h.name},
		{"subtype", offSubtype, maxSubtype, &h.subtype},
		{"cfg_desc", offCfgDesc, maxTextSize, &h.cfgDesc},
	} {
		if *text.to, ok = readText(m, word(text.offset), text.limit); !ok {
			return nil, bad("%s does not point to a text", text.what)
		}
		*text.to = strings.ToValidUTF8(*text.to, "\uFFFD")
	}
	if h.subtype == "" || len(h.subtype) > maxSubtype || strings.ContainsAny(h.subtype, "/\uFFFD") {
		return nil, bad("subtype %q is empty, or contains a '/' or something that is not text", h.subtype)
	}
	h.threads = int(int32(binary.NativeEndian.Uint32(raw[offThreads:])))
	if h.threads < 0 || h.threads > maxThreads {
		return nil, bad("nr_threads is %d, not in 0 to %d", h.threads, maxThreads)
	}
	base, ok := m.image(address)
	if !ok {
		return nil, bad("it is not part of a shared object")
	}
	for callback, offset := range l.offsets {
		at := word(offset)
		if at == 0 {
			continue
		}
		if b, ok := m.image(at); !ok || b != base {
			return nil, bad("%s points outside of the shared object", callback)
		}
		h.callbacks[callback] = at
	}
	has := func(callback string) bool { return h.callbacks[callback] != 0 }
	if !has("open") || !has("close") {
		return nil, bad("it has no open or no close")
	}
	if !(has("read") && has("write")) && !has("handle_cmd") {
		return nil, bad("it has neither read and write nor handle_cmd")
	}
	if l.dbus >= 0 && raw[l.dbus] != 0 {
		return nil, bad("_is_dbus_handler is %d, not 0", raw[l.dbus])
	}
	return h, nil
}

// callbackNames lists what the handler has, in the order of the struct.
func (h *handlerStruct) callbackNames() []string {
	var names []string
	for _, callback := range callbackOrder {
		if h.callbacks[callback] != 0 {
			names = append(names, callback)
		}
	}
	return names
}
