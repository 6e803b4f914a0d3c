// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const releaseLong = `release unmounts the file systems on the devices of a fuse_tcmur, with all that is mounted
below them, switches swap areas off and detaches the loop devices, so that the server can stop and
nothing is lost. What is in use stays, and is named. systemd's unit runs it before it stops the server.

`

// newReleaseCommand is the subcommand that takes the devices away from their users, in the order that loses nothing.
func newReleaseCommand() *cobra.Command {
	mountpoint := defaultMountpoint
	cmd := &cobra.Command{
		Use:     "release [flags]",
		Short:   "unmount what is on the devices, and detach their loop devices",
		Long:    releaseLong,
		Example: "  fuse_tcmur release && fuse_tcmur ctl exit",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := filepath.Abs(mountpoint)
			if err == nil {
				err = release(systemDirs{proc: "/proc", sys: "/sys"}, path, cmd.OutOrStdout())
			}
			return withStatus(exitRefused, err)
		},
	}
	cmd.Flags().StringVar(&mountpoint, "mountpoint", defaultMountpoint, "`directory` that the server has mounted on")
	return cmd
}

// loopDevice is a loop device on a device node.
type loopDevice struct {
	name    string // "loop0"
	numbers map[uint64]bool
}

// release takes the devices of the server at mountpoint away from their users and tells out what it did. It does not
// touch the mount, which may be hung.
func release(dirs systemDirs, mountpoint string, out io.Writer) error {
	var failures []error
	loops := loopsOn(dirs, mountpoint)
	for _, place := range mountsOn(dirs, loops) {
		if err := unix.Unmount(place, unix.UMOUNT_NOFOLLOW); err != nil {
			users := strings.Join(findProcesses(dirs, place), ", ")
			failures = append(failures, fmt.Errorf("%s cannot be unmounted: %w; used by: %s", place, err, orNobody(users)))
			continue
		}
		_, _ = fmt.Fprintf(out, "unmounted %s\n", place)
	}
	swaps, _ := os.ReadFile(dirs.proc + "/swaps")
	for _, loop := range loops {
		path := "/dev/" + loop.name
		for line := range strings.Lines(string(swaps)) {
			area, _, _ := strings.Cut(line, " ")
			if area != path && !strings.HasPrefix(area, path+"p") {
				continue
			}
			if err := swapOff(area); err != nil {
				failures = append(failures, fmt.Errorf("%s is still used for swapping: %w", area, err))
				continue
			}
			_, _ = fmt.Fprintf(out, "swap area %s switched off\n", area)
		}
		if err := detachLoop(path); err != nil {
			failures = append(failures, fmt.Errorf("%s cannot be detached: %w", path, err))
			continue
		}
		_, _ = fmt.Fprintf(out, "detached %s\n", path)
	}
	return errors.Join(failures...)
}

func orNobody(users string) string {
	if users == "" {
		return "nobody this process can see"
	}
	return users
}

// loopsOn finds the loop devices whose backing file is a device of the server at mountpoint, with their partitions.
func loopsOn(dirs systemDirs, mountpoint string) []loopDevice {
	files, _ := filepath.Glob(filepath.Join(dirs.sys, "block/loop*/loop/backing_file"))
	var loops []loopDevice
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err != nil || !isAtOrBelow(strings.TrimSuffix(string(backing), "\n"), mountpoint+"/dev") {
			continue
		}
		block := filepath.Dir(filepath.Dir(file))
		loop := loopDevice{name: filepath.Base(block), numbers: map[uint64]bool{}}
		numbers, _ := filepath.Glob(filepath.Join(block, loop.name+"p*", "dev"))
		for _, number := range append(numbers, filepath.Join(block, "dev")) {
			text, _ := os.ReadFile(number)
			majorText, minorText, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
			major, majorErr := strconv.ParseUint(majorText, 10, 32)
			minor, minorErr := strconv.ParseUint(minorText, 10, 32)
			if majorErr == nil && minorErr == nil {
				loop.numbers[unix.Mkdev(uint32(major), uint32(minor))] = true
			}
		}
		loops = append(loops, loop)
	}
	return loops
}

// mountsOn lists the mount points of file systems on the loop devices, and of whatever is mounted below these, in the
// order in which they can be unmounted.
func mountsOn(dirs systemDirs, loops []loopDevice) []string {
	mounts, _ := readMounts(dirs.proc)
	var roots, places []string
	for _, mount := range mounts {
		below := false
		for _, root := range roots {
			below = below || isAtOrBelow(mount.mountpoint, root)
		}
		for _, loop := range loops {
			if loop.numbers[mount.device] {
				roots = append(roots, mount.mountpoint)
				below = true
			}
		}
		if below {
			places = append([]string{mount.mountpoint}, places...)
		}
	}
	return places
}

// swapOff stops the use of a swap area.
func swapOff(path string) error {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	return swapOffPointer(name)
}

// detachLoop frees a loop device. One that was made by mount(8) has freed itself already. EBUSY: something has it open;
// the kernel would free it later without a word.
func detachLoop(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	err = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	return err
}
