/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the C files of tcmur-host share. Nothing here is visible to handlers; native.h is the part that Go calls.
 *
 * The way of a request: a worker (worker.c) takes an entry off the submission ring (channel.c) and makes a request of
 * it (request.c); the device admits it (device.c); one or more callouts into the handler serve it (io.c, command.c);
 * its result goes into the completion ring. Completions of asynchronous handlers arrive in io.c, on threads of the
 * handler.
 */
#ifndef TCMUR_HOST_H
#define TCMUR_HOST_H

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#include "channel.h"
#include "native.h"

/*
 * Handlers find these functions in the dynamic symbol table. Everything else is compiled hidden: an exported name of
 * ours would be used instead of a handler's own global of the same name.
 */
#pragma GCC visibility push(default)
#include "tcmu-runner.h"
#pragma GCC visibility pop

/*
 * The handler of this process. Written once, by loader_adopt(), before any device exists; read-only afterwards.
 */
struct handler {
	bool (*check_config)(const char *cfgstring, char **reason);
	int (*reconfig)(struct tcmu_device *dev, struct tcmulib_cfg_info *cfg);
	int (*open)(struct tcmu_device *dev, bool reopen);
	void (*close)(struct tcmu_device *dev);
	int (*handle_cmd)(struct tcmu_device *dev, struct tcmur_cmd *cmd);
	int (*read)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		    off_t offset);
	int (*write)(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t iov_cnt, size_t length,
		     off_t offset);
	int (*flush)(struct tcmu_device *dev, struct tcmur_cmd *cmd);
	int (*unmap)(struct tcmu_device *dev, struct tcmur_cmd *cmd, uint64_t offset, uint64_t length);
	tcmur_writesame_fn_t writesame;
	int (*init)(void);
	void (*destroy)(void);

	char subtype[NATIVE_SUBTYPE_MAX];
	unsigned int concurrency; /* callouts at a time for one device, at least 1 */
	bool by_cdb;              /* I/O goes through handle_cmd, for want of read and write */
	bool async;               /* read, write, ... that return 0 have only been queued */
};

extern struct handler host_handler;

/* What the front submits, as it stood in the ring. Nothing of it has been checked. */
struct submission {
	uint32_t tag;
	uint32_t gen;
	uint32_t op;
	uint32_t device;
	uint64_t offset;
	uint64_t length;
	uint64_t payload;
	uint32_t flags;
};

/*
 * A request: what the front submitted, and what the handler is given for the callout under way. Objects are recycled
 * but never freed, so that a handler that completes a command twice finds an object whose state tells (request.c).
 */
enum {
	REQUEST_CLAIMED = 1,   /* somebody has decided how the callout ended */
	REQUEST_COMPLETED = 2, /* ... and has acted on it */
	REQUEST_RETURNED = 4,  /* the callout has returned; its thread touches the request no more */
	REQUEST_IDLE = REQUEST_CLAIMED | REQUEST_COMPLETED | REQUEST_RETURNED,
};

/* What has to follow when a callout has ended. */
enum request_then {
	THEN_END,   /* nothing: the requester has been told */
	THEN_GO_ON, /* another callout */
	THEN_RETRY, /* the same callout again, after pause_ns or after a reopen */
};

struct request {
	struct tcmur_cmd cmd; /* handlers hold pointers to it */
	struct tcmulib_cmd lib;
	struct iovec iov;
	uint8_t cdb[16];

	struct tcmu_device *dev;
	struct request *next; /* of whichever queue holds the request */
	int *result;          /* of the host's own requests: gets the errno, instead of the front */
	uint32_t tag;
	uint32_t gen;
	uint32_t op;            /* enum tcmur_op */
	enum request_then then; /* valid from CLAIMED on */
	int returned;           /* what the callout has returned; valid from RETURNED on */
	int completed;          /* what the handler has completed it with; valid from COMPLETED on */
	bool resent;            /* a callout of it timed out, and it was sent again for that */
	uint8_t *payload;
	uint64_t offset; /* bytes, as submitted */
	uint64_t length;
	uint64_t done;        /* bytes of length that earlier callouts have served */
	uint64_t step;        /* bytes that the callout under way serves */
	uint64_t retry_until; /* clock_ns() at which refusals are not put up with any longer; 0: never refused yet */
	uint64_t pause_ns;    /* before the next try */
	uint64_t due;         /* retry.c: clock_ns() at which the pause is over */
	bool timed;           /* how long the handler has it is measured */
	bool may_in_place;    /* a read whose data may stay where it is: TCMUR_SQE_IN_PLACE */
	bool in_place;        /* the callout under way, which serves all of the request, has left it there */
	uint64_t started;     /* clock_ns() before its first callout; 0: that has not come, or timed is not set */
	_Atomic uint32_t state;
};

struct request_pool {
	struct request *head;
	struct request *tail;
	unsigned int free;
};

/* As new: nothing done, never refused, never resent, for the front. NULL: out of memory. */
struct request *request_alloc(struct request_pool *pool);
void request_free(struct request_pool *pool, struct request *req);

