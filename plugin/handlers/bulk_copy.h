/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies to memory that nobody is likely to look at soon. Past the processor's cache: an ordinary store first fetches
 * what it replaces, so that half of the traffic is for nothing, and what is copied drives out what is in use.
 */
#ifndef BULK_COPY_H
#define BULK_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

#define BULK_LINE 64u /* bytes that the processor writes at a time */

static inline void bulk_copy(char *dst, const char *src, size_t len)
{
	size_t head = -(uintptr_t)dst % BULK_LINE;

	if (len < head + BULK_LINE) {
		memcpy(dst, src, len);
		return;
	}
	memcpy(dst, src, head);
	for (dst += head, src += head, len -= head; len >= BULK_LINE; len -= BULK_LINE) {
		const __m128i *from = (const __m128i *)src;
		__m128i *to = (__m128i *)dst;
		__m128i a = _mm_loadu_si128(from);
		__m128i b = _mm_loadu_si128(from + 1);
		__m128i c = _mm_loadu_si128(from + 2);
		__m128i d = _mm_loadu_si128(from + 3);

		_mm_stream_si128(to, a);
		_mm_stream_si128(to + 1, b);
		_mm_stream_si128(to + 2, c);
		_mm_stream_si128(to + 3, d);
		dst += BULK_LINE;
		src += BULK_LINE;
	}
	_mm_sfence(); /* nothing else orders these stores before the ones that tell of them */
	memcpy(dst, src, len);
}
#else
static inline void bulk_copy(char *dst, const char *src, size_t len)
{
	memcpy(dst, src, len);
}
#endif

#endif
