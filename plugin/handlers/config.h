/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a device was configured with.
 */
#ifndef CONFIG_H
#define CONFIG_H

#include <stdint.h>

#include "tcmu-runner.h"

/* What follows the subtype in "subtype/rest", from the slash on; NULL without a slash. Points into cfgstring. */
const char *config_after_subtype(const char *cfgstring);

/* The configured size in bytes, 0 for none. */
uint64_t config_size(struct tcmu_device *dev);

/* Sees to it that the device has a block size, 512 if none is configured. Call before anything depends on it. */
void config_settle_block_size(struct tcmu_device *dev);

/*
 * Tells the size a device turned out to have, and what its discards are like: at least a page is given back at once,
 * and the handler takes ranges of any length, which read back zeroes. (tcmu-runner divides by the alignment, so it must not stay 0.)
 */
void config_announce(struct tcmu_device *dev, uint64_t size);

/* Tells that completed writes survive the death of the process, where anybody wants to know. */
void config_announce_survival(struct tcmu_device *dev);

/* Tells which kept memory holds what is on the device, where anybody wants to know. */
void config_announce_contents(struct tcmu_device *dev, const char *name);

/* Tells who knows where there are holes, where anybody wants to know. */
void config_announce_seek(struct tcmu_device *dev, tcmur_seek_fn_t fn);

/*
 * Reads a size: digits, then K, M, G, T or P (powers of 1024, either case), or the same with iB, or nothing. 0, or
 * -EINVAL for anything else, or -ERANGE for 2^63 and more.
 */
int config_parse_size(const char *text, uint64_t *size);

#endif
