/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler whose storage fails for a while, over memory that survives a reopen; for tests.
 *
 * Compile with -DASYNC for an asynchronous one (subtype "async" instead of "sync"): its completions and events come
 * from a thread that holds a lock which open and close need too. NAME=N in the configuration string:
 *   busy    so many writes at 4096 return status sts
 *   sts     which one; 3 (BUSY) if it is not given
 *   lost    so many writes at 4096 report a lost connection and return BUSY
 *   slow    so many writes at 4096 report a time-out and return TIMEOUT
 *   refuse  so many opens with reopen set fail
 * Always: a write at 8192 makes storage shut the device out until it is opened again: all requests report a lost lock
 * and return BUSY. A request at 16384 has the connection lost later, when nothing is going on.
 * A write at 24576 takes a tenth of a second.
 * It aborts when it is closed with requests inside, or without being open, or used without being open.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tcmu-runner.h"

#define SIZE (1u << 20)

enum event {
	NOTHING,
	CONN_LOST,
	LOCK_LOST,
	TIMED_OUT
};

struct job {
	struct job *next;
	struct tcmur_cmd *cmd;
	int sts;
	enum event event;
	int lasting;
};

struct state {
	unsigned int inside; /* guarded by counts */
	/* ASYNC; guarded by storage */
	struct job *jobs;
	int stop;
	pthread_t thread;
	struct tcmu_device *dev;
};

static pthread_mutex_t storage = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t counts = PTHREAD_MUTEX_INITIALIZER;
static char mem[SIZE];
static int shut_out;                      /* guarded by counts, as all below */
static int busy, lost, slow, refuse, sts; /* of the device that is not called other */
static int opens, writes;

static int given(const char *config, const char *name, int otherwise)
{
	const char *p = strstr(config, name);

	return p ? atoi(p + strlen(name)) : otherwise;
}

static int other(struct tcmu_device *dev)
{
	return strstr(tcmu_dev_get_cfgstring(dev), "other") != NULL;
}

static void report(struct tcmu_device *dev, enum event event)
{
	if (event == CONN_LOST)
		tcmu_notify_conn_lost(dev);
	if (event == LOCK_LOST)
		tcmu_notify_lock_lost(dev);
	if (event == TIMED_OUT)
		tcmu_notify_cmd_timed_out(dev);
}

static void leave(struct state *s)
{
	pthread_mutex_lock(&counts);
	s->inside--;
	pthread_mutex_unlock(&counts);
}

#ifdef ASYNC
static void *completer(void *arg)
{
	struct state *s = arg;

	pthread_mutex_lock(&storage);
	for (;;) {
		struct job *j;

		while (!s->jobs && !s->stop)
			pthread_cond_wait(&more, &storage);
		j = s->jobs;
		if (!j)
			break;
		s->jobs = j->next;
		if (j->lasting)
			usleep(100000);
		report(s->dev, j->event);
		leave(s); /* before the host can know that it is the last one */
		tcmur_cmd_complete(s->dev, j->cmd, j->sts);
		free(j);
	}
	pthread_mutex_unlock(&storage);
	return NULL;
}
#endif

static void *lose(void *dev)
{
	usleep(50000); /* until the write that started this has ended: storage fails when it likes */
	pthread_mutex_lock(&storage);
	tcmu_notify_conn_lost(dev);
	pthread_mutex_unlock(&storage);
	return NULL;
}

static int open_(struct tcmu_device *dev, bool reopen)
{
	const char *config = tcmu_dev_get_cfgstring(dev);
	struct state *s;

	pthread_mutex_lock(&storage);
	pthread_mutex_lock(&counts);
	if (!reopen && !other(dev)) {
		busy = given(config, "busy=", 0);
		lost = given(config, "lost=", 0);
		slow = given(config, "slow=", 0);
		refuse = given(config, "refuse=", 0);
		sts = given(config, "sts=", TCMU_STS_BUSY);
		opens = 0;
	}
	opens += !other(dev);
	if (reopen && refuse-- > 0) {
		pthread_mutex_unlock(&counts);
		pthread_mutex_unlock(&storage);
		tcmu_err(dev, "storage is still away\n");
		return -EHOSTUNREACH;
	}
	shut_out = 0;
	s = calloc(1, sizeof(*s));
	s->dev = dev;
	/* The string is the handler's to cut up; the host has to give a fresh one each time. */
	tcmu_dev_get_cfgstring(dev)[0] = 'X';
	tcmur_dev_set_private(dev, s);
	pthread_mutex_unlock(&counts);
#ifdef ASYNC
	pthread_create(&s->thread, NULL, completer, s);
#endif
	pthread_mutex_unlock(&storage);
	if (config[1] == 'X')
		abort();
	return 0;
}

