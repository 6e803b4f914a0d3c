/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scatter-gather helpers for handlers. Those that "consume" leave what they have used up with length 0, and advance the
 * entry that they stopped in; the number of entries stays.
 */
#include <string.h>

#include "host.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in tcmu-runner.h: known handlers do not use it. */
EXPORT void tcmu_cmd_seek(struct tcmulib_cmd *cmd, size_t count);

size_t tcmu_iovec_length(struct iovec *iov, size_t iov_cnt)
{
	size_t sum = 0;

	while (iov_cnt--)
		sum += iov++->iov_len;
	return sum;
}

static void advance(struct iovec *iov, size_t n)
{
	iov->iov_base = (char *)iov->iov_base + n;
	iov->iov_len -= n;
}

size_t tcmu_iovec_seek(struct iovec *iov, size_t count)
{
	size_t used_up = 0;

	for (; count; iov++) {
		if (count < iov->iov_len) {
			advance(iov, count);
			break;
		}
		count -= iov->iov_len;
		iov->iov_len = 0;
		used_up++;
	}
	return used_up;
}

void tcmu_cmd_seek(struct tcmulib_cmd *cmd, size_t count)
{
	cmd->iov_cnt -= tcmu_iovec_seek(cmd->iovec, count);
}

void tcmu_iovec_zero(struct iovec *iov, size_t iov_cnt)
{
	for (; iov_cnt; iov++, iov_cnt--) {
		if (iov->iov_len)
			memset(iov->iov_base, 0, iov->iov_len);
	}
}

bool tcmu_iovec_zeroed(struct iovec *iov, size_t iov_cnt)
{
	for (; iov_cnt; iov++, iov_cnt--) {
		const uint8_t *p = iov->iov_base;

		/* The first byte is 0 and each one equals its successor. */
		if (iov->iov_len && (p[0] || memcmp(p, p + 1, iov->iov_len - 1)))
			return false;
	}
	return true;
}

off_t tcmu_iovec_compare(void *mem, struct iovec *iov, size_t size)
{
	const uint8_t *left = mem;
	size_t at = 0;

	for (; at < size; iov++) {
		const uint8_t *right = iov->iov_base;
		size_t n = iov->iov_len < size - at ? iov->iov_len : size - at;

		if (n && memcmp(left + at, right, n)) {
			while (*right == left[at]) {
				right++;
				at++;
			}
			return (off_t)at;
		}
		at += n;
	}
	return -1;
}

static size_t copy(struct iovec *iov, size_t iov_cnt, uint8_t *mem, size_t len, bool into)
{
	size_t done = 0;

	for (; iov_cnt && done < len; iov++, iov_cnt--) {
		size_t n = iov->iov_len < len - done ? iov->iov_len : len - done;

		if (!n)
			continue;
		if (into)
			memcpy(iov->iov_base, mem + done, n);
		else
			memcpy(mem + done, iov->iov_base, n);
		advance(iov, n);
		done += n;
	}
	return done;
}

size_t tcmu_memcpy_into_iovec(struct iovec *iov, size_t iov_cnt, void *src, size_t len)
{
	return copy(iov, iov_cnt, src, len, true);
}

size_t tcmu_memcpy_from_iovec(void *dest, size_t len, struct iovec *iov, size_t iov_cnt)
{
	return copy(iov, iov_cnt, dest, len, false);
}
