// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// Loading a shared object runs it, as root more often than not: whoever can change the file, or put another one in its
// place, decides what runs. This file finds out who that is.

// maxLinks is how many symbolic links a path may lead through, as for the kernel.
const maxLinks = 40

// checkTrusted refuses (EPERM) a handler's file that somebody can change or replace who is neither root nor the file's
// owner nor the user of this process. That takes write permission for the file or for a directory on the way to it,
// those that symbolic links lead through included. In a directory with the sticky bit, such as /tmp, writers cannot
// replace what belongs to others; there only the owners of the directory and of its entry count.
func checkTrusted(path string) error {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return fmt.Errorf("handler file: %w", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	trusted := func(uid uint32) bool { return uid == 0 || uid == file.Uid || uid == uint32(os.Geteuid()) }
	done, rest, links := "/", strings.TrimPrefix(filepath.Clean(path), "/"), 0
	if err := checkWriters("/", path, trusted); err != nil {
		return err
	}
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			done = filepath.Dir(done) // no link is left in done
			continue
		}
		next := filepath.Join(done, name)
		if err := checkWriters(next, path, trusted); err != nil {
			return err
		}
		target, err := os.Readlink(next)
		if err != nil { // no link
			done = next
			continue
		}
		if links++; links > maxLinks {
			return control.Failf(syscall.ELOOP, "%s: too many symbolic links", path)
		}
		if filepath.IsAbs(target) {
			done = "/"
		}
		rest = target + "/" + rest
	}
	return nil
}

// checkWriters looks at one place on the way to the file at path: a directory, a symbolic link, or the file.
func checkWriters(place, path string, trusted func(uid uint32) bool) error {
	var st unix.Stat_t
	if err := unix.Lstat(place, &st); err != nil {
		return fmt.Errorf("handler file: %w", &os.PathError{Op: "lstat", Path: place, Err: err})
	}
	kind := st.Mode & unix.S_IFMT
	who := ""
	switch {
	case !trusted(st.Uid):
		who = fmt.Sprintf("user %d, who owns it,", st.Uid)
	case kind == unix.S_IFLNK: // its permissions mean nothing
	case kind == unix.S_IFDIR && st.Mode&unix.S_ISVTX != 0:
	case st.Mode&unix.S_IWOTH != 0:
		who = "everybody"
	case st.Mode&unix.S_IWGRP != 0:
		who = fmt.Sprintf("group %d", st.Gid)
	}
	if who == "" {
		return nil
	}
	return control.Failf(syscall.EPERM, "%s is not safe to load: %s can change %s (mode %04o); "+
		"correct that (chmod go-w, chown root), or start with --allow-insecure-handlers",
		path, who, place, st.Mode&0o7777)
}
