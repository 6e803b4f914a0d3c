// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountInfo is one line of /proc/self/mountinfo. Reading that file touches no mount, not even a hung one.
type mountInfo struct {
	device     uint64 // as in st_dev
	mountpoint string
	fsType     string // "fuse.fuse_tcmur", "ext4"
	source     string // "/dev/loop0"
}

// readMounts lists the mounts this process sees, in the order of the kernel's table: of two at one mount point the
// later one is on top.
func readMounts(procDir string) ([]mountInfo, error) {
	text, err := os.ReadFile(procDir + "/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot see what is mounted: %w", err)
	}
	return parseMounts(string(text)), nil
}

// parseMounts reads the format of proc(5): fixed fields, any number of optional ones, "-", type, source, options. A
// line that does not fit is skipped: newer kernels may say more than this program knows.
func parseMounts(text string) []mountInfo {
	var mounts []mountInfo
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields, last := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(last) < 2 {
			continue
		}
		majorText, minorText, _ := strings.Cut(fields[2], ":")
		major, majorErr := strconv.ParseUint(majorText, 10, 32)
		minor, minorErr := strconv.ParseUint(minorText, 10, 32)
		if majorErr != nil || minorErr != nil {
			continue
		}
		mounts = append(mounts, mountInfo{
			device:     unix.Mkdev(uint32(major), uint32(minor)),
			mountpoint: unescapeMount(fields[4]),
			fsType:     unescapeMount(last[0]),
			source:     unescapeMount(last[1]),
		})
	}
	return mounts
}

// unescapeMount undoes the kernel's octal escapes of blank, tab, newline and backslash.
func unescapeMount(text string) string {
	if !strings.Contains(text, "\\") {
		return text
	}
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+3 < len(text) {
			if code, err := strconv.ParseUint(text[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(code))
				i += 3
				continue
			}
		}
		out.WriteByte(text[i])
	}
	return out.String()
}

// topMount is the mount that is on top at mountpoint, nil if none is mounted there.
func topMount(mounts []mountInfo, mountpoint string) *mountInfo {
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].mountpoint == mountpoint {
			return &mounts[i]
		}
	}
	return nil
}

// ownMount is the set of places at which this program's own mount can be reached.
type ownMount struct {
	places  map[string]bool
	device  uint64
	mounted bool // device is known
}

// findOwnMount finds the mount at mountpoint and every other place it is bound to. When the mount table cannot be read,
// mountpoint alone is known.
func findOwnMount(procDir, mountpoint string) ownMount {
	own := ownMount{places: map[string]bool{mountpoint: true}}
	mounts, err := readMounts(procDir)
	if err != nil {
		return own
	}
	top := topMount(mounts, mountpoint)
	if top == nil || !isOwnType(top) {
		return own
	}
	own.device, own.mounted = top.device, true
	for _, mount := range mounts {
		if mount.device == own.device {
			own.places[mount.mountpoint] = true
		}
	}
	return own
}

// covers reports whether place is a root of the own mount.
func (o ownMount) covers(place string) bool { return o.places[place] }

// isDevice reports whether a file with this st_dev lies in the own mount.
func (o ownMount) isDevice(device uint64) bool { return o.mounted && device == o.device }
