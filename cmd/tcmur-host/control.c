/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The control thread: the one thread that loads, opens and closes. Handlers keep static state there (strtok, lists
 * locked in part only), so that two opens must never overlap; and a death in one of these callouts is reported like a
 * death in I/O, which needs a thread of ours rather than one of Go's.
 */
#include <stdlib.h>

#include "host.h"

static pthread_mutex_t caller_lock = PTHREAD_MUTEX_INITIALIZER; /* one caller at a time; taken before lock */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void (*job)(void *arg); /* guarded by lock: NULL when there is nothing to do */
static void *job_arg;          /* guarded by lock */
static bool started;           /* guarded by caller_lock */
static _Thread_local bool self;

bool control_is_self(void)
{
	return self;
}

static void *control_main(void *arg)
{
	(void)arg;
	self = true;
	crash_thread_start();
	pthread_mutex_lock(&lock);
	for (;;) {
		while (!job)
			pthread_cond_wait(&changed, &lock);
		pthread_mutex_unlock(&lock);
		job(job_arg);
		pthread_mutex_lock(&lock);
		job = NULL;
		pthread_cond_broadcast(&changed);
	}
	return NULL;
}

void control_run(void (*fn)(void *arg), void *arg)
{
	pthread_mutex_lock(&caller_lock);
	if (!started) {
		/* Without even one thread nothing of what the host is for can be done. */
		if (thread_start("control", control_main, NULL) != 0)
			abort();
		started = true;
	}
	pthread_mutex_lock(&lock);
	job_arg = arg;
	job = fn;
	pthread_cond_broadcast(&changed);
	while (job)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
	pthread_mutex_unlock(&caller_lock);
}
