/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config.h"
#include "fd_io.h"
#include "iov_cursor.h"
#include "pattern.h"
#include "range.h"

/*
 * Bytes. The page size of most machines: with larger pages a first write brings more memory than its granule, which
 * then lies in the memfd unused, as zeroes. With smaller granules than pages everything stays true.
 */
#define GRANULE 4096ull
#define BITS 64ull          /* granules per word of the bitmap */
#define BULK (256ull << 10) /* bytes; so much is not likely to be in a cache when it is read */

static uint64_t granules(uint64_t bytes)
{
	return (bytes + GRANULE - 1) / GRANULE;
}

/* Bytes of bitmap for a device of that size. */
static size_t bitmap_size(uint64_t size)
{
	return (granules(size) + BITS - 1) / BITS * sizeof(uint64_t);
}

/* The bits [first, end) of the word that first is in. */
static uint64_t word_mask(uint64_t first, uint64_t end)
{
	uint64_t mask = ~0ull << (first % BITS);

	if (end / BITS == first / BITS)
		mask &= (1ull << (end % BITS)) - 1;
	return mask;
}

/* Release: whoever sees the bit sees the data that was written before. */
static void mark(struct memory *m, uint64_t first, uint64_t end)
{
	for (; first < end; first = (first / BITS + 1) * BITS)
		atomic_fetch_or_explicit(&m->written[first / BITS], word_mask(first, end), memory_order_release);
}

/* Only reads words that are zero already, lest the bitmap get pages. */
static void clear(struct memory *m, uint64_t first, uint64_t end)
{
	for (; first < end; first = (first / BITS + 1) * BITS) {
		_Atomic uint64_t *word = &m->written[first / BITS];
		uint64_t mask = word_mask(first, end);

		if (atomic_load_explicit(word, memory_order_relaxed) & mask)
			atomic_fetch_and(word, ~mask);
	}
}

/* Returns where the run of granules that are in the same state as first ends, at most end. */
static uint64_t run_end(struct memory *m, uint64_t first, uint64_t end, bool *written)
{
	uint64_t word = atomic_load_explicit(&m->written[first / BITS], memory_order_acquire);
	uint64_t at = first;

	*written = word >> (first % BITS) & 1;
	for (;;) {
		uint64_t other = (*written ? ~word : word) & word_mask(at, end);

		if (other)
			return at / BITS * BITS + (uint64_t)__builtin_ctzll(other);
		at = (at / BITS + 1) * BITS;
		if (at >= end)
			return end;
		word = atomic_load_explicit(&m->written[at / BITS], memory_order_acquire);
	}
}

static int size_error(struct memory *m, const char *what, uint64_t size)
{
	int err = errno;

	tcmu_err(m->dev, "cannot %s for a device of %llu bytes: %m\n", what, (unsigned long long)size);
	return -err;
}

static int check_size(struct memory *m, uint64_t size)
{
	if (size && size <= INT64_MAX && size % m->block_size == 0)
		return 0;
	tcmu_err(m->dev, "a size of %llu is not possible: it must be a multiple of the block size %u\n",
		 (unsigned long long)size, m->block_size);
	return -EINVAL;
}

