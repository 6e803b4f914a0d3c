/* SPDX-License-Identifier: Apache-2.0 */
/* A shared object that is no handler: it has no handler_init. */
int noinit_is_no_handler;
