/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fixed-format sense data, as handlers fill it in.
 */
#include <string.h>

#include "host.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in tcmu-runner.h: known handlers do not use it. */
EXPORT void __tcmu_sense_set_data(uint8_t *sense_buf, uint8_t key, uint16_t asc_ascq);

#define SENSE_HEAD 18 /* bytes of fixed-format sense data proper */

void __tcmu_sense_set_data(uint8_t *sense_buf, uint8_t key, uint16_t asc_ascq)
{
	sense_buf[0] = 0x70; /* current error, fixed format */
	sense_buf[2] = key;
	sense_buf[7] = 10; /* additional length */
	sense_buf[12] = (uint8_t)(asc_ascq >> 8);
	sense_buf[13] = (uint8_t)asc_ascq;
}

int tcmu_sense_set_data(uint8_t *sense_buf, uint8_t key, uint16_t asc_ascq)
{
	memset(sense_buf, 0, TCMU_SENSE_BUFFERSIZE);
	__tcmu_sense_set_data(sense_buf, key, asc_ascq);
	return TCMU_STS_PASSTHROUGH_ERR;
}

void tcmu_sense_set_info(uint8_t *sense_buf, uint32_t info)
{
	memset(sense_buf, 0, SENSE_HEAD);
	sense_buf[0] |= 0x80; /* the information field is valid */
	sense_buf[3] = (uint8_t)(info >> 24);
	sense_buf[4] = (uint8_t)(info >> 16);
	sense_buf[5] = (uint8_t)(info >> 8);
	sense_buf[6] = (uint8_t)info;
}

void tcmu_sense_set_key_specific_info(uint8_t *sense_buf, uint16_t info)
{
	memset(sense_buf, 0, SENSE_HEAD);
	sense_buf[15] |= 0x80; /* the sense-key specific field is valid */
	sense_buf[16] = (uint8_t)(info >> 8);
	sense_buf[17] = (uint8_t)info;
}