/* Maps m->fd, which has the size, and makes a bitmap without any mark. On failure m->fd is closed. */
static int map_contents(struct memory *m, uint64_t size)
{
	pthread_rwlockattr_t attr;
	void *map;
	int ret;

	m->size = size;
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, m->fd, 0);
	if (map == MAP_FAILED) {
		ret = size_error(m, "map memory", size);
		goto no_map;
	}
	m->map = map;
	madvise(map, size, MADV_DONTDUMP); /* a core dump would read, and so allocate, all of it */

	map = mmap(NULL, bitmap_size(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED) {
		ret = size_error(m, "map the bitmap", size);
		goto no_bitmap;
	}
	m->written = map;

	/* Otherwise a steady stream of requests keeps a resize waiting for ever. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&m->layout, &attr);
	pthread_rwlockattr_destroy(&attr);
	return 0;

no_bitmap:
	munmap(m->map, size);
no_map:
	close(m->fd);
	return ret;
}

static const char region[] = "contents";

/* What has been kept of the memory, or new memory that is kept if size is not 0; or a negative errno. */
static int kept_memory(struct tcmu_device *dev, uint64_t size)
{
	return tcmur_dev_keep_memory ? tcmur_dev_keep_memory(dev, region, size) : -EOPNOTSUPP;
}

int memory_open(struct memory *m, struct tcmu_device *dev, uint64_t size)
{
	int ret;

	m->dev = dev;
	m->block_size = tcmu_dev_get_block_size(dev);
	ret = check_size(m, size);
	if (ret)
		return ret;
	m->fd = kept_memory(dev, size);
	m->kept = m->fd >= 0;
	if (m->kept)
		config_announce_contents(dev, region);
	if (m->fd == -EOPNOTSUPP)
		m->fd = memfd_create("tcmur-ram", MFD_CLOEXEC);
	else if (m->fd < 0)
		errno = -m->fd;
	if (m->fd < 0)
		return size_error(m, "create memory", size);
	/* An open that failed half-way may have left something. */
	if (ftruncate(m->fd, 0) || ftruncate(m->fd, (off_t)size)) {
		ret = size_error(m, "size memory", size);
		close(m->fd);
		return ret;
	}
	return map_contents(m, size);
}

/* Marks what the memfd has pages for: the bitmap went with its process. */
static int mark_contents(struct memory *m)
{
	off_t data, hole = 0;

	while ((uint64_t)hole < m->size) {
		data = lseek(m->fd, hole, SEEK_DATA);
		if (data < 0 && errno == ENXIO) /* none from there on */
			return 0;
		if (data < 0)
			return -errno;
		hole = lseek(m->fd, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		mark(m, (uint64_t)data / GRANULE, granules((uint64_t)hole));
	}
	return 0;
}

int memory_reopen(struct memory *m, struct tcmu_device *dev)
{
	struct stat st;
	int ret;

	m->dev = dev;
	m->block_size = tcmu_dev_get_block_size(dev);
	m->fd = kept_memory(dev, 0);
	m->kept = true;
	if (m->fd == -EOPNOTSUPP || m->fd == -ENOENT) {
		tcmu_err(dev, "%s: the contents are gone with the process that had them\n",
			 tcmu_dev_get_cfgstring(dev));
		return -ENODATA;
	}
	if (m->fd < 0) {
		tcmu_err(dev, "%s: cannot get at what was kept of the contents: %s\n", tcmu_dev_get_cfgstring(dev),
			 strerror(-m->fd));
		return m->fd;
	}
	config_announce_contents(dev, region);
	if (fstat(m->fd, &st)) {
		ret = size_error(m, "find the size of memory", 0);
		goto failed;
	}
	ret = check_size(m, (uint64_t)st.st_size);
	if (ret)
		goto failed;
	ret = map_contents(m, (uint64_t)st.st_size);
	if (ret)
		return ret;
	ret = mark_contents(m);
	if (ret) {
		tcmu_err(dev, "cannot find out what the memory holds: %s\n", strerror(-ret));
		memory_close(m);
	}
	return ret;

failed:
	close(m->fd);
	return ret;
}

void memory_close(struct memory *m)
{
	pthread_rwlock_destroy(&m->layout);
	munmap(m->written, bitmap_size(m->size));
	munmap(m->map, m->size);
	close(m->fd);
}

/* run_end in bytes, for a range that need not begin or end with a granule. */
static uint64_t run_stop(struct memory *m, uint64_t at, uint64_t end, bool *written)
{
	uint64_t stop = run_end(m, at / GRANULE, granules(end), written) * GRANULE;

	return stop < end ? stop : end;
}

static void read_runs(struct memory *m, struct iov_cursor *to, uint64_t at, uint64_t end)
{
	while (at < end) {
		bool written;
		uint64_t stop = run_stop(m, at, end, &written);

		if (written)
			iov_cursor_put(to, m->map + at, stop - at);
		else
			iov_cursor_zero(to, stop - at);
		at = stop;
	}
}

/* Not where there are granules without data: whoever looks at these would allocate them. */
static bool answer_in_place(struct memory *m, struct tcmur_cmd *cmd, size_t length, uint64_t offset)
{
	uint64_t end = granules(offset + length);
	bool written;

	if (!m->kept || !tcmur_cmd_answer_in_place || !length)
		return false;
	return run_end(m, offset / GRANULE, end, &written) >= end && written && tcmur_cmd_answer_in_place(m->dev, cmd);
}

int memory_read(struct memory *m, struct tcmur_cmd *cmd, const struct iovec *iov, size_t iov_cnt, size_t length,
		uint64_t offset)
{
	struct iov_cursor to = iov_cursor_of(iov, iov_cnt);
	int sts = TCMU_STS_RANGE;

	pthread_rwlock_rdlock(&m->layout);
	if (range_within(m->size, offset, length)) {
		if (!answer_in_place(m, cmd, length, offset))
			read_runs(m, &to, offset, offset + length);
		sts = TCMU_STS_OK;
	}
	pthread_rwlock_unlock(&m->layout);
	return sts;
}

/*
 * Maps pages that the memfd has. Otherwise the next write to each of them would, with a fault that takes as long as half
 * of the rest of it (and does where this call fails: Linux before 5.14). Some hypervisors keep page tables of their own
 * and fill them in when a page is used: then the next write would still take 5 us more, five times as long as this one.
 */
static void map_pages(struct memory *m, uint64_t at, uint64_t end)
{
	at = at / GRANULE * GRANULE;
	madvise(m->map + at, end - at, MADV_POPULATE_WRITE);
	for (; at < end; at += GRANULE)
		(void)*(volatile uint8_t *)(m->map + at);
}

/* Writes to granules that were never written. What was done before a failure is marked: it is there. */
static int write_first(struct memory *m, struct iov_cursor *from, size_t length, uint64_t offset)
{
	size_t done = fd_write(m->fd, from, length, offset);
	int err = errno;

	if (done) {
		map_pages(m, offset, offset + done);
		mark(m, offset / GRANULE, granules(offset + done));
	}
	if (done == length)
		return TCMU_STS_OK;

	errno = err;
	tcmu_err(m->dev, "no memory for %zu bytes at %llu: %m\n", length, (unsigned long long)offset);
	return TCMU_STS_WR_ERR; /* not NO_RESOURCE, on which an initiator would retry as long as memory is short */
}

static int write_runs(struct memory *m, struct iov_cursor *from, uint64_t at, uint64_t end)
{
	while (at < end) {
		bool written;
		uint64_t stop = run_stop(m, at, end, &written);
		int sts;

		if (written) {
			(stop - at < BULK ? iov_cursor_get : iov_cursor_get_bulk)(from, m->map + at, stop - at);
		} else {
			sts = write_first(m, from, stop - at, at);
			if (sts)
				return sts;
		}
		at = stop;
	}
	return TCMU_STS_OK;
}

int memory_write(struct memory *m, const struct iovec *iov, size_t iov_cnt, size_t length, uint64_t offset)
{
	struct iov_cursor from = iov_cursor_of(iov, iov_cnt);
	int sts = TCMU_STS_RANGE;

	pthread_rwlock_rdlock(&m->layout);
	if (range_within(m->size, offset, length))
		sts = write_runs(m, &from, offset, offset + length);
	pthread_rwlock_unlock(&m->layout);
	return sts;
}

/* Zeroes what has memory. The rest reads zeroes. */
static void zero_runs(struct memory *m, uint64_t at, uint64_t end)
{
	while (at < end) {
		bool written;
		uint64_t stop = run_stop(m, at, end, &written);

		if (written)
			memset(m->map + at, 0, stop - at);
		at = stop;
	}
}

/*
 * The bits of whole granules go before their pages: a write at the same time then leaves, in every order, a granule
 * that is marked or has no data. (One with data and no mark would show that data when a later write marks it.)
 */
static int unmap_locked(struct memory *m, uint64_t at, uint64_t end)
{
	uint64_t first = granules(at) * GRANULE; /* whole granules: first to last */
	uint64_t last = end == m->size ? granules(end) * GRANULE : end / GRANULE * GRANULE;
	int ret;

	if (first > last) { /* all within one granule */
		zero_runs(m, at, end);
		return TCMU_STS_OK;
	}
	if (at < first)
		zero_runs(m, at, first);
	if (end > last)
		zero_runs(m, last, end);
	if (first == last)
		return TCMU_STS_OK;

	clear(m, first / GRANULE, last / GRANULE);
	do {
		ret = fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)first, (off_t)(last - first));
	} while (ret && errno == EINTR);
	if (ret) {
		tcmu_err(m->dev, "cannot give back %llu bytes at %llu: %m\n", (unsigned long long)(last - first),
			 (unsigned long long)first);
		mark(m, first / GRANULE, last / GRANULE);
		return TCMU_STS_WR_ERR;
	}
	return TCMU_STS_OK;
}

