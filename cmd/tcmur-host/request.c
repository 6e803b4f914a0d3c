/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool of request objects, one for each device: its users hold the device's lock anyway.
 *
 * Objects come from calloc and are never given back: a tcmur_cmd pointer that a handler keeps too long always points to
 * a request, whose state says that nothing is expected from it. The pool is first in, first out, so that an object
 * rests as long as possible before it serves again and a late second completion is recognised as one.
 */
#include <stdlib.h>

#include "host.h"

#define POOL_CHUNK 64u

static bool grow(struct request_pool *pool)
{
	struct request *chunk = calloc(POOL_CHUNK, sizeof(*chunk));

	if (!chunk)
		return false;
	for (unsigned int i = 0; i < POOL_CHUNK; i++) {
		atomic_init(&chunk[i].state, REQUEST_IDLE);
		request_free(pool, &chunk[i]);
	}
	return true;
}

struct request *request_alloc(struct request_pool *pool)
{
	struct request *req;

	/* Never down to the last few: the rest that the comment above speaks of. */
	if (pool->free <= POOL_CHUNK / 2 && !grow(pool) && !pool->head)
		return NULL;
	req = pool->head;
	pool->head = req->next;
	if (!pool->head)
		pool->tail = NULL;
	pool->free--;
	req->next = NULL;
	req->result = NULL;
	req->done = 0;
	req->retry_until = 0;
	req->resent = false;
	req->timed = false;
	req->may_in_place = false;
	req->started = 0;
	return req;
}

void request_free(struct request_pool *pool, struct request *req)
{
	req->next = NULL;
	if (pool->tail)
		pool->tail->next = req;
	else
		pool->head = req;
	pool->tail = req;
	pool->free++;
}
