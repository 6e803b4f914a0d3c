/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The binary interface between a tcmu-runner storage handler (handler_*.so) and the program that loads it: tcmur-host
 * here, tcmu-runner 1.5.4 and later elsewhere. A handler compiled with this header loads in both.
 *
 * What tcmur-host offers beyond tcmu-runner is declared weak, at the end of this file: such a function's address is
 * NULL where it is missing.
 *
 * A handler is a shared object without any library to link against. It exports handler_init(), which passes a struct
 * tcmur_handler to tcmur_register_handler(). The program that loads it provides every function declared below.
 *
 * Let the struct tcmur_handler be a global, non-static variable: its size in the symbol table is what tells a host
 * which layout it has. Layouts of 1.5.3 and earlier differ after the unmap member; this is that of 1.5.4 to 1.6.2.
 */
#ifndef TCMU_RUNNER_H
#define TCMU_RUNNER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#if !defined(__LP64__) || !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "these layouts are established for 64-bit little-endian Linux (x86-64, aarch64) only"
#endif

/*
 * What a callout returns, and what tcmur_cmd_complete() is given.
 */
enum tcmu_sts {
	TCMU_STS_ASYNC_HANDLED = -2,  /* handle_cmd only: no status yet, tcmur_cmd_complete() will follow */
	TCMU_STS_NOT_HANDLED = -1,    /* the handler does not do this: the caller may emulate it */
	TCMU_STS_OK = 0,              /* with nr_threads 0: queued, tcmur_cmd_complete() will follow */
	TCMU_STS_NO_RESOURCE = 1,     /* out of memory or the like: try later */
	TCMU_STS_PASSTHROUGH_ERR = 2, /* the handler has filled sense_buf itself */
	TCMU_STS_BUSY = 3,            /* try later */
	TCMU_STS_WR_ERR = 4,          /* medium: write or flush failed */
	TCMU_STS_RD_ERR = 5,          /* medium: read failed */
	TCMU_STS_MISCOMPARE = 6,      /* compare-and-write found other data */
	TCMU_STS_INVALID_CMD = 7,     /* operation code */
	TCMU_STS_INVALID_CDB = 8,     /* field of the command block */
	TCMU_STS_INVALID_PARAM_LIST = 9,
	TCMU_STS_INVALID_PARAM_LIST_LEN = 10,
	TCMU_STS_TIMEOUT = 11, /* the storage behind the handler did not answer in time */
	TCMU_STS_FENCED = 12,
	TCMU_STS_HW_ERR = 13,
	TCMU_STS_RANGE = 14, /* outside the device */
	TCMU_STS_FRMT_IN_PROGRESS = 15,
	TCMU_STS_CAPACITY_CHANGED = 16,
	TCMU_STS_NOTSUPP_SAVE_PARAMS = 17,
	TCMU_STS_WR_ERR_INCOMPAT_FRMT = 18, /* write to a read-only medium */
	TCMU_STS_TRANSITION = 19,
	TCMU_STS_IMPL_TRANSITION_ERR = 20,
	TCMU_STS_EXPL_TRANSITION_ERR = 21,
	TCMU_STS_NO_LOCK_HOLDERS = 22,
	TCMU_STS_NOTSUPP_SEG_DESC_TYPE = 23,
	TCMU_STS_NOTSUPP_TGT_DESC_TYPE = 24,
	TCMU_STS_CP_TGT_DEV_NOTCONN = 25,
	TCMU_STS_INVALID_CP_TGT_DEV_TYPE = 26,
	TCMU_STS_TOO_MANY_SEG_DESC = 27,
	TCMU_STS_TOO_MANY_TGT_DESC = 28,
};

/* Lock states as get_lock_state() returns them since 1.5.3. */
enum tcmur_dev_lock_state {
	TCMUR_DEV_LOCK_UNKNOWN = 0,
	TCMUR_DEV_LOCK_UNLOCKED = 1,
	TCMUR_DEV_LOCK_READ_LOCKING = 2,
	TCMUR_DEV_LOCK_READ_LOCKED = 3,
	TCMUR_DEV_LOCK_WRITE_LOCKING = 4,
	TCMUR_DEV_LOCK_WRITE_LOCKED = 5,
};