/*
 * A device. One object per index, made at its first open and never freed: threads of a handler may still log or ask for
 * attributes after close, and workers may look at it at any time.
 */
enum device_state {
	DEVICE_CLOSED,
	DEVICE_OPENING,
	DEVICE_OPEN,
	DEVICE_DRAINING, /* no new requests; those accepted are being served */
	DEVICE_CLOSING,
};

struct tcmu_device {
	/* Attributes that handlers ask for and set, at any time and from any thread; lengths are blocks. */
	_Atomic uint64_t num_lbas;
	_Atomic uint32_t block_size; /* bytes */
	_Atomic uint32_t max_xfer;
	_Atomic uint32_t opt_xcopy;
	_Atomic uint32_t max_unmap;
	_Atomic uint32_t unmap_gran;
	_Atomic uint32_t unmap_align; /* 0: unknown */
	_Atomic bool unmap_split;
	_Atomic bool write_cache;
	_Atomic bool solid_state;
	_Atomic bool write_protect;
	_Atomic(void *) handler_private;
	/* Stands in for a structure of tcmu-runner's that handler_rbd.so looks into; all zero is what it should see. */
	_Alignas(64) unsigned char runner_private[512];

	/* Set before the handler's open, constant until after its close. */
	char *config; /* NATIVE_CONFIG_SIZE bytes, fresh for each open: a handler may cut it up */
	char *given;  /* the same as it was given */
	char name[NATIVE_NAME_MAX];
	uint32_t index;
	uint64_t configured_size; /* bytes */
	uint32_t max_request;     /* bytes; the most that one callout may carry */
	uint32_t alignment;       /* bytes; of offsets and lengths */
	uint64_t boundary;        /* bytes; no callout may cross a multiple of it. 0: none */
	uint64_t retry_ns;        /* how long refused requests are tried again */
	bool read_only;
	bool read_errors_logged; /* a failed read returns success; that the handler logged an error gives it away */
	struct qcow_guard *qcow; /* guard_qcow.c sees to transfers; NULL: none of its devices */
	bool handler_open;       /* the control thread's own: open has succeeded and close has not been called since */

	/* What was learnt about the handler on this device. */
	_Atomic uint8_t read_cdb; /* length of the command block that it understands */
	_Atomic uint8_t write_cdb;
	_Atomic uint8_t sync_cdb;
	_Atomic bool no_writesame;
	_Atomic uint32_t conn_lost;
	_Atomic uint32_t lock_lost;
	_Atomic uint32_t timed_out;
	_Atomic bool writes_survive;
	_Atomic bool unmap_zeroes;
	_Atomic(tcmur_seek_fn_t) seek;
	char contents[NATIVE_REGION_MAX]; /* set in the handler's open, constant until after its close; "": none */
	/* The handler needs a reopen: no callouts until then. Changed under lock, read without; see device_lost(). */
	_Atomic bool lost;

	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t idle;  /* inflight fell to 0, or interrupted was set */
	enum device_state state;
	uint32_t opens;               /* counts the opens by the front */
	unsigned int running;         /* threads in callouts, at most host_handler.concurrency */
	unsigned int inside;          /* requests in a callout, or queued by the handler */
	unsigned int inflight;        /* requests accepted and not yet released */
	bool reopening;               /* reopen.c is at it */
	bool interrupted;             /* whoever waits on idle is to give up */
	struct request *waiting_head; /* accepted, until running and lost allow */
	struct request *waiting_tail;
	struct request_pool pool;
};

struct tcmu_device *device_lookup(uint32_t index); /* NULL: never opened */
/* The request that the caller has to run now, with device_run(). NULL: it waits for its turn, or was answered. */
struct request *device_admit(const struct submission *sub);
/* Serves req and then whatever waits for the device; blocks as long as the handler does. timed: see pace.c. */
void device_run(struct request *req, bool timed);
/* For a request whose callout the handler has completed: acts on req->then. Any thread may call it. */
void device_completed(struct request *req);
/* Has an accepted request, which nobody else looks at, served by a thread of ours as soon as it may. */
void device_continue(struct request *req);
uint64_t device_size(struct tcmu_device *dev); /* bytes */
/* The handler says that it needs a reopen; that happens when all its requests have ended. Any thread may call it. */
void device_lost(struct tcmu_device *dev);

/*
 * For reopen.c. device_reopen() tries once: 0, or a positive errno, the handler's words in errors (NATIVE_WHY_SIZE
 * bytes); ECANCELED: the front has closed the device meanwhile.
 */
int device_reopen(struct tcmu_device *dev, uint32_t opens, bool quietly, char *errors);

