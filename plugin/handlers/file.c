/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Handler "file": a device whose contents are a regular file or a block device.
 *
 * Configuration: file//absolute/path. The size is that of the file, or the configured one, which must not exceed it;
 * a missing or empty file is made the configured size, without allocating it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "backing.h"
#include "config.h"
#include "tcmu-runner.h"

/* The path in the configuration string, or NULL. */
static const char *path_in(const char *cfgstring)
{
	const char *rest = config_after_subtype(cfgstring);

	return rest && rest[1] == '/' && rest[2] ? rest + 1 : NULL;
}

static bool file_check_config(const char *cfgstring, char **reason)
{
	if (path_in(cfgstring))
		return true;
	if (asprintf(reason, "%s: give an absolute path, as in file//var/tmp/disk", cfgstring) < 0)
		*reason = NULL;
	return false;
}

static int64_t file_seek(struct tcmu_device *dev, uint64_t offset, bool hole)
{
	return backing_seek(tcmur_dev_get_private(dev), offset, hole);
}

static int file_open(struct tcmu_device *dev, bool reopen)
{
	const char *path = path_in(tcmu_dev_get_cfgstring(dev));
	struct backing *b;
	int ret;

	(void)reopen; /* the file is the same one */
	if (!path) {
		tcmu_err(dev, "%s: give an absolute path, as in file//var/tmp/disk\n", tcmu_dev_get_cfgstring(dev));
		return -EINVAL;
	}
	b = calloc(1, sizeof(*b));
	if (!b)
		return -ENOMEM;

	config_settle_block_size(dev);
	ret = backing_open(b, dev, path, config_size(dev), 0);
	if (ret) {
		free(b);
		return ret;
	}
	config_announce(dev, b->size);
	config_announce_survival(dev); /* in the page cache */
	tcmur_dev_set_private(dev, b);
	config_announce_seek(dev, file_seek);
	return 0;
}

static void file_close(struct tcmu_device *dev)
{
	struct backing *b = tcmur_dev_get_private(dev);

	backing_close(b);
	free(b);
}

static int file_reconfig(struct tcmu_device *dev, struct tcmulib_cfg_info *cfg)
{
	if (cfg->type != TCMULIB_CFG_DEV_SIZE)
		return -EOPNOTSUPP;
	return backing_resize(tcmur_dev_get_private(dev), cfg->dev_size);
}

static int file_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		     off_t offset)
{
	(void)cmd;
	return backing_read(tcmur_dev_get_private(dev), iov, iov_cnt, length, (uint64_t)offset);
}

static int file_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		      off_t offset)
{
	(void)cmd;
	return backing_write(tcmur_dev_get_private(dev), iov, iov_cnt, length, (uint64_t)offset);
}

static int file_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	(void)cmd;
	return backing_flush(tcmur_dev_get_private(dev));
}

static int file_unmap(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length)
{
	(void)cmd;
	return backing_unmap(tcmur_dev_get_private(dev), offset, length);
}

static int file_writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
			  struct iovec *iov, size_t iov_cnt)
{
	(void)cmd;
	return backing_fill(tcmur_dev_get_private(dev), iov, iov_cnt, offset, length);
}

__attribute__((visibility("default"))) struct tcmur_handler file_handler = {
	.name = "File or block device",
	.subtype = "file",
	.cfg_desc = "file//absolute/path: a regular file or block device; a missing file is created if a size is given",
	.check_config = file_check_config,
	.reconfig = file_reconfig,
	.open = file_open,
	.close = file_close,
	.nr_threads = 4,
	.read = file_read,
	.write = file_write,
	.flush = file_flush,
	.unmap = file_unmap,
	.writesame = file_writesame,
};

int handler_init(void)
{
	return tcmur_register_handler(&file_handler);
}