#define TCMU_INVALID_LOCK_TAG 65535 /* lock(), get_lock_tag(): no tag */

#define TCMU_SENSE_BUFFERSIZE 96

/* One device. Opaque: belongs to the program that loaded the handler. */
struct tcmu_device;

/* A command as the initiator sent it. */
struct tcmulib_cmd {
	uint16_t cmd_id;
	uint8_t *cdb;        /* whole command block, at least 16 readable bytes */
	struct iovec *iovec; /* data buffer; may be consumed, see tcmu_iovec_seek() */
	size_t iov_cnt;
	uint8_t sense_buf[TCMU_SENSE_BUFFERSIZE]; /* zero when the handler gets it */
	void *hm_private;                         /* the struct tcmur_cmd around it */
};

/*
 * A command as callouts get it. Handlers use lib_cmd; everything else belongs to the caller. Lives until the callout
 * returns or, where it is asynchronous, until tcmur_cmd_complete().
 */
struct tcmur_cmd {
	struct tcmulib_cmd *lib_cmd;
	struct iovec *iovec;
	size_t iov_cnt;
	void *iov_base_copy;
	void *cmd_state;
	size_t requested;
	struct {
		void *next;
		void *prev;
	} cmds_list_entry;
	struct timespec start_time;
	bool timed_out;
	void (*done)(struct tcmu_device *dev, struct tcmur_cmd *cmd, int sts);
};

/* What reconfig() is asked to change; names the member of the union that is valid. */
enum tcmulib_cfg_type {
	TCMULIB_CFG_DEV_CFGSTR = 0,  /* dev_cfgstring */
	TCMULIB_CFG_DEV_SIZE = 1,    /* dev_size, bytes */
	TCMULIB_CFG_WRITE_CACHE = 2, /* write_cache */
};

struct tcmulib_cfg_info {
	uint32_t type;
	union {
		uint64_t dev_size;
		char *dev_cfgstring;
		bool write_cache;
	};
};

/*
 * fn of writesame: fill length bytes at offset with the one block of pattern in iov.
 * fn of caw: iov holds length bytes to compare with, followed by length bytes to write.
 */
typedef int (*tcmur_writesame_fn_t)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
				    struct iovec *iov, size_t iov_cnt);
typedef int (*tcmur_caw_fn_t)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length,
			      struct iovec *iov, size_t iov_cnt);

/*
 * A handler. Never copied: it must stay where it is for the life of the process.
 *
 * Offsets and lengths are bytes. Callouts return enum tcmu_sts; reconfig, open and init 0 or a negative errno.
 * At most nr_threads callouts run at once for one device; 0 stands for an asynchronous handler, whose read, write,
 * flush, unmap, writesame and caw return TCMU_STS_OK for "queued" and end in tcmur_cmd_complete(), from any thread,
 * possibly before they have returned. Any other value they return is final.
 *
 * Optional members are NULL; a handler has read and write, or handle_cmd.
 */
struct tcmur_handler {
	const char *name;     /* for people */
	const char *subtype;  /* first component of the configuration string; no '/' in it */
	const char *cfg_desc; /* how the rest of the configuration string is written */
	void *opaque;         /* the handler's own */

	/* false: refused; *reason may then be set to a malloc'ed string, which the caller frees. */
	bool (*check_config)(const char *cfgstring, char **reason);
	int (*reconfig)(struct tcmu_device *dev, struct tcmulib_cfg_info *cfg);

	/* close() is called only after an open() that returned 0; it does not imply a flush. */
	int (*open)(struct tcmu_device *dev, bool reopen);
	void (*close)(struct tcmu_device *dev);

	int nr_threads;

	/* A whole SCSI command; TCMU_STS_NOT_HANDLED for one it leaves to the callouts below. */
	int (*handle_cmd)(struct tcmu_device *dev, struct tcmur_cmd *cmd);

