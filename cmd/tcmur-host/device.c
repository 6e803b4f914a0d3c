/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices: opening and closing them, and which of their requests may run.
 *
 * An accepted request (counted by inflight) is inside the handler, or waits in the device's queue for its turn or for
 * the end of a reopen, or is in a pause of retry.c. While a device is lost nothing goes inside; when nothing is there
 * any more the reopen begins.
 *
 * Lock order: device->lock is a leaf; no callout and no other lock is taken under it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "host.h"

#define TIMED_USES 8u

/* Entries are set once and then stay. */
static struct tcmu_device *_Atomic table[NATIVE_MAX_DEVICES];

struct tcmu_device *device_lookup(uint32_t index)
{
	return index < NATIVE_MAX_DEVICES ? atomic_load_explicit(&table[index], memory_order_acquire) : NULL;
}

static struct tcmu_device *lookup_or_make(uint32_t index)
{
	struct tcmu_device *dev = device_lookup(index);
	struct tcmu_device *expected = NULL;
	pthread_condattr_t attr;

	if (dev || index >= NATIVE_MAX_DEVICES)
		return dev;
	dev = aligned_alloc(_Alignof(struct tcmu_device), sizeof(*dev));
	if (!dev)
		return NULL;
	memset(dev, 0, sizeof(*dev));
	dev->index = index;
	pthread_mutex_init(&dev->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&dev->idle, &attr);
	pthread_condattr_destroy(&attr);
	if (!atomic_compare_exchange_strong(&table[index], &expected, dev)) {
		free(dev);
		return expected;
	}
	return dev;
}

uint64_t device_size(struct tcmu_device *dev)
{
	return atomic_load(&dev->num_lbas) * atomic_load(&dev->block_size);
}

/*
 * What is wrong with a request, as an errno; the status for it goes to *sts. Handlers loop for ever, abort or corrupt
 * data when they are given anything that this lets through by mistake.
 */
static int examine(struct tcmu_device *dev, const struct submission *sub, const uint8_t *payload, int *sts)
{
	bool write = sub->op != TCMUR_OP_READ;
	uint64_t size;

	switch (sub->op) {
	case TCMUR_OP_FLUSH:
		return 0;
	case TCMUR_OP_READ:
	case TCMUR_OP_WRITE:
		if (sub->length > TCMUR_MAX_PAYLOAD || !payload) {
			*sts = TCMU_STS_INVALID_CDB;
			return EINVAL;
		}
		break;
	case TCMUR_OP_UNMAP:
		if (!host_handler.unmap) {
			*sts = TCMU_STS_INVALID_CMD;
			return EOPNOTSUPP;
		}
		break;
	case TCMUR_OP_ZERO:
		break;
	default:
		*sts = TCMU_STS_INVALID_CMD;
		return EINVAL;
	}
	if (write && dev->read_only) {
		*sts = TCMU_STS_WR_ERR_INCOMPAT_FRMT;
		return EROFS;
	}
	size = device_size(dev);
	if (sub->length > size || sub->offset > size - sub->length) {
		*sts = TCMU_STS_RANGE;
		return write ? ENOSPC : EINVAL;
	}
	if (sub->offset % dev->alignment || sub->length % dev->alignment) {
		*sts = TCMU_STS_INVALID_CDB;
		return EINVAL;
	}
	return 0;
}

static bool is_lost(struct tcmu_device *dev)
{
	return atomic_load_explicit(&dev->lost, memory_order_relaxed);
}

/* dev->lock is held. */
static void enqueue(struct tcmu_device *dev, struct request *req)
{
	req->next = NULL;
	if (dev->waiting_tail)
		dev->waiting_tail->next = req;
	else
		dev->waiting_head = req;
	dev->waiting_tail = req;
}

/* dev->lock is held. The request that has waited longest, which goes inside; NULL: none, or none may. */
static struct request *dequeue(struct tcmu_device *dev)
{
	struct request *req = dev->waiting_head;

