/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool of request objects.
 *
 * Objects come from calloc and are never given back: a tcmur_cmd pointer that a handler keeps too long always points to
 * a request, whose state says that nothing is expected from it. The pool is first in, first out, so that an object
 * rests as long as possible before it serves again and a late second completion is recognised as one.
 */
#include <stdlib.h>

#include "host.h"

#define POOL_CHUNK 64u

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static struct request *pool_head; /* guarded by pool_lock, as all below */
static struct request *pool_tail;
static unsigned int pool_free;

static void append(struct request *req)
{
	req->next = NULL;
	if (pool_tail)
		pool_tail->next = req;
	else
		pool_head = req;
	pool_tail = req;
	pool_free++;
}

static bool grow(void)
{
	struct request *chunk = calloc(POOL_CHUNK, sizeof(*chunk));

	if (!chunk)
		return false;
	for (unsigned int i = 0; i < POOL_CHUNK; i++) {
		atomic_init(&chunk[i].state, REQUEST_IDLE);
		append(&chunk[i]);
	}
	return true;
}

struct request *request_alloc(void)
{
	struct request *req = NULL;

	pthread_mutex_lock(&pool_lock);
	/* Never down to the last few: the rest that the comment above speaks of. */
	if (pool_free > POOL_CHUNK / 2 || grow() || pool_head) {
		req = pool_head;
		pool_head = req->next;
		if (!pool_head)
			pool_tail = NULL;
		pool_free--;
	}
	pthread_mutex_unlock(&pool_lock);
	if (req) {
		req->next = NULL;
		req->retry_until = 0;
		req->resent = false;
	}
	return req;
}

void request_free(struct request *req)
{
	pthread_mutex_lock(&pool_lock);
	append(req);
	pthread_mutex_unlock(&pool_lock);
}
