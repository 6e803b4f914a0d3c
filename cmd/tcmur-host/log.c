/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Log messages, on their way from any thread of the handler's to the Go side, which passes them to the front.
 *
 * A message is one write to a non-blocking pipe, small enough to be atomic. I/O never waits for the log: when the pipe
 * is full the message is dropped and counted.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "host.h"

#define TEXT_MAX 1024 /* bytes of one message; longer ones are cut */
#define FUNC_MAX 64

_Static_assert(sizeof(struct log_record) + NATIVE_NAME_MAX + FUNC_MAX + TEXT_MAX <= PIPE_BUF,
	       "a record has to fit an atomic write");

static _Atomic int output = -1;
static _Atomic int threshold = LOG_INFORMATION;
static _Atomic uint64_t dropped;

/* Error messages that explain why the callout under way on the control thread failed. */
static pthread_mutex_t collector_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic bool collecting; /* changed under collector_lock, read without */
static const struct tcmu_device *collector_device;
static bool collector_quiet;
static char collected[NATIVE_WHY_SIZE];

void log_set_output(int fd)
{
	atomic_store(&output, fd);
}

void log_set_level(int level)
{
	atomic_store(&threshold, level);
}

int log_level_now(void)
{
	return atomic_load(&threshold);
}

uint64_t log_take_dropped(void)
{
	return atomic_exchange(&dropped, 0);
}

bool log_wanted(int level)
{
	/* Errors always: they may be what explains a failed open, or stand in for the status of a read. */
	return level <= LOG_ERROR || level <= atomic_load_explicit(&threshold, memory_order_relaxed);
}

void log_collect(const struct tcmu_device *dev, bool quietly)
{
	pthread_mutex_lock(&collector_lock);
	collector_device = dev;
	collector_quiet = quietly;
	collected[0] = 0;
	atomic_store(&collecting, true);
	pthread_mutex_unlock(&collector_lock);
}

void log_collected(char *out, size_t size)
{
	pthread_mutex_lock(&collector_lock);
	atomic_store(&collecting, false);
	snprintf(out, size, "%s", collected);
	pthread_mutex_unlock(&collector_lock);
}

/* Returns the level to log the message at. */
static int collect(int level, const struct tcmu_device *dev, const char *text, size_t size)
{
	size_t used;

	pthread_mutex_lock(&collector_lock);
	if (atomic_load(&collecting) && (!dev || dev == collector_device || control_is_self())) {
		used = strlen(collected);
		/* Handlers that try one format after another repeat themselves. */
		if (!strstr(collected, text))
			snprintf(collected + used, sizeof(collected) - used, "%s%.*s", used ? "; " : "", (int)size,
				 text);
		if (collector_quiet)
			level = LOG_DEBUGGING;
	}
	pthread_mutex_unlock(&collector_lock);
	return level;
}

static void emit(int level, bool host, const struct tcmu_device *dev, const char *func, int line, const char *text,
		 size_t size)
{
	char buf[sizeof(struct log_record) + NATIVE_NAME_MAX + FUNC_MAX + TEXT_MAX];
	struct log_record rec = { .level = (uint8_t)level, .host = host, .line = line };
	const char *name = dev ? dev->name : "";
	int fd = atomic_load_explicit(&output, memory_order_relaxed);
	char *p = buf + sizeof(rec);

	if (fd < 0)
		return;
	rec.device = (uint16_t)strnlen(name, NATIVE_NAME_MAX);
	rec.func = (uint16_t)strnlen(func, FUNC_MAX);
	rec.text = (uint16_t)size;
	rec.size = (uint16_t)(sizeof(rec) + rec.device + rec.func + rec.text);
	memcpy(buf, &rec, sizeof(rec));
	memcpy(p, name, rec.device);
	memcpy(p + rec.device, func, rec.func);
	memcpy(p + rec.device + rec.func, text, size);
	if (write(fd, buf, rec.size) != (ssize_t)rec.size)
		atomic_fetch_add(&dropped, 1);
}

/* Bytes of a message without the newline that most end in; snprintf's result may exceed the buffer. */
static size_t trimmed(char *text, int n)
{
	size_t size = n < 0 ? 0 : (size_t)n;

	if (size > TEXT_MAX - 1)
		size = TEXT_MAX - 1;
	while (size && (text[size - 1] == '\n' || text[size - 1] == '\r'))
		size--;
	text[size] = 0;
	return size;
}

_Thread_local uint32_t log_errors;

void log_handler(int level, struct tcmu_device *dev, const char *func, int line, const char *fmt, va_list args)
{
	int saved_errno = errno;
	char text[TEXT_MAX];
	size_t size;

	/* Nothing before this may touch errno: %m is for the handler's. */
	size = trimmed(text, vsnprintf(text, sizeof(text), fmt, args));
	if (level <= LOG_ERROR) {
		log_errors++;
		if (atomic_load(&collecting))
			level = collect(level, dev, text, size);
	}
	if (level <= atomic_load_explicit(&threshold, memory_order_relaxed))
		emit(level, false, dev, func ? func : "", line, text, size);
	errno = saved_errno;
}

void log_host(int level, struct tcmu_device *dev, const char *fmt, ...)
{
	int saved_errno = errno;
	char text[TEXT_MAX];
	va_list args;
	size_t size;

	if (level > atomic_load_explicit(&threshold, memory_order_relaxed))
		return;
	va_start(args, fmt);
	size = trimmed(text, vsnprintf(text, sizeof(text), fmt, args));
	va_end(args);
	emit(level, true, dev, "", 0, text, size);
	errno = saved_errno;
}
