/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler over plain memory that behaves, or misbehaves, as its configuration string says; for tests.
 *
 * Compile with -DASYNC for an asynchronous one (subtype "async" instead of "sync"). Words in the configuration string:
 *   noisy     prints 3000 long lines to stdout and stderr in open
 *   refuse    open fails with -ENXIO and logs why
 *   die-in-open  open writes to address 0
 *   crash     a read at 4096 writes to address 0
 *   abort     a read at 4096 prints and aborts
 *   exit      a read at 4096 calls exit(3)
 *   thread    a read at 4096 starts a thread that crashes
 *   hang      a read at 4096 lasts until a write arrives
 *   status    a write at 4096+N*512 returns status N (-1 for N = 100)
 *   early     a write is completed by another thread, and done a little later (not ASYNC)
 *   twice     completes twice (ASYNC)
 *   noflush   flush fails
 *   flood     logs 20000 messages in a read at 4096
 *   inside    completes inside of the callout (ASYNC)
 *   blind     writesame returns NOT_HANDLED
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tcmu-runner.h"

struct job {
	struct job *next;
	struct tcmur_cmd *cmd;
	int sts;
};

struct state {
	char *mem;
	uint64_t size;
	unsigned int running, most; /* callouts */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int hanging, written;
	/* ASYNC: completed last in, first out by a thread */
	struct job *jobs;
	int stop;
	pthread_t thread;
	struct tcmu_device *dev;
};

static int is(struct tcmu_device *dev, const char *word)
{
	return strstr(tcmu_dev_get_cfgstring(dev), word) != NULL;
}

static void *completer(void *arg)
{
	struct state *s = arg;

	pthread_mutex_lock(&s->lock);
	for (;;) {
		struct job *j;

		while (!s->jobs && !s->stop)
			pthread_cond_wait(&s->changed, &s->lock);
		j = s->jobs;
		if (!j)
			break;
		s->jobs = j->next;
		pthread_mutex_unlock(&s->lock);
		tcmur_cmd_complete(s->dev, j->cmd, j->sts);
		if (is(s->dev, "twice"))
			tcmur_cmd_complete(s->dev, j->cmd, j->sts);
		free(j);
		pthread_mutex_lock(&s->lock);
	}
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

static void *fault(void *arg)
{
	*(volatile char *)arg = 1;
	return NULL;
}

struct completion {
	struct tcmu_device *dev;
	struct tcmur_cmd *cmd;
};

static void *complete(void *arg)
{
	struct completion *c = arg;

	tcmur_cmd_complete(c->dev, c->cmd, TCMU_STS_WR_ERR);
	return NULL;
}

static void complete_early(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	struct completion c = { dev, cmd };
	pthread_t t;

	pthread_create(&t, NULL, complete, &c);
	pthread_join(t, NULL);
	usleep(20000); /* whoever believes it has time to look */
}

/* How every callout ends. */
static int end(struct tcmu_device *dev, struct tcmur_cmd *cmd, int sts)
{
#ifdef ASYNC
	struct state *s = tcmur_dev_get_private(dev);
	struct job *j;

	if (sts == TCMU_STS_NOT_HANDLED)
		return sts;
	if (is(dev, "inside")) {
		tcmur_cmd_complete(dev, cmd, sts);
		return 0;
	}
	j = malloc(sizeof(*j));
	j->cmd = cmd;
	j->sts = sts;
	pthread_mutex_lock(&s->lock);
	j->next = s->jobs;
	s->jobs = j;
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	return 0;
#else
	(void)dev;
	(void)cmd;
	return sts;
#endif
}

static int open_(struct tcmu_device *dev, bool reopen)
{
	struct state *s;
	int ret;

	(void)reopen;
	if (is(dev, "refuse")) {
		errno = EXDEV;
		tcmu_err(dev, "no such thing: %m\n");
		tcmu_err(NULL, "and no other\n");
		return -ENXIO;
	}
	if (is(dev, "die-in-open"))
		fault(NULL);
	if (is(dev, "noisy")) {
		static char line[3000];

		memset(line, 'x', sizeof(line) - 1);
		for (int i = 0; i < 3000; i++) {
			printf("%s\n", i % 10 ? "chatty handler" : line);
			fprintf(stderr, "chatty handler\n");
		}
		fflush(stdout);
	}
	s = calloc(1, sizeof(*s));
	s->size = tcmu_cfgfs_dev_get_info_u64(dev, "Size", &ret);
	s->mem = calloc(1, s->size + 1);
	s->dev = dev;
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->changed, NULL);
	tcmur_dev_set_private(dev, s);
	tcmu_dev_set_max_unmap_len(dev, 8);
	tcmu_dev_set_opt_unmap_gran(dev, 4, true);
	tcmu_dev_set_unmap_gran_align(dev, 4);
	pthread_create(&s->thread, NULL, completer, s);
	tcmu_info(dev, "opened %llu bytes\n", (unsigned long long)s->size);
	return 0;
}

