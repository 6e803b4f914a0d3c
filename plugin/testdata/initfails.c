/* SPDX-License-Identifier: Apache-2.0 */
/* A handler that cannot start: its handler_init fails and says why. */
#include "tcmu-runner.h"

int handler_init(void)
{
	tcmu_err(NULL, "the license server is on fire\n");
	return -1;
}
