// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// useMemory uses so many bytes of memory and gives them back. What the kernel takes next, as for its page cache, is
// then memory that the hypervisor of a virtual machine has behind it. To come by that can take 9 us for each page,
// where filling one takes 1.
func useMemory(bytes int64) error {
	memory, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("use %d bytes of memory: %w", bytes, err)
	}
	return unix.Munmap(memory)
}
