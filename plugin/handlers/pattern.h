/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pattern of a write-same.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct pattern {
	char *buf;   /* the pattern, as often as it fits into a buffer worth writing at once */
	size_t size; /* bytes of buf, a multiple of the pattern's */
	bool zero;   /* all of it is zeroes */
};

/*
 * Takes the pattern from the buffers. length is the range that is to be filled. Returns a TCMU_STS: OK, or INVALID_CDB
 * unless the range is a multiple of the pattern, or NO_RESOURCE without memory. After OK the caller owes
 * pattern_free().
 */
int pattern_take(struct pattern *p, const struct iovec *iov, size_t iov_cnt, uint64_t length);
void pattern_free(struct pattern *p);

#endif
