// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// findFile returns the path of a handler's shared object: of the first file that a prefix and the subtype name, or else
// of the first one that begins with a prefix and whose handler seems to be of the subtype, for a file's name need not
// be that of its handler: handler_file_optical.so is fbo. ENOENT tells which were tried; EPERM: others than root and
// its owner can change it.
func (l *Library) findFile(subtype string) (string, error) {
	var tried []string
	for _, prefix := range l.cfg.HandlerPrefixes {
		path := prefix + subtype + ".so"
		_, err := os.Stat(path)
		if err == nil {
			return l.usableFile(path)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("handler file: %w", err)
		}
		tried = append(tried, path)
	}
	for _, prefix := range l.cfg.HandlerPrefixes {
		if path, ok := findByContents(prefix, subtype); ok {
			return l.usableFile(path)
		}
	}
	return "", control.Failf(syscall.ENOENT, "no such handler; looked for %s, and for a handler of that name in other "+
		"files there", strings.Join(tried, ", "))
}

// usableFile is the absolute path of a handler's file, if it can be trusted.
func (l *Library) usableFile(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err == nil && !l.cfg.AllowInsecureHandlers {
		err = checkTrusted(path)
	}
	return path, err
}

// findByContents returns the first file, by name, that begins with the prefix and has a handler of the subtype in it,
// as far as that can be told without running it. Whether it has shows when it is loaded.
func findByContents(prefix, subtype string) (path string, ok bool) {
	dir, start := filepath.Split(prefix)
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return "", false
	}
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasPrefix(name, start) && strings.HasSuffix(name, ".so") && mentions(filepath.Join(dir, name), subtype) {
			return filepath.Join(dir, name), true
		}
	}
	return "", false
}

// mentions reports whether a file is a handler's shared object with the subtype among its constant texts.
func mentions(path, subtype string) bool {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return false // a FIFO would keep us waiting
	}
	object, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer object.Close()
	symbols, err := object.DynamicSymbols()
	isInit := func(s elf.Symbol) bool { return s.Name == "handler_init" && s.Section != elf.SHN_UNDEF }
	if err != nil || !slices.ContainsFunc(symbols, isInit) {
		return false
	}
	for _, section := range object.Sections {
		if section.Type != elf.SHT_PROGBITS || section.Flags&(elf.SHF_ALLOC|elf.SHF_EXECINSTR) != elf.SHF_ALLOC {
			continue
		}
		data, err := section.Data()
		text := append(append([]byte{0}, subtype...), 0)
		if err == nil && (bytes.Contains(data, text) || bytes.HasPrefix(data, text[1:])) {
			return true
		}
	}
	return false
}
