/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler that misbehaves to order, for tests. What a device is and does stands in its configuration string:
 *
 *	fault/WORD,WORD,...
 *
 *	size=BYTES          1 MiB unless given
 *	delay=USEC          each read, write and flush takes so long
 *	linger=USEC         a flush takes so much longer when its work is done
 *	grow=BYTES          a flush gives the device this size
 *	zeroes              what is unmapped reads back zeroes, and the host is told so
 *
 * Where its contents are:
 *
 *	                    memory of the process, so that reopening it is refused
 *	volatile            the same, and a reopened device is all zeroes
 *	store=PATH          a file, written to at once
 *	lazy=PATH           memory of the process; what was written since the last flush goes to the file with a flush
 *
 * What it does wrong:
 *
 *	OP=EFFECT           each time that OP is called
 *	OP@N=EFFECT         at the Nth call of OP since the device was opened
 *	OP:OFFSET=EFFECT    whenever OP touches this byte
 *	once=PATH           only until the file exists, which is made just before the first effect
 *
 * OP is check, open, reopen, close, read, write, flush, unmap, writesame (of zeroes, always) or reconfig (of stores); open is the first one only. EFFECT is a TCMU_STS code (a
 * negative errno for open and reopen), a name in fault_effects.h, or one of those that concern the call:
 *
 *	never               it never ends: asynchronously, or as hang
 *	twice               it ends twice
 *	late                it ends, and once more after close
 *	other               a synchronous handler's call ends in another thread too
 *	garbage             it ends with a status that does not exist
 *	overrun             64 KiB on both sides of its buffer are overwritten
 *
 * With TCMUR_FAULT_INIT in the environment it dies in handler_init while the file of that name exists.
 *
 * With TCMUR_FAULT_ASYNC in the environment, or built as handler faultasync, the handler is asynchronous: a thread per
 * request.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>

#include "fault_effects.h"

#ifndef FAULT_SUBTYPE
#define FAULT_SUBTYPE "fault"
#define FAULT_ASYNC (getenv("TCMUR_FAULT_ASYNC") != NULL)
#endif

#define RULES_MAX 8
#define BLOCK 4096u /* unit in which lazy contents are written */
#define GARBAGE 0x5eed5eed

enum op {
	OP_CHECK,
	OP_OPEN,
	OP_REOPEN,
	OP_CLOSE,
	OP_READ,
	OP_WRITE,
	OP_FLUSH,
	OP_UNMAP,
	OP_WRITESAME,
	OP_RECONFIG,
	OPS
};

static const char *const op_names[OPS] = { "check", "open",  "reopen", "close",     "read",
					   "write", "flush", "unmap",  "writesame", "reconfig" };

struct rule {
	enum op op;
	const char *effect; /* in the config string */
	unsigned long at;   /* call, from 1; 0: every call */
	bool by_offset;
	off_t offset;
};

struct fault {
	size_t size;
	size_t grow;
	unsigned int delay;
	unsigned int linger;
	bool is_volatile;
	bool zeroes;
	char *path; /* of the contents' file, NULL without one */
	bool lazy;
	char *once;
	struct rule rules[RULES_MAX];
	int nr_rules;

	unsigned long calls[OPS];
	int fd;      /* of path */
	char *data;  /* contents, or NULL: they are in the file */
	char *dirty; /* of lazy: a flag per BLOCK */
	pthread_mutex_t flushing;
	struct tcmur_cmd *kept; /* completed, and to be completed again after close */
};

static bool async;

static char *copy_word(const char *s)
{
	return strndup(s, strcspn(s, ","));
}

/* What follows name in the word at s; NULL: the word is another one. */
static const char *after(const char *s, const char *name)
{
	size_t n = strlen(name);

	return strncmp(s, name, n) == 0 ? s + n : NULL;
}

static void parse_rule(struct fault *f, const char *s)
{
	for (int op = 0; op < OPS; op++) {
		struct rule *r = &f->rules[f->nr_rules];
		const char *rest = after(s, op_names[op]);
		char *end;

		if (!rest || !strchr("=@:", *rest) || f->nr_rules == RULES_MAX)
			continue;
		r->op = (enum op)op;
		end = (char *)rest;
		if (*rest == '@')
			r->at = strtoul(rest + 1, &end, 0);
		r->by_offset = *rest == ':';
		if (r->by_offset)
			r->offset = strtoll(rest + 1, &end, 0);
		r->effect = end + 1;
		f->nr_rules++;
	}
}

