// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// cacheMode says what the kernel keeps of a device's contents for those who open it without O_DIRECT. Who opens it with
// O_DIRECT gets past the page cache in each of them.
type cacheMode string

const (
	// cacheNone: every read and write goes to the handler as it was made.
	cacheNone cacheMode = "none"
	// cacheReadahead: reads are cached and made ahead of time, writes go to the handler at once.
	cacheReadahead cacheMode = "readahead"

	// cacheWriteback: writes are cached, too, and go to the handler later and in larger pieces (cover.go).
	cacheWriteback cacheMode = "writeback"

	// cacheDefault is as docs/performance.md explains.
	cacheDefault = cacheReadahead
)

// cacheModes are all of them.
var cacheModes = []string{string(cacheNone), string(cacheReadahead), string(cacheWriteback)}

// cacheOptions are the options of "add" that are for the kernel's caching.
func cacheOptions() []addOption[cacheMode] {
	return []addOption[cacheMode]{{
		"cache", strings.Join(cacheModes, "|"),
		"what the kernel caches without O_DIRECT: nothing, what was read (the default), or writes as well", setCache,
	}}
}

func setCache(mode *cacheMode, value string) error {
	for _, known := range cacheModes {
		if value == known {
			*mode = cacheMode(value)
			return nil
		}
	}
	return failf(syscall.EINVAL, "%q: must be one of %s", value, strings.Join(cacheModes, ", "))
}

// orDefault is what holds where "add" was told nothing.
func (m cacheMode) orDefault() cacheMode {
	if m == "" {
		return cacheDefault
	}
	return m
}

// apply sets how the kernel treats a file that is being opened.
func (m cacheMode) apply(file *fusetree.File) {
	// Only this server changes the device, and only at the kernel's request: what the kernel has cached stays true.
	file.KeepCache = true
	// Past the page cache there is nothing that the kernel's lock on the file would have to order: without it, direct
	// writes run side by side.
	file.DirectIO = m == cacheNone || file.Flags&syscall.O_DIRECT != 0
}
