/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that keeps a record, for tests of what reaches a handler, and when. A device is 1 MiB of memory.
 *
 *	record//ABSOLUTE/PATH
 *
 * A line is appended to the file for each callout:
 *
 *	open
 *	read OFFSET LENGTH      when it is done
 *	write OFFSET LENGTH     when it is done
 *	flush                   when it begins
 *	close
 *
 * so that a flush line stands behind exactly those writes that were complete when the handler was told to flush.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tcmu-runner.h"

#define SIZE (1 << 20)

struct record {
	int fd;
	char *data;
};

/* One write(2) in append mode per line: lines of different threads neither mix nor change places. */
static int __attribute__((format(printf, 2, 3))) note(struct record *r, const char *format, ...)
{
	char line[64];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	return write(r->fd, line, (size_t)n) == n ? TCMU_STS_OK : TCMU_STS_HW_ERR;
}

static int record_open(struct tcmu_device *dev, bool reopen)
{
	const char *path = strchr(tcmu_dev_get_cfgstring(dev), '/');
	struct record *r = calloc(1, sizeof(*r));
	int ret;

	(void)reopen;
	if (!r)
		return -ENOMEM;
	r->fd = open(path ? path + 1 : "", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (r->fd < 0) {
		ret = -errno;
		free(r);
		return ret;
	}
	r->data = calloc(1, SIZE);
	if (!r->data) {
		close(r->fd);
		free(r);
		return -ENOMEM;
	}
	tcmu_dev_set_num_lbas(dev, SIZE / tcmu_dev_get_block_size(dev));
	tcmur_dev_set_private(dev, r);
	note(r, "open\n");
	return 0;
}

static void record_close(struct tcmu_device *dev)
{
	struct record *r = tcmur_dev_get_private(dev);

	note(r, "close\n");
	close(r->fd);
	free(r->data);
	free(r);
}

static int record_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		       off_t offset)
{
	struct record *r = tcmur_dev_get_private(dev);

	(void)cmd;
	tcmu_memcpy_into_iovec(iov, iov_cnt, r->data + offset, length);
	return note(r, "read %lld %zu\n", (long long)offset, length);
}

static int record_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			size_t length, off_t offset)
{
	struct record *r = tcmur_dev_get_private(dev);

	(void)cmd;
	tcmu_memcpy_from_iovec(r->data + offset, length, iov, iov_cnt);
	return note(r, "write %lld %zu\n", (long long)offset, length);
}

static int record_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	(void)cmd;
	return note(tcmur_dev_get_private(dev), "flush\n");
}

struct tcmur_handler record_handler = {
	.name = "Record of callouts for tests",
	.subtype = "record",
	.cfg_desc = "record//ABSOLUTE/PATH : see plugin/testdata/record.c",
	.open = record_open,
	.close = record_close,
	.nr_threads = 16,
	.read = record_read,
	.write = record_write,
	.flush = record_flush,
};

int handler_init(void)
{
	return tcmur_register_handler(&record_handler);
}
