/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a handler's status amounts to as an errno.
 */
#include <errno.h>

#include "host.h"

static int sense_to_errno(bool write, const uint8_t *sense)
{
	unsigned int key = sense[2] & 0x0f;
	unsigned int asc_ascq = (unsigned int)sense[12] << 8 | sense[13];

	switch (key) {
	case 0x2: /* NOT READY */
		return EAGAIN;
	case 0x5: /* ILLEGAL REQUEST */
		switch (asc_ascq) {
		case 0x2000: /* operation code */
			return EOPNOTSUPP;
		case 0x2100: /* block address out of range */
			return write ? ENOSPC : EINVAL;
		case 0x2400: /* field in CDB; zoned devices: the zone is full */
			return EINVAL;
		}
		return EIO;
	case 0x7:                                          /* DATA PROTECT */
		return asc_ascq == 0x550e ? EBUSY : EROFS; /* 550e: too many open zones */
	case 0xe:                                          /* MISCOMPARE */
		return EILSEQ;
	}
	return EIO;
}

int status_to_errno(int sts, bool write, const uint8_t *sense)
{
	switch (sts) {
	case TCMU_STS_OK:
		return 0;
	case TCMU_STS_NOT_HANDLED:
	case TCMU_STS_INVALID_CMD:
	case TCMU_STS_NOTSUPP_SAVE_PARAMS:
	case TCMU_STS_NOTSUPP_SEG_DESC_TYPE:
	case TCMU_STS_NOTSUPP_TGT_DESC_TYPE:
		return EOPNOTSUPP;
	case TCMU_STS_NO_RESOURCE:
		return ENOMEM;
	case TCMU_STS_PASSTHROUGH_ERR:
		return sense_to_errno(write, sense);
	case TCMU_STS_TRANSITION:
	case TCMU_STS_IMPL_TRANSITION_ERR:
		return EAGAIN;
	case TCMU_STS_MISCOMPARE:
		return EILSEQ;
	case TCMU_STS_INVALID_CDB:
	case TCMU_STS_INVALID_PARAM_LIST:
	case TCMU_STS_INVALID_PARAM_LIST_LEN:
	case TCMU_STS_INVALID_CP_TGT_DEV_TYPE:
		return EINVAL;
	case TCMU_STS_TIMEOUT:
		return ETIMEDOUT;
	case TCMU_STS_FENCED:
		return ESHUTDOWN;
	case TCMU_STS_RANGE:
		return write ? ENOSPC : EINVAL;
	case TCMU_STS_BUSY: /* for as long as retry.c has put up with it: EAGAIN would have programs try for ever */
	case TCMU_STS_FRMT_IN_PROGRESS:
		return EBUSY;
	case TCMU_STS_CAPACITY_CHANGED:
		return ESTALE;
	case TCMU_STS_WR_ERR_INCOMPAT_FRMT:
		return EROFS;
	case TCMU_STS_NO_LOCK_HOLDERS:
		return ENOLCK;
	case TCMU_STS_CP_TGT_DEV_NOTCONN:
		return ENODEV;
	case TCMU_STS_TOO_MANY_SEG_DESC:
	case TCMU_STS_TOO_MANY_TGT_DESC:
		return E2BIG;
	}
	return EIO;
}
