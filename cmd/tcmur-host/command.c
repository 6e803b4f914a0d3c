/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Command blocks for handlers that offer handle_cmd only.
 *
 * Which of the sizes of a command block a handler understands is not written anywhere: one knows READ(16) but not
 * READ(6), another the reverse. The largest is tried first; one that the handler does not know is replaced by the next
 * for good.
 */
#include <string.h>

#include "host.h"

static void put16(uint8_t *to, uint16_t v)
{
	to[0] = (uint8_t)(v >> 8);
	to[1] = (uint8_t)v;
}

static void put32(uint8_t *to, uint32_t v)
{
	put16(to, (uint16_t)(v >> 16));
	put16(to + 2, (uint16_t)v);
}

static void put64(uint8_t *to, uint64_t v)
{
	put32(to, (uint32_t)(v >> 32));
	put32(to + 4, (uint32_t)v);
}

/* False: the block has no room for these numbers. */
static bool build(uint8_t *cdb, unsigned int size, bool write, uint64_t lba, uint64_t blocks)
{
	memset(cdb, 0, 16);
	if (size != 16 && lba + blocks > UINT32_MAX)
		return false;
	switch (size) {
	case 16:
		cdb[0] = write ? 0x8a : 0x88;
		put64(cdb + 2, lba);
		put32(cdb + 10, (uint32_t)blocks);
		return true;
	case 12:
		cdb[0] = write ? 0xaa : 0xa8;
		put32(cdb + 2, (uint32_t)lba);
		put32(cdb + 6, (uint32_t)blocks);
		return true;
	default:
		if (blocks > UINT16_MAX)
			return false;
		cdb[0] = write ? 0x2a : 0x28;
		put32(cdb + 2, (uint32_t)lba);
		put16(cdb + 7, (uint16_t)blocks);
		return true;
	}
}

static int handle(struct request *req, const char *what, uint64_t offset, uint64_t length)
{
	int r;

	callout_begin(what, req->dev, offset, length);
	r = host_handler.handle_cmd(req->dev, &req->cmd);
	callout_end();
	return r;
}

int command_transfer(struct request *req, bool write, uint64_t offset, uint64_t length)
{
	struct tcmu_device *dev = req->dev;
	uint64_t block = dev->alignment; /* the handler's block size, see device_start() */
	unsigned int size = atomic_load(write ? &dev->write_cdb : &dev->read_cdb);
	uint32_t errors = log_errors;
	int r;

	if (!build(req->cdb, size, write, offset / block, length / block))
		return TCMU_STS_RANGE;
	r = handle(req, write ? "handle_cmd(WRITE)" : "handle_cmd(READ)", offset, length);
	if (r == TCMU_STS_OK && !write && dev->read_errors_logged && log_errors != errors)
		return TCMU_STS_RD_ERR;
	return r;
}

int command_sync(struct request *req)
{
	bool ten = atomic_load(&req->dev->sync_cdb) == 10;

	/* The IMMED bit stays clear: completion is to mean that the data are on the medium. */
	memset(req->cdb, 0, sizeof(req->cdb));
	req->cdb[0] = ten ? 0x35 : 0x91;
	return handle(req, "handle_cmd(SYNCHRONIZE CACHE)", 0, 0);
}

static bool shorter(_Atomic uint8_t *size)
{
	uint8_t now = atomic_load(size);

	if (now == 10)
		return false;
	atomic_store(size, now == 16 ? 12 : 10);
	return true;
}

/* "Unknown operation code", said in one of three ways. */
static bool unknown_opcode(const struct request *req, int sts)
{
	const uint8_t *sense = req->lib.sense_buf;

	return sts == TCMU_STS_NOT_HANDLED || sts == TCMU_STS_INVALID_CMD ||
	       (sts == TCMU_STS_PASSTHROUGH_ERR && (sense[2] & 0x0f) == 0x5 && sense[12] == 0x20 && sense[13] == 0);
}

bool command_fall_back(struct request *req, int sts)
{
	struct tcmu_device *dev = req->dev;

	if (!unknown_opcode(req, sts))
		return false;
	switch (req->op) {
	case TCMUR_OP_READ:
		return host_handler.by_cdb && shorter(&dev->read_cdb);
	case TCMUR_OP_WRITE:
	case TCMUR_OP_ZERO:
		return host_handler.by_cdb && shorter(&dev->write_cdb);
	case TCMUR_OP_FLUSH:
		if (host_handler.flush || atomic_load(&dev->sync_cdb) != 10)
			return false;
		atomic_store(&dev->sync_cdb, 16);
		return true;
	}
	return false;
}
