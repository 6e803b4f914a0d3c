/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What handlers ask about their configuration; in tcmu-runner the answers come from configfs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

static char log_directory[256];

void log_set_directory(const char *path)
{
	snprintf(log_directory, sizeof(log_directory), "%s", path);
}

char *tcmu_dev_get_cfgstring(struct tcmu_device *dev)
{
	return dev->config;
}

uint64_t tcmu_cfgfs_dev_get_info_u64(struct tcmu_device *dev, const char *name, int *ret)
{
	/* Handlers test *ret without having set it. */
	if (strcmp(name, "Size")) {
		*ret = -EINVAL;
		return 0;
	}
	*ret = 0;
	return dev->configured_size;
}

int tcmu_cfgfs_dev_get_attr_int(struct tcmu_device *dev, const char *name)
{
	if (!strcmp(name, "hw_block_size"))
		return (int)atomic_load(&dev->block_size);
	if (!strcmp(name, "hw_max_sectors"))
		return (int)atomic_load(&dev->max_xfer);
	return -ENOENT;
}

char *tcmu_cfgfs_dev_get_wwn(struct tcmu_device *dev)
{
	uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a: the same configuration keeps its serial number */
	char *wwn;

	for (const char *p = dev->config; p && *p; p++)
		hash = (hash ^ (uint8_t)*p) * 0x100000001b3u;
	return asprintf(&wwn, "%016llx", (unsigned long long)hash) < 0 ? NULL : wwn;
}

int tcmu_make_absolute_logfile(char *path, const char *filename)
{
	int n;

	if (!log_directory[0])
		return -EINVAL;
	n = snprintf(path, PATH_MAX, "%s/%s", log_directory, filename);
	return n > 0 && n < PATH_MAX ? 0 : -EINVAL;
}