static void close_(struct tcmu_device *dev)
{
	struct state *s = tcmur_dev_get_private(dev);

	if (!s || s->dev != dev || s->inside) {
		fprintf(stderr, "close of %p with %u requests inside\n", (void *)s, s ? s->inside : 0);
		abort();
	}
	tcmu_info(dev, "closing after %d opens and %d writes\n", opens, writes);
	pthread_mutex_lock(&storage);
	s->stop = 1;
	pthread_cond_broadcast(&more);
	pthread_mutex_unlock(&storage);
#ifdef ASYNC
	pthread_join(s->thread, NULL);
#endif
	memset(s, 0x5a, sizeof(*s));
	free(s);
	tcmur_dev_set_private(dev, NULL);
}

/* How a request of the device ends. */
static int outcome(struct tcmu_device *dev, int write, off_t off, enum event *event)
{
	int result = TCMU_STS_OK;

	*event = NOTHING;
	if (other(dev))
		return TCMU_STS_OK;
	pthread_mutex_lock(&counts);
	writes += write;
	if (write && off == 8192)
		shut_out = opens == 1;
	if (shut_out) {
		*event = LOCK_LOST;
		result = TCMU_STS_BUSY;
	} else if (write && off == 4096 && busy > 0) {
		busy--;
		result = sts;
	} else if (write && off == 4096 && lost > 0) {
		lost--;
		*event = CONN_LOST;
		result = TCMU_STS_BUSY;
	} else if (write && off == 4096 && slow > 0) {
		slow--;
		*event = TIMED_OUT;
		result = TCMU_STS_TIMEOUT;
	}
	pthread_mutex_unlock(&counts);
	return result;
}

static int transfer(struct tcmu_device *dev, struct tcmur_cmd *cmd, int write, struct iovec *iov, size_t cnt,
		    size_t len, off_t off)
{
	struct state *s = tcmur_dev_get_private(dev);
	pthread_t thread;
	enum event event;
	int result;

	if (!s)
		abort();
	pthread_mutex_lock(&counts);
	s->inside++;
	pthread_mutex_unlock(&counts);
	result = outcome(dev, write, off, &event);
	if (result == TCMU_STS_OK && write)
		tcmu_memcpy_from_iovec(mem + off, len, iov, cnt);
	else if (result == TCMU_STS_OK)
		tcmu_memcpy_into_iovec(iov, cnt, mem + off, len);
	if (off == 16384 && opens == 1) {
		pthread_create(&thread, NULL, lose, dev);
		pthread_detach(thread);
	}
#ifdef ASYNC
	struct job *j = calloc(1, sizeof(*j));

	*j = (struct job){ .cmd = cmd, .sts = result, .event = event, .lasting = write && off == 24576 };
	pthread_mutex_lock(&storage);
	j->next = s->jobs;
	s->jobs = j;
	pthread_cond_broadcast(&more);
	pthread_mutex_unlock(&storage);
	return TCMU_STS_OK;
#else
	(void)cmd;
	if (write && off == 24576)
		usleep(100000);
	report(dev, event);
	leave(s);
	return result;
#endif
}

static int read_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len, off_t off)
{
	return transfer(dev, cmd, 0, iov, cnt, len, off);
}

static int write_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len, off_t off)
{
	return transfer(dev, cmd, 1, iov, cnt, len, off);
}

struct tcmur_handler flaky_handler = {
	.name = "handler with flaky storage",
	.cfg_desc = "NAME=N",
	.open = open_,
	.close = close_,
#ifdef ASYNC
	.subtype = "async",
	.nr_threads = 0,
#else
	.subtype = "sync",
	.nr_threads = 2,
#endif
	.read = read_,
	.write = write_,
};

int handler_init(void)
{
	return tcmur_register_handler(&flaky_handler);
}
