/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The threads that serve the submission ring.
 *
 * A handler may block in any callout for as long as it likes. So that no device waits for another one's handler, a
 * worker that goes into a callout leaves an idle one behind that watches the ring, as long as the pool is smaller than
 * the number of callouts that the devices allow at once, plus one. Workers beyond what is needed just sleep.
 *
 * Where callouts take less time than waking a thread does, that would make everything slower: then a worker serves what
 * is in the ring by itself, one after another, and rings the front's bell once for several. Should the handler block
 * after all, the others sleep until the front has looked out for a completion in vain or, at the latest, until its clock
 * ticks (Channel.Tick).
 *
 * One idle worker at most watches the ring without sleeping (spins), for a short time after it has run empty: the next
 * request often follows soon, and waking a thread costs more than serving a small request does. While it does,
 * sq_sleepers reads 0, and the front rings no bell. It offers the CPU to others all the time; those who make the next
 * request may be waiting for just this one.
 */
#define _GNU_SOURCE
#include <sched.h>

#include "host.h"

#define WORKERS_MAX 1024u
#define SPIN_STEPS 32 /* looks at the ring between two offers of the CPU to others */
/*
 * After a long request the next one takes longer to come, too, as its client and the front copy as much: so many bytes
 * are worth a nanosecond more.
 */
#define SPIN_BYTES 4
/* Watching in vain so often in a row makes it the exception: only each SPIN_PROBE-th time, until it has paid again. */
#define SPIN_TRIES 8
#define SPIN_PROBE 16
/*
 * Others may keep a CPU that is offered to them for so long. The threads that a spinning worker waits for need far less;
 * others use up their time slice, which is some milliseconds, whereas a thread that is woken comes before them. Where
 * that much (SPIN_LOST_NS) is lost to them within a period, spinning is left alone for a while.
 */
#define SPIN_YIELD_NS 300000u
#define SPIN_LOST_NS 20000000u
#define SPIN_PERIOD_NS 100000000u
#define SPIN_RESPITE_NS 250000000u
#define QUICK_BACKLOG 16 /* so many requests in the ring are worth another worker even where callouts are quick */

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int sleeping;     /* guarded by idle_lock: workers asleep on the bell, or about to be */
static bool spinning;             /* guarded by idle_lock */
static unsigned int in_quick;     /* guarded by idle_lock: workers that serve quick callouts one after another */
static unsigned int workers;      /* guarded by idle_lock: all of them */
static unsigned int expected = 1; /* guarded by idle_lock: callouts at a time, plus one */
static _Atomic unsigned int idle; /* sleeping + spinning; changed under idle_lock, read without */

static _Atomic unsigned int spin_limit_ns;
static _Atomic unsigned int spins_in_vain;  /* in a row */
static _Atomic uint64_t spin_respite_until; /* CLOCK_MONOTONIC, ns */
static uint64_t period_since;               /* of the worker that spins, as the next: when its period began */
static uint64_t period_lost;                /* ns in that period */

void worker_set_spin(unsigned int microseconds)
{
	if (microseconds > 1000)
		microseconds = 1000;
	atomic_store(&spin_limit_ns, microseconds * 1000);
}

