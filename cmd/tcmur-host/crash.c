/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Last words. When a handler faults or aborts, one line says which callout for which device did it, and a backtrace
 * follows; then the process dies of the same signal, so that its exit status tells the truth.
 *
 * Lines begin with "[ERROR]", which go-plugin's reader of a plugin's stderr takes for the log level. Only
 * async-signal-safe calls are made, but for backtrace() and dladdr(), which can block if the fault is inside the
 * dynamic linker; an alarm ends the process then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define ALT_STACK_SIZE (128u << 10)
#define MAX_FRAMES 48

static const int fatal_signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
#define FATAL_SIGNALS (sizeof(fatal_signals) / sizeof(fatal_signals[0]))

static struct sigaction previous[FATAL_SIGNALS]; /* Go's own handlers */
static int report_fd = -1;
static int output_fds[2] = { -1, -1 }; /* where what the handler printed can be read */
static _Atomic int reporting;          /* a second thread that dies meanwhile waits for the first one's end */

_Thread_local struct callout current_callout;
static _Thread_local bool own_thread; /* of the host: worker, follow-up, control */

/* One line, assembled without the C library's formatting. */
struct line {
	char text[768];
	size_t used;
};

static void add(struct line *l, const char *text)
{
	while (*text && l->used < sizeof(l->text) - 1)
		l->text[l->used++] = *text++;
}

static void add_number(struct line *l, uint64_t v, unsigned int base)
{
	char digits[24];
	size_t n = sizeof(digits);

	digits[--n] = 0;
	do {
		digits[--n] = "0123456789abcdef"[v % base];
		v /= base;
	} while (v);
	add(l, digits + n);
}

static void emit(struct line *l)
{
	ssize_t ignored;

	l->text[l->used++] = '\n';
	ignored = write(report_fd, l->text, l->used);
	(void)ignored; /* there is nobody else to tell */
	l->used = 0;
}

static const char *signal_name(int sig)
{
	switch (sig) {
	case SIGSEGV:
		return "SIGSEGV";
	case SIGBUS:
		return "SIGBUS";
	case SIGFPE:
		return "SIGFPE";
	case SIGILL:
		return "SIGILL";
	default:
		return "SIGABRT";
	}
}

/* What the handler printed last (an assertion's text, as a rule) and nobody has read yet. */
static void report_output(void)
{
	struct line l = { .used = 0 };

	for (int i = 0; i < 2; i++) {
		char buf[512];
		ssize_t n;
		int rounds = 0;

		if (output_fds[i] < 0)
			continue;
		while (rounds++ < 16 && (n = read(output_fds[i], buf, sizeof(buf))) > 0) {
			for (ssize_t k = 0; k < n; k++) {
				char c[2] = { buf[k], 0 };

				if (l.used == 0)
					add(&l, "[ERROR] handler printed: ");
				if (c[0] == '\n')
					emit(&l);
				else
					add(&l, c);
			}
		}
		if (l.used)
			emit(&l);
	}
}

static void add_place(struct line *l)
{
	const struct callout *c = &current_callout;

	if (!c->what) {
		add(l, " outside of any callout");
		return;
	}
	add(l, " in ");
	add(l, c->what);
	if (!c->dev)
		return;
	add(l, "(device ");
	add(l, c->dev->name);
	if (c->length) {
		add(l, ", offset ");
		add_number(l, c->offset, 10);
		add(l, ", length ");
		add_number(l, c->length, 10);
	}
	add(l, ")");
}

static void report_frames(void)
{
	void *frames[MAX_FRAMES];
	int n = backtrace(frames, MAX_FRAMES);

	for (int i = 0; i < n; i++) {
		struct line l = { .used = 0 };
		Dl_info info;

		add(&l, "[ERROR] handler backtrace: ");
		if (dladdr(frames[i], &info) && info.dli_fname) {
			const char *slash = strrchr(info.dli_fname, '/');

			add(&l, slash ? slash + 1 : info.dli_fname);
			add(&l, "+0x");
			add_number(&l, (uint64_t)((uintptr_t)frames[i] - (uintptr_t)info.dli_fbase), 16);
			if (info.dli_sname) {
				add(&l, " ");
				add(&l, info.dli_sname);
			}
		} else {
			add(&l, "0x");
			add_number(&l, (uintptr_t)frames[i], 16);
		}
		emit(&l);
	}
}

