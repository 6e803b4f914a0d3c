/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that keeps two regions of memory: blocks, and how often each of them was written. For tests.
 *
 * The contents are 64 blocks of 4096 bytes, and behind them the 64 counts, which cannot be written to. The name in the
 * configuration string says what to try in open, and open fails unless it goes as it should:
 *   keep/greedy    more regions than there may be, names that are none, and memory that is not there yet
 *   keep/nonsense  messages that are none on the socket to the front; the memory has to work before and after
 *
 * and what to say of the contents:
 *   keep/place     they are in region "blocks", and reads of the blocks are to be answered in place; a copy is wrong
 *   keep/nowhere   they are in a region that there is not; after a reopen in "blocks"
 *   keep/cut       as keep/place, but a read of the last block takes the memory away first
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tcmu-runner.h"

#define BLOCK 4096
#define BLOCKS 64
#define SIZE (BLOCKS * BLOCK)

struct keep {
	char *blocks;
	uint64_t *counts;
	bool in_place;
	bool cut;
};

static void *map_region(struct tcmu_device *dev, const char *name, bool reopen, size_t size)
{
	struct stat st;
	void *p;
	int fd = tcmur_dev_keep_memory(dev, name, reopen ? 0 : size);

	if (fd < 0) {
		tcmu_err(dev, "region %s: %s\n", name, strerror(-fd));
		return NULL;
	}
	if (fstat(fd, &st) || st.st_size != (off_t)size) {
		tcmu_err(dev, "region %s has %lld bytes\n", name, (long long)st.st_size);
		close(fd);
		return NULL;
	}
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	return p == MAP_FAILED ? NULL : p;
}

static int expect(struct tcmu_device *dev, const char *name, size_t size, int want)
{
	int got = tcmur_dev_keep_memory(dev, name, size);

	if (got >= 0)
		close(got);
	if (got == want || (got >= 0 && want == 0))
		return 0;
	tcmu_err(dev, "region \"%s\" of %zu bytes: %d, not %d\n", name, size, got, want);
	return -1;
}

static int be_greedy(struct tcmu_device *dev)
{
	return expect(dev, "", 1, -EINVAL) || expect(dev, "a/b", 1, -EINVAL) || expect(dev, "a b", 1, -EINVAL) ||
	       expect(dev, "a-name-of-thirty-two-letters-123", 1, -EINVAL) ||
	       expect(dev, "a-name-of-thirty-one-letters-12", 0, -ENOENT) ||
	       expect(dev, "a-name-of-thirty-one-letters-12", 1, 0) || expect(dev, "b", 1, 0) ||
	       expect(dev, "c", 1, -ENOSPC) || expect(dev, "b", 0, 0);
}

/* Finds the socket by its type and says odd things to it. */
static int talk_nonsense(void)
{
	char text[100] = "\x7f\0\0\0\0\0\0\0../..";
	int found = 0;

	memset(text + 40, 'x', 60);
	for (int fd = 3; fd < 100; fd++) {
		int type = 0;
		socklen_t len = sizeof(type);

		if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) || type != SOCK_SEQPACKET)
			continue;
		found++;
		for (int i = 1; i < 4; i++)
			send(fd, text, (size_t)i * 33, MSG_NOSIGNAL);
		memset(text + 8, 'x', 32); /* a name without an end */
		send(fd, text, 40, MSG_NOSIGNAL);
		memset(text + 4, 0x7f, 4); /* a device that is not ours */
		memset(text + 9, 0, 31);
		for (int i = 0; i < 100; i++) /* and nobody reads the answers */
			send(fd, text, 40, MSG_NOSIGNAL | MSG_DONTWAIT);
	}
	return found;
}

static int keep_open(struct tcmu_device *dev, bool reopen)
{
	const char *config = tcmu_dev_get_cfgstring(dev);
	struct keep *k;

	if (!tcmur_dev_keep_memory || !tcmur_dev_set_writes_survive)
		return -EOPNOTSUPP;
	k = calloc(1, sizeof(*k));
	k->blocks = map_region(dev, "blocks", reopen, SIZE);
	if (strstr(config, "nonsense") && !reopen && talk_nonsense() != 1)
		k->blocks = NULL;
	k->counts = map_region(dev, "counts", reopen, BLOCK);
	if (!k->blocks || !k->counts || (strstr(config, "greedy") && !reopen && be_greedy(dev))) {
		free(k);
		return -ENODATA;
	}
	tcmu_dev_set_num_lbas(dev, (SIZE + BLOCK) / tcmu_dev_get_block_size(dev));
	tcmur_dev_set_writes_survive(dev, true);
	k->cut = strstr(config, "cut");
	k->in_place = k->cut || strstr(config, "place");
	if (k->in_place || (strstr(config, "nowhere") && reopen))
		tcmur_dev_set_contents(dev, "blocks");
	else if (strstr(config, "nowhere"))
		tcmur_dev_set_contents(dev, "nowhere");
	tcmur_dev_set_private(dev, k);
	return 0;
}

static void keep_close(struct tcmu_device *dev)
{
	struct keep *k = tcmur_dev_get_private(dev);

	munmap(k->blocks, SIZE);
	munmap(k->counts, BLOCK);
	free(k);
}

/* What a hostile host may do at any time. The mapping is not looked at any more. */
static void cut(struct tcmu_device *dev)
{
	int fd = tcmur_dev_keep_memory(dev, "blocks", 0);

	if (fd < 0 || ftruncate(fd, 0))
		tcmu_err(dev, "cannot cut the memory off: %m\n");
	close(fd);
}

static int keep_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len,
		     off_t off)
{
	struct keep *k = tcmur_dev_get_private(dev);

	if (off >= SIZE) {
		tcmu_memcpy_into_iovec(iov, cnt, (char *)k->counts + (off - SIZE), len);
		return TCMU_STS_OK;
	}
	if (k->cut && off == SIZE - BLOCK)
		cut(dev);
	if (k->in_place)
		memset(iov->iov_base, 0xee, len);
	if (!tcmur_cmd_answer_in_place(dev, cmd) && !k->in_place)
		tcmu_memcpy_into_iovec(iov, cnt, k->blocks + off, len);
	return TCMU_STS_OK;
}

static int keep_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len,
		      off_t off)
{
	struct keep *k = tcmur_dev_get_private(dev);

	(void)cmd;
	if (off % BLOCK || len != BLOCK || off >= SIZE)
		return TCMU_STS_INVALID_CDB;
	tcmu_memcpy_from_iovec(k->blocks + off, len, iov, cnt);
	k->counts[off / BLOCK]++;
	return TCMU_STS_OK;
}

static int keep_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	(void)dev;
	(void)cmd;
	return TCMU_STS_OK;
}

struct tcmur_handler keep_handler = {
	.name = "handler that keeps two regions",
	.subtype = "keep",
	.cfg_desc = "keep/ and what to try, if anything",
	.open = keep_open,
	.close = keep_close,
	.nr_threads = 1,
	.read = keep_read,
	.write = keep_write,
	.flush = keep_flush,
};

int handler_init(void)
{
	return tcmur_register_handler(&keep_handler);
}