static void close_(struct tcmu_device *dev)
{
	struct state *s = tcmur_dev_get_private(dev);

	tcmu_info(dev, "closing; at most %u callouts at once\n", s->most);
	pthread_mutex_lock(&s->lock);
	s->stop = 1;
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	pthread_join(s->thread, NULL);
	free(s->mem);
	free(s);
}

static void enter(struct state *s)
{
	pthread_mutex_lock(&s->lock);
	if (++s->running > s->most)
		s->most = s->running;
	pthread_mutex_unlock(&s->lock);
}

static void leave(struct state *s)
{
	pthread_mutex_lock(&s->lock);
	s->running--;
	pthread_mutex_unlock(&s->lock);
}

static void misbehave(struct tcmu_device *dev)
{
	struct state *s = tcmur_dev_get_private(dev);

	if (is(dev, "crash"))
		fault(NULL);
	if (is(dev, "abort")) {
		fprintf(stderr, "handler is at a loss\n");
		abort();
	}
	if (is(dev, "exit"))
		exit(3);
	if (is(dev, "flood")) {
		for (int i = 0; i < 20000; i++)
			tcmu_warn(dev, "flood %d\n", i);
	}
	if (is(dev, "thread")) {
		pthread_t t;

		pthread_create(&t, NULL, fault, NULL);
		pthread_join(t, NULL);
	}
	if (is(dev, "hang")) {
		pthread_mutex_lock(&s->lock);
		tcmu_info(dev, "callout %d hangs\n", ++s->hanging);
		while (!s->written)
			pthread_cond_wait(&s->changed, &s->lock);
		pthread_mutex_unlock(&s->lock);
	}
}

static int read_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len, off_t off)
{
	struct state *s = tcmur_dev_get_private(dev);

	enter(s);
	if (off == 4096)
		misbehave(dev);
	tcmu_memcpy_into_iovec(iov, cnt, s->mem + off, len);
	leave(s);
	return end(dev, cmd, TCMU_STS_OK);
}

static int write_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len, off_t off)
{
	struct state *s = tcmur_dev_get_private(dev);
	int sts = TCMU_STS_OK;

	enter(s);
	if (is(dev, "status") && off >= 4096)
		sts = (int)(off - 4096) / 512;
	if (sts == 100)
		sts = -1;
	if (is(dev, "early"))
		complete_early(dev, cmd);
	if (sts == TCMU_STS_OK)
		tcmu_memcpy_from_iovec(s->mem + off, len, iov, cnt);
	pthread_mutex_lock(&s->lock);
	s->written = 1;
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	leave(s);
	return end(dev, cmd, sts);
}

static int flush_(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	return end(dev, cmd, is(dev, "noflush") ? TCMU_STS_WR_ERR : TCMU_STS_OK);
}

/* Refuses what the attributes set in open do not allow. */
static int unmap_(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t off, uint64_t len)
{
	struct state *s = tcmur_dev_get_private(dev);
	int sts = TCMU_STS_OK;

	if (len > 2048 || off / 2048 != (off + len - 1) / 2048)
		sts = TCMU_STS_INVALID_PARAM_LIST;
	else
		memset(s->mem + off, 0xee, len);
	return end(dev, cmd, sts);
}

static int writesame_(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t off, uint64_t len, struct iovec *iov,
		      size_t cnt)
{
	struct state *s = tcmur_dev_get_private(dev);

	if (is(dev, "blind"))
		return TCMU_STS_NOT_HANDLED;
	if (cnt != 1 || iov->iov_len != tcmu_dev_get_block_size(dev) || !tcmu_iovec_zeroed(iov, cnt))
		return TCMU_STS_INVALID_CDB;
	memset(s->mem + off, 0, len);
	return end(dev, cmd, TCMU_STS_OK);
}

static bool check(const char *cfg, char **reason)
{
	if (!strstr(cfg, "unacceptable"))
		return true;
	*reason = strdup("I do not like it\n");
	return false;
}

struct tcmur_handler behave_handler = {
	.name = "handler for tests",
	.cfg_desc = "words",
	.check_config = check,
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
	.flush = flush_,
	.unmap = unmap_,
	.writesame = writesame_,
};

int handler_init(void)
{
	printf("hello from handler_init\n");
	fflush(stdout);
	return tcmur_register_handler(&behave_handler);
}
