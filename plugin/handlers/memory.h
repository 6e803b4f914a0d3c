/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Anonymous memory that holds a device's contents and costs what has been written to it, however large it is. Where the
 * host keeps memory it outlives the process, see tcmur_dev_keep_memory().
 *
 * The bytes are in a memfd that is mapped as a whole. A bitmap says which granules of it have ever been written, and
 * is untouched, so without memory behind it, where none have. It serves two ends:
 *   - a granule that was never written is answered with zeroes without looking: a read through the mapping would
 *     allocate the page;
 *   - the first write to a granule goes through a system call, which fails when there is no memory left, where a
 *     store into the mapping raises SIGBUS and ends the process. Later accesses are plain copies.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "tcmu-runner.h"

struct memory {
	struct tcmu_device *dev; /* for the log */
	int fd;
	bool kept; /* it outlives the process, and reads may be answered from it */
	uint32_t block_size;
	/*
	 * Guards what follows: shared by accesses, exclusive to memory_resize(), which may move both mappings. The
	 * bytes of the device themselves it does not guard: overlapping requests are their sender's affair.
	 */
	pthread_rwlock_t layout;
	uint64_t size;             /* bytes */
	char *map;                 /* size bytes */
	_Atomic uint64_t *written; /* one bit per granule */
};

/*
 * Makes size bytes of zeroes for the device; size must be a multiple of its block size and not 0. 0 or a negative
 * errno, the reason logged: ENOMEM or EINVAL where the address space does not hold that much, or memfd_create()'s, or
 * tcmur_dev_keep_memory()'s. After 0 the caller owes memory_close(), which forgets the contents unless they are kept.
 */
int memory_open(struct memory *m, struct tcmu_device *dev, uint64_t size);
/* The same for the memory that an earlier memory_open() of the device has left; -ENODATA where it was not kept. */
int memory_reopen(struct memory *m, struct tcmu_device *dev);
void memory_close(struct memory *m);

/*
 * These return a TCMU_STS, failures logged; RANGE outside the device. Any number of threads may call them.
 */
int memory_read(struct memory *m, struct tcmur_cmd *cmd, const struct iovec *iov, size_t iov_cnt, size_t length,
		uint64_t offset);
int memory_write(struct memory *m, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset);
/* Gives the memory back; the range reads zeroes afterwards. */
int memory_unmap(struct memory *m, uint64_t offset, uint64_t length);
/* Fills the range with the pattern; one of zeroes takes no more memory than there is, and gives none back. */
int memory_fill(struct memory *m, const struct iovec *iov, size_t iov_cnt, uint64_t offset, uint64_t length);

/*
 * Changes the size, waiting for accesses under way. New space reads zeroes. 0 or a negative errno, the reason logged
 * and the size as it was: EINVAL for a size that is 0 or no multiple of the block size, otherwise as memory_open().
 */
int memory_resize(struct memory *m, uint64_t size);

#endif
