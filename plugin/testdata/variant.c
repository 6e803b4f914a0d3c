/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handler of fault.c under another name, for tests that replace one by the other. VARIANT_NAME is the name; with
 * VARIANT_REFUSES it opens no device, with VARIANT_CRASHES it dies of the first one.
 */
#define handler_init fault_handler_init
#include "fault.c"
#undef handler_init

#ifndef VARIANT_NAME
#define VARIANT_NAME "Fault injection, as it was"
#endif

#if defined(VARIANT_REFUSES) || defined(VARIANT_CRASHES)
static int spoilt_open(struct tcmu_device *dev, bool reopen)
{
	(void)reopen;
#ifdef VARIANT_CRASHES
	abort();
#endif
	tcmu_err(dev, "this version opens nothing\n");
	return -EACCES;
}
#endif

int handler_init(void)
{
	fault_handler.name = VARIANT_NAME;
#if defined(VARIANT_REFUSES) || defined(VARIANT_CRASHES)
	fault_handler.open = spoilt_open;
#endif
	return fault_handler_init();
}
