/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Command blocks: what handlers read out of them, and the two compound commands that handlers of 1.5.3 and earlier
 * leave to the program around them.
 */
#include <errno.h>

#include "host.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in tcmu-runner.h: known handlers do not use them. */
EXPORT int tcmu_cdb_get_length(uint8_t *cdb);
EXPORT uint64_t tcmu_cdb_to_byte(struct tcmu_device *dev, uint8_t *cdb);
EXPORT uint64_t tcmu_lba_to_byte(struct tcmu_device *dev, uint64_t lba);

static uint16_t be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t be32(const uint8_t *p)
{
	return (uint32_t)be16(p) << 16 | be16(p + 2);
}

static uint64_t be64(const uint8_t *p)
{
	return (uint64_t)be32(p) << 32 | be32(p + 4);
}

/* Three bits of the operation code tell the size. */
int tcmu_cdb_get_length(uint8_t *cdb)
{
	switch (cdb[0] >> 5) {
	case 0:
		return 6;
	case 1:
	case 2:
		return 10;
	case 3:
		return cdb[0] == 0x7f ? 8 + cdb[7] : -EINVAL;
	case 4:
		return 16;
	case 5:
		return 12;
	default:
		return -EINVAL;
	}
}

static void complain(uint8_t *cdb)
{
	log_host(LOG_ERROR, NULL, "handler asks for the address in a command of opcode %#x, which has none", cdb[0]);
}

uint64_t tcmu_cdb_get_lba(uint8_t *cdb)
{
	switch (tcmu_cdb_get_length(cdb)) {
	case 6:
		return (uint64_t)(cdb[1] & 0x1f) << 16 | be16(cdb + 2);
	case 10:
	case 12:
		return be32(cdb + 2);
	case 16:
		if (cdb[0] != 0x7f)
			return be64(cdb + 2);
	}
	complain(cdb);
	return UINT64_MAX; /* outside every device */
}

uint32_t tcmu_cdb_get_xfer_length(uint8_t *cdb)
{
	switch (tcmu_cdb_get_length(cdb)) {
	case 6:
		return cdb[4];
	case 10:
		return be16(cdb + 7);
	case 12:
		return be32(cdb + 6);
	case 16:
		if (cdb[0] != 0x7f)
			return be32(cdb + 10);
	}
	complain(cdb);
	return 0;
}

uint64_t tcmu_cdb_to_byte(struct tcmu_device *dev, uint8_t *cdb)
{
	return tcmu_lba_to_byte(dev, tcmu_cdb_get_lba(cdb));
}

static bool outside(struct tcmu_device *dev, uint64_t lba, uint64_t blocks)
{
	uint64_t all = atomic_load(&dev->num_lbas);

	return blocks > all || lba > all - blocks;
}

int tcmur_handle_writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, tcmur_writesame_fn_t fn)
{
	struct tcmulib_cmd *lib = cmd->lib_cmd;
	uint64_t lba = tcmu_cdb_get_lba(lib->cdb);
	uint64_t blocks = tcmu_cdb_get_xfer_length(lib->cdb);
	uint32_t block = atomic_load(&dev->block_size);
	int r;

	if (!blocks || tcmu_iovec_length(lib->iovec, lib->iov_cnt) != block)
		return TCMU_STS_INVALID_CDB;
	if (outside(dev, lba, blocks))
		return TCMU_STS_RANGE;
	r = fn(dev, cmd, lba * block, blocks * block, lib->iovec, lib->iov_cnt);
	return r == TCMU_STS_OK ? TCMU_STS_ASYNC_HANDLED : r;
}

int tcmur_handle_caw(struct tcmu_device *dev, struct tcmur_cmd *cmd, tcmur_caw_fn_t fn)
{
	struct tcmulib_cmd *lib = cmd->lib_cmd;
	uint64_t lba = tcmu_cdb_get_lba(lib->cdb);
	uint64_t blocks = lib->cdb[13];
	uint32_t block = atomic_load(&dev->block_size);
	int r;

	if (!blocks)
		return TCMU_STS_OK; /* nothing to compare, nothing to write */
	if (tcmu_iovec_length(lib->iovec, lib->iov_cnt) != 2 * blocks * block)
		return TCMU_STS_INVALID_CDB;
	if (outside(dev, lba, blocks))
		return TCMU_STS_RANGE;
	r = fn(dev, cmd, lba * block, blocks * block, lib->iovec, lib->iov_cnt);
	return r == TCMU_STS_OK ? TCMU_STS_ASYNC_HANDLED : r;
}