	if (!req || is_lost(dev))
		return NULL;
	dev->waiting_head = req->next;
	if (!dev->waiting_head)
		dev->waiting_tail = NULL;
	dev->inside++;
	return req;
}

/* dev->lock is held. True: the caller is to run the request; false: it waits for a callout to end, or for a reopen. */
static bool start_or_queue(struct tcmu_device *dev, struct request *req)
{
	if (dev->running < host_handler.concurrency && !is_lost(dev)) {
		dev->running++;
		dev->inside++;
		return true;
	}
	enqueue(dev, req);
	return false;
}

/* dev->lock is held. True: the caller has to call reopen_start() when it has let go of the lock. */
static bool reopen_is_due(struct tcmu_device *dev)
{
	if (!is_lost(dev) || dev->inside || dev->reopening ||
	    (dev->state != DEVICE_OPEN && dev->state != DEVICE_DRAINING))
		return false;
	dev->reopening = true;
	return true;
}

void device_lost(struct tcmu_device *dev)
{
	uint32_t opens;
	bool due;

	pthread_mutex_lock(&dev->lock);
	/* What is heard from the old instance while it is closed, or from the new one in its open, changes nothing. */
	if (!dev->reopening && (dev->state == DEVICE_OPEN || dev->state == DEVICE_DRAINING))
		atomic_store(&dev->lost, true);
	due = reopen_is_due(dev);
	opens = dev->opens;
	pthread_mutex_unlock(&dev->lock);
	if (due)
		reopen_start(dev, opens);
}

static uint8_t *payload_of(const struct submission *sub)
{
	switch (sub->op) {
	case TCMUR_OP_READ:
		return channel_read_payload(sub->payload, sub->length);
	case TCMUR_OP_WRITE:
		return channel_write_payload(sub->payload, sub->length);
	}
	return NULL;
}

/* Looking at the clock costs: of reads and writes only each TIMED_USES-th use of a tag is measured. */
static bool timing_wanted(const struct submission *sub)
{
	return sub->gen % TIMED_USES == 1 || (sub->op != TCMUR_OP_READ && sub->op != TCMUR_OP_WRITE);
}

/* dev->lock is held. NULL: there is nothing to be done, or it cannot be done; *error and *sts say why. */
static struct request *accept(struct tcmu_device *dev, const struct submission *sub, int *error, int *sts)
{
	uint8_t *payload = payload_of(sub);
	struct request *req;

	if (dev->state != DEVICE_OPEN)
		return NULL;
	*error = examine(dev, sub, payload, sts);
	if (*error)
		return NULL;
	*sts = TCMU_STS_OK;
	if (!sub->length && sub->op != TCMUR_OP_FLUSH)
		return NULL;
	req = request_alloc(&dev->pool);
	if (!req) {
		*error = ENOMEM;
		*sts = TCMU_STS_NO_RESOURCE;
		return NULL;
	}
	req->dev = dev;
	req->tag = sub->tag;
	req->gen = sub->gen;
	req->op = sub->op;
	req->offset = sub->offset;
	req->length = sub->length;
	req->payload = payload;
	req->timed = timing_wanted(sub);
	req->may_in_place = sub->op == TCMUR_OP_READ && sub->flags & TCMUR_SQE_IN_PLACE;
	dev->inflight++;
	return req;
}

struct request *device_admit(const struct submission *sub)
{
	struct tcmu_device *dev = device_lookup(sub->device);
	int sts = TCMU_STS_HW_ERR, error = ENODEV;
	struct request *req = NULL;
	bool run = false;

	if (dev) {
		pthread_mutex_lock(&dev->lock);
		req = accept(dev, sub, &error, &sts);
		if (req)
			run = start_or_queue(dev, req);
		pthread_mutex_unlock(&dev->lock);
	}
	if (!req)
		channel_post(sub->tag, sub->gen, sts, error, 0, false);
	return run ? req : NULL;
}

