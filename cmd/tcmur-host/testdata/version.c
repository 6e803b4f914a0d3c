/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler over plain memory, compiled against the struct of one version of tcmu-runner, for tests: 152 (1.5.0 to
 * 1.5.2), 153 or 154 (1.5.4 to 1.6.2), by -DVERSION=n. It logs the calls that a host makes, or must not make, only when
 * it reads the struct by that version. The name of the struct is that of the oldest: our header has the newest.
 */
#include <stdlib.h>
#include <string.h>

#include "tcmu-runner.h"

typedef int (*transfer_fn)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt,
			   size_t length, off_t offset);
typedef int (*pattern_fn)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
			  struct iovec *iov, size_t iov_cnt);

struct versioned_handler {
	const char *name;
	const char *subtype;
	const char *cfg_desc;
	void *opaque;
	bool (*check_config)(const char *cfgstring, char **reason);
	int (*reconfig)(struct tcmu_device *dev, void *cfg);
	int (*open)(struct tcmu_device *dev, bool reopen);
	void (*close)(struct tcmu_device *dev);
	int nr_threads;
	int (*handle_cmd)(struct tcmu_device *dev, struct tcmur_cmd *cmd);
	transfer_fn read;
	transfer_fn write;
	int (*flush)(struct tcmu_device *dev, struct tcmur_cmd *cmd);
	int (*unmap)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length);
#if VERSION >= 154
	pattern_fn writesame;
	pattern_fn caw;
#endif
#if VERSION >= 153
	int (*report_event)(struct tcmu_device *dev);
#endif
	int (*lock)(struct tcmu_device *dev, uint16_t tag);
	int (*unlock)(struct tcmu_device *dev);
	int (*get_lock_tag)(struct tcmu_device *dev, uint16_t *tag);
	int (*get_lock_state)(struct tcmu_device *dev);
	bool is_dbus_handler;
	bool (*update_logdir)(void);
#if VERSION >= 153
	int (*init)(void);
	void (*destroy)(void);
#endif
};

static char memory[1 << 20];

static int open_(struct tcmu_device *dev, bool reopen)
{
	(void)reopen;
	tcmu_info(dev, "opened\n");
	return 0;
}

static void close_(struct tcmu_device *dev)
{
	(void)dev;
}

static int read_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		 off_t offset)
{
	(void)dev;
	(void)cmd;
	tcmu_memcpy_into_iovec(iov, iov_cnt, memory + offset, length);
	return TCMU_STS_OK;
}

static int write_(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		  off_t offset)
{
	(void)dev;
	(void)cmd;
	tcmu_memcpy_from_iovec(memory + offset, length, iov, iov_cnt);
	return TCMU_STS_OK;
}

#if VERSION >= 154
static int writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
		     struct iovec *iov, size_t iov_cnt)
{
	(void)cmd;
	(void)iov;
	(void)iov_cnt;
	tcmu_info(dev, "writesame was called\n");
	memset(memory + offset, 0, length);
	return TCMU_STS_OK;
}
#endif

#if VERSION >= 153
static int init(void)
{
	tcmu_info(NULL, "init was called\n");
	return 0;
}
#endif

/* Stand where another version has a callback that hosts call. */
static int lock(struct tcmu_device *dev, uint16_t tag)
{
	(void)tag;
	tcmu_info(dev, "called by mistake: lock\n");
	return TCMU_STS_HW_ERR;
}

static bool update_logdir(void)
{
	tcmu_info(NULL, "called by mistake: update_logdir\n");
	return false;
}

struct versioned_handler handler = {
	.name = "handler of one version",
	.subtype = "version",
	.cfg_desc = "nothing",
	.open = open_,
	.close = close_,
	.nr_threads = 1,
	.read = read_,
	.write = write_,
#if VERSION >= 154
	.writesame = writesame,
#endif
#if VERSION >= 153
	.init = init,
#endif
	.lock = lock,
	.update_logdir = update_logdir,
};

int handler_init(void);
int handler_init(void)
{
	return tcmur_register_handler((struct tcmur_handler *)&handler);
}
