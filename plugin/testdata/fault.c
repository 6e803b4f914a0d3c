/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that misbehaves to order, for tests. A device is plain memory of the process, plus what its configuration
 * string asks for:
 *
 *	fault/WORD,WORD,...
 *
 *	size=BYTES          1 MiB unless given
 *	delay=USEC          each read, write and flush takes so long
 *	OP=EFFECT           from the first time on that OP is called
 *	OP@N=EFFECT         at the Nth call of OP only
 *
 * OP is check, open, close, read, write or flush. EFFECT is a TCMU_STS code (a negative errno for open), or
 *
 *	segv abort exit     the process ends so
 *	hang                the call never returns
 *	stdout stderr       a megabyte of text goes there
 *	log                 a thousand error messages
 *
 * With TCMUR_FAULT_ASYNC in the environment the handler is asynchronous: a thread per request.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tcmu-runner.h"

enum op {
	OP_CHECK,
	OP_OPEN,
	OP_CLOSE,
	OP_READ,
	OP_WRITE,
	OP_FLUSH,
	OPS
};

static const char *const op_names[OPS] = { "check", "open", "close", "read", "write", "flush" };

struct fault {
	char *data;
	size_t size;
	unsigned int delay;
	struct {
		const char *effect; /* in the config string */
		unsigned long at;   /* call, from 1; 0: every call */
		unsigned long calls;
	} ops[OPS];
};

/* Whether the comma-separated word at s is key followed by '=' or '@'; *value is what follows the key. */
static bool word_is(const char *s, const char *key, const char **value)
{
	size_t n = strlen(key);

	*value = s + n;
	return strncmp(s, key, n) == 0 && (s[n] == '=' || s[n] == '@');
}

static void parse(struct fault *f, const char *config)
{
	const char *s = strchr(config, '/');
	const char *value;
	int op;

	for (s = s ? s + 1 : ""; *s; s += strcspn(s, ","), s += *s == ',') {
		if (word_is(s, "size", &value))
			f->size = strtoull(value + 1, NULL, 0);
		else if (word_is(s, "delay", &value))
			f->delay = (unsigned int)strtoul(value + 1, NULL, 0);
		for (op = 0; op < OPS; op++) {
			if (!word_is(s, op_names[op], &value))
				continue;
			if (*value == '@')
				f->ops[op].at = strtoul(value + 1, (char **)&value, 0);
			f->ops[op].effect = value + 1;
		}
	}
}

static void print_megabyte(int fd)
{
	char line[1000];
	int i;

	memset(line, 'x', sizeof(line));
	line[sizeof(line) - 1] = '\n';
	for (i = 0; i < 1000; i++) {
		if (write(fd, line, sizeof(line)) < 0)
			return;
	}
}

static bool effect_is(const char *effect, const char *name)
{
	size_t n = strlen(name);

	return strncmp(effect, name, n) == 0 && (effect[n] == ',' || effect[n] == '\0');
}

/* What this call of op has to return; its other effects happen here. */
static int effect(struct fault *f, struct tcmu_device *dev, enum op op)
{
	const char *e = f->ops[op].effect;
	unsigned long call = __atomic_add_fetch(&f->ops[op].calls, 1, __ATOMIC_RELAXED);
	int i;

	if (!e || (f->ops[op].at && f->ops[op].at != call))
		return 0;
	if (effect_is(e, "segv"))
		*(volatile int *)8 = 1;
	if (effect_is(e, "abort"))
		abort();
	if (effect_is(e, "exit"))
		exit(3);
	while (effect_is(e, "hang"))
		pause();
	if (effect_is(e, "stdout"))
		print_megabyte(STDOUT_FILENO);
	else if (effect_is(e, "stderr"))
		print_megabyte(STDERR_FILENO);
	else if (effect_is(e, "log"))
		for (i = 0; i < 1000; i++)
			tcmu_err(dev, "message %d of a flood\n", i);
	else
		return atoi(e);
	return 0;
}