	/* length is the sum of the iov_cnt entries of iov, which the handler may consume. */
	int (*read)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		    off_t offset);
	int (*write)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		     off_t offset);
	int (*flush)(struct tcmu_device *dev, struct tcmur_cmd *cmd);
	int (*unmap)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length);

	/* From here on earlier versions differ. */
	tcmur_writesame_fn_t writesame;
	tcmur_caw_fn_t caw;
	int (*report_event)(struct tcmu_device *dev);
	int (*lock)(struct tcmu_device *dev, uint16_t tag);
	int (*unlock)(struct tcmu_device *dev);
	int (*get_lock_tag)(struct tcmu_device *dev, uint16_t *tag);
	int (*get_lock_state)(struct tcmu_device *dev);
	bool _is_dbus_handler; /* false */
	bool (*update_logdir)(void);
	int (*init)(void); /* called by tcmur_register_handler() */
	void (*destroy)(void);
};

#ifndef __cplusplus
#define TCMUR_AT(type, member, off) \
	_Static_assert(offsetof(type, member) == (off), #type "." #member " is not where handlers expect it")

TCMUR_AT(struct tcmur_handler, name, 0);
TCMUR_AT(struct tcmur_handler, subtype, 8);
TCMUR_AT(struct tcmur_handler, cfg_desc, 16);
TCMUR_AT(struct tcmur_handler, opaque, 24);
TCMUR_AT(struct tcmur_handler, check_config, 32);
TCMUR_AT(struct tcmur_handler, reconfig, 40);
TCMUR_AT(struct tcmur_handler, open, 48);
TCMUR_AT(struct tcmur_handler, close, 56);
TCMUR_AT(struct tcmur_handler, nr_threads, 64);
TCMUR_AT(struct tcmur_handler, handle_cmd, 72);
TCMUR_AT(struct tcmur_handler, read, 80);
TCMUR_AT(struct tcmur_handler, write, 88);
TCMUR_AT(struct tcmur_handler, flush, 96);
TCMUR_AT(struct tcmur_handler, unmap, 104);
TCMUR_AT(struct tcmur_handler, writesame, 112);
TCMUR_AT(struct tcmur_handler, caw, 120);
TCMUR_AT(struct tcmur_handler, report_event, 128);
TCMUR_AT(struct tcmur_handler, lock, 136);
TCMUR_AT(struct tcmur_handler, unlock, 144);
TCMUR_AT(struct tcmur_handler, get_lock_tag, 152);
TCMUR_AT(struct tcmur_handler, get_lock_state, 160);
TCMUR_AT(struct tcmur_handler, _is_dbus_handler, 168);
TCMUR_AT(struct tcmur_handler, update_logdir, 176);
TCMUR_AT(struct tcmur_handler, init, 184);
TCMUR_AT(struct tcmur_handler, destroy, 192);
_Static_assert(sizeof(struct tcmur_handler) == 200, "struct tcmur_handler of 1.5.4 has 200 bytes");

TCMUR_AT(struct tcmulib_cmd, cmd_id, 0);
TCMUR_AT(struct tcmulib_cmd, cdb, 8);
TCMUR_AT(struct tcmulib_cmd, iovec, 16);
TCMUR_AT(struct tcmulib_cmd, iov_cnt, 24);
TCMUR_AT(struct tcmulib_cmd, sense_buf, 32);
TCMUR_AT(struct tcmulib_cmd, hm_private, 128);
_Static_assert(sizeof(struct tcmulib_cmd) == 136, "struct tcmulib_cmd of 1.5 has 136 bytes");

TCMUR_AT(struct tcmur_cmd, lib_cmd, 0);
TCMUR_AT(struct tcmur_cmd, iovec, 8);
TCMUR_AT(struct tcmur_cmd, iov_cnt, 16);
TCMUR_AT(struct tcmur_cmd, iov_base_copy, 24);
TCMUR_AT(struct tcmur_cmd, cmd_state, 32);
TCMUR_AT(struct tcmur_cmd, requested, 40);
TCMUR_AT(struct tcmur_cmd, cmds_list_entry, 48);
TCMUR_AT(struct tcmur_cmd, start_time, 64);
TCMUR_AT(struct tcmur_cmd, timed_out, 80);
TCMUR_AT(struct tcmur_cmd, done, 88);
_Static_assert(sizeof(struct tcmur_cmd) == 96, "struct tcmur_cmd of 1.5 has 96 bytes");

TCMUR_AT(struct tcmulib_cfg_info, type, 0);
TCMUR_AT(struct tcmulib_cfg_info, dev_size, 8);
TCMUR_AT(struct tcmulib_cfg_info, dev_cfgstring, 8);
TCMUR_AT(struct tcmulib_cfg_info, write_cache, 8);
_Static_assert(sizeof(struct tcmulib_cfg_info) == 16, "struct tcmulib_cfg_info has 16 bytes");

#undef TCMUR_AT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The handler's entry point: registers its handlers. 0, or what tcmur_register_handler() returned. */
__attribute__((visibility("default"))) int handler_init(void);

/*
 * Registration, private pointers, configuration
 */

/* 0, or -1: that subtype is already there. Calls handler->init. */
int tcmur_register_handler(struct tcmur_handler *handler);

/* The handler's pointer for the device; set in open(), cheap enough for each request. */
void *tcmur_dev_get_private(struct tcmu_device *dev);
void tcmur_dev_set_private(struct tcmu_device *dev, void *private_data);

/* The loading program's own structure. Not the handler's pointer; never NULL. */
void *tcmu_dev_get_private(struct tcmu_device *dev);

/* "subtype/rest", at most 4095 bytes; stays until close() has returned. */
char *tcmu_dev_get_cfgstring(struct tcmu_device *dev);

/* name "Size": the configured size in bytes, *ret = 0. Otherwise 0 and *ret = a negative errno. */
uint64_t tcmu_cfgfs_dev_get_info_u64(struct tcmu_device *dev, const char *name, int *ret);

/* names "hw_block_size", "hw_max_sectors"; otherwise a negative errno. */
int tcmu_cfgfs_dev_get_attr_int(struct tcmu_device *dev, const char *name);

/* Unit serial number, malloc'ed for the caller, or NULL. */
char *tcmu_cfgfs_dev_get_wwn(struct tcmu_device *dev);

/* Tells a new device size in bytes: 0, or -EINVAL for size 0. */
int tcmur_dev_update_size(struct tcmu_device *dev, uint64_t new_size);

/* Puts "<log directory>/<filename>" into path, which has PATH_MAX bytes: 0, or -EINVAL without such a directory. */
int tcmu_make_absolute_logfile(char *path, const char *filename);

/*
 * Device attributes; lengths are in blocks. All have a value before open(), which may set others.
 */
void tcmu_dev_set_num_lbas(struct tcmu_device *dev, uint64_t num_lbas);
uint64_t tcmu_dev_get_num_lbas(struct tcmu_device *dev);
void tcmu_dev_set_block_size(struct tcmu_device *dev, uint32_t block_size); /* bytes, a power of two */
uint32_t tcmu_dev_get_block_size(struct tcmu_device *dev);
uint32_t tcmu_dev_get_max_xfer_len(struct tcmu_device *dev);
void tcmu_dev_set_opt_xcopy_rw_len(struct tcmu_device *dev, uint32_t len);
void tcmu_dev_set_max_unmap_len(struct tcmu_device *dev, uint32_t len);
uint32_t tcmu_dev_get_max_unmap_len(struct tcmu_device *dev);
void tcmu_dev_set_opt_unmap_gran(struct tcmu_device *dev, uint32_t len, bool split);
uint32_t tcmu_dev_get_opt_unmap_gran(struct tcmu_device *dev);
void tcmu_dev_set_unmap_gran_align(struct tcmu_device *dev, uint32_t len);
uint32_t tcmu_dev_get_unmap_gran_align(struct tcmu_device *dev); /* 0 unless set */
void tcmu_dev_set_write_cache_enabled(struct tcmu_device *dev, bool enabled);
bool tcmu_dev_get_write_cache_enabled(struct tcmu_device *dev);
void tcmu_dev_set_solid_state_media(struct tcmu_device *dev, bool solid_state);
bool tcmu_dev_get_solid_state_media(struct tcmu_device *dev);
bool tcmu_dev_get_unmap_enabled(struct tcmu_device *dev);
bool tcmu_dev_get_write_protect_enabled(struct tcmu_device *dev); /* tcmu-runner: since 1.6.0 */

/*
 * Completion and events; from any thread
 */

/* cmd is the struct tcmur_cmd of an asynchronous callout. Once each; nothing of cmd may be touched afterwards. */
void tcmur_cmd_complete(struct tcmu_device *dev, void *cmd, int sts);

/* The storage behind the handler is gone: the device is closed and opened again once its requests have ended. */
void tcmu_notify_conn_lost(struct tcmu_device *dev);
void tcmu_notify_lock_lost(struct tcmu_device *dev);
void tcmu_notify_cmd_timed_out(struct tcmu_device *dev);

/* For handle_cmd of handlers made for tcmu-runner 1.5.3 and earlier; newer ones have the two callouts instead. */
int tcmur_handle_writesame(struct tcmu_device *dev, struct tcmur_cmd *cmd, tcmur_writesame_fn_t fn);
int tcmur_handle_caw(struct tcmu_device *dev, struct tcmur_cmd *cmd, tcmur_caw_fn_t fn);

/*
 * Log; dev may be NULL. Use the macros. %m works.
 */
#define TCMUR_LOG_FORMAT __attribute__((format(printf, 4, 5)))
void tcmu_crit_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) TCMUR_LOG_FORMAT;
void tcmu_err_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) TCMUR_LOG_FORMAT;
void tcmu_warn_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) TCMUR_LOG_FORMAT;
void tcmu_info_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) TCMUR_LOG_FORMAT;
void tcmu_dbg_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) TCMUR_LOG_FORMAT;
#undef TCMUR_LOG_FORMAT