static void parse(struct fault *f, const char *config)
{
	const char *s = strchr(config, '/');
	const char *value;

	for (s = s ? s + 1 : ""; *s; s += strcspn(s, ","), s += *s == ',') {
		if ((value = after(s, "size=")))
			f->size = strtoull(value, NULL, 0);
		else if ((value = after(s, "grow=")))
			f->grow = strtoull(value, NULL, 0);
		else if ((value = after(s, "delay=")))
			f->delay = (unsigned int)strtoul(value, NULL, 0);
		else if ((value = after(s, "linger=")))
			f->linger = (unsigned int)strtoul(value, NULL, 0);
		else if (after(s, "volatile"))
			f->is_volatile = true;
		else if (after(s, "zeroes"))
			f->zeroes = true;
		else if ((value = after(s, "once=")))
			f->once = copy_word(value);
		else if ((value = after(s, "store=")) || (value = after(s, "lazy="))) {
			f->path = copy_word(value);
			f->lazy = *s == 'l';
		} else
			parse_rule(f, s);
	}
}

static void forget(struct fault *f)
{
	if (f->fd >= 0)
		close(f->fd);
	if (f->lazy && f->data)
		munmap(f->data, f->size);
	else
		free(f->data);
	free(f->dirty);
	free(f->path);
	free(f->once);
}

/* A call of the handler: what its effects need to know. */
struct call {
	struct tcmu_device *dev;
	struct tcmur_cmd *cmd;
	enum op op;
	struct iovec *iov;
	size_t iov_cnt;
	size_t length;
	off_t offset;
};

static bool effect_is(const char *effect, const char *name)
{
	size_t n = strlen(name);

	return strncmp(effect, name, n) == 0 && (effect[n] == ',' || effect[n] == '\0');
}

static const char *effect_of(struct fault *f, const struct call *c)
{
	unsigned long call = __atomic_add_fetch(&f->calls[c->op], 1, __ATOMIC_RELAXED);

	for (int i = 0; i < f->nr_rules; i++) {
		const struct rule *r = &f->rules[i];
		bool here = !r->by_offset || (r->offset >= c->offset && r->offset - c->offset < (off_t)c->length);

		if (r->op != c->op || !here || (r->at && r->at != call))
			continue;
		if (f->once) {
			int fd = open(f->once, O_CREAT | O_EXCL | O_CLOEXEC, 0600);

			if (fd < 0)
				continue;
			close(fd);
		}
		return r->effect;
	}
	return NULL;
}

/* What is written outside of a buffer that handlers may only read ends the process instead. */
static void overrun(const struct call *c)
{
	const size_t n = 64 << 10;

	for (size_t i = 0; i < c->iov_cnt; i++) {
		char *p = c->iov[i].iov_base;

		memset(p - n, 0xa5, n);
		memset(p + c->iov[i].iov_len, 0xa5, n);
	}
}

struct completion {
	struct tcmu_device *dev;
	struct tcmur_cmd *cmd;
	useconds_t after;
};

static void *complete(void *arg)
{
	struct completion *c = arg;

	usleep(c->after);
	tcmur_cmd_complete(c->dev, c->cmd, TCMU_STS_OK);
	free(c);
	return NULL;
}

static void complete_in_thread(struct tcmu_device *dev, struct tcmur_cmd *cmd, useconds_t after)
{
	struct completion *c = malloc(sizeof(*c));

	if (c) {
		*c = (struct completion){ dev, cmd, after };
		run_in_thread(complete, c);
	}
}

/* What the call has to return; its other effects happen here. *ends: how often it is completed. */
static int have_effect(struct fault *f, const struct call *c, int *ends)
{
	const char *e = effect_of(f, c);

	if (!e)
		return 0;
	for (size_t i = 0; i < EFFECTS; i++) {
		if (effect_is(e, effects[i].name)) {
			effects[i].have(c->dev);
			return 0;
		}
	}
	if (effect_is(e, "garbage"))
		return GARBAGE;
	if (effect_is(e, "never") && !async)
		hang(c->dev);
	if (effect_is(e, "never"))
		*ends = 0;
	else if (effect_is(e, "twice"))
		*ends = 2;
	else if (effect_is(e, "late"))
		f->kept = c->cmd;
	else if (effect_is(e, "other"))
		complete_in_thread(c->dev, c->cmd, 0);
	else if (effect_is(e, "overrun"))
		overrun(c);
	else
		return atoi(e);
	return 0;
}

