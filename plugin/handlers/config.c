/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define DEFAULT_BLOCK_SIZE 512u
#define DISCARD_UNIT 4096u /* bytes: what file systems and memory usually give back at once */

const char *config_after_subtype(const char *cfgstring)
{
	return strchr(cfgstring, '/');
}

uint64_t config_size(struct tcmu_device *dev)
{
	int ret = -EINVAL;
	uint64_t size = tcmu_cfgfs_dev_get_info_u64(dev, "Size", &ret);

	return ret ? 0 : size;
}

void config_settle_block_size(struct tcmu_device *dev)
{
	if (!tcmu_dev_get_block_size(dev))
		tcmu_dev_set_block_size(dev, DEFAULT_BLOCK_SIZE);
}

void config_announce(struct tcmu_device *dev, uint64_t size)
{
	uint32_t block_size = tcmu_dev_get_block_size(dev);
	uint32_t unit = block_size < DISCARD_UNIT ? DISCARD_UNIT / block_size : 1;

	tcmu_dev_set_num_lbas(dev, size / block_size);
	tcmu_dev_set_opt_unmap_gran(dev, unit, false);
	tcmu_dev_set_unmap_gran_align(dev, unit);
	tcmu_dev_set_write_cache_enabled(dev, true);
	if (tcmur_dev_set_unmap_zeroes)
		tcmur_dev_set_unmap_zeroes(dev, true);
}

void config_announce_survival(struct tcmu_device *dev)
{
	if (tcmur_dev_set_writes_survive)
		tcmur_dev_set_writes_survive(dev, true);
}

void config_announce_contents(struct tcmu_device *dev, const char *name)
{
	if (tcmur_dev_set_contents)
		tcmur_dev_set_contents(dev, name);
}

void config_announce_seek(struct tcmu_device *dev, tcmur_seek_fn_t fn)
{
	if (tcmur_dev_set_seek)
		tcmur_dev_set_seek(dev, fn);
}

int config_parse_size(const char *text, uint64_t *size)
{
	static const char suffixes[] = "KMGTP";
	unsigned long long value;
	unsigned int shift = 0;
	const char *suffix;
	char *end;

	if (!isdigit((unsigned char)*text))
		return -EINVAL;
	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno)
		return -ERANGE;

	if (*end) {
		suffix = strchr(suffixes, toupper((unsigned char)*end));
		if (!suffix || (end[1] && strcasecmp(end + 1, "iB") != 0))
			return -EINVAL;
		shift = 10 * (unsigned int)(suffix - suffixes + 1);
	}
	if (value > (unsigned long long)INT64_MAX >> shift)
		return -ERANGE;
	*size = value << shift;
	return 0;
}
