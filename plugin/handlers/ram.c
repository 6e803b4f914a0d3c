/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Handler "ram": a device in memory.
 *
 * Configuration:
 *   ram/@            anonymous memory of the configured size, or 1 GiB
 *   ram/@/SIZE       the same with its size, such as 512M or 1TiB
 *   ram/PATH         a file that keeps the contents (the text after "ram" is its absolute path): it has the file's
 *                    size, or the configured one, which must not exceed it; a missing or empty file is made the
 *                    configured size or 1 GiB
 * Memory and disk space are used as they are written to. Where the host keeps memory (tcmur-host does), anonymous memory
 * lasts as long as the device, whatever becomes of the process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "backing.h"
#include "config.h"
#include "fd_io.h"
#include "memory.h"
#include "tcmu-runner.h"

#define DEFAULT_SIZE (1ull << 30) /* bytes */

struct ram {
	bool anonymous; /* which of the two it is */
	struct memory memory;
	struct backing file;
};

struct ram_config {
	bool anonymous;
	uint64_t size;    /* of anonymous memory; 0: not given */
	const char *path; /* of a file; points into the configuration string */
};

/* What follows "@": nothing, "/", or "/SIZE". 0, -EINVAL for anything else, -ERANGE for a size that cannot be. */
static int parse_anonymous(const char *text, uint64_t *size)
{
	int ret;

	if (!*text)
		return 0;
	if (*text != '/')
		return -EINVAL;
	if (!*++text)
		return 0;
	ret = config_parse_size(text, size);
	return !ret && !*size ? -ERANGE : ret;
}

/* Whether the configuration string is valid; otherwise *reason says why, malloc'ed (NULL without memory). */
static bool parse_config(const char *cfgstring, struct ram_config *config, char **reason)
{
	const char *rest = config_after_subtype(cfgstring);
	const char *advice = "give ram/@ for anonymous memory, or a path, as in ram/var/tmp/disk";

	*config = (struct ram_config){ 0 };
	if (rest && rest[1] == '@') {
		int ret = parse_anonymous(rest + 2, &config->size);

		config->anonymous = true;
		if (!ret)
			return true;
		advice = ret == -ERANGE ? "this size is not possible" : "give a size such as 512M, as in ram/@/512M";
	} else {
		while (rest && rest[0] == '/' && rest[1] == '/')
			rest++;
		config->path = rest;
		if (rest && rest[1])
			return true;
	}
	if (asprintf(reason, "%s: %s", cfgstring, advice) < 0)
		*reason = NULL;
	return false;
}

static bool ram_check_config(const char *cfgstring, char **reason)
{
	struct ram_config config;

	return parse_config(cfgstring, &config, reason);
}

static int open_anonymous(struct ram *ram, struct tcmu_device *dev, const struct ram_config *config, bool reopen)
{
	uint64_t size = config_size(dev);
	int ret;

	/* After a resize the host knows better than the configuration string. */
	if (!reopen && size && config->size && size != config->size) {
		tcmu_err(dev, "%s: this size is not the configured one of %llu bytes: give one of them\n",
			 tcmu_dev_get_cfgstring(dev), (unsigned long long)size);
		return -EINVAL;
	}
	if (!size)
		size = config->size ? config->size : DEFAULT_SIZE;

	/* Where reopen does not find the contents, zeroes in their place would be silent loss. */
	ret = reopen ? memory_reopen(&ram->memory, dev) : memory_open(&ram->memory, dev, size);
	if (ret)
		return ret;
	ram->anonymous = true;
	tcmu_dev_set_solid_state_media(dev, true);
	config_announce(dev, ram->memory.size);
	if (ram->memory.kept)
		config_announce_survival(dev);
	return 0;
}

static int open_file(struct ram *ram, struct tcmu_device *dev, const char *path)
{
	int ret = backing_open(&ram->file, dev, path, config_size(dev), DEFAULT_SIZE);

	if (ret)
		return ret;
	config_announce(dev, ram->file.size);
	config_announce_survival(dev); /* in the page cache */
	return 0;
}

static int64_t ram_seek(struct tcmu_device *dev, uint64_t offset, bool hole)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	return ram->anonymous ? fd_seek(ram->memory.fd, offset, ram->memory.size, hole) :
				backing_seek(&ram->file, offset, hole);
}

static int ram_open(struct tcmu_device *dev, bool reopen)
{
	struct ram_config config;
	struct ram *ram;
	char *reason;
	int ret;

	if (!parse_config(tcmu_dev_get_cfgstring(dev), &config, &reason)) {
		tcmu_err(dev, "%s\n", reason ? reason : "the configuration is not valid");
		free(reason);
		return -EINVAL;
	}
	ram = calloc(1, sizeof(*ram));
	if (!ram)
		return -ENOMEM;

	config_settle_block_size(dev);
	if (config.anonymous)
		ret = open_anonymous(ram, dev, &config, reopen);
	else
		ret = open_file(ram, dev, config.path);
	if (ret) {
		free(ram);
		return ret;
	}
	tcmur_dev_set_private(dev, ram);
	config_announce_seek(dev, ram_seek);
	return 0;
}

static void ram_close(struct tcmu_device *dev)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	if (ram->anonymous)
		memory_close(&ram->memory);
	else
		backing_close(&ram->file);
	free(ram);
}

static int ram_reconfig(struct tcmu_device *dev, struct tcmulib_cfg_info *cfg)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	if (cfg->type != TCMULIB_CFG_DEV_SIZE)
		return -EOPNOTSUPP;
	return ram->anonymous ? memory_resize(&ram->memory, cfg->dev_size) : backing_resize(&ram->file, cfg->dev_size);
}

static int ram_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		    off_t offset)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	return ram->anonymous ? memory_read(&ram->memory, cmd, iov, iov_cnt, length, (uint64_t)offset) :
				backing_read(&ram->file, iov, iov_cnt, length, (uint64_t)offset);
}

static int ram_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		     off_t offset)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	(void)cmd;
	return ram->anonymous ? memory_write(&ram->memory, iov, iov_cnt, length, (uint64_t)offset) :
				backing_write(&ram->file, iov, iov_cnt, length, (uint64_t)offset);
}

static int ram_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	(void)cmd;
	return ram->anonymous ? TCMU_STS_OK : backing_flush(&ram->file);
}

static int ram_unmap(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	(void)cmd;
	return ram->anonymous ? memory_unmap(&ram->memory, offset, length) : backing_unmap(&ram->file, offset, length);
}

static int ram_writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
			 struct iovec *iov, size_t iov_cnt)
{
	struct ram *ram = tcmur_dev_get_private(dev);

	(void)cmd;
	return ram->anonymous ? memory_fill(&ram->memory, iov, iov_cnt, offset, length) :
				backing_fill(&ram->file, iov, iov_cnt, offset, length);
}

__attribute__((visibility("default"))) struct tcmur_handler ram_handler = {
	.name = "RAM disk",
	.subtype = "ram",
	.cfg_desc = "ram/@ or ram/@/SIZE: anonymous memory; ram/PATH: memory kept in a file",
	.check_config = ram_check_config,
	.reconfig = ram_reconfig,
	.open = ram_open,
	.close = ram_close,
	.nr_threads = 4,
	.read = ram_read,
	.write = ram_write,
	.flush = ram_flush,
	.unmap = ram_unmap,
	.writesame = ram_writesame,
};

int handler_init(void)
{
	return tcmur_register_handler(&ram_handler);
}
