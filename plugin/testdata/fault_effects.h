/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a handler can do to the process that it runs in, by name. Those that return let the call go on as if nothing had
 * happened.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tcmu-runner.h"

#define MEMORY_TO_EAT (256ul << 20) /* bytes beyond what the process has */

static void die_of_segv(struct tcmu_device *dev)
{
	(void)dev;
	*(volatile int *)8 = 1;
}

static void die_of_abort(struct tcmu_device *dev)
{
	(void)dev;
	abort();
}

static void die_of_exit(struct tcmu_device *dev)
{
	(void)dev;
	exit(3);
}

static void die_of_exit0(struct tcmu_device *dev)
{
	(void)dev;
	exit(0);
}

static void die_of_exit_now(struct tcmu_device *dev)
{
	(void)dev;
	_exit(1);
}

static void run_in_thread(void *(*fn)(void *), void *arg)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, fn, arg) == 0)
		pthread_detach(thread);
}

static void *crash_soon(void *arg)
{
	usleep(20000);
	die_of_segv(arg);
	return NULL;
}

static void die_in_thread(struct tcmu_device *dev)
{
	run_in_thread(crash_soon, dev);
}

static void stop_oneself(struct tcmu_device *dev)
{
	(void)dev;
	raise(SIGSTOP);
	kill(getpid(), SIGSTOP);
}

static void hang(struct tcmu_device *dev)
{
	(void)dev;
	for (;;)
		pause();
}

static void be_slow(struct tcmu_device *dev)
{
	(void)dev;
	usleep(200000);
}

static void loop_endlessly(struct tcmu_device *dev)
{
	volatile unsigned long turns = 0;

	(void)dev;
	for (;;)
		turns++;
}

static void lock_oneself_out(struct tcmu_device *dev)
{
	pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

	(void)dev;
	pthread_mutex_lock(&lock);
	pthread_mutex_lock(&lock);
}

/* The first mapping of a segment of the memory channel; the two are the same size. NULL: there is none. */
static char *find_segment(const char *name, size_t *size)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	unsigned long start, end;
	char line[512];
	char *found = NULL;

	while (maps && !found && fgets(line, sizeof(line), maps)) {
		if (!strstr(line, name) || sscanf(line, "%lx-%lx", &start, &end) != 2)
			continue;
		found = (char *)(uintptr_t)start;
		*size = end - start;
	}
	if (maps)
		fclose(maps);
	return found;
}

#define COMPLETE_SEGMENT "/memfd:tcmur-complete"
#define SUBMIT_SEGMENT "/memfd:tcmur-submit"

/* Rings and head; the arena behind them is memory that nobody believes anything of. */
static void *scribble_on(void *arg)
{
	const size_t head = 64 << 10;
	size_t size = 0;
	unsigned char *segment = (unsigned char *)find_segment(COMPLETE_SEGMENT, &size);
	uint32_t random = (uint32_t)getpid() | 1;

	(void)arg;
	for (size_t i = 0; segment && size >= head; i = (i + 1) % head) {
		random = random * 1664525 + 1013904223;
		segment[i] = (unsigned char)(random >> 24);
		if (i == head - 1)
			usleep(100);
	}
	return NULL;
}

static void scribble(struct tcmu_device *dev)
{
	run_in_thread(scribble_on, dev);
}

/* Once over everything, and this time with numbers that could be true. */
static void scribble_everything(struct tcmu_device *dev)
{
	size_t size = 0;
	char *segment = find_segment(COMPLETE_SEGMENT, &size);

	(void)dev;
	for (size_t i = 0; segment && i + 4 <= size; i += 4)
		*(volatile uint32_t *)(segment + i) = (uint32_t)(i >> 5) & 1023;
}

/*
 * Completions of requests that do not exist, where the next ones are expected. The entry that the host itself fills next
 * is left out: it would undo it.
 */
static void forge_completions(struct tcmu_device *dev)
{
	struct entry {
		uint64_t seq;
		uint32_t tag, gen, sts, error;
		uint64_t unused;
	} * ring;
	size_t size = 0;
	char *segment = find_segment(COMPLETE_SEGMENT, &size);
	const unsigned int entries = 512;
	uint64_t tail = 0;

	(void)dev;
	if (!segment)
		return;
	ring = (struct entry *)(segment + 4096);
	for (unsigned int i = 0; i < entries; i++)
		tail = ring[i].seq > tail ? ring[i].seq : tail;
	for (uint64_t seq = tail + 2; seq < tail + 40; seq++) {
		ring[(seq - 1) % entries] = (struct entry){ .tag = (uint32_t)seq * 77, .gen = 1, .seq = seq };
	}
}

