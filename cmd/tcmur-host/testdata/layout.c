/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handler as an array of words, laid out as the struct of some version, or malformed; for tests.
 *
 *   -DWORDS=n    size of the struct in words: 20, 23, 25
 *   -DSTATIC     the struct has no dynamic symbol
 *   -DIMPORTS=s  what the object imports besides: a function called s
 *   -DBAD=n      what is wrong, see below
 */
#include <stdint.h>

extern int tcmur_register_handler(void *);

#ifdef IMPORTS
extern int IMPORTS(void);
int never(void);
int never(void)
{
	return IMPORTS();
}
#endif

static int callout(void)
{
	return 0;
}

#ifndef BAD
#define BAD 0
#endif
#define FN ((uintptr_t)&callout)

/* Any address that is not in this object. */
extern int printf(const char *, ...);

#ifdef STATIC
static
#endif
	uintptr_t some_handler[WORDS] = {
		[0] = (uintptr_t) "name",
		[1] = BAD == 1 ? 0x10 :
				 (uintptr_t)(BAD == 2 ? "a/b" :
					     BAD == 3 ? "" :
							"layout"),
		[2] = (uintptr_t) "description",
		[6] = BAD == 4 ? 0 : FN,                   /* open */
		[7] = FN,                                  /* close */
		[8] = BAD == 5 ? 5000 : 1,                 /* nr_threads */
		[10] = BAD == 6 ? 0 : FN,                  /* read */
		[11] = BAD == 7 ? (uintptr_t)&printf : FN, /* write */
		[WORDS == 20        ? 18 :
			WORDS == 23 ? 19 :
				      21] = BAD == 8 ? 1 : 0, /* _is_dbus_handler */
#if WORDS == 20
		[14] = FN, /* lock */
#elif WORDS == 23
	[14] = FN, /* report_event */
	[21] = FN, /* init */
#else
	[14] = FN, /* writesame */
	[15] = FN, /* caw */
	[24] = FN, /* destroy */
#endif
	};

int handler_init(void);
int handler_init(void)
{
#if BAD == 9
	return 7;
#elif BAD == 10
	return 0;
#elif BAD == 11
	return tcmur_register_handler((void *)0x1000);
#elif BAD == 12
	return tcmur_register_handler(some_handler) || tcmur_register_handler(some_handler);
#else
	return tcmur_register_handler(some_handler);
#endif
}