void device_continue(struct request *req)
{
	struct tcmu_device *dev = req->dev;
	bool run;

	pthread_mutex_lock(&dev->lock);
	run = start_or_queue(dev, req);
	pthread_mutex_unlock(&dev->lock);
	if (run)
		worker_run(req);
}

/* dev->lock is held. */
static void ended(struct tcmu_device *dev, struct request *req)
{
	request_free(&dev->pool, req);
	if (--dev->inflight == 0)
		pthread_cond_broadcast(&dev->idle);
}

void device_completed(struct request *req)
{
	struct tcmu_device *dev = req->dev;
	enum request_then then = req->then;
	bool run = false, pause = false, due;
	uint32_t opens;

	pthread_mutex_lock(&dev->lock);
	dev->inside--;
	if (then == THEN_END)
		ended(dev, req);
	else if (then == THEN_GO_ON || is_lost(dev))
		run = start_or_queue(dev, req);
	else
		pause = true;
	due = reopen_is_due(dev);
	opens = dev->opens;
	pthread_mutex_unlock(&dev->lock);
	if (run)
		worker_run(req);
	if (pause)
		retry_later(req);
	if (due)
		reopen_start(dev, opens);
}

void device_run(struct request *req, bool timed)
{
	struct tcmu_device *dev = req->dev;

	while (req) {
		struct request *later = NULL;
		enum io_result result;
		struct pace pace;
		uint32_t opens;
		bool due;

		if (timed)
			pace_begin(&pace);
		result = io_run(req);
		if (timed) {
			pace.callouts = 1;
			pace_end(&pace);
		}
		pthread_mutex_lock(&dev->lock);
		if (result != IO_QUEUED)
			dev->inside--;
		if (result == IO_ENDED)
			ended(dev, req);
		else if (result == IO_LATER && is_lost(dev))
			enqueue(dev, req);
		else if (result == IO_LATER)
			later = req;
		/* The place that this request had in the handler goes to the one that has waited longest. */
		req = dequeue(dev);
		if (!req)
			dev->running--;
		due = reopen_is_due(dev);
		opens = dev->opens;
		pthread_mutex_unlock(&dev->lock);
		if (later)
			retry_later(later);
		if (due)
			reopen_start(dev, opens);
	}
}

static void reset(struct tcmu_device *dev, const struct native_open *how, char *config)
{
	atomic_store(&dev->block_size, how->block_size);
	atomic_store(&dev->num_lbas, how->size / how->block_size);
	/* The values that tcmu-runner starts a device with. */
	atomic_store(&dev->max_xfer, how->max_xfer / how->block_size);
	atomic_store(&dev->opt_xcopy, how->max_xfer / how->block_size);
	atomic_store(&dev->max_unmap, 33554432);
	atomic_store(&dev->unmap_gran, how->max_xfer / how->block_size);
	atomic_store(&dev->unmap_align, 0);
	atomic_store(&dev->unmap_split, true);
	atomic_store(&dev->write_cache, false);
	atomic_store(&dev->solid_state, false);
	atomic_store(&dev->write_protect, how->read_only);
	atomic_store(&dev->writes_survive, false);
	atomic_store(&dev->unmap_zeroes, false);
	atomic_store(&dev->seek, NULL);
	dev->contents[0] = '\0';
	atomic_store(&dev->handler_private, NULL);
	memset(dev->runner_private, 0, sizeof(dev->runner_private));

	dev->config = config;
	dev->given = config + NATIVE_CONFIG_SIZE;
	dev->handler_open = false;
	dev->retry_ns = how->retry_ns;
	snprintf(dev->name, sizeof(dev->name), "%s", how->name);
	dev->configured_size = how->size;
	dev->max_request = how->max_xfer;
	dev->alignment = how->alignment;
	dev->boundary = 0;
	dev->read_only = how->read_only;
	dev->read_errors_logged = how->read_errors_logged;

	atomic_store(&dev->read_cdb, 16);
	atomic_store(&dev->write_cdb, 16);
	atomic_store(&dev->sync_cdb, 10);
	atomic_store(&dev->no_writesame, false);
	atomic_store(&dev->conn_lost, 0);
	atomic_store(&dev->lock_lost, 0);
	atomic_store(&dev->timed_out, 0);

	pthread_mutex_lock(&dev->lock);
	atomic_store(&dev->lost, false);
	dev->opens++;
	dev->reopening = false;
	dev->interrupted = false;
	pthread_mutex_unlock(&dev->lock);
}

