/* SPDX-License-Identifier: Apache-2.0 */
#ifndef RANGE_H
#define RANGE_H

#include <stdbool.h>
#include <stdint.h>

/* Whether length bytes at offset lie within size bytes; a negative off_t converted to uint64_t never does. */
static inline bool range_within(uint64_t size, uint64_t offset, uint64_t length)
{
	return offset <= size && length <= size - offset;
}

#endif