static bool fault_check_config(const char *cfgstring, char **reason)
{
	struct fault f = { 0 };

	parse(&f, cfgstring);
	if (effect(&f, NULL, OP_CHECK) == 0)
		return true;
	*reason = strdup("told to refuse it");
	return false;
}

static int fault_open(struct tcmu_device *dev, bool reopen)
{
	struct fault *f = calloc(1, sizeof(*f));
	int ret;

	(void)reopen;
	if (!f)
		return -ENOMEM;
	f->size = 1 << 20;
	parse(f, tcmu_dev_get_cfgstring(dev));
	ret = effect(f, dev, OP_OPEN);
	if (ret == 0 && !(f->data = calloc(1, f->size)))
		ret = -ENOMEM;
	if (ret) {
		tcmu_err(dev, "told to fail open\n");
		free(f);
		return ret;
	}
	tcmu_dev_set_num_lbas(dev, f->size / tcmu_dev_get_block_size(dev));
	tcmur_dev_set_private(dev, f);
	return 0;
}

static void fault_close(struct tcmu_device *dev)
{
	struct fault *f = tcmur_dev_get_private(dev);

	effect(f, dev, OP_CLOSE);
	free(f->data);
	free(f);
}

struct call {
	struct tcmu_device *dev;
	struct tcmur_cmd *cmd;
	enum op op;
	struct iovec *iov;
	size_t iov_cnt;
	size_t length;
	off_t offset;
};

static int carry_out(struct call *c)
{
	struct fault *f = tcmur_dev_get_private(c->dev);
	int sts;

	if (f->delay)
		usleep(f->delay);
	sts = effect(f, c->dev, c->op);
	if (sts)
		return sts;
	if (c->op == OP_READ)
		tcmu_memcpy_into_iovec(c->iov, c->iov_cnt, f->data + c->offset, c->length);
	else if (c->op == OP_WRITE)
		tcmu_memcpy_from_iovec(f->data + c->offset, c->length, c->iov, c->iov_cnt);
	return TCMU_STS_OK;
}

static void *carry_out_and_complete(void *arg)
{
	struct call *c = arg;

	tcmur_cmd_complete(c->dev, c->cmd, carry_out(c));
	free(c);
	return NULL;
}

static bool async;

static int start(struct call c)
{
	struct call *copy;
	pthread_attr_t attr;
	pthread_t thread;
	int err;

	if (!async)
		return carry_out(&c);
	copy = malloc(sizeof(*copy));
	if (!copy)
		return TCMU_STS_NO_RESOURCE;
	*copy = c;
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, 128 << 10);
	err = pthread_create(&thread, &attr, carry_out_and_complete, copy);
	pthread_attr_destroy(&attr);
	if (err) {
		free(copy);
		return TCMU_STS_NO_RESOURCE;
	}
	return TCMU_STS_OK;
}

static int fault_read(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		      off_t offset)
{
	return start((struct call){ dev, cmd, OP_READ, iov, iov_cnt, length, offset });
}

static int fault_write(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		       off_t offset)
{
	return start((struct call){ dev, cmd, OP_WRITE, iov, iov_cnt, length, offset });
}

static int fault_flush(struct tcmu_device *dev, struct tcmur_cmd *cmd)
{
	return start((struct call){ .dev = dev, .cmd = cmd, .op = OP_FLUSH });
}

struct tcmur_handler fault_handler = {
	.name = "Fault injection for tests",
	.subtype = "fault",
	.cfg_desc = "fault/WORD,... : see plugin/testdata/fault.c",
	.check_config = fault_check_config,
	.open = fault_open,
	.close = fault_close,
	.nr_threads = 256,
	.read = fault_read,
	.write = fault_write,
	.flush = fault_flush,
};

int handler_init(void)
{
	async = getenv("TCMUR_FAULT_ASYNC") != NULL;
	if (async)
		fault_handler.nr_threads = 0;
	return tcmur_register_handler(&fault_handler);
}
