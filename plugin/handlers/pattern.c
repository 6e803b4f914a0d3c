/* SPDX-License-Identifier: Apache-2.0 */
#include "pattern.h"

#include <stdlib.h>
#include <string.h>

#include "iov_cursor.h"
#include "tcmu-runner.h"

#define FILL_BUFFER (256u << 10) /* bytes; large enough that the system calls do not matter */

int pattern_take(struct pattern *p, const struct iovec *iov, size_t iov_cnt, uint64_t length)
{
	struct iov_cursor cursor = iov_cursor_of(iov, iov_cnt);
	size_t one = 0, times, i;

	for (i = 0; i < iov_cnt; i++)
		one += iov[i].iov_len;
	if (!one || length % one)
		return TCMU_STS_INVALID_CDB;

	times = one < FILL_BUFFER ? FILL_BUFFER / one : 1;
	if (length / one < times)
		times = length ? length / one : 1;
	p->size = one * times;
	p->buf = malloc(p->size);
	if (!p->buf)
		return TCMU_STS_NO_RESOURCE;

	iov_cursor_get(&cursor, p->buf, one);
	p->zero = p->buf[0] == 0 && !memcmp(p->buf, p->buf + 1, one - 1);
	for (i = 1; i < times; i++)
		memcpy(p->buf + i * one, p->buf, one);
	return TCMU_STS_OK;
}

void pattern_free(struct pattern *p)
{
	free(p->buf);
}
