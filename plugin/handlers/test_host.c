/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "test_host.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

char last_log[512];
const char *running = "starting";
void (*before_failing)(void);

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

void fail(const char *file, int line, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "FAIL %s: %s:%d: ", running, file, line);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\n");
	if (before_failing)
		before_failing();
	_exit(1);
}

void *allocated(size_t size)
{
	void *p = malloc(size);

	CHECK(p);
	return p;
}

/*
 * What the handlers import
 */

static struct tcmur_handler *registered[8];
static int num_registered;

int tcmur_register_handler(struct tcmur_handler *handler)
{
	int i;

	for (i = 0; i < num_registered; i++)
		if (!strcmp(registered[i]->subtype, handler->subtype))
			return -1;
	registered[num_registered++] = handler;
	return 0;
}

void *tcmur_dev_get_private(struct tcmu_device *dev)
{
	return dev->private_data;
}

void tcmur_dev_set_private(struct tcmu_device *dev, void *private_data)
{
	dev->private_data = private_data;
}

char *tcmu_dev_get_cfgstring(struct tcmu_device *dev)
{
	return dev->cfgstring;
}

uint64_t tcmu_cfgfs_dev_get_info_u64(struct tcmu_device *dev, const char *name, int *ret)
{
	*ret = !strcmp(name, "Size") && dev->configured ? 0 : -EINVAL;
	return *ret ? 0 : dev->configured;
}

void tcmu_dev_set_num_lbas(struct tcmu_device *dev, uint64_t num_lbas)
{
	dev->num_lbas = num_lbas;
}

void tcmu_dev_set_block_size(struct tcmu_device *dev, uint32_t block_size)
{
	dev->block_size = block_size;
}

uint32_t tcmu_dev_get_block_size(struct tcmu_device *dev)
{
	return dev->block_size;
}

void tcmu_dev_set_opt_unmap_gran(struct tcmu_device *dev, uint32_t len, bool split)
{
	CHECK(!split);
	dev->unmap_gran = len;
}

void tcmu_dev_set_unmap_gran_align(struct tcmu_device *dev, uint32_t len)
{
	dev->unmap_align = len;
}

void tcmu_dev_set_write_cache_enabled(struct tcmu_device *dev, bool enabled)
{
	dev->write_cache = enabled;
}

void tcmu_dev_set_solid_state_media(struct tcmu_device *dev, bool solid_state)
{
	dev->solid_state = solid_state;
}

static void log_message(const char *fmt, va_list ap)
{
	int err = errno;

	pthread_mutex_lock(&log_lock);
	errno = err;
	vsnprintf(last_log, sizeof(last_log), fmt, ap);
	pthread_mutex_unlock(&log_lock);
}

void tcmu_err_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...)
{
	va_list ap;

	(void)dev;
	CHECK(func && line > 0);
	va_start(ap, fmt);
	log_message(fmt, ap);
	va_end(ap);
}

void tcmu_warn_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...)
{
	va_list ap;

	(void)dev;
	CHECK(func && line > 0);
	va_start(ap, fmt);
	log_message(fmt, ap);
	va_end(ap);
}

/*
 * What tests use
 */

void load_handler(const char *dir, const char *subtype)
{
	char path[PATH_MAX];
	int (*init)(void);
	void *so;

	snprintf(path, sizeof(path), "%s/handler_%s.so", dir, subtype);
	so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!so)
		FAIL("%s", dlerror());
	*(void **)&init = dlsym(so, "handler_init");
	CHECK(init);
	CHECK_EQ(init(), 0);
}

struct tcmur_handler *handler_of(const char *subtype)
{
	int i;

	for (i = 0; i < num_registered; i++)
		if (!strcmp(registered[i]->subtype, subtype))
			return registered[i];
	FAIL("no handler for %s", subtype);
}

void configure(struct tcmu_device *dev, uint64_t size, const char *fmt, ...)
{
	char *slash;
	va_list ap;

	*dev = (struct tcmu_device){ .configured = size, .block_size = 512 };
	va_start(ap, fmt);
	vsnprintf(dev->cfgstring, sizeof(dev->cfgstring), fmt, ap);
	va_end(ap);
	slash = strchr(dev->cfgstring, '/');
	*slash = '\0';
	dev->handler = handler_of(dev->cfgstring);
	*slash = '/';
	last_log[0] = '\0';
}

int try_open(struct tcmu_device *dev)
{
	return dev->handler->open(dev, false);
}

