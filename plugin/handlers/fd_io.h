/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whole transfers between a file descriptor and buffers: short transfers and interruptions are continued.
 */
#ifndef FD_IO_H
#define FD_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "iov_cursor.h"

/*
 * Both move the cursor and return how many bytes were transferred: len, or less with errno set (0 where the file ends
 * before len bytes). The buffers must have len bytes.
 */
size_t fd_read(int fd, struct iov_cursor *to, size_t len, uint64_t offset);
size_t fd_write(int fd, struct iov_cursor *from, size_t len, uint64_t offset);

/*
 * Where, from offset on and before size, the file has data (-ENXIO: nowhere) or a hole, at the latest at size; or
 * another negative errno.
 */
int64_t fd_seek(int fd, uint64_t offset, uint64_t size, bool hole);

#endif
