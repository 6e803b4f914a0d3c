/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Serving one request: its callouts, one after another, and how each of them ends.
 *
 * A callout ends either when it returns or, where the handler has only queued the command, when the handler calls
 * tcmur_cmd_complete(), on any thread and possibly before the callout has returned. request.state orders the two:
 * whoever sets CLAIMED decides the result, and whoever comes second of COMPLETED and RETURNED owns the request from
 * there on.
 *
 * A handler that is not asynchronous has no business completing a command unless its callout says that it will. If it
 * does all the same, the requester is told nothing before the callout has returned, which uses the buffer until then,
 * and what it returns counts.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "host.h"

/* One writesame callout may cover this much: more keeps a back end busy for longer than a time-out allows. */
#define ZERO_RANGE_MAX (256ull << 20)

/* Zeroes to write from; a read-only mapping of the system's zero page, however long. */
static void *zeroes(void)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static void *memory;
	void *p;

	pthread_mutex_lock(&lock);
	if (!memory) {
		p = mmap(NULL, TCMUR_MAX_PAYLOAD, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p != MAP_FAILED)
			memory = p;
	}
	p = memory;
	pthread_mutex_unlock(&lock);
	return p;
}

/* For out-of-tree handlers that call it themselves instead of tcmur_cmd_complete(). */
static void complete_by_hand(struct tcmu_device *dev, struct tcmur_cmd *cmd, int sts)
{
	tcmur_cmd_complete(dev, cmd, sts);
}

/* Handlers use up the iovec, so that everything is set up anew for each callout. */
static void prepare(struct request *req, uint8_t opcode, void *data, size_t length)
{
	memset(&req->cmd, 0, sizeof(req->cmd));
	memset(&req->lib, 0, sizeof(req->lib));
	memset(req->cdb, 0, sizeof(req->cdb));
	req->cdb[0] = opcode;
	req->iov.iov_base = data;
	req->iov.iov_len = length;
	req->lib.cmd_id = (uint16_t)req->tag;
	req->lib.cdb = req->cdb;
	req->lib.iovec = &req->iov;
	req->lib.iov_cnt = data ? 1 : 0;
	req->lib.hm_private = &req->cmd;
	req->cmd.lib_cmd = &req->lib;
	req->cmd.done = complete_by_hand;
	req->in_place = false;
}

