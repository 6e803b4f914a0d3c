/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening a device again whose handler has lost its back end: close, then open with reopen set, once a second until it
 * succeeds. The device holds its requests meanwhile. How long that may take is for the front to say, which kills the
 * whole process when a request gets too old; a device without requests can wait.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

#define INTERVAL_S 1
#define LOG_EVERY 60 /* failed attempts */

struct task {
	struct tcmu_device *dev;
	uint32_t opens;
};

static void *reopen_main(void *arg)
{
	const struct timespec interval = { .tv_sec = INTERVAL_S };
	struct task *task = arg;
	struct tcmu_device *dev = task->dev;
	char errors[NATIVE_WHY_SIZE];

	for (unsigned int attempt = 0;; attempt++) {
		bool quietly = attempt % LOG_EVERY != 0;
		int err = device_reopen(dev, task->opens, quietly, errors);

		if (!err)
			log_host(LOG_WARNING, dev, "opened again after %u failed attempts", attempt);
		if (!err || err == ECANCELED)
			break;
		if (!quietly)
			log_host(LOG_WARNING, dev, "cannot be opened again yet, trying every second: %s (%s)",
				 errors[0] ? errors : "the handler does not say why", strerror(err));
		nanosleep(&interval, NULL);
	}
	free(task);
	return NULL;
}

void reopen_start(struct tcmu_device *dev, uint32_t opens)
{
	struct task *task = malloc(sizeof(*task));

	if (task) {
		*task = (struct task){ .dev = dev, .opens = opens };
		if (thread_start("reopen", reopen_main, task) == 0)
			return;
		free(task);
	}
	log_host(LOG_ERROR, dev, "no memory or thread for opening the device again: its requests will time out");
}