static void set_state(struct tcmu_device *dev, enum device_state state)
{
	pthread_mutex_lock(&dev->lock);
	dev->state = state;
	pthread_mutex_unlock(&dev->lock);
}

struct open_call {
	struct tcmu_device *dev;
	bool reopen;
	bool probing;
	int result;
	char *errors;
};

static void call_open(void *arg)
{
	struct open_call *call = arg;

	log_collect(call->dev, call->probing);
	callout_begin("open", call->dev, 0, 0);
	call->result = host_handler.open(call->dev, call->reopen);
	callout_end();
	call->dev->handler_open = call->result == 0;
	log_collected(call->errors, NATIVE_WHY_SIZE);
}

/* On the control thread. A device whose reopen has not succeeded yet is closed already. */
static void call_close(void *arg)
{
	struct tcmu_device *dev = arg;

	if (!dev->handler_open)
		return;
	dev->handler_open = false;
	callout_begin("close", dev, 0, 0);
	host_handler.close(dev);
	callout_end();
}

struct reopen_call {
	struct open_call open;
	uint32_t opens;
	int error;
};

static void call_reopen(void *arg)
{
	struct reopen_call *call = arg;
	struct tcmu_device *dev = call->open.dev;
	uint32_t block_size = atomic_load(&dev->block_size);
	uint64_t size = device_size(dev);
	bool wanted;

	pthread_mutex_lock(&dev->lock);
	wanted = (dev->state == DEVICE_OPEN || dev->state == DEVICE_DRAINING) && dev->opens == call->opens;
	pthread_mutex_unlock(&dev->lock);
	call->error = ECANCELED;
	if (!wanted)
		return;
	call_close(dev);
	/* Attributes stay as they are; requests that come meanwhile are examined by them. */
	memcpy(dev->config, dev->given, NATIVE_CONFIG_SIZE);
	call_open(&call->open);
	if (call->open.result) {
		/* Some return -1 for everything. */
		call->error = call->open.result < -1 && call->open.result > -4096 ? -call->open.result : EIO;
		return;
	}
	call->error = 0;
	if (atomic_load(&dev->block_size) == block_size && device_size(dev) >= size)
		return;
	snprintf(call->open.errors, NATIVE_WHY_SIZE,
		 "it now has %llu bytes in blocks of %u, and had %llu in blocks of %u",
		 (unsigned long long)device_size(dev), atomic_load(&dev->block_size), (unsigned long long)size,
		 block_size);
	call_close(dev);
	atomic_store(&dev->block_size, block_size);
	atomic_store(&dev->num_lbas, size / block_size);
	call->error = ESTALE;
}

int device_reopen(struct tcmu_device *dev, uint32_t opens, bool quietly, char *errors)
{
	struct reopen_call call = { .open = { .dev = dev, .reopen = true, .probing = quietly, .errors = errors },
				    .opens = opens };
	struct request *head = NULL, **tail = &head;

	errors[0] = 0;
	control_run(call_reopen, &call);
	if (call.error)
		return call.error;

	pthread_mutex_lock(&dev->lock);
	/* If the front has closed it by now, and perhaps opened it anew, that is no longer about the same instance. */
	if (dev->opens == opens) {
		dev->reopening = false;
		atomic_store(&dev->lost, false);
		while (dev->running < host_handler.concurrency && (*tail = dequeue(dev))) {
			dev->running++;
			tail = &(*tail)->next;
			*tail = NULL;
		}
	}
	pthread_mutex_unlock(&dev->lock);
	while (head) {
		struct request *req = head;

		head = req->next;
		worker_run(req);
	}
	return 0;
}