int memory_unmap(struct memory *m, uint64_t offset, uint64_t length)
{
	int sts = TCMU_STS_RANGE;

	pthread_rwlock_rdlock(&m->layout);
	if (range_within(m->size, offset, length))
		sts = length ? unmap_locked(m, offset, offset + length) : TCMU_STS_OK;
	pthread_rwlock_unlock(&m->layout);
	return sts;
}

/*
 * What has memory keeps it: who zeroes a range, as mkfs(8) does with tables and a journal, is about to write there, and
 * would get it back page by page. Who has no use for it any more unmaps it.
 */
static int zero(struct memory *m, uint64_t at, uint64_t end)
{
	int sts = TCMU_STS_RANGE;

	pthread_rwlock_rdlock(&m->layout);
	if (range_within(m->size, at, end - at)) {
		zero_runs(m, at, end);
		sts = TCMU_STS_OK;
	}
	pthread_rwlock_unlock(&m->layout);
	return sts;
}

int memory_fill(struct memory *m, const struct iovec *iov, size_t iov_cnt, uint64_t offset, uint64_t length)
{
	struct pattern p;
	uint64_t done = 0;
	bool within;
	int sts;

	pthread_rwlock_rdlock(&m->layout);
	within = range_within(m->size, offset, length);
	pthread_rwlock_unlock(&m->layout);
	if (!within)
		return TCMU_STS_RANGE;
	sts = pattern_take(&p, iov, iov_cnt, length);
	if (sts)
		return sts;

	if (p.zero) {
		sts = zero(m, offset, offset + length);
		done = length;
	}
	while (!sts && done < length) {
		struct iovec part = { .iov_base = p.buf, .iov_len = p.size };

		if (part.iov_len > length - done)
			part.iov_len = length - done;
		sts = memory_write(m, &part, 1, part.iov_len, offset + done);
		done += part.iov_len;
	}
	pattern_free(&p);
	return sts;
}

