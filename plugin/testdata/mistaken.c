/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that makes one kind of mistake, for the tests of the conformance tests. A device is 4 MiB.
 *
 *	mistaken/MISTAKE//ABSOLUTE/PATH
 *
 *	lost         each 500th write does nothing
 *	misplaced    each 500th write of one block goes one block further
 *	short        a write of more than 64 KiB leaves its last byte as zero
 *	forgotten    what is written is in memory until close, whatever is flushed
 *	flush        each 20th flush fails
 *	none         makes none
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tcmu-runner.h"

#define SIZE (4 << 20)

struct store {
	char mistake[16];
	int fd;
	unsigned int writes, flushes;
	char data[SIZE];
};

static int save(struct store *s, size_t length, off_t offset)
{
	return pwrite(s->fd, s->data + offset, length, offset) == (ssize_t)length ? TCMU_STS_OK : TCMU_STS_WR_ERR;
}

static int mistaken_open(struct tcmu_device *dev, bool reopen)
{
	const char *mistake = strchr(tcmu_dev_get_cfgstring(dev), '/');
	const char *path = mistake ? strstr(mistake, "//") : NULL;
	struct store *s;

	(void)reopen;
	if (!path || (size_t)(path - mistake) > sizeof(s->mistake))
		return -EINVAL;
	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	memcpy(s->mistake, mistake + 1, (size_t)(path - mistake - 1));
	s->fd = open(path + 1, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (s->fd < 0 || pread(s->fd, s->data, SIZE, 0) < 0) {
		free(s);
		return -EIO;
	}
	tcmu_dev_set_num_lbas(dev, SIZE / tcmu_dev_get_block_size(dev));
	tcmur_dev_set_private(dev, s);
	return 0;
}

static void mistaken_close(struct tcmu_device *dev)
{
	struct store *s = tcmur_dev_get_private(dev);

	save(s, SIZE, 0);
	close(s->fd);
	free(s);
}

static int mistaken_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			 size_t length, off_t offset)
{
	struct store *s = tcmur_dev_get_private(dev);

	(void)cmd;
	tcmu_memcpy_into_iovec(iov, iov_cnt, s->data + offset, length);
	return TCMU_STS_OK;
}

static int mistaken_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			  size_t length, off_t offset)
{
	struct store *s = tcmur_dev_get_private(dev);
	bool now = ++s->writes % 500 == 0;

	(void)cmd;
	if (now && !strcmp(s->mistake, "lost"))
		return TCMU_STS_OK;
	if (now && !strcmp(s->mistake, "misplaced") && length == 512 && offset + 1024 <= SIZE)
		offset += 512;
	else if (!strcmp(s->mistake, "misplaced") && length != 512)
		s->writes--;
	tcmu_memcpy_from_iovec(s->data + offset, length, iov, iov_cnt);
	if (!strcmp(s->mistake, "short") && length > 65536)
		s->data[offset + (off_t)length - 1] = 0;
	if (!strcmp(s->mistake, "forgotten"))
		return TCMU_STS_OK;
	return save(s, length, offset);
}

static int mistaken_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct store *s = tcmur_dev_get_private(dev);

	(void)cmd;
	return ++s->flushes % 20 == 0 && !strcmp(s->mistake, "flush") ? TCMU_STS_WR_ERR : TCMU_STS_OK;
}

struct tcmur_handler mistaken_handler = {
	.name = "Mistakes for tests",
	.subtype = "mistaken",
	.cfg_desc = "mistaken/MISTAKE//ABSOLUTE/PATH : see plugin/testdata/mistaken.c",
	.open = mistaken_open,
	.close = mistaken_close,
	.nr_threads = 1,
	.read = mistaken_read,
	.write = mistaken_write,
	.flush = mistaken_flush,
};

int handler_init(void)
{
	return tcmur_register_handler(&mistaken_handler);
}