/* Frees what the handler may look at until its close has returned. */
static void forget(struct tcmu_device *dev)
{
	free(dev->config);
	dev->config = NULL;
	qcow_guard_free(dev->qcow);
	dev->qcow = NULL;
	set_state(dev, DEVICE_CLOSED);
}

int device_open(const struct native_open *how, int *result, char *errors)
{
	struct open_call call = { .reopen = how->reopen, .probing = how->probing, .errors = errors };
	struct tcmu_device *dev;
	bool closed;
	char *config;

	errors[0] = 0;
	dev = lookup_or_make(how->index);
	config = calloc(2, NATIVE_CONFIG_SIZE); /* the handler's, and one that stays as it is */
	if (!dev || !config) {
		free(config);
		return ENOMEM;
	}
	pthread_mutex_lock(&dev->lock);
	closed = dev->state == DEVICE_CLOSED;
	if (closed)
		dev->state = DEVICE_OPENING;
	pthread_mutex_unlock(&dev->lock);
	if (!closed) {
		free(config);
		return EBUSY;
	}
	snprintf(config, NATIVE_CONFIG_SIZE, "%s", how->config);
	memcpy(config + NATIVE_CONFIG_SIZE, config, NATIVE_CONFIG_SIZE);
	reset(dev, how, config);
	if (how->qcow_cluster) {
		dev->qcow = qcow_guard_make(how);
		if (!dev->qcow) {
			forget(dev);
			return ENOMEM;
		}
	}

	call.dev = dev;
	control_run(call_open, &call);
	*result = call.result;
	/* A failed open has freed its own state; close must not be called. */
	if (call.result)
		forget(dev);
	return 0;
}

void device_geometry(uint32_t index, struct native_geometry *out)
{
	struct tcmu_device *dev = device_lookup(index);
	bool write = !dev->read_only && (host_handler.by_cdb || host_handler.write);

	out->size = 0;
	out->block_size = atomic_load(&dev->block_size);
	if (atomic_load(&dev->num_lbas) <= (uint64_t)INT64_MAX / (out->block_size ? out->block_size : 1))
		out->size = device_size(dev);
	out->max_xfer = dev->max_request;
	out->alignment = dev->alignment;
	if (!out->alignment)
		out->alignment = host_handler.by_cdb ? out->block_size : 1;
	out->can_write = write;
	out->can_flush = host_handler.flush || host_handler.handle_cmd;
	out->can_unmap = write && host_handler.unmap;
	out->can_zero = write;
	out->write_cache = atomic_load(&dev->write_cache);
	out->rotational = !atomic_load(&dev->solid_state);
	out->writes_survive = atomic_load(&dev->writes_survive);
	out->can_write_same = write && host_handler.writesame;
	out->unmap_zeroes = atomic_load(&dev->unmap_zeroes);
	out->can_seek = atomic_load(&dev->seek) != NULL;
	snprintf(out->contents, sizeof(out->contents), "%s", dev->contents);
}

int device_start(uint32_t index, uint64_t boundary)
{
	struct tcmu_device *dev = device_lookup(index);
	uint64_t handler_max = (uint64_t)atomic_load(&dev->max_xfer) * atomic_load(&dev->block_size);
	struct native_geometry geometry;

	device_geometry(index, &geometry);
	dev->alignment = geometry.alignment;
	dev->boundary = boundary;
	if (handler_max && handler_max < dev->max_request)
		dev->max_request = (uint32_t)handler_max;
	/* Pieces of a request begin where the one before ended: they must end aligned as well. */
	dev->max_request -= dev->max_request % dev->alignment;
	if (!dev->max_request || (boundary && boundary % dev->alignment))
		return EINVAL;
	worker_expect(host_handler.concurrency);
	set_state(dev, DEVICE_OPEN);
	return 0;
}