#define tcmu_crit(dev, ...) tcmu_crit_message(dev, __func__, __LINE__, __VA_ARGS__)
#define tcmu_err(dev, ...) tcmu_err_message(dev, __func__, __LINE__, __VA_ARGS__)
#define tcmu_warn(dev, ...) tcmu_warn_message(dev, __func__, __LINE__, __VA_ARGS__)
#define tcmu_info(dev, ...) tcmu_info_message(dev, __func__, __LINE__, __VA_ARGS__)
#define tcmu_dbg(dev, ...) tcmu_dbg_message(dev, __func__, __LINE__, __VA_ARGS__)

/*
 * Buffers. "Consume" means: entries used up get length 0, the one in progress a later base and a shorter length; the
 * number of entries stays.
 */
size_t tcmu_iovec_length(struct iovec *iov, size_t iov_cnt);
/* Consumes count bytes, which the array must have. Returns the number of entries used up. */
size_t tcmu_iovec_seek(struct iovec *iov, size_t count);
void tcmu_iovec_zero(struct iovec *iov, size_t iov_cnt);
bool tcmu_iovec_zeroed(struct iovec *iov, size_t iov_cnt);
/* -1: the first size bytes are equal; otherwise where they first differ. */
off_t tcmu_iovec_compare(void *mem, struct iovec *iov, size_t size);
/* Both consume iov and return the number of bytes copied: len, or less when iov is shorter. */
size_t tcmu_memcpy_into_iovec(struct iovec *iov, size_t iov_cnt, void *src, size_t len);
size_t tcmu_memcpy_from_iovec(void *dest, size_t len, struct iovec *iov, size_t iov_cnt);

