/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C side of tcmur-host as Go sees it. Plain types only: cgo does not understand _Atomic.
 *
 * Functions that return int return 0 or a positive errno unless their comment says otherwise. "why" is filled with a
 * reason for people when they fail; it has NATIVE_WHY_SIZE bytes.
 */
#ifndef TCMUR_NATIVE_H
#define TCMUR_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NATIVE_WHY_SIZE 1024
#define NATIVE_SUBTYPE_MAX 256
#define NATIVE_NAME_MAX 64
#define NATIVE_REGION_MAX 32    /* name of kept memory, with the terminating NUL */
#define NATIVE_CONFIG_SIZE 4096 /* what tcmu-runner gives handlers; includes the terminating NUL */
#define NATIVE_MAX_DEVICES 4096
#define NATIVE_MAX_REGISTERED 16

/* channel.c: maps both segments. The descriptors stay the caller's. */
int channel_map(int submit_fd, int complete_fd, char *why);

/* keep.c: the socket to the front for memory that outlives this process. The descriptor is ours from then on. */
void keep_set_socket(int fd);
int keep_object(void); /* a descriptor of the front's copy of the shared object, or a negative errno */

/* worker.c: how long an idle worker may watch the ring before it sleeps; 0, or with one CPU to run on: not at all. */
void worker_set_spin(unsigned int microseconds);

/* crash.c: reports of handler deaths go to report_fd, preceded by what can still be read from the output pipes. */
int crash_install(int report_fd);
void crash_set_output(int stdout_fd, int stderr_fd);

/* log.c: messages of handlers go to fd (non-blocking), one record each; see struct log_record. */
struct log_record {
	uint16_t size; /* of the whole record */
	uint8_t level; /* syslog number */
	uint8_t host;  /* 1: of the host itself, not of the handler */
	int32_t line;
	uint16_t device; /* lengths of the texts that follow, without terminators */
	uint16_t func;
	uint16_t text;
	uint16_t pad;
};

void log_set_output(int fd);
void log_set_level(int level);
uint64_t log_take_dropped(void);          /* messages lost since the last call because fd was full */
void log_set_directory(const char *path); /* where tcmu_make_absolute_logfile() points to; at most 255 bytes */

/* loader.c: for one shared object, in this order. */
int loader_open(const char *path, char *why);               /* dlopen: ENOENT with dlerror()'s text */
void loader_preload(const char *path);                      /* the same for a library; not being able to is no error */
int loader_init(int *result, char *why);                    /* EBADF: no handler_init. result: what it returned */
size_t loader_registered(uintptr_t *handlers, size_t max);  /* addresses of what was registered */
bool loader_peek(uintptr_t address, void *to, size_t size); /* false: not readable memory */
bool loader_image(uintptr_t address, uintptr_t *base);      /* start of the image that holds address */
uint64_t loader_symbol_size(uintptr_t address);             /* of the dynamic symbol at address; 0: there is none */

struct native_handler {
	uintptr_t check_config;
	uintptr_t reconfig;
	uintptr_t open;
	uintptr_t close;
	uintptr_t handle_cmd;
	uintptr_t read;
	uintptr_t write;
	uintptr_t flush;
	uintptr_t unmap;
	uintptr_t writesame;
	uintptr_t init;
	uintptr_t destroy;
	char subtype[NATIVE_SUBTYPE_MAX];
	int nr_threads;
	bool serial; /* one callout at a time whatever nr_threads says */
};

/* Makes it the handler of this process and calls its init. Returns init's result (0 or a negative errno). */
int loader_adopt(const struct native_handler *handler);
void loader_destroy(void);

/* How the handler is driven; decided by loader_adopt(). */
struct native_threading {
	unsigned int concurrency; /* callouts at a time for one device */
	bool async;
	bool by_cdb;
};

void loader_threading(struct native_threading *out);
/* true: config is acceptable. Otherwise why says what the handler gave as the reason, or "". */
bool loader_check_config(const char *config, char *why);

/* device.c */
struct native_open {
	uint32_t index;
	const char *name;
	const char *config; /* shorter than NATIVE_CONFIG_SIZE */
	uint64_t size;      /* bytes, told to the handler */
	uint32_t block_size;
	uint32_t max_xfer;  /* bytes, a multiple of block_size */
	uint32_t alignment; /* bytes; 0: the block size found after open where I/O goes by command block, else 1 */
	uint64_t retry_ns;  /* how long requests are tried again that the handler is too busy for */
	bool read_only;
	bool reopen;
	bool read_errors_logged; /* a failed read is known by an error message only */
	uint32_t qcow_cluster;   /* bytes; 0: not for guard_qcow.c, and the others mean nothing */
	uint32_t qcow_smallest;  /* bytes: smallest clusters of the image and its backing files */
	uint64_t qcow_lookups;   /* of clusters, after which the device is opened again */
	bool qcow_whole;         /* writes have to cover whole clusters */
	bool probing;            /* failure is expected: error messages are debug messages */
};

struct native_geometry {
	uint64_t size; /* bytes */
	uint32_t block_size;
	uint32_t max_xfer; /* bytes */
	uint32_t alignment;
	bool can_write;
	bool can_flush;
	bool can_unmap;
	bool can_zero;
	bool write_cache;
	bool rotational;
	bool writes_survive;
	bool can_write_same;
	bool unmap_zeroes;
	bool can_seek;
	char contents[NATIVE_REGION_MAX]; /* of which kept memory the device consists, "" where none is said */
};

/*
 * Calls the handler's open. EBUSY: the index is in use. Otherwise *result is what open returned, and errors what the
 * handler logged meanwhile (NATIVE_WHY_SIZE bytes). The device serves I/O only after device_start().
 */
int device_open(const struct native_open *how, int *result, char *errors);
void device_geometry(uint32_t index, struct native_geometry *out);
/* boundary: no callout may cross a multiple of that many bytes; 0: none. */
int device_start(uint32_t index, uint64_t boundary);
/* The way back from device_open() without device_start(): calls the handler's close. */
void device_abandon(uint32_t index);
/*
 * resize.c: calls the handler's reconfig. ENODEV: not open. EOPNOTSUPP: the handler cannot do it. Otherwise *result is
 * what reconfig returned, and errors what the handler logged meanwhile (NATIVE_WHY_SIZE bytes).
 */
int device_resize(uint32_t index, uint64_t size, int *result, char *errors);
/* An eventfd, non-blocking, that is written to when a handler sets a device's size; -1 with errno. Call it once. */
int device_size_events(void);
/* seek.c: where data, or a hole, begins from offset on; or a negative errno, ENODEV and EOPNOTSUPP as above. */
int64_t device_seek(uint32_t index, uint64_t offset, bool hole);
/*
 * Ends an open device: refuses new requests, waits for those accepted, flushes, closes. ENODEV: not open. ETIMEDOUT:
 * did not end in timeout_ns (negative: no limit) or device_interrupt() was called; the device accepts nothing any more
 * and can be closed again. *flush_error: 0, or the errno of a failed flush; the device is closed all the same.
 */
int device_close(uint32_t index, int64_t timeout_ns, int *flush_error);
void device_interrupt(uint32_t index);

#endif
