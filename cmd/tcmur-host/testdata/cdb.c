/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler over plain memory with handle_cmd only, which knows command blocks of 10 bytes and blocks of 4096, for
 * tests. With -DFBO it goes by the name of fbo, and reads at 8192 fail like those of fbo: with a message, but with
 * success.
 */
#include <stdlib.h>
#include <string.h>

#include "tcmu-runner.h"

#define BLOCK 4096

static char *mem;
static uint64_t size;

static int open_(struct tcmu_device *dev, bool reopen)
{
	int ret;

	(void)reopen;
	size = tcmu_cfgfs_dev_get_info_u64(dev, "Size", &ret);
	mem = calloc(1, size);
	tcmu_dev_set_block_size(dev, BLOCK);
	tcmu_dev_set_num_lbas(dev, size / BLOCK);
	return 0;
}

static void close_(struct tcmu_device *dev)
{
	(void)dev;
	free(mem);
}

static int handle(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct tcmulib_cmd *lib = cmd->lib_cmd;
	uint64_t at = tcmu_cdb_get_lba(lib->cdb) * BLOCK;
	uint64_t n = (uint64_t)tcmu_cdb_get_xfer_length(lib->cdb) * BLOCK;

	(void)dev;
	switch (lib->cdb[0]) {
	case 0x28:
	case 0x2a:
		if (at + n > size)
			return tcmu_sense_set_data(lib->sense_buf, 5, 0x2100);
		if (tcmu_iovec_length(lib->iovec, lib->iov_cnt) != n)
			return TCMU_STS_HW_ERR;
#ifdef FBO
		if (lib->cdb[0] == 0x28 && at == 8192) {
			tcmu_err(dev, "read failed\n");
			return TCMU_STS_OK;
		}
#endif
		if (lib->cdb[0] == 0x28)
			tcmu_memcpy_into_iovec(lib->iovec, lib->iov_cnt, mem + at, n);
		else
			tcmu_memcpy_from_iovec(mem + at, n, lib->iovec, lib->iov_cnt);
		return TCMU_STS_OK;
	case 0x91: /* SYNCHRONIZE CACHE(16) */
		return TCMU_STS_OK;
	}
	return lib->cdb[0] == 0x88 ? TCMU_STS_NOT_HANDLED : TCMU_STS_INVALID_CMD;
}

static struct tcmur_handler handler = {
	.name = "handler for tests",
#ifdef FBO
	.subtype = "fbo",
#else
	.subtype = "cdb",
#endif
	.cfg_desc = "anything",
	.open = open_,
	.close = close_,
	.handle_cmd = handle,
};

int handler_init(void)
{
	return tcmur_register_handler(&handler);
}
