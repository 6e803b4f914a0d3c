/* SPDX-License-Identifier: Apache-2.0 */
/* A handler that takes its process down while it is loaded. */
#include <stdlib.h>

#include "tcmu-runner.h"

int handler_init(void)
{
	abort();
}
