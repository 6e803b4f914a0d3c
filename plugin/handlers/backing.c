/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fd_io.h"
#include "iov_cursor.h"
#include "pattern.h"
#include "range.h"

/* Logs the system call that failed; returns its negative errno. */
static int system_error(struct backing *b, const char *what)
{
	int err = errno;

	tcmu_err(b->dev, "%s: cannot %s: %m\n", b->path, what);
	return -err;
}

static int check_kind(struct backing *b, const struct stat *st)
{
	if (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode))
		return 0;

	tcmu_err(b->dev, "%s: is %s: give a regular file or a block device\n", b->path,
		 S_ISDIR(st->st_mode) ? "a directory" : "neither a regular file nor a block device");
	return S_ISDIR(st->st_mode) ? -EISDIR : -EINVAL;
}

/* Opens the file or creates it. What it is gets looked at before: opening a fifo or a tape has side effects. */
static int open_file(struct backing *b, bool may_create, bool *created)
{
	struct stat st;
	int flags = O_RDWR | O_CLOEXEC;
	int ret;

	*created = false;
	if (stat(b->path, &st) == 0) {
		ret = check_kind(b, &st);
		if (ret)
			return ret;
		if (S_ISBLK(st.st_mode))
			flags |= O_EXCL; /* EBUSY where it is mounted, or a swap space, or another device has it */
	} else if (errno != ENOENT) {
		return system_error(b, "look at it");
	} else if (!may_create) {
		tcmu_err(b->dev, "%s: does not exist: give a size to create it\n", b->path);
		return -ENOENT;
	} else {
		flags |= O_CREAT | O_EXCL;
		*created = true;
	}

	b->fd = open(b->path, flags, 0600);
	if (b->fd >= 0)
		return 0;

	ret = system_error(b, *created ? "create it" : "open it for reading and writing");
	*created = false;
	return ret;
}

/*
 * Open file description locks: released when the descriptor goes, however the process ends, and they conflict with
 * those of qemu. Block devices have O_EXCL instead.
 */
static int lock_file(struct backing *b)
{
	struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

	if (fcntl(b->fd, F_OFD_SETLK, &whole) == 0)
		return 0;
	if (errno == EAGAIN || errno == EACCES) {
		tcmu_err(b->dev, "%s: is in use by another device or program\n", b->path);
		return -EBUSY;
	}

	tcmu_warn(b->dev, "%s: cannot be locked, see to it that nothing else uses it: %m\n", b->path);
	return 0;
}

static int file_size(struct backing *b, uint64_t *size)
{
	struct stat st;
	int ret;

	if (fstat(b->fd, &st))
		return system_error(b, "find out its size");
	ret = check_kind(b, &st); /* it may have been replaced since the first look */
	if (ret)
		return ret;

	b->block_device = S_ISBLK(st.st_mode);
	if (!b->block_device)
		*size = (uint64_t)st.st_size;
	else if (ioctl(b->fd, BLKGETSIZE64, size))
		return system_error(b, "find out its size");
	return 0;
}

/* Settles the size to serve, giving a new file its size. */
static int settle_size(struct backing *b, uint64_t want, uint64_t new_size)
{
	uint64_t size;
	int ret;

	ret = file_size(b, &size);
	if (ret)
		return ret;

	if (size == 0 && !b->block_device && (want || new_size)) {
		size = want ? want : new_size;
		if (ftruncate(b->fd, (off_t)size))
			return system_error(b, "give it its size");
	}
	if (want > size) {
		tcmu_err(b->dev, "%s: has %llu bytes, fewer than the configured size of %llu\n", b->path,
			 (unsigned long long)size, (unsigned long long)want);
		return -EINVAL;
	}
	if (want)
		size = want;
	if (size < b->block_size) {
		tcmu_err(b->dev, "%s: has %llu bytes, less than one block of %u%s\n", b->path, (unsigned long long)size,
			 b->block_size, size ? "" : ": give a size");
		return -EINVAL;
	}
	if (size % b->block_size)
		tcmu_warn(b->dev, "%s: the last %llu bytes are no whole block of %u, they cannot be reached\n", b->path,
			  (unsigned long long)(size % b->block_size), b->block_size);

	b->size = size - size % b->block_size;
	return 0;
}

int backing_open(struct backing *b, struct tcmu_device *dev, const char *path, uint64_t want, uint64_t new_size)
{
	bool created;
	int ret;

	b->dev = dev;
	b->fd = -1;
	b->block_size = tcmu_dev_get_block_size(dev);
	if (want % b->block_size || want > INT64_MAX) {
		tcmu_err(dev, "%s: a size of %llu is not possible: it must be a multiple of the block size %u\n", path,
			 (unsigned long long)want, b->block_size);
		return -EINVAL;
	}
	b->path = strdup(path);
	if (!b->path)
		return -ENOMEM;

	ret = open_file(b, want || new_size, &created);
	if (ret)
		goto fail;
	ret = lock_file(b);
	if (ret)
		goto fail; /* even if it was created here, it is somebody else's by now */
	ret = settle_size(b, want, new_size);
	if (ret) {
		if (created)
			unlink(b->path);
		goto fail;
	}
	return 0;

fail:
	backing_close(b);
	return ret;
}