static bool fault_check_config(const char *cfgstring, char **reason)
{
	struct fault f = { .fd = -1 };
	int ends, ret;

	parse(&f, cfgstring);
	ret = have_effect(&f, &(struct call){ .op = OP_CHECK }, &ends);
	forget(&f);
	if (ret == 0)
		return true;
	*reason = strdup("told to refuse it");
	return false;
}

static int load_contents(struct fault *f, struct tcmu_device *dev, bool reopen)
{
	if (!f->path && reopen && !f->is_volatile) {
		tcmu_err(dev, "the contents were in the memory of a process that is no more\n");
		return -ESTALE;
	}
	if (f->path) {
		struct stat st;

		f->fd = open(f->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (f->fd < 0 || fstat(f->fd, &st) < 0 ||
		    (st.st_size < (off_t)f->size && ftruncate(f->fd, (off_t)f->size) < 0))
			return -errno;
		if (!f->lazy)
			return 0;
		f->dirty = calloc(1, f->size / BLOCK + 1);
		if (!f->dirty)
			return -ENOMEM;
		/* What is written here stays here. */
		f->data = mmap(NULL, f->size, PROT_READ | PROT_WRITE, MAP_PRIVATE, f->fd, 0);
		if (f->data == MAP_FAILED) {
			f->data = NULL;
			return -errno;
		}
		return 0;
	}
	f->data = calloc(1, f->grow > f->size ? f->grow : f->size);
	return f->data ? 0 : -ENOMEM;
}

static int fault_open(struct tcmu_device *dev, bool reopen)
{
	struct fault *f = calloc(1, sizeof(*f));
	struct call c = { .dev = dev, .op = reopen ? OP_REOPEN : OP_OPEN };
	int ends, ret;

	if (!f)
		return -ENOMEM;
	f->size = 1 << 20;
	f->fd = -1;
	pthread_mutex_init(&f->flushing, NULL);
	parse(f, tcmu_dev_get_cfgstring(dev));
	if (reopen && f->path && !f->lazy) { /* it may have been resized */
		uint64_t size = tcmu_cfgfs_dev_get_info_u64(dev, "Size", &ret);

		f->size = ret || !size ? f->size : size;
	}
	ret = have_effect(f, &c, &ends);
	if (ret)
		tcmu_err(dev, "told to fail open\n");
	else
		ret = load_contents(f, dev, reopen);
	if (ret) {
		forget(f);
		free(f);
		return ret;
	}
	tcmu_dev_set_num_lbas(dev, f->size / tcmu_dev_get_block_size(dev));
	tcmu_dev_set_opt_unmap_gran(dev, 8, false);
	if (tcmur_dev_set_unmap_zeroes)
		tcmur_dev_set_unmap_zeroes(dev, f->zeroes);
	tcmur_dev_set_private(dev, f);
	return 0;
}

static void fault_close(struct tcmu_device *dev)
{
	struct fault *f = tcmur_dev_get_private(dev);
	int ends;

	have_effect(f, &(struct call){ .dev = dev, .op = OP_CLOSE }, &ends);
	if (f->kept)
		complete_in_thread(dev, f->kept, 20000);
	forget(f);
	free(f);
}

static bool file_io(struct fault *f, const struct call *c)
{
	ssize_t n;

	if (c->op == OP_UNMAP || c->op == OP_WRITESAME)
		return fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, c->offset, (off_t)c->length) == 0;
	if (c->op == OP_READ)
		n = preadv(f->fd, c->iov, (int)c->iov_cnt, c->offset);
	else
		n = pwritev(f->fd, c->iov, (int)c->iov_cnt, c->offset);
	return n == (ssize_t)c->length;
}

static void memory_io(struct fault *f, const struct call *c)
{
	if (c->op == OP_READ) {
		tcmu_memcpy_into_iovec(c->iov, c->iov_cnt, f->data + c->offset, c->length);
		return;
	}
	if (c->op == OP_WRITE)
		tcmu_memcpy_from_iovec(f->data + c->offset, c->length, c->iov, c->iov_cnt);
	else
		memset(f->data + c->offset, 0, c->length);
	for (size_t b = (size_t)c->offset / BLOCK; f->dirty && b * BLOCK < (size_t)c->offset + c->length; b++)
		__atomic_store_n(&f->dirty[b], 1, __ATOMIC_RELEASE);
}

