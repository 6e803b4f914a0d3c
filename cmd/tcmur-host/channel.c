/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's side of the I/O channel; shared/channel.h has the layout and the rules.
 *
 * The front is not trusted more than necessary: each shared value is read once, then checked, then used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"

/* Constant once channel_map() has succeeded. */
static const struct tcmur_submit *submit;
static struct tcmur_complete *complete;
static const uint8_t *submit_arena;
static uint8_t *complete_arena;
static uint64_t submit_arena_size;
static uint64_t complete_arena_size;

/* Ring positions; private, see the rules in channel.h. */
static _Alignas(64) _Atomic uint64_t sq_head;
static _Alignas(64) _Atomic uint64_t cq_tail;

static void *map(int fd, int prot, off_t *size)
{
	struct stat st;
	void *p;

	if (fstat(fd, &st) < 0)
		return NULL;
	*size = st.st_size;
	if (st.st_size < (off_t)TCMUR_ARENA_OFFSET) {
		errno = EINVAL;
		return NULL;
	}
	p = mmap(NULL, (size_t)st.st_size, prot, MAP_SHARED, fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

int channel_map(int submit_fd, int complete_fd, char *why)
{
	off_t submit_size = 0, complete_size = 0;
	const struct tcmur_submit *s;
	struct tcmur_complete *c;
	uint64_t s_arena, c_arena;

	s = map(submit_fd, PROT_READ, &submit_size);
	if (!s) {
		int err = errno;

		snprintf(why, NATIVE_WHY_SIZE, "cannot map the submit segment (%lld bytes)", (long long)submit_size);
		return err;
	}
	c = map(complete_fd, PROT_READ | PROT_WRITE, &complete_size);
	if (!c) {
		int err = errno;

		snprintf(why, NATIVE_WHY_SIZE, "cannot map the complete segment (%lld bytes)",
			 (long long)complete_size);
		return err;
	}
	if (s->magic != TCMUR_CHANNEL_MAGIC || s->version != TCMUR_CHANNEL_VERSION) {
		snprintf(why, NATIVE_WHY_SIZE,
			 "the submit segment has magic %#x, version %u, but this host needs %#x, %u: "
			 "front and host are of different builds",
			 s->magic, s->version, TCMUR_CHANNEL_MAGIC, TCMUR_CHANNEL_VERSION);
		return EPROTO;
	}
	s_arena = *(const volatile uint64_t *)&s->submit_arena_size;
	c_arena = *(const volatile uint64_t *)&s->complete_arena_size;
	if (s_arena > (uint64_t)submit_size - TCMUR_ARENA_OFFSET ||
	    c_arena > (uint64_t)complete_size - TCMUR_ARENA_OFFSET) {
		snprintf(why, NATIVE_WHY_SIZE, "arenas of %llu and %llu bytes do not fit segments of %lld and %lld",
			 (unsigned long long)s_arena, (unsigned long long)c_arena, (long long)submit_size,
			 (long long)complete_size);
		return EINVAL;
	}
	submit = s;
	complete = c;
	submit_arena = (const uint8_t *)s + TCMUR_ARENA_OFFSET;
	complete_arena = (uint8_t *)c + TCMUR_ARENA_OFFSET;
	submit_arena_size = s_arena;
	complete_arena_size = c_arena;
	return 0;
}

static const struct tcmur_sqe *entry_at(uint64_t position)
{
	return &submit->sq[position % TCMUR_RING_ENTRIES];
}

bool channel_pop(struct submission *sub)
{
	uint64_t head = atomic_load_explicit(&sq_head, memory_order_relaxed);

	for (;;) {
		const struct tcmur_sqe *e = entry_at(head);
		/* A pointer to a const _Atomic may not be loaded from with C11's macros in all compilers. */
		uint64_t seq = __atomic_load_n((const uint64_t *)&e->seq, __ATOMIC_ACQUIRE);
		uint64_t now;

		if (seq != head + 1) {
			/* Empty, or another worker has claimed this entry and the front has used it again. */
			now = atomic_load_explicit(&sq_head, memory_order_relaxed);
			if (now == head)
				return false;
			head = now;
			continue;
		}
		sub->tag = __atomic_load_n(&e->tag, __ATOMIC_RELAXED);
		sub->gen = __atomic_load_n(&e->gen, __ATOMIC_RELAXED);
		sub->op = __atomic_load_n(&e->op, __ATOMIC_RELAXED);
		sub->device = __atomic_load_n(&e->device, __ATOMIC_RELAXED);
		sub->offset = __atomic_load_n(&e->offset, __ATOMIC_RELAXED);
		sub->length = __atomic_load_n(&e->length, __ATOMIC_RELAXED);
		sub->payload = __atomic_load_n(&e->payload, __ATOMIC_RELAXED);
		sub->flags = __atomic_load_n(&e->flags, __ATOMIC_RELAXED);
		/*
		 * Claim. While head has not moved the entry's request has not completed, so the front has not written
		 * to it, and the copy is whole. Release keeps the loads above before the claim.
		 */
		if (atomic_compare_exchange_weak_explicit(&sq_head, &head, head + 1, memory_order_acq_rel,
							  memory_order_relaxed))
			return true;
	}
}

bool channel_pending(unsigned int behind)
{
	uint64_t position = atomic_load_explicit(&sq_head, memory_order_relaxed) + behind;

	return __atomic_load_n((const uint64_t *)&entry_at(position)->seq, __ATOMIC_ACQUIRE) == position + 1;
}

/* Not FUTEX_PRIVATE_FLAG: the other side is another process. */
static long futex(const void *word, int op, uint32_t value)
{
	return syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

/* Of this thread: whether it rings later, and completions that it has posted since it last rang. */
static _Thread_local bool bell_deferred;
static _Thread_local unsigned int unrung;

/* Completions that share a bell at most: the front has work to do meanwhile. */
#define BELL_BATCH 8

void channel_ring(void)
{
	if (!unrung)
		return;
	unrung = 0;
	atomic_thread_fence(memory_order_seq_cst);
	if (__atomic_load_n((const uint32_t *)&submit->cq_waiting, __ATOMIC_RELAXED) != TCMUR_WAITING_ASLEEP)
		return;
	atomic_fetch_add_explicit(&complete->cq_bell, 1, memory_order_release);
	futex(&complete->cq_bell, FUTEX_WAKE, 1);
}

void channel_defer_bell(bool defer)
{
	bell_deferred = defer;
	if (!defer)
		channel_ring();
}

void channel_post(uint32_t tag, uint32_t gen, int sts, int error, uint64_t handler_ns, bool in_place)
{
	uint64_t position = atomic_fetch_add_explicit(&cq_tail, 1, memory_order_relaxed);
	struct tcmur_cqe *e = &complete->cq[position % TCMUR_RING_ENTRIES];

	e->tag = tag;
	e->gen = gen;
	e->sts = sts;
	e->error = (uint16_t)error;
	e->flags = in_place ? TCMUR_CQE_IN_PLACE : 0;
	e->handler_ns = handler_ns;
	atomic_store_explicit(&e->seq, position + 1, memory_order_release);

	unrung++;
	if (!bell_deferred || unrung >= BELL_BATCH)
		channel_ring();
}

static bool inside(uint64_t at, uint64_t length, uint64_t size)
{
	return length <= size && at <= size - length;
}

uint8_t *channel_read_payload(uint64_t at, uint64_t length)
{
	return inside(at, length, complete_arena_size) ? complete_arena + at : NULL;
}

uint8_t *channel_write_payload(uint64_t at, uint64_t length)
{
	/* iovecs have no const; the mapping is read-only, which holds handlers to it. */
	return inside(at, length, submit_arena_size) ? (uint8_t *)(uintptr_t)(submit_arena + at) : NULL;
}

void channel_publish_sleepers(uint32_t n, bool back_soon)
{
	atomic_store_explicit(&complete->sq_sleepers, back_soon ? n | TCMUR_SLEEPERS_BACK_SOON : n,
			      memory_order_relaxed);
}

uint32_t channel_bell(void)
{
	return __atomic_load_n((const uint32_t *)&submit->sq_bell, __ATOMIC_ACQUIRE);
}

void channel_sleep(uint32_t bell)
{
	/* Whatever it returns (woken, changed, interrupted), the caller looks at the ring again. */
	futex(&submit->sq_bell, FUTEX_WAIT, bell);
}

bool channel_wake(void)
{
	return futex(&submit->sq_bell, FUTEX_WAKE, 1) > 0;
}
