// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// findHolders names the loop devices, with what is mounted from them, and the processes that use path, or something
// below path if it is a directory. It compares names that the kernel shows and touches none of the files: path may be
// hung. What it may not see it leaves out.
func findHolders(dirs systemDirs, path string) []string {
	return append(findLoops(dirs, path), findProcesses(dirs, path)...)
}

// isAtOrBelow reports whether name is path or lies below it.
func isAtOrBelow(name, path string) bool {
	return name == path || strings.HasPrefix(name, path+"/")
}

// findLoops names the loop devices whose backing file is at or below path.
func findLoops(dirs systemDirs, path string) []string {
	files, _ := filepath.Glob(filepath.Join(dirs.sys, "block/loop*/loop/backing_file"))
	mounts, _ := readMounts(dirs.proc)
	var found []string
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err != nil || !isAtOrBelow(strings.TrimSuffix(string(backing), "\n"), path) {
			continue
		}
		loop := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file)))
		text := loop
		for _, mount := range mounts {
			if mount.source == loop || strings.HasPrefix(mount.source, loop+"p") {
				text += " mounted on " + mount.mountpoint
			}
		}
		found = append(found, text)
	}
	return found
}

// findProcesses names the processes that have a file or their working directory at or below path.
func findProcesses(dirs systemDirs, path string) []string {
	entries, _ := os.ReadDir(dirs.proc)
	var found []string
	for _, entry := range entries {
		process := filepath.Join(dirs.proc, entry.Name())
		if _, err := strconv.Atoi(entry.Name()); err != nil || !processUses(process, path) {
			continue
		}
		name, _ := os.ReadFile(filepath.Join(process, "comm"))
		found = append(found, fmt.Sprintf("process %s %s", entry.Name(), strings.TrimSpace(string(name))))
	}
	return found
}

// processUses looks at the links of one process. Reading them does not follow them.
func processUses(process, path string) bool {
	links := []string{filepath.Join(process, "cwd")}
	files, _ := os.ReadDir(filepath.Join(process, "fd"))
	for _, file := range files {
		links = append(links, filepath.Join(process, "fd", file.Name()))
	}
	return slices.ContainsFunc(links, func(link string) bool {
		target, err := os.Readlink(link)
		return err == nil && isAtOrBelow(target, path)
	})
}
