/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests that the handler is too busy for are tried again, with growing pauses, for a limited time. An initiator of
 * tcmu-runner's does that; the front has none behind it, and a file system takes the first refusal for an I/O error.
 */
#define _GNU_SOURCE
#include "host.h"

#define PAUSE_MIN_NS 1000000u
#define PAUSE_MAX_NS 250000000u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct request *pausing; /* guarded by lock: in the order of due */
static bool started;            /* guarded by lock */

static bool refused(int sts)
{
	return sts == TCMU_STS_BUSY || sts == TCMU_STS_NO_RESOURCE || sts == TCMU_STS_TRANSITION ||
	       sts == TCMU_STS_IMPL_TRANSITION_ERR;
}

bool retry_wanted(struct request *req, int sts)
{
	struct tcmu_device *dev = req->dev;
	uint64_t now;

	if (sts == TCMU_STS_TIMEOUT) {
		/* Whether the storage does it in time after a reopen is worth one try. */
		if (req->resent || !atomic_load(&dev->lost))
			return false;
		req->resent = true;
		req->pause_ns = 0;
		return true;
	}
	if (!refused(sts))
		return false;
	now = clock_ns();
	if (!req->retry_until) {
		req->retry_until = now + dev->retry_ns;
		req->pause_ns = PAUSE_MIN_NS;
	} else if (now < req->retry_until) {
		req->pause_ns = req->pause_ns ? 2 * req->pause_ns : PAUSE_MIN_NS;
		if (req->pause_ns > PAUSE_MAX_NS)
			req->pause_ns = PAUSE_MAX_NS;
	} else {
		log_host(LOG_WARNING, dev, "handler has refused a request for %llu ms (status %d): given up",
			 (unsigned long long)(dev->retry_ns / 1000000), sts);
		return false;
	}
	/* The last try comes when the time is up. */
	if (req->retry_until - now < req->pause_ns)
		req->pause_ns = req->retry_until - now;
	return true;
}

static void *retry_main(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		struct request *req = pausing;
		struct timespec ts;

		if (!req) {
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		if (req->due > clock_ns()) {
			ts.tv_sec = (time_t)(req->due / 1000000000u);
			ts.tv_nsec = (long)(req->due % 1000000000u);
			pthread_cond_clockwait(&changed, &lock, CLOCK_MONOTONIC, &ts);
			continue;
		}
		pausing = req->next;
		pthread_mutex_unlock(&lock);
		device_continue(req);
		pthread_mutex_lock(&lock);
	}
	return NULL;
}

void retry_later(struct request *req)
{
	struct request **at;
	bool ok;

	req->due = clock_ns() + req->pause_ns;
	pthread_mutex_lock(&lock);
	if (!started)
		started = thread_start("retry", retry_main, NULL) == 0;
	ok = started;
	if (ok) {
		for (at = &pausing; *at && (*at)->due <= req->due; at = &(*at)->next)
			;
		req->next = *at;
		*at = req;
		pthread_cond_signal(&changed);
	}
	pthread_mutex_unlock(&lock);
	if (!ok)
		device_continue(req); /* out of threads: without the pause, then */
}