/*
 * Command blocks of 6, 10, 12 and 16 bytes. Others must not be passed: tcmu-runner aborts on them.
 */
uint64_t tcmu_cdb_get_lba(uint8_t *cdb);
uint32_t tcmu_cdb_get_xfer_length(uint8_t *cdb);

/*
 * Sense data, fixed format; sense_buf has TCMU_SENSE_BUFFERSIZE bytes
 */

/* Returns TCMU_STS_PASSTHROUGH_ERR, for the callout to return. */
int tcmu_sense_set_data(uint8_t *sense_buf, uint8_t key, uint16_t asc_ascq);
void tcmu_sense_set_info(uint8_t *sense_buf, uint32_t info);
void tcmu_sense_set_key_specific_info(uint8_t *sense_buf, uint16_t info);

/* Names the calling thread after prefix and device, for ps(1). dev may be NULL. */
void tcmu_set_thread_name(const char *prefix, struct tcmu_device *dev);

/*
 * Only in tcmur-host: look before each call, as in
 *
 *	if (tcmur_dev_keep_memory)
 *		fd = tcmur_dev_keep_memory(dev, "contents", size);
 */
#define TCMUR_EXTENSION __attribute__((weak))

/*
 * Memory that outlives the process. When that dies, another one opens the device with reopen set, and finds there what
 * this one had left; the device's removal ends the memory. Names are the handler's choice: up to 31 letters, digits,
 * '.', '_' and '-'; a device can have 4 of them.
 *
 * Returns a descriptor of a memfd, which the caller owns and may resize, map and close at will; each call for the same
 * device and name returns one of the same memfd. New memory has size bytes, all zero. Memory that is there already
 * keeps the size that it has: ask fstat(). With size 0 only such memory is wanted.
 *
 * Otherwise a negative errno: -EOPNOTSUPP where nobody keeps memory, -ENOENT (size 0: there is none), -EINVAL (name),
 * -ENOSPC (too many names), -ENODEV (the device is being removed), -ETIMEDOUT, or what memfd_create() or ftruncate()
 * said. To be called from open(), or later from any thread.
 */