/* Moves both mappings to the new size. On failure they are as before. */
static int remap(struct memory *m, uint64_t size)
{
	void *bitmap, *map;

	bitmap = mremap(m->written, bitmap_size(m->size), bitmap_size(size), MREMAP_MAYMOVE);
	if (bitmap == MAP_FAILED)
		return size_error(m, "map the bitmap", size);
	m->written = bitmap;

	map = mremap(m->map, m->size, size, MREMAP_MAYMOVE);
	if (map == MAP_FAILED) {
		int ret = size_error(m, "map memory", size);

		/* Only growing can fail; should giving back what was just added fail too, it is merely unused. */
		bitmap = mremap(m->written, bitmap_size(size), bitmap_size(m->size), MREMAP_MAYMOVE);
		if (bitmap != MAP_FAILED)
			m->written = bitmap;
		return ret;
	}
	m->map = map;
	return 0;
}

int memory_resize(struct memory *m, uint64_t size)
{
	int ret;

	ret = check_size(m, size);
	if (ret)
		return ret;

	pthread_rwlock_wrlock(&m->layout);
	if (size > m->size) {
		if (ftruncate(m->fd, (off_t)size))
			ret = size_error(m, "size memory", size);
		else
			ret = remap(m, size);
		if (ret && ftruncate(m->fd, (off_t)m->size))
			tcmu_warn(m->dev, "memory stays longer than the device: %m\n");
	} else if (size < m->size) {
		/* No marks, no bytes may be left when it grows again; ftruncate() zeroes the rest of the last page. */
		clear(m, granules(size), granules(m->size));
		if (ftruncate(m->fd, (off_t)size)) {
			ret = size_error(m, "size memory", size);
			mark(m, granules(size), granules(m->size));
		} else {
			ret = remap(m, size);
		}
	}
	if (!ret)
		m->size = size;
	pthread_rwlock_unlock(&m->layout);
	return ret;
}