void device_abandon(uint32_t index)
{
	struct tcmu_device *dev = device_lookup(index);

	control_run(call_close, dev);
	forget(dev);
}

static struct timespec deadline_in(int64_t ns)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	ts.tv_sec += ns / 1000000000;
	ts.tv_nsec += ns % 1000000000;
	if (ts.tv_nsec >= 1000000000) {
		ts.tv_sec++;
		ts.tv_nsec -= 1000000000;
	}
	return ts;
}

/* dev->lock is held. False: interrupted, or the deadline (NULL: none) has passed. */
static bool wait_idle(struct tcmu_device *dev, const struct timespec *deadline)
{
	int err = 0;

	while (dev->inflight && !dev->interrupted && !err) {
		if (deadline)
			err = pthread_cond_timedwait(&dev->idle, &dev->lock, deadline);
		else
			pthread_cond_wait(&dev->idle, &dev->lock);
	}
	return dev->inflight == 0;
}

/*
 * The last flush of a device that takes no requests any more. It goes to a worker, not to the control thread: a handler
 * that hangs in it must not keep other devices from being opened and closed.
 */
static bool flush_drained(struct tcmu_device *dev, const struct timespec *deadline, int *flush_error)
{
	int *result = calloc(1, sizeof(*result)); /* may outlive this call, when the handler hangs */
	struct request *req = NULL;
	bool idle;

	if (result) {
		pthread_mutex_lock(&dev->lock);
		req = request_alloc(&dev->pool);
		if (req)
			dev->inflight++;
		pthread_mutex_unlock(&dev->lock);
	}
	if (!req) {
		free(result);
		*flush_error = ENOMEM;
		return true;
	}
	req->dev = dev;
	req->result = result;
	req->tag = 0;
	req->gen = 0;
	req->op = TCMUR_OP_FLUSH;
	req->offset = 0;
	req->length = 0;
	req->payload = NULL;
	device_continue(req);

	pthread_mutex_lock(&dev->lock);
	idle = wait_idle(dev, deadline);
	pthread_mutex_unlock(&dev->lock);
	if (!idle)
		return false; /* result is lost on purpose: the flush may still end */
	*flush_error = *result;
	free(result);
	return true;
}

int device_close(uint32_t index, int64_t timeout_ns, int *flush_error)
{
	struct tcmu_device *dev = device_lookup(index);
	struct timespec at, *deadline = NULL;
	bool was_open, idle;

	*flush_error = 0;
	if (!dev)
		return ENODEV;
	if (timeout_ns >= 0) {
		at = deadline_in(timeout_ns);
		deadline = &at;
	}
	pthread_mutex_lock(&dev->lock);
	if (dev->state != DEVICE_OPEN && dev->state != DEVICE_DRAINING) {
		pthread_mutex_unlock(&dev->lock);
		return ENODEV;
	}
	was_open = dev->state == DEVICE_OPEN;
	dev->state = DEVICE_DRAINING;
	dev->interrupted = false;
	idle = wait_idle(dev, deadline);
	pthread_mutex_unlock(&dev->lock);
	if (was_open)
		worker_dismiss(host_handler.concurrency);
	if (!idle)
		return ETIMEDOUT;
	if (!dev->read_only && !flush_drained(dev, deadline, flush_error))
		return ETIMEDOUT;

	set_state(dev, DEVICE_CLOSING);
	control_run(call_close, dev);
	forget(dev);
	return 0;
}

void device_interrupt(uint32_t index)
{
	struct tcmu_device *dev = device_lookup(index);

	if (!dev)
		return;
	pthread_mutex_lock(&dev->lock);
	dev->interrupted = true;
	pthread_cond_broadcast(&dev->idle);
	pthread_mutex_unlock(&dev->lock);
}
