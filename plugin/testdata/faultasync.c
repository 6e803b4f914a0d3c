/* SPDX-License-Identifier: Apache-2.0 */
/* The handler of fault.c as an asynchronous one, so that both can be loaded at once. */
#define FAULT_SUBTYPE "faultasync"
#define FAULT_ASYNC true

#include "fault.c"
