/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A peer of the benchmark: memory as a file of a multithreaded server of libfuse's low-level API, with a /dev/fuse
 * descriptor per thread. It shows what FUSE itself costs, as far as can be told in C.
 *
 *	mem MOUNTPOINT BYTES [writeback]
 *
 * The mount holds the same memory twice: "direct" bypasses the page cache, "cached" uses it, and writes through it
 * unless told to write back.
 * It runs until it is unmounted, or SIGINT or SIGTERM ends it.
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#include <errno.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum {
	ROOT = FUSE_ROOT_ID,
	DIRECT,
	CACHED
};

#define MAX_WRITE (1u << 20)
#define MAX_BACKGROUND 256
#define MAX_THREADS 32
#define TIMEOUT 3600.0 /* seconds; a page-cached file whose attributes expire costs a GETATTR per read */

static char *data;
static size_t size;
static bool writeback;

static void fill_attr(fuse_ino_t ino, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	st->st_ino = ino;
	st->st_nlink = 1;
	st->st_blksize = 4096;
	st->st_mode = S_IFDIR | 0700;
	if (ino != ROOT) {
		st->st_mode = S_IFREG | 0600;
		st->st_size = (off_t)size;
	}
}

static void mem_init(void *userdata, struct fuse_conn_info *conn)
{
	(void)userdata;
	conn->max_write = MAX_WRITE;
	conn->max_background = MAX_BACKGROUND;
	conn->congestion_threshold = MAX_BACKGROUND;
	conn->want |= conn->capable & FUSE_CAP_ASYNC_DIO;
	if (writeback)
		conn->want |= conn->capable & FUSE_CAP_WRITEBACK_CACHE;
}

static void mem_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .attr_timeout = TIMEOUT, .entry_timeout = TIMEOUT };

	(void)parent;
	if (strcmp(name, "direct") == 0)
		entry.ino = DIRECT;
	else if (strcmp(name, "cached") == 0)
		entry.ino = CACHED;
	else {
		fuse_reply_err(req, ENOENT);
		return;
	}
	fill_attr(entry.ino, &entry.attr);
	fuse_reply_entry(req, &entry);
}

static void mem_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct stat st;

	(void)info;
	fill_attr(ino, &st);
	fuse_reply_attr(req, &st, TIMEOUT);
}

/* What is set are the times of a file that is written back. */
static void mem_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *info)
{
	(void)attr;
	(void)to_set;
	mem_getattr(req, ino, info);
}

/* Replies in the kernel's own format: struct fuse_file_info has no parallel direct writes before libfuse 3.15. */
static void mem_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct fuse_open_out out = { 0 };

	(void)info;
	if (ino == DIRECT)
		out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
	fuse_reply_buf(req, (const char *)&out, sizeof(out));
}

static void mem_read(fuse_req_t req, fuse_ino_t ino, size_t length, off_t offset, struct fuse_file_info *info)
{
	size_t begin = (size_t)offset < size ? (size_t)offset : size;

	(void)ino;
	(void)info;
	fuse_reply_buf(req, data + begin, length < size - begin ? length : size - begin);
}

static void mem_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t length, off_t offset,
		      struct fuse_file_info *info)
{
	(void)ino;
	(void)info;
	if ((size_t)offset >= size) {
		fuse_reply_err(req, ENOSPC);
		return;
	}
	if (length > size - (size_t)offset)
		length = size - (size_t)offset;
	memcpy(data + offset, buf, length);
	fuse_reply_write(req, length);
}

static void mem_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *info)
{
	(void)ino;
	(void)datasync;
	(void)info;
	fuse_reply_err(req, 0);
}

static const struct fuse_lowlevel_ops ops = {
	.init = mem_init,
	.lookup = mem_lookup,
	.getattr = mem_getattr,
	.setattr = mem_setattr,
	.open = mem_open,
	.read = mem_read,
	.write = mem_write,
	.fsync = mem_fsync,
};

static int serve(struct fuse_session *session, const char *mountpoint)
{
	struct fuse_loop_config *config = fuse_loop_cfg_create();
	int ret = -1;

	if (!config)
		return -1;
	fuse_loop_cfg_set_clone_fd(config, 1);
	fuse_loop_cfg_set_max_threads(config, MAX_THREADS);
	fuse_loop_cfg_set_idle_threads(config, MAX_THREADS);
	if (fuse_session_mount(session, mountpoint) == 0) {
		ret = fuse_session_loop_mt(session, config);
		fuse_session_unmount(session);
	}
	fuse_loop_cfg_destroy(config);
	return ret;
}

int main(int argc, char **argv)
{
	char *options[] = { argv[0], "-o", "fsname=bench-libfuse,subtype=bench" };
	struct fuse_args args = FUSE_ARGS_INIT(3, options);
	struct fuse_session *session;
	int ret;

	if (argc != 3 && (argc != 4 || strcmp(argv[3], "writeback") != 0)) {
		fprintf(stderr, "usage: mem MOUNTPOINT BYTES [writeback]\n");
		return 2;
	}
	writeback = argc == 4;
	size = strtoull(argv[2], NULL, 0);
	data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (data == MAP_FAILED) {
		perror("mem: mmap");
		return 1;
	}
	session = fuse_session_new(&args, &ops, sizeof(ops), NULL);
	if (!session)
		return 1;
	if (fuse_set_signal_handlers(session)) {
		fuse_session_destroy(session);
		return 1;
	}
	ret = serve(session, argv[1]);
	fuse_remove_signal_handlers(session);
	fuse_session_destroy(session);
	return ret < 0;
}
