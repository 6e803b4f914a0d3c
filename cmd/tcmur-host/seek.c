/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a device has data, for handlers that know.
 */
#include <errno.h>

#include "host.h"

struct seek_call {
	struct tcmu_device *dev;
	uint64_t offset;
	bool hole;
	int64_t result;
};

static void call_seek(void *arg)
{
	struct seek_call *call = arg;
	struct tcmu_device *dev = call->dev;
	tcmur_seek_fn_t seek = atomic_load(&dev->seek);
	bool open;

	pthread_mutex_lock(&dev->lock);
	open = dev->state == DEVICE_OPEN;
	pthread_mutex_unlock(&dev->lock);
	if (!open || !dev->handler_open) {
		call->result = -ENODEV;
		return;
	}
	if (!seek) {
		call->result = -EOPNOTSUPP;
		return;
	}
	callout_begin("seek", dev, call->offset, 0);
	call->result = seek(dev, call->offset, call->hole);
	callout_end();
}

int64_t device_seek(uint32_t index, uint64_t offset, bool hole)
{
	struct seek_call call = { .dev = device_lookup(index), .offset = offset, .hole = hole };

	if (!call.dev)
		return -ENODEV;
	control_run(call_seek, &call);
	return call.result;
}
