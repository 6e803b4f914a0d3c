/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fd_io.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH 64 /* buffers per system call: keeps the copy of the array small, and is far below IOV_MAX */

static size_t transfer(int fd, struct iov_cursor *cursor, size_t len, uint64_t offset, bool write)
{
	size_t done = 0;

	while (done < len) {
		struct iov_cursor ahead = *cursor;
		struct iovec batch[BATCH];
		size_t want = 0;
		int n = 0;
		ssize_t ret;
		void *skipped;

		while (n < BATCH && want < len - done) {
			batch[n].iov_len = iov_cursor_next(&ahead, len - done - want, &batch[n].iov_base);
			if (!batch[n].iov_len)
				break;
			want += batch[n++].iov_len;
		}
		if (!n) {
			errno = EFAULT; /* the caller promised more buffers */
			break;
		}

		ret = write ? pwritev(fd, batch, n, (off_t)(offset + done)) :
			      preadv(fd, batch, n, (off_t)(offset + done));
		if (ret < 0 && errno == EINTR)
			continue;
		if (ret < 0)
			break;
		if (ret == 0) {
			errno = write ? ENOSPC : 0;
			break;
		}

		done += (size_t)ret;
		while (ret > 0)
			ret -= (ssize_t)iov_cursor_next(cursor, (size_t)ret, &skipped);
	}
	return done;
}

size_t fd_read(int fd, struct iov_cursor *to, size_t len, uint64_t offset)
{
	return transfer(fd, to, len, offset, false);
}

size_t fd_write(int fd, struct iov_cursor *from, size_t len, uint64_t offset)
{
	return transfer(fd, from, len, offset, true);
}

int64_t fd_seek(int fd, uint64_t offset, uint64_t size, bool hole)
{
	off_t at;

	if (offset >= size)
		return -ENXIO;
	at = lseek(fd, (off_t)offset, hole ? SEEK_HOLE : SEEK_DATA);
	if (at < 0)
		return -errno;
	if ((uint64_t)at < size)
		return at;
	return hole ? (int64_t)size : -ENXIO;
}