/* One at a time: a block that another flush is still writing is not yet in the file. */
static bool write_back(struct fault *f)
{
	bool good = true;

	pthread_mutex_lock(&f->flushing);
	for (size_t b = 0; good && b * BLOCK < f->size; b++) {
		size_t n = f->size - b * BLOCK < BLOCK ? f->size - b * BLOCK : BLOCK;

		if (__atomic_exchange_n(&f->dirty[b], 0, __ATOMIC_ACQUIRE))
			good = pwrite(f->fd, f->data + b * BLOCK, n, (off_t)(b * BLOCK)) == (ssize_t)n;
	}
	pthread_mutex_unlock(&f->flushing);
	return good;
}

static int carry_out(struct call *c, int *ends)
{
	struct fault *f = tcmur_dev_get_private(c->dev);
	int sts;

	if (f->delay)
		usleep(f->delay);
	sts = have_effect(f, c, ends);
	if (sts)
		return sts;
	if (c->op == OP_FLUSH) {
		sts = !f->lazy || write_back(f) ? TCMU_STS_OK : TCMU_STS_WR_ERR;
		if (f->grow)
			tcmu_dev_set_num_lbas(c->dev, f->grow / tcmu_dev_get_block_size(c->dev));
		usleep(f->linger);
		return sts;
	}
	if (c->op == OP_UNMAP && !f->zeroes)
		return TCMU_STS_OK; /* nobody may rely on it, so that nothing does just as well */
	if (f->data)
		memory_io(f, c);
	else if (!file_io(f, c))
		return c->op == OP_READ ? TCMU_STS_RD_ERR : TCMU_STS_WR_ERR;
	return TCMU_STS_OK;
}

static void *carry_out_and_complete(void *arg)
{
	struct call *c = arg;
	int ends = 1;
	int sts = carry_out(c, &ends);

	while (ends-- > 0)
		tcmur_cmd_complete(c->dev, c->cmd, sts);
	free(c);
	return NULL;
}

static int start(struct call c)
{
	struct call *copy;
	pthread_attr_t attr;
	pthread_t thread;
	int err;

	if (!async) {
		int ends = 1;
		int sts = carry_out(&c, &ends);

		if (ends > 1)
			tcmur_cmd_complete(c.dev, c.cmd, sts);
		return sts;
	}
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

static int fault_unmap(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length)
{
	return start((struct call){ dev, cmd, OP_UNMAP, NULL, 0, length, (off_t)offset });
}

static int fault_writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
			   struct iovec *iov, size_t iov_cnt)
{
	if (!tcmu_iovec_zeroed(iov, iov_cnt))
		return TCMU_STS_NOT_HANDLED;
	return start((struct call){ dev, cmd, OP_WRITESAME, iov, iov_cnt, length, (off_t)offset });
}

/* An effect comes when the file has its new size, and nobody has been told. */
static int fault_reconfig(struct tcmu_device *dev, struct tcmulib_cfg_info *cfg)
{
	struct fault *f = tcmur_dev_get_private(dev);
	int ends;

	if (cfg->type != TCMULIB_CFG_DEV_SIZE || !f->path || f->lazy)
		return -EOPNOTSUPP;
	if (ftruncate(f->fd, (off_t)cfg->dev_size))
		return -errno;
	f->size = cfg->dev_size;
	return have_effect(f, &(struct call){ .dev = dev, .op = OP_RECONFIG }, &ends);
}

struct tcmur_handler fault_handler = {
	.name = "Fault injection for tests",
	.subtype = FAULT_SUBTYPE,
	.cfg_desc = FAULT_SUBTYPE "/WORD,... : see plugin/testdata/fault.c",
	.check_config = fault_check_config,
	.reconfig = fault_reconfig,
	.open = fault_open,
	.close = fault_close,
	.nr_threads = 256,
	.read = fault_read,
	.write = fault_write,
	.flush = fault_flush,
	.unmap = fault_unmap,
	.writesame = fault_writesame,
};

int handler_init(void)
{
	const char *deadly = getenv("TCMUR_FAULT_INIT");

	if (deadly && access(deadly, F_OK) == 0)
		die_of_segv(NULL);
	async = FAULT_ASYNC;
	if (async)
		fault_handler.nr_threads = 0;
	return tcmur_register_handler(&fault_handler);
}
