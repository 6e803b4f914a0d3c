/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device attributes and per-device pointers, as handlers get and set them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>

#include "host.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in tcmu-runner.h: known handlers do not use them. */
EXPORT void tcmu_dev_set_max_xfer_len(struct tcmu_device *dev, uint32_t len);
EXPORT uint32_t tcmu_dev_get_opt_xcopy_rw_len(struct tcmu_device *dev);
EXPORT void tcmu_dev_set_write_protect_enabled(struct tcmu_device *dev, bool enabled);
EXPORT char *tcmu_dev_get_uio_name(struct tcmu_device *dev);
EXPORT uint64_t tcmu_lba_to_byte(struct tcmu_device *dev, uint64_t lba);
EXPORT uint64_t tcmu_byte_to_lba(struct tcmu_device *dev, uint64_t byte);

#define GET(type, function, member)               \
	type function(struct tcmu_device *dev)    \
	{                                         \
		return atomic_load(&dev->member); \
	}

#define SET(type, function, member)                        \
	void function(struct tcmu_device *dev, type value) \
	{                                                  \
		atomic_store(&dev->member, value);         \
	}

GET(uint64_t, tcmu_dev_get_num_lbas, num_lbas)
SET(uint32_t, tcmu_dev_set_block_size, block_size)
GET(uint32_t, tcmu_dev_get_block_size, block_size)
SET(uint32_t, tcmu_dev_set_max_xfer_len, max_xfer)
GET(uint32_t, tcmu_dev_get_max_xfer_len, max_xfer)
SET(uint32_t, tcmu_dev_set_opt_xcopy_rw_len, opt_xcopy)
GET(uint32_t, tcmu_dev_get_opt_xcopy_rw_len, opt_xcopy)
SET(uint32_t, tcmu_dev_set_max_unmap_len, max_unmap)
GET(uint32_t, tcmu_dev_get_max_unmap_len, max_unmap)
GET(uint32_t, tcmu_dev_get_opt_unmap_gran, unmap_gran)
SET(uint32_t, tcmu_dev_set_unmap_gran_align, unmap_align)
GET(uint32_t, tcmu_dev_get_unmap_gran_align, unmap_align)
SET(bool, tcmu_dev_set_write_cache_enabled, write_cache)
GET(bool, tcmu_dev_get_write_cache_enabled, write_cache)
SET(bool, tcmu_dev_set_solid_state_media, solid_state)
GET(bool, tcmu_dev_get_solid_state_media, solid_state)
SET(bool, tcmu_dev_set_write_protect_enabled, write_protect)
GET(bool, tcmu_dev_get_write_protect_enabled, write_protect)
SET(bool, tcmur_dev_set_writes_survive, writes_survive)
SET(bool, tcmur_dev_set_unmap_zeroes, unmap_zeroes)
SET(tcmur_seek_fn_t, tcmur_dev_set_seek, seek)
SET(void *, tcmur_dev_set_private, handler_private)

void tcmur_dev_set_contents(struct tcmu_device *dev, const char *name)
{
	snprintf(dev->contents, sizeof(dev->contents), "%s", name);
}

void tcmu_dev_set_num_lbas(struct tcmu_device *dev, uint64_t num_lbas)
{
	if (atomic_exchange(&dev->num_lbas, num_lbas) != num_lbas)
		size_was_set();
}

/* On the path of every request: no ordering is needed, as the handler sets it in open and reads it after that. */
void *tcmur_dev_get_private(struct tcmu_device *dev)
{
	return atomic_load_explicit(&dev->handler_private, memory_order_relaxed);
}

void *tcmu_dev_get_private(struct tcmu_device *dev)
{
	return dev->runner_private;
}

void tcmu_dev_set_opt_unmap_gran(struct tcmu_device *dev, uint32_t len, bool split)
{
	atomic_store(&dev->unmap_gran, len);
	atomic_store(&dev->unmap_split, split);
}

bool tcmu_dev_get_unmap_enabled(struct tcmu_device *dev)
{
	(void)dev;
	return host_handler.unmap != NULL;
}

char *tcmu_dev_get_uio_name(struct tcmu_device *dev)
{
	return dev->name;
}

/* Block sizes are powers of two; 0 only while a handler is still making up its mind. */
static unsigned int block_shift(struct tcmu_device *dev)
{
	uint32_t size = atomic_load(&dev->block_size);

	return size ? (unsigned int)__builtin_ctz(size) : 0;
}

uint64_t tcmu_lba_to_byte(struct tcmu_device *dev, uint64_t lba)
{
	return lba << block_shift(dev);
}

uint64_t tcmu_byte_to_lba(struct tcmu_device *dev, uint64_t byte)
{
	return byte >> block_shift(dev);
}

int tcmur_dev_update_size(struct tcmu_device *dev, uint64_t new_size)
{
	uint32_t block = atomic_load(&dev->block_size);

	if (!new_size || !block)
		return -EINVAL;
	tcmu_dev_set_num_lbas(dev, new_size / block);
	return 0;
}

void tcmu_set_thread_name(const char *prefix, struct tcmu_device *dev)
{
	char name[NATIVE_NAME_MAX + 16];
	int saved_errno = errno;

	snprintf(name, sizeof(name), "%s%s%s", prefix ? prefix : "", dev ? "-" : "", dev ? dev->name : "");
	name[15] = 0; /* the kernel takes no more */
	pthread_setname_np(pthread_self(), name);
	errno = saved_errno;
}
