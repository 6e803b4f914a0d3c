/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The I/O channel between the front (fuse_tcmur) and one host (tcmur-host): the one definition of its memory layout.
 * shared/layout.go is Go's view of the same bytes; TestLayoutMatchesHeader holds the two equal. docs/PROTOCOL.md is the
 * prose.
 *
 * A channel is two memory segments, each a memfd sealed against shrinking and growing (a shrunk mapping is SIGBUS in
 * its reader):
 *
 *   submit    written by the front only. Sealed with F_SEAL_FUTURE_WRITE once the front has mapped it, so that a host
 *             can map it only read-only: whatever a handler scribbles on, requests and write payloads stay as sent.
 *   complete  written by the host only. The front maps it read-only and believes nothing in it unchecked.
 *
 * So each word has one writer, and the memory management unit enforces it. All fields are little-endian (native on
 * every supported machine), naturally aligned and fixed-width; lengths and offsets are bytes.
 */
#ifndef TCMUR_CHANNEL_H
#define TCMUR_CHANNEL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define TCMUR_CHANNEL_MAGIC 0x524d4354u /* "TCMR" */
#define TCMUR_CHANNEL_VERSION 2u
#define TCMUR_RING_ENTRIES 512u        /* entries of each ring; also the most requests that can be in flight */
#define TCMUR_MAX_PAYLOAD (1u << 20)   /* bytes; the most that one request may carry */
#define TCMUR_ARENA_OFFSET (64u << 10) /* start of the payload arena in either segment */

enum tcmur_op {
	TCMUR_OP_READ = 1,  /* payload: complete arena, host writes it */
	TCMUR_OP_WRITE = 2, /* payload: submit arena, host reads it */
	TCMUR_OP_FLUSH = 3, /* no payload, offset and length are 0 */
	TCMUR_OP_UNMAP = 4, /* no payload; contents of the range become undefined */
	TCMUR_OP_ZERO = 5,  /* no payload; the range reads back zeroes */
};

/* A READ whose data need not be copied if the device's contents are in memory that the front has: see TCMUR_CQE_IN_PLACE. */
#define TCMUR_SQE_IN_PLACE 1u

/* Submission queue entry. Written by the front. */
struct tcmur_sqe {
	_Atomic uint64_t seq; /*  0: position + 1 once the rest is valid (release / acquire) */
	uint32_t tag;         /*  8: names the request; echoed in its completion */
	uint32_t gen;         /* 12: counts the uses of the tag; echoed */
	uint32_t op;          /* 16: enum tcmur_op */
	uint32_t device;      /* 20: index given in the Open call */
	uint64_t offset;      /* 24: where on the device */
	uint64_t length;      /* 32: payload operations: at most TCMUR_MAX_PAYLOAD */
	uint64_t payload;     /* 40: where in the arena; payload + length never exceeds the arena */
	uint32_t flags;       /* 48: TCMUR_SQE_* */
	uint32_t reserved0;   /* 52: 0 */
	uint64_t reserved1;   /* 56: 0 */
};

/*
 * Nothing is in the payload: the data is in the device's contents, at the request's own offset. Only with success, and
 * for a READ that had TCMUR_SQE_IN_PLACE.
 */
#define TCMUR_CQE_IN_PLACE 1u

/* Completion queue entry. Written by the host. */
struct tcmur_cqe {
	_Atomic uint64_t seq; /*  0: position + 1 once the rest is valid (release / acquire) */
	uint32_t tag;         /*  8: as submitted */
	uint32_t gen;         /* 12: as submitted */
	int32_t sts;          /* 16: the handler's TCMU_STS code; 0 is success */
	uint16_t error;       /* 20: 0, or the errno (positive) that sts and the operation amount to */
	uint16_t flags;       /* 22: TCMUR_CQE_* */
	uint64_t handler_ns;  /* 24: how long the handler had the request, in nanoseconds; 0: not measured */
};

/*
 * cq_waiting is a sum. While a thread attends to completions it takes them without being woken. Otherwise the completion
 * thread has to be woken if it is asleep on cq_bell, or about to be.
 */
#define TCMUR_WAITING_ASLEEP 1u  /* the completion thread, of which there is one */
#define TCMUR_WAITING_ATTENDS 2u /* some thread attends */

/* In sq_sleepers, beside the number: a worker that is in a quick callout will look at the ring when it returns. */
#define TCMUR_SLEEPERS_BACK_SOON 0x80000000u

/* Head of the submit segment. Written by the front. */
struct tcmur_submit {
	uint32_t magic;               /*   0: TCMUR_CHANNEL_MAGIC */
	uint32_t version;             /*   4: TCMUR_CHANNEL_VERSION */
	uint64_t submit_arena_size;   /*   8: bytes */
	uint64_t complete_arena_size; /*  16: bytes */
	uint8_t pad0[40];
	_Atomic uint32_t sq_bell; /*  64: futex: changed by the front before it wakes sleeping workers */
	uint8_t pad1[60];
	_Atomic uint32_t cq_waiting; /* 128: who waits for completions: TCMUR_WAITING_* */
	uint8_t pad2[4096 - 132];
	struct tcmur_sqe sq[TCMUR_RING_ENTRIES]; /* 4096 */
};

/* Head of the complete segment. Written by the host. */
struct tcmur_complete {
	uint8_t pad0[64];
	_Atomic uint32_t cq_bell; /*  64: futex: changed by the host before it wakes the front */
	uint8_t pad1[60];
	_Atomic uint32_t sq_sleepers; /* 128: workers asleep, or about to be, on sq_bell */
	uint8_t pad2[60];
	uint8_t robust[64]; /* 192: reserved for a robust mutex that a host thread holds for life */
	uint8_t pad3[4096 - 256];
	struct tcmur_cqe cq[TCMUR_RING_ENTRIES]; /* 4096 */
};

_Static_assert(sizeof(struct tcmur_sqe) == 64, "sqe is one cache line");
_Static_assert(sizeof(struct tcmur_cqe) == 32, "cqe is half a cache line");
_Static_assert(sizeof(struct tcmur_submit) <= TCMUR_ARENA_OFFSET, "submit head overlaps its arena");
_Static_assert(sizeof(struct tcmur_complete) <= TCMUR_ARENA_OFFSET, "complete head overlaps its arena");

/*
 * Rules both sides keep
 *
 * Ring positions are 64-bit counters that never wrap; entry = position % TCMUR_RING_ENTRIES. The front has at most
 * TCMUR_RING_ENTRIES requests in flight, so neither ring can overflow and neither side reads the other's consumer
 * position: those are private. Several host workers pop: each copies the entry first and then claims it by
 * compare-and-swap on the private head, so that an entry is never overwritten while it is read.
 *
 * Sleeping: the sleeper announces itself (sq_sleepers, cq_waiting), executes a full barrier, looks at the ring once
 * more, and only then waits on the bell with the value it read before that look. The waker publishes, executes a
 * full barrier, and then looks at the announcement. Either the sleeper sees the entry or the waker sees the sleeper.
 */

#endif
