/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices: opening and closing them, and which of their requests may run.
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
static int examine(const struct request *req, int *sts)
{
	struct tcmu_device *dev = req->dev;
	bool write = req->op != TCMUR_OP_READ;
	uint64_t size;

	switch (req->op) {
	case TCMUR_OP_FLUSH:
		return 0;
	case TCMUR_OP_READ:
	case TCMUR_OP_WRITE:
		if (req->length > TCMUR_MAX_PAYLOAD || !req->payload) {
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
	if (req->length > size || req->offset > size - req->length) {
		*sts = TCMU_STS_RANGE;
		return write ? ENOSPC : EINVAL;
	}
	if (req->offset % dev->alignment || req->length % dev->alignment) {
		*sts = TCMU_STS_INVALID_CDB;
		return EINVAL;
	}
	return 0;
}

/* dev->lock is held. True: the caller is to run the request; false: it waits for a callout to end. */
static bool start_or_queue(struct tcmu_device *dev, struct request *req)
{
	if (dev->running < host_handler.concurrency) {
		dev->running++;
		return true;
	}
	req->next = NULL;
	if (dev->waiting_tail)
		dev->waiting_tail->next = req;
	else
		dev->waiting_head = req;
	dev->waiting_tail = req;
	return false;
}

bool device_admit(struct request *req, int *error)
{
	struct tcmu_device *dev = req->dev;
	int sts = TCMU_STS_HW_ERR;
	bool run = false, open = false;

	*error = ENODEV;
	if (dev) {
		pthread_mutex_lock(&dev->lock);
		open = dev->state == DEVICE_OPEN;
		if (open) {
			*error = examine(req, &sts);
			if (!*error && (req->length || req->op == TCMUR_OP_FLUSH)) {
				dev->inflight++;
				run = start_or_queue(dev, req);
				pthread_mutex_unlock(&dev->lock);
				return run;
			}
		}
		pthread_mutex_unlock(&dev->lock);
	}
	io_fail(req, *error ? sts : TCMU_STS_OK, *error);
	request_free(req);
	return false;
}

bool device_readmit(struct request *req)
{
	struct tcmu_device *dev = req->dev;
	bool run;

	pthread_mutex_lock(&dev->lock);
	run = start_or_queue(dev, req);
	pthread_mutex_unlock(&dev->lock);
	return run;
}

/* dev->lock is held. */
static void ended(struct tcmu_device *dev)
{
	if (--dev->inflight == 0)
		pthread_cond_broadcast(&dev->idle);
}

void device_release(struct request *req)
{
	struct tcmu_device *dev = req->dev;

	request_free(req);
	pthread_mutex_lock(&dev->lock);
	ended(dev);
	pthread_mutex_unlock(&dev->lock);
}

void device_run(struct request *req)
{
	struct tcmu_device *dev = req->dev;

	while (req) {
		bool over = io_run(req);

		if (over)
			request_free(req);
		pthread_mutex_lock(&dev->lock);
		if (over)
			ended(dev);
		/* The place that this request had in the handler goes to the one that has waited longest. */
		req = dev->waiting_head;
		if (req) {
			dev->waiting_head = req->next;
			if (!dev->waiting_head)
				dev->waiting_tail = NULL;
		} else {
			dev->running--;
		}
		pthread_mutex_unlock(&dev->lock);
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
	atomic_store(&dev->handler_private, NULL);
	memset(dev->runner_private, 0, sizeof(dev->runner_private));

	dev->config = config;
	snprintf(dev->name, sizeof(dev->name), "%s", how->name);
	dev->configured_size = how->size;
	dev->max_request = how->max_xfer;
	dev->alignment = how->alignment;
	dev->boundary = 0;
	dev->read_only = how->read_only;

	atomic_store(&dev->read_cdb, 16);
	atomic_store(&dev->write_cdb, 16);
	atomic_store(&dev->sync_cdb, 10);
	atomic_store(&dev->no_writesame, false);
	atomic_store(&dev->errors_logged, 0);
	atomic_store(&dev->conn_lost, 0);
	atomic_store(&dev->lock_lost, 0);
	atomic_store(&dev->timed_out, 0);
	dev->interrupted = false;
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
	log_collected(call->errors, NATIVE_WHY_SIZE);
}

/* On the control thread. Frees what the handler may look at until its close has returned. */
static void call_close(void *arg)
{
	struct tcmu_device *dev = arg;

	callout_begin("close", dev, 0, 0);
	host_handler.close(dev);
	callout_end();
}

static void forget(struct tcmu_device *dev)
{
	free(dev->config);
	dev->config = NULL;
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
	config = calloc(1, NATIVE_CONFIG_SIZE);
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
	reset(dev, how, config);

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
	struct request *req = request_alloc();
	bool idle;

	if (!result || !req) {
		free(result);
		if (req)
			request_free(req);
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
	req->done = 0;
	req->payload = NULL;

	pthread_mutex_lock(&dev->lock);
	dev->inflight++;
	pthread_mutex_unlock(&dev->lock);
	worker_follow_up(req);

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