bool tcmur_cmd_answer_in_place(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct request *req = (struct request *)((char *)cmd - offsetof(struct request, cmd));

	/* All of the request, or else the rest would have to be looked for elsewhere. */
	if (!req->may_in_place || !dev->contents[0] || req->step != req->length)
		return false;
	req->in_place = true;
	return true;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Bytes from at that one transfer may carry. */
static uint64_t transfer_length(const struct tcmu_device *dev, uint64_t at, uint64_t left)
{
	uint64_t n = min_u64(left, dev->max_request);

	if (dev->boundary)
		n = min_u64(n, dev->boundary - at % dev->boundary);
	return n;
}

/* Bytes from at that one unmap may cover, by the limits that the handler has set. */
static uint64_t unmap_length(struct tcmu_device *dev, uint64_t at, uint64_t left)
{
	uint64_t block = atomic_load(&dev->block_size);
	uint64_t max = atomic_load(&dev->max_unmap) * block;
	uint64_t gran = atomic_load(&dev->unmap_gran) * block;
	uint64_t align = atomic_load(&dev->unmap_align) * block;
	uint64_t n = left;

	if (atomic_load(&dev->unmap_split) && gran) {
		if (!align)
			align = gran;
		/* The first piece is cut short so that the others start at multiples of the alignment. */
		n = min_u64(n, gran);
		if (at % align)
			n = min_u64(n, align - at % align);
	}
	if (max)
		n = min_u64(n, max);
	return n;
}

int io_callout(struct request *req, bool write, void *data, uint64_t at, size_t n)
{
	struct tcmu_device *dev = req->dev;
	int r;

	prepare(req, write ? 0x8a : 0x88, data, n); /* WRITE(16), READ(16) */
	if (host_handler.by_cdb)
		return command_transfer(req, write, at, n);
	callout_begin(write ? "write" : "read", dev, at, n);
	r = (write ? host_handler.write : host_handler.read)(dev, &req->cmd, &req->iov, 1, n, (off_t)at);
	callout_end();
	return r;
}

static int issue_transfer(struct request *req, bool write, void *data, uint64_t at)
{
	if (__builtin_expect(req->dev->qcow != NULL, false))
		return qcow_guard_transfer(req, write, data, at, req->step);
	return io_callout(req, write, data, at, req->step);
}

static int issue_zero(struct request *req, uint64_t at, uint64_t left)
{
	struct tcmu_device *dev = req->dev;
	void *data = zeroes();
	int r;

	if (!data)
		return TCMU_STS_NO_RESOURCE;
	if (!host_handler.writesame || atomic_load(&dev->no_writesame)) {
		req->step = transfer_length(dev, at, left);
		return issue_transfer(req, true, data, at);
	}
	req->step = min_u64(left, ZERO_RANGE_MAX);
	prepare(req, 0x93, data, atomic_load(&dev->block_size)); /* WRITE SAME(16) */
	callout_begin("writesame", dev, at, req->step);
	r = host_handler.writesame(dev, &req->cmd, at, req->step, &req->iov, 1);
	callout_end();
	return r;
}

static int issue_flush(struct request *req)
{
	int r;

	prepare(req, 0x35, NULL, 0); /* SYNCHRONIZE CACHE(10) */
	if (!host_handler.flush) {
		/* Nothing to flush is what a missing flush means, unless there are command blocks to ask with. */
		if (!host_handler.handle_cmd)
			return TCMU_STS_OK;
		return command_sync(req);
	}
	callout_begin("flush", req->dev, 0, 0);
	r = host_handler.flush(req->dev, &req->cmd);
	callout_end();
	return r;
}

/* Makes the next callout; nothing of req may be touched afterwards if that has queued the command. */
static int issue(struct request *req)
{
	struct tcmu_device *dev = req->dev;
	uint64_t at = req->offset + req->done;
	uint64_t left = req->length - req->done;
	int r;

	switch (req->op) {
	case TCMUR_OP_READ:
	case TCMUR_OP_WRITE:
		req->step = transfer_length(dev, at, left);
		return issue_transfer(req, req->op == TCMUR_OP_WRITE, req->payload + req->done, at);
	case TCMUR_OP_ZERO:
		return issue_zero(req, at, left);
	case TCMUR_OP_UNMAP:
		req->step = unmap_length(dev, at, left);
		prepare(req, 0x42, NULL, 0); /* UNMAP */
		callout_begin("unmap", dev, at, req->step);
		r = host_handler.unmap(dev, &req->cmd, at, req->step);
		callout_end();
		return r;
	default:
		req->step = 0;
		return issue_flush(req);
	}
}

/* Whether a callout of this request that returned r is to be completed by the handler. */
static bool queued(const struct request *req, int r)
{
	bool by_cdb = host_handler.by_cdb || (req->op == TCMUR_OP_FLUSH && !host_handler.flush);

	if (r == TCMU_STS_ASYNC_HANDLED)
		return true;
	/* handle_cmd says so explicitly; without any callout (no flush at all) there is nothing to wait for. */
	return r == TCMU_STS_OK && host_handler.async && !by_cdb;
}

static void finish(struct request *req, int sts, int error)
{
	uint64_t took = 0;

	if (req->result) {
		*req->result = error; /* read once the request has been released */
		return;
	}
	if (req->started)
		took = clock_ns() - req->started;
	channel_post(req->tag, req->gen, sts, error, took, req->in_place && !error);
}

static bool is_write(uint32_t op)
{
	return op != TCMUR_OP_READ;
}

/*
 * Acts on the result of a callout: sets req->then, or tells the requester. The caller has set CLAIMED; nobody else
 * looks at the request until COMPLETED.
 */
static void settle(struct request *req, int sts)
{
	req->then = THEN_GO_ON;
	if (sts == TCMU_STS_OK) {
		req->done += req->step;
		if (req->done < req->length)
			return;
	} else if (command_fall_back(req, sts)) {
		return;
	} else if (req->op == TCMUR_OP_ZERO && host_handler.writesame && !atomic_load(&req->dev->no_writesame) &&
		   (sts == TCMU_STS_NOT_HANDLED || sts == TCMU_STS_INVALID_CMD)) {
		/* This handler cannot fill with zeroes (or only with other patterns): write them. */
		atomic_store(&req->dev->no_writesame, true);
		return;
	} else if (retry_wanted(req, sts)) {
		req->then = THEN_RETRY;
		return;
	}
	req->then = THEN_END;
	finish(req, sts, status_to_errno(sts, is_write(req->op), req->lib.sense_buf));
}

enum io_result io_run(struct request *req)
{
	for (;;) {
		unsigned int old;
		int r;

		/* A waiting request is IDLE: a completion that comes for it now is one too many. */
		atomic_store_explicit(&req->state, 0, memory_order_release);
		if (req->timed && !req->started)
			req->started = clock_ns();
		r = issue(req);
		req->returned = r;
		if (queued(req, r)) {
			old = atomic_fetch_or_explicit(&req->state, REQUEST_RETURNED, memory_order_acq_rel);
			if (!(old & REQUEST_COMPLETED))
				return IO_QUEUED; /* tcmur_cmd_complete() takes over, or already has */
			if (!host_handler.async)
				settle(req, req->completed);
		} else {
			old = atomic_fetch_or_explicit(&req->state, REQUEST_CLAIMED, memory_order_acq_rel);
			if (old & REQUEST_CLAIMED) {
				log_host(LOG_ERROR, req->dev,
					 "handler completed a command and also returned %d for it; the %s counts", r,
					 host_handler.async ? "first" : "second");
				old = atomic_fetch_or_explicit(&req->state, REQUEST_RETURNED, memory_order_acq_rel);
				if (!(old & REQUEST_COMPLETED))
					return IO_QUEUED;
				if (!host_handler.async)
					settle(req, r);
			} else {
				settle(req, r);
			}
		}
		if (req->then == THEN_GO_ON) {
			if (!atomic_load_explicit(&req->dev->lost, memory_order_relaxed))
				continue;
			req->pause_ns = 0;
		}
		atomic_store_explicit(&req->state, REQUEST_IDLE, memory_order_release);
		return req->then == THEN_END ? IO_ENDED : IO_LATER;
	}
}

void tcmur_cmd_complete(struct tcmu_device *dev, void *cmd, int sts)
{
	struct request *req;
	unsigned int old;

	if (!cmd) {
		log_host(LOG_ERROR, dev, "handler completed a NULL command; ignored");
		return;
	}
	req = (struct request *)((char *)cmd - offsetof(struct request, cmd));
	old = atomic_fetch_or_explicit(&req->state, REQUEST_CLAIMED, memory_order_acq_rel);
	if (old & REQUEST_CLAIMED) {
		log_host(LOG_ERROR, dev, "handler completed a command twice (second status %d); ignored", sts);
		return;
	}
	req->completed = sts;
	if (host_handler.async)
		settle(req, sts);
	old = atomic_fetch_or_explicit(&req->state, REQUEST_COMPLETED, memory_order_acq_rel);
	if (!(old & REQUEST_RETURNED))
		return; /* the thread in the callout goes on with it */
	if (!host_handler.async)
		settle(req, queued(req, req->returned) ? sts : req->returned);
	atomic_store_explicit(&req->state, REQUEST_IDLE, memory_order_release);
	device_completed(req);
}
