/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A regular file or block device that holds a device's contents.
 *
 * All access is by system calls on the descriptor, never through a mapping: when the file is truncated by somebody
 * else or its file system is full, a system call fails and the request with it, whereas a mapping raises SIGBUS and
 * ends the process with everything else in it. The page cache, and so the contents others see, are the same.
 */
#ifndef BACKING_H
#define BACKING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "tcmu-runner.h"

struct backing {
	struct tcmu_device *dev; /* for the log */
	char *path;
	int fd;
	bool block_device;
	uint32_t block_size;
	_Atomic uint64_t size; /* bytes that are served; the file may have more */
};

/*
 * Opens path, which must be absolute, for the device, and keeps other devices and programs that lock files (qemu) off
 * it while it is open.
 *
 * want is the size asked for, 0 for none. A file that has contents must have that much already, and is served up to
 * there, or whole if want is 0. A file that is missing or empty gets size want, or new_size if want is 0, without any
 * space being allocated; a missing file gets mode 0600. Where both are 0 it is refused.
 *
 * Returns 0 or a negative errno, the reason logged: EINVAL (sizes, or neither file nor block device), EISDIR, EBUSY
 * (in use) and whatever the system calls say. After 0 the caller owes backing_close().
 */
int backing_open(struct backing *b, struct tcmu_device *dev, const char *path, uint64_t want, uint64_t new_size);
void backing_close(struct backing *b);

/*
 * These return a TCMU_STS, failures logged; RANGE outside the device. Any number of threads may call them.
 */
int backing_read(struct backing *b, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset);
int backing_write(struct backing *b, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset);
int backing_flush(struct backing *b);
/* Gives the space back; the range reads zeroes afterwards. NOT_HANDLED where the storage cannot do that. */
int backing_unmap(struct backing *b, uint64_t offset, uint64_t length);
/* Fills the range with the pattern; one of zeroes gives regular files' space back. */
int backing_fill(struct backing *b, const struct iovec *iov, size_t iov_cnt, uint64_t offset, uint64_t length);

/* Where data or a hole begins, as tcmur_dev_set_seek() wants it. A block device is all data. */
int64_t backing_seek(struct backing *b, uint64_t offset, bool hole);

/*
 * Changes the served size. A regular file grows where needed, sparsely, and shrinks along if all of it was served; a
 * block device has to be large enough. 0 or a negative errno, the reason logged: EINVAL for a size that is 0 or no
 * multiple of the block size, ENOSPC for too small a block device, or ftruncate's.
 */
int backing_resize(struct backing *b, uint64_t size);

#endif