static void write_to_submissions(struct tcmu_device *dev)
{
	size_t size = 0;
	char *segment = find_segment(SUBMIT_SEGMENT, &size);

	(void)dev;
	if (segment)
		memset(segment, 0xff, size);
}

static void unmap_segment(struct tcmu_device *dev)
{
	size_t size = 0;
	char *segment = find_segment(COMPLETE_SEGMENT, &size);

	(void)dev;
	if (segment)
		munmap(segment, size);
}

/* The segments are sealed, so this should fail whatever way the file is reached. */
static void shrink_segments(struct tcmu_device *dev)
{
	static const char *const names[] = { COMPLETE_SEGMENT, SUBMIT_SEGMENT };

	for (int i = 0; i < 2; i++) {
		size_t size = 0;
		char *segment = find_segment(names[i], &size);
		char path[96];
		int fd;

		snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (unsigned long)(uintptr_t)segment,
			 (unsigned long)(uintptr_t)segment + size);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (ftruncate(fd, 4096) == 0)
			tcmu_err(dev, "a segment of the memory channel could be shrunk\n");
		close(fd);
	}
}

static void close_all_descriptors(struct tcmu_device *dev)
{
	(void)dev;
	close_range(0, ~0u, 0);
}

/* A child that keeps everything open for a while after its parent's death. */
static void fork_child(struct tcmu_device *dev)
{
	pid_t parent = getpid();

	(void)dev;
	if (fork() == 0) {
		while (getppid() == parent)
			usleep(10000);
		sleep(1);
		_exit(0);
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

static void flood_stdout(struct tcmu_device *dev)
{
	(void)dev;
	print_megabyte(STDOUT_FILENO);
}

static void flood_stderr(struct tcmu_device *dev)
{
	(void)dev;
	print_megabyte(STDERR_FILENO);
}

static void flood_log(struct tcmu_device *dev)
{
	int i;

	for (i = 0; i < 1000; i++)
		tcmu_err(dev, "message %d of a flood\n", i);
}

static unsigned long address_space(void)
{
	FILE *f = fopen("/proc/self/statm", "r");
	unsigned long pages = 0;

	if (f) {
		if (fscanf(f, "%lu", &pages) != 1)
			pages = 0;
		fclose(f);
	}
	return pages * (unsigned long)sysconf(_SC_PAGESIZE);
}

/* Leaves the process without any memory, and the machine with plenty. */
static void eat_memory(struct tcmu_device *dev)
{
	rlim_t limit = address_space() + MEMORY_TO_EAT;
	size_t size = 16 << 20;

	(void)dev;
	setrlimit(RLIMIT_AS, &(struct rlimit){ limit, limit });
	while (size >= 64) {
		char *p = malloc(size);

		if (p)
			memset(p, 1, size);
		else
			size /= 2;
	}
}

static const struct effect {
	const char *name;
	void (*have)(struct tcmu_device *dev);
} effects[] = {
	{ "segv", die_of_segv },
	{ "abort", die_of_abort },
	{ "exit", die_of_exit },
	{ "exit0", die_of_exit0 },
	{ "_exit", die_of_exit_now },
	{ "thread", die_in_thread },
	{ "stop", stop_oneself },
	{ "hang", hang },
	{ "loop", loop_endlessly },
	{ "deadlock", lock_oneself_out },
	{ "scribble", scribble },
	{ "scribble-all", scribble_everything },
	{ "forge", forge_completions },
	{ "submissions", write_to_submissions },
	{ "unmap", unmap_segment },
	{ "shrink", shrink_segments },
	{ "closefds", close_all_descriptors },
	{ "fork", fork_child },
	{ "stdout", flood_stdout },
	{ "stderr", flood_stderr },
	{ "log", flood_log },
	{ "slow", be_slow },
	{ "memory", eat_memory },
};
#define EFFECTS (sizeof(effects) / sizeof(effects[0]))