static void report(int sig, const siginfo_t *info, bool foreign)
{
	struct line l = { .used = 0 };

	report_output();
	add(&l, "[ERROR] handler died of ");
	add(&l, signal_name(sig));
	if (foreign)
		add(&l, " in a thread of its own");
	else
		add_place(&l);
	if (sig != SIGABRT) {
		add(&l, ", address 0x");
		add_number(&l, (uintptr_t)info->si_addr, 16);
	}
	emit(&l);
	report_frames();
}

/*
 * Go's threads have an alternate signal stack, and so have ours. A thread without one was made by the handler or by a
 * library of its.
 */
static bool foreign_thread(void)
{
	stack_t ss;

	return !own_thread && sigaltstack(NULL, &ss) == 0 && (ss.ss_flags & SS_DISABLE);
}

static void on_fatal_signal(int sig, siginfo_t *info, void *context)
{
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	int saved_errno = errno;
	bool foreign = foreign_thread();
	sigset_t only;

	if (!own_thread && !foreign) {
		/* A fault in Go code: a panic, as a rule, which Go turns into whatever it should be. */
		for (size_t i = 0; i < FATAL_SIGNALS; i++) {
			if (fatal_signals[i] != sig)
				continue;
			if (previous[i].sa_flags & SA_SIGINFO)
				previous[i].sa_sigaction(sig, info, context);
			else if (previous[i].sa_handler == SIG_DFL)
				break;
			errno = saved_errno;
			return;
		}
	} else if (!atomic_exchange(&reporting, 1)) {
		sigaction(SIGALRM, &dfl, NULL);
		sigemptyset(&only);
		sigaddset(&only, SIGALRM);
		pthread_sigmask(SIG_UNBLOCK, &only, NULL);
		alarm(2);
		report(sig, info, foreign);
		alarm(0);
	} else {
		sleep(3); /* another thread is dying, and takes the process with it */
	}
	sigaction(sig, &dfl, NULL);
	sigemptyset(&only);
	sigaddset(&only, sig);
	pthread_sigmask(SIG_UNBLOCK, &only, NULL);
	raise(sig);
}

/* exit() from inside a handler; the host itself leaves by Go's os.Exit, which does not come here. */
static void on_exit_call(void)
{
	struct line l = { .used = 0 };

	report_output();
	add(&l, "[ERROR] handler called exit()");
	add_place(&l);
	emit(&l);
}

int crash_install(int fd)
{
	struct sigaction sa = { .sa_sigaction = on_fatal_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	void *frames[4];

	report_fd = fd;
	/* The first backtrace() of a process loads a library: not in a signal handler. */
	backtrace(frames, 4);
	sigfillset(&sa.sa_mask);
	for (size_t i = 0; i < FATAL_SIGNALS; i++) {
		if (sigaction(fatal_signals[i], &sa, &previous[i]) < 0)
			return errno;
	}
	return atexit(on_exit_call) ? ENOMEM : 0;
}

void crash_set_output(int stdout_fd, int stderr_fd)
{
	output_fds[0] = stdout_fd;
	output_fds[1] = stderr_fd;
}

void crash_thread_start(void)
{
	stack_t ss = { .ss_size = ALT_STACK_SIZE };

	own_thread = true;
	/* Kept for the life of the thread, which is that of the process. A stack overflow is reported from here. */
	ss.ss_sp = mmap(NULL, ALT_STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ss.ss_sp != MAP_FAILED)
		sigaltstack(&ss, NULL);
}

int thread_start(const char *name, void *(*fn)(void *), void *arg)
{
	sigset_t all, before;
	pthread_attr_t attr;
	pthread_t thread;
	int err;

	/* Signals to the process are Go's to handle. Those of faults cannot sensibly be blocked. */
	sigfillset(&all);
	for (size_t i = 0; i < FATAL_SIGNALS; i++)
		sigdelset(&all, fatal_signals[i]);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(&thread, &attr, fn, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	if (!err)
		pthread_setname_np(thread, name);
	return err;
}
