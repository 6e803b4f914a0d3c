/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A place in an array of buffers. Callouts walk the caller's array with one of these and leave the array as it is, so
 * that a caller can submit it again.
 */
#ifndef IOV_CURSOR_H
#define IOV_CURSOR_H

#include <stddef.h>
#include <string.h>
#include <sys/uio.h>

#include "bulk_copy.h"

struct iov_cursor {
	const struct iovec *iov; /* entry the place is in */
	size_t cnt;              /* entries from there on */
	size_t skip;             /* bytes of that entry already behind */
};

static inline struct iov_cursor iov_cursor_of(const struct iovec *iov, size_t cnt)
{
	return (struct iov_cursor){ .iov = iov, .cnt = cnt };
}

/* Stores the buffer at the place, cut to at most want bytes, and moves behind it. Returns its length, 0 at the end. */
static inline size_t iov_cursor_next(struct iov_cursor *c, size_t want, void **buf)
{
	size_t n;

	while (c->cnt && c->skip == c->iov->iov_len) {
		c->iov++;
		c->cnt--;
		c->skip = 0;
	}
	if (!c->cnt)
		return 0;

	n = c->iov->iov_len - c->skip;
	if (n > want)
		n = want;
	*buf = (char *)c->iov->iov_base + c->skip;
	c->skip += n;
	return n;
}

/* The following move on by len bytes, which must be there. */

static inline void iov_cursor_put(struct iov_cursor *c, const char *src, size_t len)
{
	void *buf;
	size_t n;

	for (; len && (n = iov_cursor_next(c, len, &buf)); src += n, len -= n)
		memcpy(buf, src, n);
}

static inline void iov_cursor_get(struct iov_cursor *c, char *dst, size_t len)
{
	void *buf;
	size_t n;

	for (; len && (n = iov_cursor_next(c, len, &buf)); dst += n, len -= n)
		memcpy(dst, buf, n);
}

/* As iov_cursor_get(), for bytes that nobody will look at soon. */
static inline void iov_cursor_get_bulk(struct iov_cursor *c, char *dst, size_t len)
{
	void *buf;
	size_t n;

	for (; len && (n = iov_cursor_next(c, len, &buf)); dst += n, len -= n)
		bulk_copy(dst, buf, n);
}

static inline void iov_cursor_zero(struct iov_cursor *c, size_t len)
{
	void *buf;
	size_t n;

	for (; len && (n = iov_cursor_next(c, len, &buf)); len -= n)
		memset(buf, 0, n);
}

#endif
