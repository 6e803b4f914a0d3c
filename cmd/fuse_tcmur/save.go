// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// defaultSaveFile is where the state is saved if nothing else is said, and applied from when the service starts.
const defaultSaveFile = "/etc/tcmur/tcmur.conf"

// newSaveMode is the mode of a file that save makes: config strings may say more than everybody should know.
const newSaveMode = 0o600

// commands is the present state as a command file: what loads every handler and adds every device.
func (f *front) commands() string {
	var text strings.Builder
	for _, subtype := range slices.Sorted(slices.Values(f.allModules())) {
		fmt.Fprintf(&text, "load %s\n", subtype)
	}
	for _, node := range f.sortedNodes() {
		words := []string{"add", fmt.Sprint(node.device.Minor())}
		words = append(words, node.lastingOptions()...)
		text.WriteString(strings.Join(append(words, node.device.Config()), " ") + "\n")
	}
	return text.String()
}

// lastingOptions are the options that the device is to be added with another time: those it was added with, without
// what was wanted once only, and with its present size if that has changed.
func (n *deviceNode) lastingOptions() []string {
	var words []string
	resized := n.device.Size() != n.sizeAtAdd
	for _, word := range n.args.words {
		key, _, _ := strings.Cut(word, "=")
		if key != "format" && (key != "size" || !resized) {
			words = append(words, word)
		}
	}
	if resized {
		words = append(words, fmt.Sprintf("size=%d", n.device.Size()))
	}
	return words
}

// save writes the present state to a command file, whole or not at all: after a crash in the middle the file is what it
// was. EDEADLK: the path leads into the program's own mount. EINVAL: it is not absolute, or not that of a regular file.
// Otherwise what the file system says.
func (f *front) save(path string) error {
	if !filepath.IsAbs(path) {
		return failf(syscall.EINVAL, "%s: give an absolute path, the server is in another directory", path)
	}
	if path == defaultSaveFile {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	own := f.ownMount()
	resolved, err := resolvePath(path, own.covers)
	var untouchable *untouchableError
	if errors.As(err, &untouchable) {
		return saveInOwnMount(path)
	}
	if err != nil {
		return err
	}
	var dir, old unix.Stat_t
	if err := unix.Stat(filepath.Dir(resolved), &dir); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if own.isDevice(dir.Dev) {
		return saveInOwnMount(path)
	}
	mode := uint32(newSaveMode)
	switch err := unix.Lstat(resolved, &old); {
	case err == nil && old.Mode&unix.S_IFMT != unix.S_IFREG:
		return failf(syscall.EINVAL, "%s: not a regular file", path)
	case err == nil:
		mode = old.Mode & 0o777
	case !errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%s: %w", path, err)
	}
	text := fmt.Sprintf("# Saved by fuse_tcmur on %s\n%s", time.Now().Format(time.RFC3339), f.commands())
	if err := replaceFile(resolved, text, os.FileMode(mode)); err != nil {
		return fmt.Errorf("%s: nothing was saved: %w", path, err)
	}
	return nil
}

func saveInOwnMount(path string) error {
	return failf(syscall.EDEADLK, "%s lies in this server's own mount; choose another place", path)
}

// replaceFile puts a file in the place of the one at path, if there is one, so that path always is one of the two.
func replaceFile(path, text string, mode os.FileMode) error {
	dir := filepath.Dir(path)
	temporary, err := os.CreateTemp(dir, "."+filepath.Base(path)+".")
	if err != nil {
		return err
	}
	_, err = io.WriteString(temporary, text)
	if err == nil {
		err = temporary.Chmod(mode)
	}
	if err == nil {
		err = temporary.Sync()
	}
	if err = errors.Join(err, temporary.Close()); err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		os.Remove(temporary.Name())
		return err
	}
	// The name is as durable as its directory.
	parent, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}

func runSave(call *call, args string) error {
	path := args
	if path == "" {
		path = defaultSaveFile
	}
	if err := call.front.save(path); err != nil {
		return err
	}
	call.print("saved to " + path + "\n")
	return nil
}