void must_open(struct tcmu_device *dev)
{
	CHECK_EQ(try_open(dev), 0);
}

void close_device(struct tcmu_device *dev)
{
	dev->handler->close(dev);
}

uint64_t device_size(const struct tcmu_device *dev)
{
	return dev->num_lbas * dev->block_size;
}

void reconfigure_size(struct tcmu_device *dev, uint64_t size, int want)
{
	struct tcmulib_cfg_info cfg = { .type = TCMULIB_CFG_DEV_SIZE, .dev_size = size };

	CHECK_EQ(dev->handler->reconfig(dev, &cfg), want);
}

/* A command as callouts want one around their buffers. */
struct request {
	struct tcmulib_cmd lib;
	struct tcmur_cmd cmd;
	uint8_t cdb[16];
};

static struct tcmur_cmd *request(struct request *r, struct iovec *iov, size_t cnt)
{
	memset(r, 0, sizeof(*r));
	r->lib.cdb = r->cdb;
	r->lib.iovec = iov;
	r->lib.iov_cnt = cnt;
	r->lib.hm_private = &r->cmd;
	r->cmd.lib_cmd = &r->lib;
	return &r->cmd;
}

typedef int (*transfer_fn)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len,
			   off_t offset);

static int transfer(transfer_fn fn, struct tcmu_device *dev, struct iovec *iov, size_t cnt, size_t len, uint64_t offset)
{
	struct iovec *before = allocated(cnt * sizeof(*iov));
	struct request r;
	int sts;

	memcpy(before, iov, cnt * sizeof(*iov));
	sts = fn(dev, request(&r, iov, cnt), iov, cnt, len, (off_t)offset);
	CHECK(!memcmp(before, iov, cnt * sizeof(*iov)));
	free(before);
	return sts;
}

int dev_readv(struct tcmu_device *dev, struct iovec *iov, size_t cnt, size_t len, uint64_t offset)
{
	return transfer(dev->handler->read, dev, iov, cnt, len, offset);
}

int dev_writev(struct tcmu_device *dev, struct iovec *iov, size_t cnt, size_t len, uint64_t offset)
{
	return transfer(dev->handler->write, dev, iov, cnt, len, offset);
}

int dev_read(struct tcmu_device *dev, void *buf, size_t len, uint64_t offset)
{
	struct iovec iov = { .iov_base = buf, .iov_len = len };

	return dev_readv(dev, &iov, 1, len, offset);
}

int dev_write(struct tcmu_device *dev, const void *buf, size_t len, uint64_t offset)
{
	struct iovec iov = { .iov_base = (void *)(uintptr_t)buf, .iov_len = len };

	return dev_writev(dev, &iov, 1, len, offset);
}

int dev_flush(struct tcmu_device *dev)
{
	struct request r;

	return dev->handler->flush(dev, request(&r, NULL, 0));
}

int dev_unmap(struct tcmu_device *dev, uint64_t offset, uint64_t len)
{
	struct request r;

	return dev->handler->unmap(dev, request(&r, NULL, 0), offset, len);
}

int dev_writesame(struct tcmu_device *dev, const void *pattern, size_t size, uint64_t offset, uint64_t len)
{
	struct iovec iov = { .iov_base = (void *)(uintptr_t)pattern, .iov_len = size }, before = iov;
	struct request r;
	int sts;

	sts = dev->handler->writesame(dev, request(&r, &iov, 1), offset, len, &iov, 1);
	CHECK(iov.iov_base == before.iov_base && iov.iov_len == before.iov_len);
	return sts;
}

void check_bytes(struct tcmu_device *dev, uint64_t offset, size_t len, int byte)
{
	unsigned char *buf = allocated(len);
	size_t i;

	memset(buf, byte ^ 0xff, len);
	CHECK_EQ(dev_read(dev, buf, len, offset), TCMU_STS_OK);
	for (i = 0; i < len; i++)
		if (buf[i] != byte)
			FAIL("%s: byte %" PRIu64 " is %02x, not %02x", dev->cfgstring, offset + i, buf[i], byte);
	free(buf);
}

void write_bytes(struct tcmu_device *dev, uint64_t offset, size_t len, int byte)
{
	void *buf = allocated(len);

	memset(buf, byte, len);
	CHECK_EQ(dev_write(dev, buf, len, offset), TCMU_STS_OK);
	free(buf);
}