/* channel.c */
bool channel_pop(struct submission *sub);
bool channel_pending(unsigned int behind); /* an entry is there to be popped, and so many before it */
void channel_post(uint32_t tag, uint32_t gen, int sts, int error, uint64_t handler_ns, bool in_place);
/* This thread posts several completions before it wakes the front; channel_ring() must follow before it waits. */
void channel_defer_bell(bool defer);
void channel_ring(void);                                      /* what was deferred */
uint8_t *channel_read_payload(uint64_t at, uint64_t length);  /* NULL: outside the arena */
uint8_t *channel_write_payload(uint64_t at, uint64_t length); /* the same; memory is read-only */
void channel_publish_sleepers(uint32_t n, bool back_soon);
uint32_t channel_bell(void);
void channel_sleep(uint32_t bell);
bool channel_wake(void); /* wakes one sleeper; false: nobody was asleep yet */

/* pace.c: callouts that one thread makes from pace_begin() to pace_end(); the caller counts them. */
struct pace {
	unsigned int callouts;
	long waits; /* the rest as of pace_begin(): how often the thread has had to wait */
	uint64_t cpu_ns;
	uint64_t wall_ns;
};
void pace_begin(struct pace *pace);
void pace_end(const struct pace *pace);
bool pace_is_quick(void); /* the next callout is expected to be */

/* worker.c */
void worker_expect(unsigned int callouts); /* that many more callouts may run at once */
void worker_dismiss(unsigned int callouts);
/* Has a thread of ours call device_run(), for callers that must not run callouts themselves. */
void worker_run(struct request *req);

/* io.c */
enum io_result {
	IO_ENDED,  /* the requester has been told */
	IO_QUEUED, /* the handler's completion will see to the request, or already has */
	IO_LATER,  /* to be run again, after req->pause_ns, or after a reopen if there is to be one */
};

enum io_result io_run(struct request *req);
/* One read or write of the handler, by whatever way it has. */
int io_callout(struct request *req, bool write, void *data, uint64_t at, size_t length);

/* retry.c */
bool retry_wanted(struct request *req, int sts); /* the status may be another one later; sets req->pause_ns */
void retry_later(struct request *req);           /* device_continue() after req->pause_ns */

/* resize.c */
void size_was_set(void); /* by a handler; any thread may call it */

/* reopen.c */
void reopen_start(struct tcmu_device *dev, uint32_t opens); /* until it has succeeded, in a thread of its own */

/* command.c */
int command_transfer(struct request *req, bool write, uint64_t offset, uint64_t length);
int command_sync(struct request *req);
/* True: the handler did not know the command block, and the device now has another one to try. */
bool command_fall_back(struct request *req, int sts);

/*
 * guard_qcow.c: for devices that have dev->qcow. One thread at a time, as for callouts of that handler. The result is
 * that of a callout, and it has ended.
 */
struct qcow_guard *qcow_guard_make(const struct native_open *how); /* NULL: out of memory */
void qcow_guard_free(struct qcow_guard *guard);
int qcow_guard_transfer(struct request *req, bool write, void *data, uint64_t at, size_t length);

/* status.c */
int status_to_errno(int sts, bool write, const uint8_t *sense);

/* control.c */
void control_run(void (*fn)(void *arg), void *arg); /* on the one thread that opens, closes and initialises */
bool control_is_self(void);

static inline uint64_t clock_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* crash.c: which callout a thread is in, for the report that is written when it dies there */
struct callout {
	const char *what;              /* NULL: in none */
	const struct tcmu_device *dev; /* may be NULL */
	uint64_t offset;
	uint64_t length;
};

extern _Thread_local struct callout current_callout;

static inline void callout_begin(const char *what, const struct tcmu_device *dev, uint64_t offset, uint64_t length)
{
	current_callout.dev = dev;
	current_callout.offset = offset;
	current_callout.length = length;
	/* A signal handler of this very thread is the reader: order is enough. */
	atomic_signal_fence(memory_order_release);
	current_callout.what = what;
}

static inline void callout_end(void)
{
	current_callout.what = NULL;
}

void crash_thread_start(void); /* first call of each thread of ours that runs callouts */
int thread_start(const char *name, void *(*fn)(void *), void *arg);

/* log.c */
enum log_level {
	LOG_CRITICAL = 2, /* numbers of syslog, as handlers use them */
	LOG_ERROR = 3,
	LOG_WARNING = 4,
	LOG_INFORMATION = 6,
	LOG_DEBUGGING = 7,
	LOG_SCSI_COMMANDS = 8,
};

bool log_wanted(int level); /* look before formatting */
int log_level_now(void);
void log_handler(int level, struct tcmu_device *dev, const char *func, int line, const char *fmt, va_list args)
	__attribute__((format(printf, 5, 0)));
/* Error messages of the handler on this thread so far. Not by device: the handler that this is for names none. */
extern _Thread_local uint32_t log_errors;
void log_host(int level, struct tcmu_device *dev, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/*
 * From here on error messages about dev, about no device, and of the control thread are kept for log_collected().
 * Quietly: they are logged as debug messages.
 */
void log_collect(const struct tcmu_device *dev, bool quietly);
void log_collected(char *out, size_t size); /* "a; b", or ""; ends the collecting */

#endif
