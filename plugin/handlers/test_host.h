/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host that the handlers' tests run in: one process with what a handler imports, and short names for its callouts.
 * A check that fails ends the process.
 */
#ifndef TEST_HOST_H
#define TEST_HOST_H

#include <errno.h>
#include <limits.h>
#include <string.h>

#include "tcmu-runner.h"

/* Set by the tests: the name of the one that runs, for reports, and what to do before the process ends on a failure. */
extern const char *running;
extern void (*before_failing)(void);

/* What a handler logged last, errors and warnings only. */
extern char last_log[512];

__attribute__((noreturn, format(printf, 3, 4))) void fail(const char *file, int line, const char *fmt, ...);

#define FAIL(...) fail(__FILE__, __LINE__, __VA_ARGS__)

#define CHECK(cond)                                                                  \
	do {                                                                         \
		if (!(cond))                                                         \
			FAIL("%s (errno %d, last log: %s)", #cond, errno, last_log); \
	} while (0)

#define CHECK_EQ(got, want)                                                                       \
	do {                                                                                      \
		long long got_ = (long long)(got), want_ = (long long)(want);                     \
		if (got_ != want_)                                                                \
			FAIL("%s is %lld, not %lld (last log: %s)", #got, got_, want_, last_log); \
	} while (0)

/* The last error or warning said so. */
#define CHECK_SAID(text) CHECK(strstr(last_log, text))

struct tcmu_device {
	const struct tcmur_handler *handler;
	char cfgstring[PATH_MAX];
	void *private_data;
	uint64_t configured; /* bytes; 0: none */
	uint64_t num_lbas;
	uint32_t block_size;
	uint32_t unmap_gran, unmap_align;
	bool write_cache, solid_state;
};

/* Loads DIR/handler_SUBTYPE.so, which has to register a handler. */
void load_handler(const char *dir, const char *subtype);
struct tcmur_handler *handler_of(const char *subtype);

/* Sets a device up as new: block size 512, this size (0: none) and configuration string. Clears last_log. */
__attribute__((format(printf, 3, 4))) void configure(struct tcmu_device *dev, uint64_t size, const char *fmt, ...);

/* The callouts, and what they return; that they leave the buffer array alone is checked. */
int try_open(struct tcmu_device *dev);
void close_device(struct tcmu_device *dev);
int dev_read(struct tcmu_device *dev, void *buf, size_t len, uint64_t offset);
int dev_write(struct tcmu_device *dev, const void *buf, size_t len, uint64_t offset);
int dev_readv(struct tcmu_device *dev, struct iovec *iov, size_t cnt, size_t len, uint64_t offset);
int dev_writev(struct tcmu_device *dev, struct iovec *iov, size_t cnt, size_t len, uint64_t offset);
int dev_flush(struct tcmu_device *dev);
int dev_unmap(struct tcmu_device *dev, uint64_t offset, uint64_t len);
int dev_writesame(struct tcmu_device *dev, const void *pattern, size_t size, uint64_t offset, uint64_t len);

/* The same, checked. */
void must_open(struct tcmu_device *dev);
void reconfigure_size(struct tcmu_device *dev, uint64_t size, int want);
void check_bytes(struct tcmu_device *dev, uint64_t offset, size_t len, int byte);
void write_bytes(struct tcmu_device *dev, uint64_t offset, size_t len, int byte);

uint64_t device_size(const struct tcmu_device *dev); /* bytes, as the handler told it */
void *allocated(size_t size);                        /* malloc(), checked */

#endif
