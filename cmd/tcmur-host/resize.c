/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sizes of open devices that change: by the handler's reconfig when the front wants it, or by the handler itself.
 */
#include <errno.h>
#include <sys/eventfd.h>

#include "host.h"

static _Atomic int events = -1;

int device_size_events(void)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	if (fd >= 0)
		atomic_store(&events, fd);
	return fd;
}

void size_was_set(void)
{
	int fd = atomic_load(&events), saved_errno = errno;

	if (fd >= 0)
		(void)eventfd_write(fd, 1);
	errno = saved_errno;
}

struct resize_call {
	struct tcmu_device *dev;
	uint64_t size;
	int error;
	int result;
	char *errors;
};

static void call_resize(void *arg)
{
	struct resize_call *call = arg;
	struct tcmu_device *dev = call->dev;
	struct tcmulib_cfg_info cfg = { .type = TCMULIB_CFG_DEV_SIZE, .dev_size = call->size };
	uint64_t old = atomic_load(&dev->num_lbas), new = call->size / atomic_load(&dev->block_size);
	bool open;

	pthread_mutex_lock(&dev->lock);
	open = dev->state == DEVICE_OPEN;
	pthread_mutex_unlock(&dev->lock);
	if (!open || !dev->handler_open) {
		call->error = ENODEV;
		return;
	}
	/* Nothing new is let in beyond the end before the handler cuts that off, or before it has added it. */
	if (new < old)
		atomic_store(&dev->num_lbas, new);
	log_collect(dev, false);
	callout_begin("reconfig", dev, 0, 0);
	call->result = host_handler.reconfig(dev, &cfg);
	callout_end();
	log_collected(call->errors, NATIVE_WHY_SIZE);
	if (call->result) {
		atomic_store(&dev->num_lbas, old);
		return;
	}
	atomic_store(&dev->num_lbas, new);
	dev->configured_size = call->size; /* what a reopen is told */
}

int device_resize(uint32_t index, uint64_t size, int *result, char *errors)
{
	struct resize_call call = { .dev = device_lookup(index), .size = size, .errors = errors };

	errors[0] = 0;
	if (!call.dev)
		return ENODEV;
	if (!host_handler.reconfig)
		return EOPNOTSUPP;
	control_run(call_resize, &call);
	*result = call.result;
	return call.error;
}