void backing_close(struct backing *b)
{
	if (b->fd >= 0)
		close(b->fd);
	free(b->path);
}

static int transfer_error(struct backing *b, int sts, const char *what, size_t length, uint64_t offset)
{
	if (!errno)
		tcmu_err(b->dev, "%s: cannot %s %zu bytes at %llu: the file has been made shorter\n", b->path, what,
			 length, (unsigned long long)offset);
	else
		tcmu_err(b->dev, "%s: cannot %s %zu bytes at %llu: %m\n", b->path, what, length,
			 (unsigned long long)offset);
	return sts;
}

int backing_read(struct backing *b, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset)
{
	struct iov_cursor to = iov_cursor_of(iov, iov_cnt);

	if (!range_within(b->size, offset, length))
		return TCMU_STS_RANGE;
	if (fd_read(b->fd, &to, length, offset) < length)
		return transfer_error(b, TCMU_STS_RD_ERR, "read", length, offset);
	return TCMU_STS_OK;
}

int backing_write(struct backing *b, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset)
{
	struct iov_cursor from = iov_cursor_of(iov, iov_cnt);

	if (!range_within(b->size, offset, length))
		return TCMU_STS_RANGE;
	if (fd_write(b->fd, &from, length, offset) < length)
		return transfer_error(b, TCMU_STS_WR_ERR, "write", length, offset);
	return TCMU_STS_OK;
}

int backing_flush(struct backing *b)
{
	int ret;

	do {
		ret = fdatasync(b->fd);
	} while (ret && errno == EINTR);
	if (ret) {
		tcmu_err(b->dev, "%s: cannot flush: %m\n", b->path);
		return TCMU_STS_WR_ERR;
	}
	return TCMU_STS_OK;
}

static int allocate(struct backing *b, int mode, uint64_t offset, uint64_t length)
{
	int ret;

	do {
		ret = fallocate(b->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
	} while (ret && errno == EINTR);
	return ret;
}

/*
 * Punching a hole into a block device, unlike BLKDISCARD, either makes it read zeroes or fails; it also fails (EINVAL)
 * where the range is no multiple of that device's logical blocks.
 */
int backing_unmap(struct backing *b, uint64_t offset, uint64_t length)
{
	if (!range_within(b->size, offset, length))
		return TCMU_STS_RANGE;
	if (!length || !allocate(b, FALLOC_FL_PUNCH_HOLE, offset, length))
		return TCMU_STS_OK;
	if (errno == EOPNOTSUPP || (errno == EINVAL && b->block_device))
		return TCMU_STS_NOT_HANDLED;

	tcmu_err(b->dev, "%s: cannot discard %llu bytes at %llu: %m\n", b->path, (unsigned long long)length,
		 (unsigned long long)offset);
	return TCMU_STS_WR_ERR;
}

int backing_fill(struct backing *b, const struct iovec *iov, size_t iov_cnt, uint64_t offset, uint64_t length)
{
	struct pattern p;
	uint64_t done = 0;
	int sts;

	if (!range_within(b->size, offset, length))
		return TCMU_STS_RANGE;
	sts = pattern_take(&p, iov, iov_cnt, length);
	if (sts)
		return sts;

	/* Block devices: offloaded where they can. Whoever cannot do it gets the zeroes written. */
	if (p.zero && length &&
	    !allocate(b, b->block_device ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE, offset, length))
		done = length;

	while (!sts && done < length) {
		struct iovec part = { .iov_base = p.buf, .iov_len = p.size };

		if (part.iov_len > length - done)
			part.iov_len = length - done;
		sts = backing_write(b, &part, 1, part.iov_len, offset + done);
		done += part.iov_len;
	}
	pattern_free(&p);
	return sts;
}

int64_t backing_seek(struct backing *b, uint64_t offset, bool hole)
{
	uint64_t size = b->size;

	if (!b->block_device)
		return fd_seek(b->fd, offset, size, hole);
	if (offset >= size)
		return -ENXIO;
	return (int64_t)(hole ? size : offset);
}

int backing_resize(struct backing *b, uint64_t size)
{
	uint64_t have, old = b->size;
	int ret;

	if (!size || size % b->block_size || size > INT64_MAX) {
		tcmu_err(b->dev, "%s: a size of %llu is not possible: it must be a multiple of the block size %u\n",
			 b->path, (unsigned long long)size, b->block_size);
		return -EINVAL;
	}
	ret = file_size(b, &have);
	if (ret)
		return ret;

	if (b->block_device) {
		if (size > have) {
			tcmu_err(b->dev, "%s: has %llu bytes, fewer than the size of %llu asked for\n", b->path,
				 (unsigned long long)have, (unsigned long long)size);
			return -ENOSPC;
		}
		b->size = size;
		return 0;
	}

	/* Served less before the file gets shorter, and more after it has got longer. */
	if (size < old)
		b->size = size;
	if (size > have || (size < old && have < old + b->block_size)) {
		if (ftruncate(b->fd, (off_t)size)) {
			ret = system_error(b, "change its size");
			b->size = old;
			return ret;
		}
	}
	b->size = size;
	return 0;
}
