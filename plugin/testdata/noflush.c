/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that passes everything on to a file, and lies about flushes: while a second file exists, it says of a flush
 * that it was done and does nothing.
 *
 *	noflush//PATH:LIAR
 *
 * PATH is opened past the page cache, so that only the flushes are missing: it may be the node of another device.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "tcmu-runner.h"

struct noflush {
	int fd;
	char *liar;
};

static int noflush_open(struct tcmu_device *dev, bool reopen)
{
	const char *path = strchr(tcmu_dev_get_cfgstring(dev), '/');
	struct noflush *n = calloc(1, sizeof(*n));
	struct stat st;
	char *copy, *colon;
	int ret;

	(void)reopen;
	copy = path ? strdup(path + 1) : NULL;
	colon = copy ? strrchr(copy, ':') : NULL;
	if (!n || !colon) {
		ret = -EINVAL;
		goto fail;
	}
	*colon = '\0';
	n->liar = strdup(colon + 1);
	n->fd = open(copy, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (!n->liar || n->fd < 0 || fstat(n->fd, &st) < 0) {
		ret = -errno;
		goto fail;
	}
	free(copy);
	tcmu_dev_set_num_lbas(dev, (uint64_t)st.st_size / tcmu_dev_get_block_size(dev));
	tcmur_dev_set_private(dev, n);
	return 0;
fail:
	if (n)
		free(n->liar);
	free(n);
	free(copy);
	return ret;
}

static void noflush_close(struct tcmu_device *dev)
{
	struct noflush *n = tcmur_dev_get_private(dev);

	close(n->fd);
	free(n->liar);
	free(n);
}

static int noflush_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			size_t length, off_t offset)
{
	struct noflush *n = tcmur_dev_get_private(dev);

	(void)cmd;
	return preadv(n->fd, iov, (int)iov_cnt, offset) == (ssize_t)length ? TCMU_STS_OK : TCMU_STS_RD_ERR;
}

static int noflush_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			 size_t length, off_t offset)
{
	struct noflush *n = tcmur_dev_get_private(dev);

	(void)cmd;
	return pwritev(n->fd, iov, (int)iov_cnt, offset) == (ssize_t)length ? TCMU_STS_OK : TCMU_STS_WR_ERR;
}

static int noflush_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct noflush *n = tcmur_dev_get_private(dev);

	(void)cmd;
	if (access(n->liar, F_OK) == 0)
		return TCMU_STS_OK;
	return fsync(n->fd) == 0 ? TCMU_STS_OK : TCMU_STS_WR_ERR;
}

struct tcmur_handler noflush_handler = {
	.name = "Drops flushes, for tests",
	.subtype = "noflush",
	.cfg_desc = "noflush//PATH:LIAR : see plugin/testdata/noflush.c",
	.open = noflush_open,
	.close = noflush_close,
	.nr_threads = 4,
	.read = noflush_read,
	.write = noflush_write,
	.flush = noflush_flush,
};

int handler_init(void)
{
	return tcmur_register_handler(&noflush_handler);
}
