/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Events by which a handler says that its back end is lost. They arrive in the middle of a completion, with the
 * handler's locks held: nothing is waited for here. The device is closed and opened again once all its requests have
 * ended; see device_lost().
 */
#include "host.h"

static void note(struct tcmu_device *dev, _Atomic uint32_t *count, const char *what)
{
	/* Every request of a lost back end comes with one: the first few say it all. */
	uint32_t n = atomic_fetch_add(count, 1) + 1;

	if (n <= 3 || n % 1000 == 0)
		log_host(LOG_WARNING, dev, "handler reports: %s (%u so far); the device will be opened again", what, n);
	device_lost(dev);
}

void tcmu_notify_conn_lost(struct tcmu_device *dev)
{
	note(dev, &dev->conn_lost, "connection to its storage lost");
}

void tcmu_notify_lock_lost(struct tcmu_device *dev)
{
	note(dev, &dev->lock_lost, "storage has shut this client out");
}

void tcmu_notify_cmd_timed_out(struct tcmu_device *dev)
{
	note(dev, &dev->timed_out, "storage did not answer in time");
}