TCMUR_EXTENSION int tcmur_dev_keep_memory(struct tcmu_device *dev, const char *name, size_t size);

/*
 * Says in open() that what a completed callout has changed survives the death of the process even if no flush follows,
 * because it is in kept memory, in the page cache or in other processes by then. Nobody else then keeps it until the
 * flush, which costs a copy of each write. It says nothing about power failures: flushes still come.
 */
TCMUR_EXTENSION void tcmur_dev_set_writes_survive(struct tcmu_device *dev, bool survive);

/*
 * Says in open() that a range reads back zeroes after unmap() has returned TCMU_STS_OK for it, at any alignment. Without
 * it, what users want to read as zeroes is filled by writesame() or written.
 */
TCMUR_EXTENSION void tcmur_dev_set_unmap_zeroes(struct tcmu_device *dev, bool zeroes);

/*
 * Says in open() that fn knows where there are holes: ranges that nobody has written to, which read zeroes. fn returns
 * where, from offset on, data begins (-ENXIO: nowhere) or, with hole set, a hole, which the end of the device is too; or
 * another negative errno. What it calls data may be zeroes. It is called on the thread of open(), between requests.
 */
typedef int64_t (*tcmur_seek_fn_t)(struct tcmu_device *dev, uint64_t offset, bool hole);
TCMUR_EXTENSION void tcmur_dev_set_seek(struct tcmu_device *dev, tcmur_seek_fn_t fn);

/*
 * Says in open() that the kept memory of that name is what is on the device, byte for byte: what lies at an offset of
 * the device is at the same offset of the memory. It permits the next function.
 */
TCMUR_EXTENSION void tcmur_dev_set_contents(struct tcmu_device *dev, const char *name);

/*
 * Asked in a read callout: may the data stay where it is? If true is returned, the callout must leave the buffer alone,
 * and if it then succeeds the reader is given what is in the device's contents a little later, when the answer goes out.
 * A write that ends before that may show, as it may for any two requests that are under way at the same time. Holes of
 * the memory that are read in this way become memory. False: the data is to be copied as ever.
 */
TCMUR_EXTENSION bool tcmur_cmd_answer_in_place(struct tcmu_device *dev, struct tcmur_cmd *cmd);

#ifdef __cplusplus
}
#endif

#endif