/* idle_lock is held. */
static void publish(void)
{
	channel_publish_sleepers(spinning ? 0 : sleeping, in_quick > 0);
	atomic_store_explicit(&idle, sleeping + spinning, memory_order_relaxed);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* idle_lock is held. What the calling worker does next: to serve quick callouts, or something else. */
static void serves_quick(bool yes)
{
	static _Thread_local bool was;

	in_quick += yes;
	in_quick -= was;
	was = yes;
}

/* Called by the worker that spins: others have kept its CPU for ns. */
static bool lost_too_much(uint64_t ns, uint64_t now)
{
	if (now - period_since > SPIN_PERIOD_NS) {
		period_since = now;
		period_lost = 0;
	}
	period_lost += ns;
	if (period_lost < SPIN_LOST_NS)
		return false;
	period_lost = 0;
	return true;
}

static bool spin(struct submission *sub)
{
	unsigned int limit = atomic_load_explicit(&spin_limit_ns, memory_order_relaxed);
	unsigned int in_vain = atomic_load_explicit(&spins_in_vain, memory_order_relaxed);
	uint64_t start = clock_ns();
	bool found = false;

	if (!limit || start < atomic_load_explicit(&spin_respite_until, memory_order_relaxed))
		return false;
	if (sub->op == TCMUR_OP_READ || sub->op == TCMUR_OP_WRITE)
		limit += (sub->length < TCMUR_MAX_PAYLOAD ? sub->length : TCMUR_MAX_PAYLOAD) / SPIN_BYTES;
	if (in_vain >= SPIN_TRIES) {
		atomic_store_explicit(&spins_in_vain, in_vain + 1, memory_order_relaxed);
		if (in_vain % SPIN_PROBE)
			return false;
		limit *= 4; /* the next request comes sooner when nobody has to be woken for it any more */
	}
	pthread_mutex_lock(&idle_lock);
	if (spinning) {
		pthread_mutex_unlock(&idle_lock);
		return false;
	}
	spinning = true;
	serves_quick(false);
	publish();
	pthread_mutex_unlock(&idle_lock);

	for (;;) {
		uint64_t yielded, now;

		for (int i = 0; i < SPIN_STEPS && !found; i++) {
			found = channel_pop(sub);
			if (!found)
				cpu_relax();
		}
		yielded = clock_ns();
		if (found || yielded - start >= limit)
			break;
		sched_yield();
		now = clock_ns();
		if (now - yielded > SPIN_YIELD_NS && lost_too_much(now - yielded, now)) {
			atomic_store_explicit(&spin_respite_until, now + SPIN_RESPITE_NS, memory_order_relaxed);
			break;
		}
	}

	if (found)
		atomic_store_explicit(&spins_in_vain, 0, memory_order_relaxed);
	else if (in_vain < SPIN_TRIES)
		atomic_store_explicit(&spins_in_vain, in_vain + 1, memory_order_relaxed);

	pthread_mutex_lock(&idle_lock);
	spinning = false;
	serves_quick(found && pace_is_quick());
	publish();
	pthread_mutex_unlock(&idle_lock);
	return found;
}

static bool sleep_on_bell(struct submission *sub)
{
	bool found;

	pthread_mutex_lock(&idle_lock);
	sleeping++;
	serves_quick(false);
	publish();
	pthread_mutex_unlock(&idle_lock);
	atomic_thread_fence(memory_order_seq_cst);

	uint32_t bell = channel_bell();

	found = channel_pop(sub);
	if (!found)
		channel_sleep(bell);

	pthread_mutex_lock(&idle_lock);
	sleeping--;
	serves_quick(pace_is_quick());
	publish();
	pthread_mutex_unlock(&idle_lock);
	return found;
}

static void *worker_main(void *arg);

/*
 * Called by a worker that has work: somebody else has to see to the rest of the ring, now and while this one is busy, if
 * there is more in it than the given number of requests.
 */
static void pass_the_watch(unsigned int behind)
{
	bool start = false;

	if (!atomic_load_explicit(&idle, memory_order_relaxed)) {
		pthread_mutex_lock(&idle_lock);
		if (sleeping + spinning == 0 && workers < expected && workers < WORKERS_MAX) {
			workers++;
			start = true;
		}
		pthread_mutex_unlock(&idle_lock);
		if (start && thread_start("worker", worker_main, NULL) != 0) {
			/* Out of threads: those that there are go on, and the next request tries again. */
			pthread_mutex_lock(&idle_lock);
			workers--;
			pthread_mutex_unlock(&idle_lock);
		}
		return;
	}
	/*
	 * The front rings once per batch, or not at all while a worker spins, so the others are woken from here. A
	 * worker that has announced its sleep but is not asleep yet cannot be woken and may have looked at the ring too
	 * early: it will be asleep in a moment.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	while (channel_pending(behind)) {
		bool anybody;

		pthread_mutex_lock(&idle_lock);
		anybody = sleeping > 0 && !spinning;
		pthread_mutex_unlock(&idle_lock);
		if (!anybody || channel_wake())
			break;
		sched_yield();
	}
}

static void *worker_main(void *arg)
{
	struct submission sub = { 0 };
	struct request *req;
	struct pace batch = { 0 };
	bool quick = false;

	(void)arg;
	crash_thread_start();
	channel_defer_bell(true);
	for (;;) {
		if (!channel_pop(&sub)) {
			channel_ring();
			if (quick)
				pace_end(&batch);
			while (!spin(&sub) && !sleep_on_bell(&sub) && !channel_pop(&sub))
				;
			quick = pace_is_quick();
			if (quick)
				pace_begin(&batch);
		}
		if (quick) {
			pass_the_watch(QUICK_BACKLOG);
		} else {
			channel_ring();
			pass_the_watch(0);
		}
		req = device_admit(&sub);
		if (req)
			device_run(req, !quick);
		batch.callouts++;
	}
	return NULL;
}

void worker_expect(unsigned int callouts)
{
	bool first;

	pthread_mutex_lock(&idle_lock);
	expected += callouts;
	first = workers == 0;
	if (first)
		workers = 1;
	pthread_mutex_unlock(&idle_lock);
	if (first && thread_start("worker", worker_main, NULL) != 0) {
		pthread_mutex_lock(&idle_lock);
		workers = 0;
		pthread_mutex_unlock(&idle_lock);
	}
}

void worker_dismiss(unsigned int callouts)
{
	pthread_mutex_lock(&idle_lock);
	expected -= callouts;
	pthread_mutex_unlock(&idle_lock);
}

/*
 * Follow-ups: requests whose next callout may not be made where the previous one ended (a thread of the handler's, with
 * the handler's locks held), or comes later, and those of the host itself. They are rare. The threads that serve them
 * cannot wait on the bell, which only the front can change, and so are a pool of their own, grown like the other one.
 */
static pthread_mutex_t follow_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t follow_more = PTHREAD_COND_INITIALIZER;
static struct request *follow_head; /* guarded by follow_lock, as all below */
static struct request *follow_tail;
static unsigned int follow_queued;
static unsigned int follow_idle;
static unsigned int follow_threads;

static void *follow_main(void *arg)
{
	(void)arg;
	crash_thread_start();
	pthread_mutex_lock(&follow_lock);
	for (;;) {
		struct request *req;

		follow_idle++;
		while (!follow_head)
			pthread_cond_wait(&follow_more, &follow_lock);
		follow_idle--;
		req = follow_head;
		follow_head = req->next;
		if (!follow_head)
			follow_tail = NULL;
		follow_queued--;
		pthread_mutex_unlock(&follow_lock);
		device_run(req, false);
		pthread_mutex_lock(&follow_lock);
	}
	return NULL;
}

void worker_run(struct request *req)
{
	bool start;

	pthread_mutex_lock(&follow_lock);
	req->next = NULL;
	if (follow_tail)
		follow_tail->next = req;
	else
		follow_head = req;
	follow_tail = req;
	follow_queued++;
	start = follow_queued > follow_idle && follow_threads < WORKERS_MAX;
	if (start)
		follow_threads++;
	pthread_cond_signal(&follow_more);
	pthread_mutex_unlock(&follow_lock);
	if (start && thread_start("follow-up", follow_main, NULL) != 0) {
		pthread_mutex_lock(&follow_lock);
		follow_threads--;
		pthread_mutex_unlock(&follow_lock);
	}
}
