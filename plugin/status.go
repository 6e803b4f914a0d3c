// SPDX-License-Identifier: Apache-2.0

package plugin

import "fmt"

// Status is a TCMU_STS code: what a handler reports of a finished request. The host translates it to an errno
// (docs/PROTOCOL.md has the table); the code itself reaches a Command's Done.
type Status int32

// The codes that this package itself produces or treats specially; handlers use all of them.
const (
	StatusNotHandled Status = -1
	StatusOK         Status = 0
	StatusHWError    Status = 13 // also: the handler's process died with the request
)

var statusNames = map[Status]string{
	-2: "ASYNC_HANDLED", -1: "NOT_HANDLED", 0: "OK", 1: "NO_RESOURCE", 2: "PASSTHROUGH_ERR", 3: "BUSY", 4: "WR_ERR",
	5: "RD_ERR", 6: "MISCOMPARE", 7: "INVALID_CMD", 8: "INVALID_CDB", 9: "INVALID_PARAM_LIST",
	10: "INVALID_PARAM_LIST_LEN", 11: "TIMEOUT", 12: "FENCED", 13: "HW_ERR", 14: "RANGE", 15: "FRMT_IN_PROGRESS",
	16: "CAPACITY_CHANGED", 17: "NOTSUPP_SAVE_PARAMS", 18: "WR_ERR_INCOMPAT_FRMT", 19: "TRANSITION",
	20: "IMPL_TRANSITION_ERR", 21: "EXPL_TRANSITION_ERR", 22: "NO_LOCK_HOLDERS", 23: "NOTSUPP_SEG_DESC_TYPE",
	24: "NOTSUPP_TGT_DESC_TYPE", 25: "CP_TGT_DEV_NOTCONN", 26: "INVALID_CP_TGT_DEV_TYPE", 27: "TOO_MANY_SEG_DESC",
	28: "TOO_MANY_TGT_DESC",
}

// String is the name that libtcmu_common.h gives the code, without its prefix.
func (s Status) String() string {
	if n, ok := statusNames[s]; ok {
		return n
	}
	return fmt.Sprintf("STS_%d", int32(s))
}
