/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether the handler's callouts are quick: whether they take less time than it takes to wake a thread, and do not
 * wait for anything. worker.c serves those differently.
 *
 * As long as they are taken for quick, only whole batches are timed, which costs next to nothing. Otherwise each callout
 * is, until enough of them were quick. One that has waited counts for much more than one that was only long:
 * where one of a hundred waits for a disk, the other ninety-nine should not have to wait for it, too. A thread that has
 * lost the CPU to others takes long as well, but that says nothing of the handler.
 */
#define _GNU_SOURCE
#include <sys/resource.h>

#include "host.h"

#define QUICK_NS 10000
#define CREDIT_QUICK 32 /* from here on the next callouts pass for quick */
#define CREDIT_MAX 96
#define LONG_COST 8        /* credit that a callout costs that has taken long without waiting */
#define WAIT_CREDIT (-256) /* credit after one that has waited, whatever it was before */

/* Each quick callout, of any thread, adds 1. A hint: updates may get lost. */
static _Atomic int credit;

bool pace_is_quick(void)
{
	return atomic_load_explicit(&credit, memory_order_relaxed) >= CREDIT_QUICK;
}

static void now(struct pace *pace)
{
	struct rusage usage = { 0 };

	getrusage(RUSAGE_THREAD, &usage);
	pace->waits = usage.ru_nvcsw;
	pace->cpu_ns = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000ull +
		       (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000ull;
	pace->wall_ns = clock_ns();
}

void pace_begin(struct pace *pace)
{
	now(pace);
	pace->callouts = 0;
}

void pace_end(const struct pace *pace)
{
	int now_has = atomic_load_explicit(&credit, memory_order_relaxed), had = now_has;
	uint64_t limit = (uint64_t)QUICK_NS * pace->callouts;
	struct pace end;

	if (!pace->callouts)
		return;
	if (clock_ns() - pace->wall_ns < limit) {
		if (now_has < CREDIT_MAX)
			now_has++;
	} else {
		now(&end);
		if (end.waits != pace->waits)
			now_has = WAIT_CREDIT;
		else if (end.cpu_ns - pace->cpu_ns >= limit && now_has > 0)
			now_has -= LONG_COST;
	}
	if (now_has != had)
		atomic_store_explicit(&credit, now_has, memory_order_relaxed);
}
