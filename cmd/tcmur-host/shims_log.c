/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Logging functions for handlers. The level is looked at before anything is formatted: handlers log several debug
 * messages per request.
 */
#include "host.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in tcmu-runner.h: known handlers do not use them. */
EXPORT void tcmu_dbg_scsi_cmd_message(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
EXPORT unsigned int tcmu_get_log_level(void);
EXPORT void tcmu_set_log_level(int level);

#define LOG_SHIM(name, level)                                                                \
	void name(struct tcmu_device *dev, const char *func, int line, const char *fmt, ...) \
	{                                                                                    \
		va_list args;                                                                \
                                                                                             \
		if (!log_wanted(level))                                                      \
			return;                                                              \
		va_start(args, fmt);                                                         \
		log_handler(level, dev, func, line, fmt, args);                              \
		va_end(args);                                                                \
	}

LOG_SHIM(tcmu_crit_message, LOG_CRITICAL)
LOG_SHIM(tcmu_err_message, LOG_ERROR)
LOG_SHIM(tcmu_warn_message, LOG_WARNING)
LOG_SHIM(tcmu_info_message, LOG_INFORMATION)
LOG_SHIM(tcmu_dbg_message, LOG_DEBUGGING)
LOG_SHIM(tcmu_dbg_scsi_cmd_message, LOG_SCSI_COMMANDS)

unsigned int tcmu_get_log_level(void)
{
	return (unsigned int)log_level_now();
}

void tcmu_set_log_level(int level)
{
	log_set_level(level);
}
