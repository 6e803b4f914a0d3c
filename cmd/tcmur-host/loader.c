/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bringing the handler's shared object in. What its struct tcmur_handler means is decided in Go (layout.go), which
 * looks at the struct through loader_peek(): a malformed one must give an error, not a fault.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "host.h"

struct handler host_handler;

static void *image; /* of dlopen; never closed: threads and exit handlers of the handler may outlive everything */

static uintptr_t registered[NATIVE_MAX_REGISTERED]; /* written by the control thread, inside handler_init */
static size_t registered_count;

struct open_job {
	const char *path;
	char *why;
	int error;
};

static void open_job(void *arg)
{
	struct open_job *j = arg;
	const char *text;

	/* Its constructors run here. RTLD_LOCAL: handlers have globals of the same names. */
	callout_begin("dlopen", NULL, 0, 0);
	image = dlopen(j->path, RTLD_NOW | RTLD_LOCAL);
	callout_end();
	if (image)
		return;
	text = dlerror();
	snprintf(j->why, NATIVE_WHY_SIZE, "%s", text ? text : "dlopen failed");
	j->error = ENOENT;
}

int loader_open(const char *path, char *why)
{
	struct open_job j = { .path = path, .why = why };

	control_run(open_job, &j);
	return j.error;
}

static void preload_job(void *arg)
{
	callout_begin("dlopen", NULL, 0, 0);
	dlopen(arg, RTLD_NOW | RTLD_LOCAL);
	callout_end();
}

void loader_preload(const char *path)
{
	control_run(preload_job, (void *)path);
}

struct init_job {
	int (*handler_init)(void);
	int result;
	char *why;
};

static void init_job(void *arg)
{
	struct init_job *j = arg;

	log_collect(NULL, false);
	callout_begin("handler_init", NULL, 0, 0);
	j->result = j->handler_init();
	callout_end();
	log_collected(j->why, NATIVE_WHY_SIZE);
}

int loader_init(int *result, char *why)
{
	struct init_job j = { .why = why };
	void *symbol = dlsym(image, "handler_init");

	if (!symbol) {
		const char *text = dlerror();

		snprintf(why, NATIVE_WHY_SIZE, "%s", text ? text : "no handler_init");
		return EBADF;
	}
	memcpy(&j.handler_init, &symbol, sizeof(symbol));
	control_run(init_job, &j);
	*result = j.result;
	return 0;
}

int tcmur_register_handler(struct tcmur_handler *handler)
{
	char subtype[2][NATIVE_SUBTYPE_MAX];
	uintptr_t text;

	/* Whatever else is wrong with it is found, and explained, when handler_init has returned. */
	for (size_t i = 0; i < registered_count; i++) {
		uintptr_t both[2] = { registered[i], (uintptr_t)handler };
		bool readable = true;

		if (both[0] == both[1])
			return -1;
		for (int k = 0; k < 2; k++) {
			memset(subtype[k], 0, sizeof(subtype[k]));
			/* The subtype is the second word in every layout. */
			readable &= loader_peek(both[k] + sizeof(char *), &text, sizeof(text));
			for (size_t n = 0; readable && n < sizeof(subtype[k]) - 1; n++) {
				readable &= loader_peek(text + n, &subtype[k][n], 1);
				if (!subtype[k][n])
					break;
			}
		}
		if (readable && !strcmp(subtype[0], subtype[1]))
			return -1;
	}
	if (registered_count == NATIVE_MAX_REGISTERED)
		return -1;
	registered[registered_count++] = (uintptr_t)handler;
	return 0;
}

size_t loader_registered(uintptr_t *handlers, size_t max)
{
	size_t n = registered_count < max ? registered_count : max;

	memcpy(handlers, registered, n * sizeof(*handlers));
	return n;
}

bool loader_peek(uintptr_t address, void *to, size_t size)
{
	struct iovec local = { .iov_base = to, .iov_len = size };
	struct iovec remote = { .iov_base = (void *)address, .iov_len = size };

	/* The kernel does the reading, and says EFAULT where a load of ours would be the end. */
	return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)size;
}

bool loader_image(uintptr_t address, uintptr_t *base)
{
	Dl_info info;

	if (!dladdr((void *)address, &info))
		return false;
	*base = (uintptr_t)info.dli_fbase;
	return true;
}

uint64_t loader_symbol_size(uintptr_t address)
{
	const ElfW(Sym) *symbol = NULL;
	Dl_info info;

	if (!dladdr1((void *)address, &info, (void **)&symbol, RTLD_DL_SYMENT))
		return 0;
	/* The nearest symbol below the address is what dladdr1 finds: it may be another one. */
	if (!symbol || (uintptr_t)info.dli_saddr != address)
		return 0;
	return symbol->st_size;
}

static void init_adopted(void *arg)
{
	int *result = arg;

	log_collect(NULL, false);
	callout_begin("init", NULL, 0, 0);
	*result = host_handler.init();
	callout_end();
}

int loader_adopt(const struct native_handler *h)
{
	int result = 0;

/* Function pointers travel through Go as numbers. */
#define TAKE(member) memcpy(&host_handler.member, &h->member, sizeof(h->member))
	TAKE(check_config);
	TAKE(reconfig);
	TAKE(open);
	TAKE(close);
	TAKE(handle_cmd);
	TAKE(read);
	TAKE(write);
	TAKE(flush);
	TAKE(unmap);
	TAKE(writesame);
	TAKE(init);
	TAKE(destroy);
#undef TAKE
	memcpy(host_handler.subtype, h->subtype, sizeof(host_handler.subtype) - 1);
	host_handler.by_cdb = !(host_handler.read && host_handler.write);
	/* 0 threads: the handler queues commands, and is fed by one thread. With handle_cmd alone, it just is serial. */
	host_handler.async = h->nr_threads == 0 && (h->read || h->write || h->flush);
	host_handler.concurrency = h->nr_threads > 0 && !h->serial ? (unsigned int)h->nr_threads : 1;
	if (host_handler.init)
		control_run(init_adopted, &result);
	return result;
}

void loader_threading(struct native_threading *out)
{
	out->concurrency = host_handler.concurrency;
	out->async = host_handler.async;
	out->by_cdb = host_handler.by_cdb;
}

static void destroy_job(void *arg)
{
	(void)arg;
	callout_begin("destroy", NULL, 0, 0);
	host_handler.destroy();
	callout_end();
}

void loader_destroy(void)
{
	if (host_handler.destroy)
		control_run(destroy_job, NULL);
}

struct check_job {
	const char *config;
	char *why;
	bool ok;
};

static void check_job(void *arg)
{
	struct check_job *j = arg;
	char *reason = NULL;

	callout_begin("check_config", NULL, 0, 0);
	j->ok = host_handler.check_config(j->config, &reason);
	callout_end();
	if (!j->ok && reason)
		snprintf(j->why, NATIVE_WHY_SIZE, "%s", reason);
	free(reason);
}

bool loader_check_config(const char *config, char *why)
{
	struct check_job j = { .config = config, .why = why, .ok = true };

	why[0] = 0;
	if (host_handler.check_config)
		control_run(check_job, &j);
	return j.ok;
}
