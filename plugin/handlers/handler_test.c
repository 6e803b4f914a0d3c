/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests of handler_ram.so and handler_file.so: test_host.c drives every callout directly.
 *
 *     handler_test DIRECTORY-OF-THE-HANDLERS
 *
 * Prints a line for each test; exits 1 at the first that fails. A test that this machine cannot run prints SKIP.
 * Scratch files go to $TMPDIR or /tmp, and are removed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <linux/loop.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tcmu-runner.h"
#include "test_host.h"

#define KIB (1ull << 10)
#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define TIB (1ull << 40)

#define DEADLINE 120 /* seconds; SIGALRM ends the program then */

static char scratch[PATH_MAX];

static void remove_scratch(void)
{
	DIR *dir = opendir(scratch);
	struct dirent *entry;

	while (dir && (entry = readdir(dir)))
		if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 &&
		    unlinkat(dirfd(dir), entry->d_name, 0) != 0)
			unlinkat(dirfd(dir), entry->d_name, AT_REMOVEDIR);
	if (dir)
		closedir(dir);
	rmdir(scratch);
}

static const char *in_scratch(const char *name)
{
	static char path[8][PATH_MAX + 64];
	static int next;

	next = (next + 1) % 8;
	snprintf(path[next], sizeof(path[next]), "%s/%s", scratch, name);
	return path[next];
}

static void make_file(const char *path, uint64_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)size));
	close(fd);
}

static struct stat stat_of(const char *path)
{
	struct stat st;

	CHECK(!stat(path, &st));
	return st;
}

/* Bytes of memory that the anonymous devices hold. */
static uint64_t memfd_usage(void)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *entry;
	uint64_t bytes = 0;
	int found = 0;

	CHECK(dir);
	while ((entry = readdir(dir))) {
		char target[64] = "";
		struct stat st;

		if (readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1) < 0 ||
		    !strstr(target, "memfd:tcmur-ram"))
			continue;
		CHECK(!fstatat(dirfd(dir), entry->d_name, &st, 0));
		bytes += (uint64_t)st.st_blocks * 512;
		found++;
	}
	closedir(dir);
	CHECK(found);
	return bytes;
}

static uint64_t resident(void)
{
	unsigned long long size, pages;
	FILE *f = fopen("/proc/self/statm", "re");

	CHECK(f && fscanf(f, "%llu %llu", &size, &pages) == 2);
	fclose(f);
	return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static int open_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *entry;
	int n = 0;

	CHECK(dir);
	while ((entry = readdir(dir)))
		n++;
	closedir(dir);
	return n;
}

/*
 * Tests. Each returns NULL, or why it could not be run.
 */

static const char *test_registration(void)
{
	static const char *const subtypes[] = { "ram", "file" };
	size_t i;

	for (i = 0; i < 2; i++) {
		struct tcmur_handler *h = handler_of(subtypes[i]);
		const ElfW(Sym) *sym = NULL;
		Dl_info info;
		int (*init)(void);
		void *so;

		CHECK(dladdr1(h, &info, (void **)&sym, RTLD_DL_SYMENT));
		CHECK(info.dli_saddr == h && sym);
		CHECK_EQ(sym->st_size, sizeof(struct tcmur_handler));
		CHECK(h->name && h->cfg_desc && h->check_config && h->reconfig && h->open && h->close);
		CHECK(h->read && h->write && h->flush && h->unmap && h->writesame);
		CHECK(!h->handle_cmd && !h->caw && !h->lock && !h->init && !h->destroy && !h->_is_dbus_handler);
		CHECK_EQ(h->nr_threads, 4);

		so = dlopen(info.dli_fname, RTLD_NOW | RTLD_LOCAL);
		CHECK(so);
		*(void **)&init = dlsym(so, "handler_init");
		CHECK(init);
		CHECK_EQ(init(), -1); /* registered already */
		dlclose(so);
	}
	return NULL;
}

static void check_config(const char *cfgstring, const char *refusal)
{
	struct tcmu_device dev;
	char *reason = NULL;
	bool ok;

	configure(&dev, 0, "%s", cfgstring);
	ok = dev.handler->check_config(cfgstring, &reason);
	if (ok != !refusal || (refusal && (!reason || !strstr(reason, refusal))))
		FAIL("check_config(%s): %d, %s", cfgstring, ok, reason ? reason : "no reason");
	free(reason);
	if (refusal)
		CHECK_EQ(try_open(&dev), -EINVAL);
}

static const char *test_check_config(void)
{
	check_config("ram/@", NULL);
	check_config("ram/@/", NULL);
	check_config("ram/@/4K", NULL);
	check_config("ram/@/512MiB", NULL);
	check_config("ram/var/tmp/x", NULL);
	check_config("ram//@x", NULL);
	check_config("ram/", "give ram/@");
	check_config("ram//", "give ram/@");
	check_config("ram/@x", "such as 512M");
	check_config("ram/@/x", "such as 512M");
	check_config("ram/@/-1", "such as 512M");
	check_config("ram/@/1Z", "such as 512M");
	check_config("ram/@/1Gi", "such as 512M");
	check_config("ram/@/1GB", "such as 512M");
	check_config("ram/@/0", "not possible");
	check_config("ram/@/8388608T", "not possible");
	check_config("ram/@/99999999999999999999", "not possible");
	check_config("file//var/tmp/x", NULL);
	check_config("file/var/tmp/x", "absolute path");
	check_config("file//", "absolute path");
	check_config("file/", "absolute path");
	return NULL;
}

static void check_ram_size(uint64_t configured, const char *cfgstring, uint64_t want)
{
	struct tcmu_device dev;

	configure(&dev, configured, "%s", cfgstring);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), want);
	CHECK_EQ(dev.block_size, 512);
	CHECK_EQ(dev.unmap_gran, 8);
	CHECK_EQ(dev.unmap_align, 8);
	CHECK(dev.write_cache && dev.solid_state);
	check_bytes(&dev, want - 512, 512, 0);
	close_device(&dev);
}

static const char *test_ram_sizes(void)
{
	struct tcmu_device dev;

	check_ram_size(0, "ram/@", GIB);
	check_ram_size(0, "ram/@/", GIB);
	check_ram_size(5 * MIB, "ram/@", 5 * MIB);
	check_ram_size(0, "ram/@/1536", 1536);
	check_ram_size(0, "ram/@/3k", 3 * KIB);
	check_ram_size(0, "ram/@/3MiB", 3 * MIB);
	check_ram_size(0, "ram/@/2G", 2 * GIB);
	check_ram_size(0, "ram/@/2TiB", 2 * TIB);
	check_ram_size(4 * KIB, "ram/@/4K", 4 * KIB);

	configure(&dev, 8 * KIB, "ram/@/4K");
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("give one of them");
	configure(&dev, 0, "ram/@/1000");
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("multiple of the block size");
	configure(&dev, 0, "ram/@/4096P");
	CHECK(try_open(&dev) < 0); /* more than the address space */
	CHECK_SAID("cannot");

	configure(&dev, 0, "ram/@");
	dev.block_size = 4096;
	must_open(&dev);
	CHECK_EQ(dev.num_lbas, GIB / 4096);
	CHECK_EQ(dev.unmap_align, 1);
	close_device(&dev);
	configure(&dev, 0, "ram/@");
	dev.block_size = 0;
	must_open(&dev);
	CHECK_EQ(dev.block_size, 512);
	close_device(&dev);
	return NULL;
}

static const char *test_ram_is_sparse(void)
{
	struct tcmu_device dev;
	uint64_t before, offset;
	char *buf = allocated(MIB);

	memset(buf, 1, MIB);
	configure(&dev, 0, "ram/@/1T");
	before = resident();
	must_open(&dev);
	for (offset = 0; offset < GIB; offset += MIB) {
		CHECK_EQ(dev_read(&dev, buf, MIB, TIB - GIB + offset), TCMU_STS_OK);
		CHECK(!buf[0] && !memcmp(buf, buf + 1, MIB - 1));
	}
	CHECK_EQ(memfd_usage(), 0);
	CHECK(resident() - before < 2 * MIB || resident() < before);

	/* One byte costs a page; reading around it costs nothing more. */
	write_bytes(&dev, TIB / 2 + 100, 1, 0x5a);
	CHECK(memfd_usage() <= 64 * KIB);
	check_bytes(&dev, TIB / 2 + 100, 1, 0x5a);
	before = memfd_usage();
	check_bytes(&dev, TIB / 2 - MIB, MIB + 100, 0);
	check_bytes(&dev, TIB / 2 + 101, MIB, 0);
	CHECK_EQ(memfd_usage(), before);

	/* What a resize has cut off costs nothing when it is there again. */
	write_bytes(&dev, TIB - MIB, MIB, 1);
	reconfigure_size(&dev, TIB - MIB, 0);
	CHECK_EQ(memfd_usage(), before);
	reconfigure_size(&dev, TIB, 0);
	check_bytes(&dev, TIB - MIB, MIB, 0);
	CHECK_EQ(memfd_usage(), before);

	/* Discarding all of it is quick, frees everything and touches nothing. */
	CHECK_EQ(dev_unmap(&dev, 0, TIB), TCMU_STS_OK);
	CHECK_EQ(memfd_usage(), 0);
	check_bytes(&dev, TIB / 2, 4096, 0);
	close_device(&dev);
	free(buf);
	return NULL;
}

static const char *test_ram_reopen(void)
{
	struct tcmu_device dev;

	configure(&dev, 0, "ram/@");
	CHECK_EQ(dev.handler->open(&dev, true), -ENODATA);
	CHECK_SAID("contents are gone");

	configure(&dev, 0, "ram%s", in_scratch("reopen"));
	must_open(&dev);
	write_bytes(&dev, 512, 512, 7);
	close_device(&dev);
	CHECK_EQ(dev.handler->open(&dev, true), 0);
	check_bytes(&dev, 512, 512, 7);
	close_device(&dev);
	return NULL;
}

/* Writes fail, rather than the process, when there is no memory; a file size limit stands for that. */
static const char *test_ram_without_memory(void)
{
	struct rlimit old, low = { .rlim_cur = MIB };
	struct tcmu_device dev;
	char buf[4096] = { 1 };

	configure(&dev, 0, "ram/@");
	must_open(&dev);
	write_bytes(&dev, 0, 4096, 9);
	CHECK(!getrlimit(RLIMIT_FSIZE, &old));
	low.rlim_max = old.rlim_max;
	signal(SIGXFSZ, SIG_IGN);
	CHECK(!setrlimit(RLIMIT_FSIZE, &low));
	CHECK_EQ(dev_write(&dev, buf, sizeof(buf), 8 * MIB), TCMU_STS_WR_ERR);
	CHECK_SAID("no memory");
	CHECK(!setrlimit(RLIMIT_FSIZE, &old));
	signal(SIGXFSZ, SIG_DFL);
	check_bytes(&dev, 0, 4096, 9);
	check_bytes(&dev, 8 * MIB, 4096, 0);
	close_device(&dev);
	return NULL;
}

static uint64_t random_below(unsigned int *seed, uint64_t limit)
{
	return (((uint64_t)rand_r(seed) << 31) ^ (uint64_t)rand_r(seed)) % limit;
}

/* Cuts the buffer into pieces, empty ones among them. */
static size_t cut(unsigned int *seed, unsigned char *buf, size_t len, struct iovec *iov, size_t max)
{
	size_t n = 0;

	while (n < max - 1 && len) {
		size_t piece = random_below(seed, 4) ? random_below(seed, len) + 1 : 0;

		iov[n].iov_base = buf;
		iov[n++].iov_len = piece;
		buf += piece;
		len -= piece;
	}
	iov[n].iov_base = buf;
	iov[n++].iov_len = len;
	return n;
}

/* Random requests against a copy in memory, unaligned ones too. */
static void compare_with_model(struct tcmu_device *dev, unsigned int seed)
{
	enum {
		SIZE = 300 << 10,
		PIECES = 150,
		LONGEST = 40 << 10
	};
	unsigned char *model = allocated(SIZE), *buf = allocated(SIZE);
	struct iovec iov[PIECES];
	int round;

	CHECK(device_size(dev) >= SIZE);
	CHECK_EQ(dev_read(dev, model, SIZE, 0), TCMU_STS_OK);
	for (round = 0; round < 3000; round++) {
		uint64_t offset = random_below(&seed, SIZE);
		size_t len = random_below(&seed, SIZE - offset < LONGEST ? SIZE - offset : LONGEST) + 1, cnt, i;
		unsigned char pattern[512];
		int fill;

		switch (random_below(&seed, 5)) {
		case 0:
		case 1:
			for (i = 0; i < len; i++)
				buf[i] = (unsigned char)rand_r(&seed);
			cnt = cut(&seed, buf, len, iov, PIECES);
			CHECK_EQ(dev_writev(dev, iov, cnt, len, offset), TCMU_STS_OK);
			memcpy(model + offset, buf, len);
			break;
		case 2:
			memset(buf, 0xee, len);
			cnt = cut(&seed, buf, len, iov, PIECES);
			CHECK_EQ(dev_readv(dev, iov, cnt, len, offset), TCMU_STS_OK);
			if (memcmp(model + offset, buf, len) != 0)
				FAIL("%s: round %d: wrong data", dev->cfgstring, round);
			break;
		case 3:
			offset = offset / 512 * 512;
			len = (len + 511) / 512 * 512;
			if (offset + len > SIZE)
				len = SIZE - offset;
			CHECK_EQ(dev_unmap(dev, offset, len), TCMU_STS_OK);
			memset(model + offset, 0, len);
			break;
		default:
			fill = random_below(&seed, 2) ? 0 : rand_r(&seed);
			for (i = 0; i < sizeof(pattern); i++)
				pattern[i] = (unsigned char)(fill ? fill + (int)i : 0);
			len = len / 512 * 512;
			if (offset + len > SIZE)
				len = 0;
			CHECK_EQ(dev_writesame(dev, pattern, sizeof(pattern), offset, len), TCMU_STS_OK);
			for (i = 0; i < len; i++)
				model[offset + i] = pattern[i % sizeof(pattern)];
		}
	}
	CHECK_EQ(dev_flush(dev), TCMU_STS_OK);
	CHECK_EQ(dev_read(dev, buf, SIZE, 0), TCMU_STS_OK);
	CHECK(!memcmp(model, buf, SIZE));
	free(model);
	free(buf);
}

/* Bounds, and what the optional callouts answer; the device must have 1 MiB. */
static void check_limits(struct tcmu_device *dev)
{
	char block[512] = { 0 }, buf[1024];
	struct tcmulib_cfg_info cfg = { .type = TCMULIB_CFG_WRITE_CACHE };
	uint64_t size = device_size(dev);

	CHECK_EQ(size, MIB);
	CHECK_EQ(dev_read(dev, buf, 512, size), TCMU_STS_RANGE);
	CHECK_EQ(dev_read(dev, buf, 1024, size - 512), TCMU_STS_RANGE);
	CHECK_EQ(dev_read(dev, buf, 512, UINT64_MAX - 511), TCMU_STS_RANGE);
	CHECK_EQ(dev_read(dev, buf, 0, size), TCMU_STS_OK);
	CHECK_EQ(dev_write(dev, block, 512, size), TCMU_STS_RANGE);
	CHECK_EQ(dev_write(dev, buf, 1024, size - 512), TCMU_STS_RANGE);
	CHECK_EQ(dev_write(dev, buf, 512, UINT64_MAX - 511), TCMU_STS_RANGE);
	CHECK_EQ(dev_unmap(dev, size, 512), TCMU_STS_RANGE);
	CHECK_EQ(dev_unmap(dev, 512, size), TCMU_STS_RANGE);
	CHECK_EQ(dev_unmap(dev, 512, UINT64_MAX), TCMU_STS_RANGE);
	CHECK_EQ(dev_unmap(dev, 512, 0), TCMU_STS_OK);
	CHECK_EQ(dev_writesame(dev, block, 512, size, 512), TCMU_STS_RANGE);
	CHECK_EQ(dev_writesame(dev, block, 512, 512, size), TCMU_STS_RANGE);
	CHECK_EQ(dev_writesame(dev, block, 512, 0, 513), TCMU_STS_INVALID_CDB);
	CHECK_EQ(dev_writesame(dev, block, 0, 0, 512), TCMU_STS_INVALID_CDB);
	CHECK_EQ(dev->handler->reconfig(dev, &cfg), -EOPNOTSUPP);
	reconfigure_size(dev, 0, -EINVAL);
	reconfigure_size(dev, 1000, -EINVAL);
	CHECK_SAID("multiple of the block size");
}

static void check_resize(struct tcmu_device *dev)
{
	char buf[512];

	/* Cuts within a page; the old contents must not come back. */
	write_bytes(dev, 0, MIB, 0x33);
	reconfigure_size(dev, 512 * KIB + 512, 0);
	CHECK_EQ(dev_read(dev, buf, 512, 512 * KIB + 512), TCMU_STS_RANGE);
	reconfigure_size(dev, 2 * GIB, 0);
	check_bytes(dev, 0, 512 * KIB + 512, 0x33);
	check_bytes(dev, 512 * KIB + 512, MIB, 0);
	write_bytes(dev, 2 * GIB - 512, 512, 0x44);
	check_bytes(dev, 2 * GIB - 512, 512, 0x44);
	write_bytes(dev, 512 * KIB + 1024, 1, 0x55);
	check_bytes(dev, 512 * KIB + 1025, 3000, 0);
	reconfigure_size(dev, MIB, 0);
}

static void check_device(struct tcmu_device *dev, unsigned int seed)
{
	must_open(dev);
	check_limits(dev);
	compare_with_model(dev, seed);
	check_resize(dev);
	compare_with_model(dev, seed + 1);
	close_device(dev);
}

static const char *test_every_callout(void)
{
	struct tcmu_device dev;

	configure(&dev, 0, "ram/@/1M");
	check_device(&dev, 1);
	configure(&dev, MIB, "ram%s", in_scratch("ram"));
	check_device(&dev, 2);
	CHECK_EQ(stat_of(in_scratch("ram")).st_size, MIB);
	configure(&dev, MIB, "file/%s", in_scratch("file"));
	check_device(&dev, 3);
	CHECK_EQ(stat_of(in_scratch("file")).st_size, MIB);
	return NULL;
}

/* Long writes over what was written before, which are copied differently, with all alignments. */
static const char *test_ram_long_writes(void)
{
	static const size_t lengths[] = { 256 * KIB - 1, 256 * KIB, 256 * KIB + 63, MIB - 1, MIB };
	static const size_t shifts[] = { 0, 1, 8, 15, 16, 63, 64, 511 };
	enum {
		SIZE = 2 << 20
	};
	unsigned char *model = allocated(SIZE), *buf = allocated(SIZE);
	struct tcmu_device dev;
	unsigned int seed = 4;
	size_t i, k;

	configure(&dev, 0, "ram/@/2M");
	must_open(&dev);
	write_bytes(&dev, 0, SIZE, 0x11);
	memset(model, 0x11, SIZE);
	for (i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		for (k = 0; k < 64; k++) {
			uint64_t offset = 4096 * (k / 8) + shifts[k % 8];
			unsigned char *from = buf + random_below(&seed, 65);
			size_t n;

			for (n = 0; n < lengths[i]; n++)
				from[n] = (unsigned char)((n ^ n >> 8) * 7 + k);
			CHECK_EQ(dev_write(&dev, from, lengths[i], offset), TCMU_STS_OK);
			memcpy(model + offset, from, lengths[i]);
		}
		CHECK_EQ(dev_read(&dev, buf, SIZE, 0), TCMU_STS_OK);
		CHECK(!memcmp(model, buf, SIZE));
	}
	close_device(&dev);
	free(model);
	free(buf);
	return NULL;
}

static const char *test_unmap_gives_back(void)
{
	struct tcmu_device dev;
	uint64_t used;
	char zero[512] = { 0 };
	const char *path = in_scratch("unmap");

	configure(&dev, 0, "ram/@/64M");
	must_open(&dev);
	write_bytes(&dev, 0, 8 * MIB, 1);
	used = memfd_usage();
	CHECK(used >= 8 * MIB);
	CHECK_EQ(dev_unmap(&dev, MIB - 512, 2 * MIB + 1024), TCMU_STS_OK);
	CHECK(memfd_usage() <= used - 2 * MIB);
	used = memfd_usage();
	CHECK_EQ(dev_writesame(&dev, zero, 512, 4 * MIB, 2 * MIB), TCMU_STS_OK);
	CHECK_EQ(dev_writesame(&dev, zero, 512, 32 * MIB, 2 * MIB), TCMU_STS_OK);
	check_bytes(&dev, 4 * MIB, 2 * MIB, 0);
	check_bytes(&dev, 32 * MIB, 2 * MIB, 0);
	check_bytes(&dev, MIB - 1024, 512, 1);
	check_bytes(&dev, MIB - 512, 2 * MIB + 1024, 0);
	check_bytes(&dev, 3 * MIB + 512, 512, 1);
	CHECK_EQ(memfd_usage(), used);
	close_device(&dev);

	configure(&dev, 64 * MIB, "file/%s", path);
	must_open(&dev);
	CHECK_EQ(stat_of(path).st_blocks, 0);
	write_bytes(&dev, 0, 8 * MIB, 1);
	CHECK_EQ(dev_flush(&dev), TCMU_STS_OK);
	used = (uint64_t)stat_of(path).st_blocks * 512;
	CHECK(used >= 8 * MIB);
	CHECK_EQ(dev_unmap(&dev, MIB, 2 * MIB), TCMU_STS_OK);
	CHECK_EQ(dev_writesame(&dev, zero, 512, 4 * MIB, 2 * MIB), TCMU_STS_OK);
	CHECK((uint64_t)stat_of(path).st_blocks * 512 <= used - 4 * MIB);
	check_bytes(&dev, MIB, 2 * MIB, 0);
	check_bytes(&dev, 3 * MIB, 512, 1);
	CHECK_EQ(stat_of(path).st_size, 64 * MIB);
	close_device(&dev);
	return NULL;
}

static const char *test_ram_backing_file(void)
{
	struct tcmu_device dev;
	const char *path = in_scratch("kept");

	configure(&dev, 0, "ram%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), GIB);
	CHECK_EQ(stat_of(path).st_size, GIB);
	CHECK_EQ(stat_of(path).st_blocks, 0);
	CHECK_EQ(stat_of(path).st_mode & 07777, 0600);
	write_bytes(&dev, 12345, 1000, 0x77);
	CHECK_EQ(dev_flush(&dev), TCMU_STS_OK);
	close_device(&dev);

	configure(&dev, 0, "ram/%s", path); /* two slashes are one */
	must_open(&dev);
	check_bytes(&dev, 12345, 1000, 0x77);
	close_device(&dev);

	/* A size of its own is kept, and not made 1 GiB; an empty file counts as new. */
	make_file(path, 3 * MIB);
	configure(&dev, 0, "ram%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), 3 * MIB);
	close_device(&dev);
	CHECK_EQ(stat_of(path).st_size, 3 * MIB);
	make_file(path, 0);
	configure(&dev, 7 * MIB, "ram%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), 7 * MIB);
	close_device(&dev);
	CHECK_EQ(stat_of(path).st_size, 7 * MIB);
	configure(&dev, 8 * MIB, "ram%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("fewer than the configured size");
	return NULL;
}

static const char *test_file_sizes(void)
{
	struct tcmu_device dev;
	const char *path = in_scratch("sizes");

	configure(&dev, 0, "file/%s", path);
	CHECK_EQ(try_open(&dev), -ENOENT);
	CHECK_SAID("give a size to create it");
	CHECK(access(path, F_OK));
	configure(&dev, 1000, "file/%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("multiple of the block size");
	CHECK(access(path, F_OK));

	configure(&dev, 4 * MIB, "file/%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), 4 * MIB);
	CHECK(dev.write_cache && !dev.solid_state);
	close_device(&dev);
	CHECK_EQ(stat_of(path).st_size, 4 * MIB);
	CHECK_EQ(stat_of(path).st_mode & 07777, 0600);

	/* Larger than the file: refused. Smaller: only that much, and a resize leaves the rest alone. */
	configure(&dev, 4 * MIB + 512, "file/%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("fewer than the configured size");
	configure(&dev, MIB, "file/%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), MIB);
	reconfigure_size(&dev, MIB / 2, 0);
	CHECK_EQ(stat_of(path).st_size, 4 * MIB);
	reconfigure_size(&dev, 8 * MIB, 0);
	CHECK_EQ(stat_of(path).st_size, 8 * MIB);
	close_device(&dev);

	make_file(path, 5000);
	configure(&dev, 0, "file/%s", path);
	must_open(&dev);
	CHECK_SAID("cannot be reached");
	CHECK_EQ(device_size(&dev), 4608);
	close_device(&dev);
	CHECK_EQ(stat_of(path).st_size, 5000);
	make_file(path, 100);
	configure(&dev, 0, "file/%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("less than one block");
	make_file(path, 0);
	configure(&dev, 0, "file/%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("give a size");
	configure(&dev, MIB, "file/%s", path);
	must_open(&dev);
	close_device(&dev);
	CHECK_EQ(stat_of(path).st_size, MIB);

	/* A file that cannot get its size is not left behind. */
	path = in_scratch("huge");
	configure(&dev, 1ull << 62, "file/%s", path);
	if (try_open(&dev) == 0)
		close_device(&dev);
	else
		CHECK(access(path, F_OK));
	return NULL;
}

static const char *test_refused_files(void)
{
	struct tcmu_device dev;
	const char *path = in_scratch("fifo");
	const char *subtypes[] = { "file/", "ram" };
	size_t i;

	CHECK(!mkfifo(path, 0600));
	for (i = 0; i < 2; i++) {
		configure(&dev, MIB, "%s%s", subtypes[i], scratch);
		CHECK_EQ(try_open(&dev), -EISDIR);
		CHECK_SAID("is a directory");
		configure(&dev, MIB, "%s%s", subtypes[i], path);
		CHECK_EQ(try_open(&dev), -EINVAL);
		CHECK_SAID("neither a regular file nor a block device");
		configure(&dev, MIB, "%s/dev/null", subtypes[i]);
		CHECK_EQ(try_open(&dev), -EINVAL);
		configure(&dev, MIB, "%s%s/none/such", subtypes[i], scratch);
		CHECK_EQ(try_open(&dev), -ENOENT);
		CHECK_SAID("none/such: cannot create it: No such file or directory");
	}
	return NULL;
}

static const char *test_one_device_per_file(void)
{
	struct tcmu_device first, second;
	const char *path = in_scratch("shared");

	configure(&first, MIB, "file/%s", path);
	must_open(&first);
	configure(&second, MIB, "file/%s", path);
	CHECK_EQ(try_open(&second), -EBUSY);
	CHECK_SAID("in use by another");
	configure(&second, 0, "ram%s", path);
	CHECK_EQ(try_open(&second), -EBUSY);
	close_device(&first);
	must_open(&second);
	close_device(&second);
	return NULL;
}

static const char *test_file_made_shorter(void)
{
	const char *path = in_scratch("shorter");
	const char *subtypes[] = { "file/", "ram" };
	struct tcmu_device dev;
	char buf[8192];
	size_t i;

	for (i = 0; i < 2; i++) {
		make_file(path, MIB);
		configure(&dev, 0, "%s%s", subtypes[i], path);
		must_open(&dev);
		CHECK(!truncate(path, 4096));
		CHECK_EQ(dev_read(&dev, buf, sizeof(buf), 0), TCMU_STS_RD_ERR);
		CHECK_SAID("made shorter");
		CHECK_EQ(dev_read(&dev, buf, 512, MIB - 512), TCMU_STS_RD_ERR);
		check_bytes(&dev, 0, 4096, 0);
		write_bytes(&dev, MIB - 512, 512, 1);
		check_bytes(&dev, MIB - 512, 512, 1);
		close_device(&dev);
	}
	return NULL;
}

/* In a mount name space of a child of its own, so that nothing stays mounted whatever happens. */
static const char *test_full_file_system(void)
{
	const char *dir = in_scratch("small");
	int status;
	pid_t pid;

	CHECK(!mkdir(dir, 0700));
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		const char *subtypes[] = { "file/", "ram" };
		struct tcmu_device dev;
		char *buf = allocated(2 * MIB);
		size_t i;

		alarm(DEADLINE);
		memset(buf, 6, 2 * MIB);
		if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
		    mount("none", dir, "tmpfs", 0, "size=1m"))
			_exit(77);
		for (i = 0; i < 2; i++) {
			configure(&dev, 64 * MIB, "%s%s/disk%zu", subtypes[i], dir, i);
			must_open(&dev);
			CHECK_EQ(dev_write(&dev, buf, 2 * MIB, 0), TCMU_STS_WR_ERR);
			CHECK_SAID("No space left on device");
			check_bytes(&dev, 32 * MIB, MIB, 0);
			CHECK_EQ(dev_unmap(&dev, 0, 2 * MIB), TCMU_STS_OK);
			write_bytes(&dev, 32 * MIB, 128 * KIB, 8);
			check_bytes(&dev, 32 * MIB, 128 * KIB, 8);
			close_device(&dev);
		}
		free(buf);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	rmdir(dir);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		return "may not mount a file system here";
	CHECK_EQ(status, 0);
	return NULL;
}

/* A loop device on a scratch file; gone with its last descriptor, which *fd gets. */
static const char *make_loop(const char *file, int *fd)
{
	static char path[32];
	struct loop_config config = { .info.lo_flags = LO_FLAGS_AUTOCLEAR };
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), attempt;

	if (control < 0)
		return NULL;
	config.fd = (uint32_t)open(file, O_RDWR | O_CLOEXEC);
	CHECK((int)config.fd >= 0);
	for (attempt = 0; attempt < 20; attempt++) { /* another program may be quicker */
		snprintf(path, sizeof(path), "/dev/loop%d", ioctl(control, LOOP_CTL_GET_FREE));
		*fd = open(path, O_RDWR | O_CLOEXEC);
		if (*fd >= 0 && !ioctl(*fd, LOOP_CONFIGURE, &config))
			break;
		if (*fd >= 0)
			close(*fd);
		*fd = -1;
	}
	close((int)config.fd);
	close(control);
	return *fd < 0 ? NULL : path;
}

static const char *test_block_device(void)
{
	const char *file = in_scratch("disk"), *path;
	struct tcmu_device dev, second;
	char zero[512] = { 0 };
	uint64_t used;
	int loop;

	make_file(file, 16 * MIB);
	path = make_loop(file, &loop);
	if (!path)
		return "no loop devices here";

	configure(&dev, 0, "file/%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), 16 * MIB);
	configure(&second, 0, "file/%s", path);
	CHECK_EQ(try_open(&second), -EBUSY);
	CHECK_SAID("busy");
	write_bytes(&dev, 0, 8 * MIB, 3);
	CHECK_EQ(dev_flush(&dev), TCMU_STS_OK);
	used = (uint64_t)stat_of(file).st_blocks * 512;
	CHECK_EQ(dev_unmap(&dev, MIB, 2 * MIB), TCMU_STS_OK);
	CHECK((uint64_t)stat_of(file).st_blocks * 512 <= used - 2 * MIB);
	CHECK_EQ(dev_writesame(&dev, zero, 512, 4 * MIB, 2 * MIB), TCMU_STS_OK);
	check_bytes(&dev, MIB, 2 * MIB, 0);
	check_bytes(&dev, 3 * MIB, MIB, 3);
	check_bytes(&dev, 4 * MIB, 2 * MIB, 0);
	check_bytes(&dev, 6 * MIB, 2 * MIB, 3);
	CHECK_EQ(dev_writesame(&dev, zero, 1, 7 * MIB + 1, 100), TCMU_STS_OK); /* not in whole blocks */
	check_bytes(&dev, 7 * MIB + 1, 100, 0);
	check_bytes(&dev, 7 * MIB + 101, 100, 3);
	CHECK_EQ(dev_unmap(&dev, 7 * MIB + 100, 100), TCMU_STS_NOT_HANDLED);
	reconfigure_size(&dev, 17 * MIB, -ENOSPC);
	reconfigure_size(&dev, 8 * MIB, 0);
	reconfigure_size(&dev, MIB, 0);
	compare_with_model(&dev, 4);
	close_device(&dev);

	configure(&dev, 17 * MIB, "file/%s", path);
	CHECK_EQ(try_open(&dev), -EINVAL);
	CHECK_SAID("fewer than the configured size");
	configure(&dev, 2 * MIB, "ram%s", path);
	must_open(&dev);
	CHECK_EQ(device_size(&dev), 2 * MIB);
	close_device(&dev);
	close(loop);
	return NULL;
}

/*
 * Four threads, the most a host runs at once. Each owns every fourth block, so that all of them meet in every page, and
 * the pages behind, which it may discard. Meanwhile the device grows and shrinks behind all of that.
 */
#define GROWN (64 * GIB)

struct worker {
	pthread_t thread;
	struct tcmu_device *dev;
	unsigned int number;
	const char *failure;
};

enum {
	BLOCKS = 1024,
	ROUNDS = 20000,
	PRIVATE = 1 << 20,
	SHARED_END = BLOCKS * 512
};

static void *work(void *arg)
{
	struct worker *w = arg;
	unsigned int seed = w->number, round, stamp[BLOCKS / 4] = { 0 };
	uint64_t own = SHARED_END + (uint64_t)w->number * PRIVATE;
	unsigned char buf[8192], want[8192];

	for (round = 1; round <= ROUNDS && !w->failure; round++) {
		unsigned int block = (unsigned int)random_below(&seed, BLOCKS / 4);
		uint64_t offset = (block * 4ull + w->number) * 512;

		if (round % 8 == 0) {
			offset = own + random_below(&seed, PRIVATE - sizeof(buf));
			memset(want, (int)round | 1, sizeof(want));
			if (dev_write(w->dev, want, sizeof(want), offset))
				w->failure = "write of a range";
			else if (dev_unmap(w->dev, offset + 1000, 6000))
				w->failure = "discard";
			memset(want + 1000, 0, 6000);
			if (dev_read(w->dev, buf, sizeof(buf), offset) || memcmp(buf, want, sizeof(buf)) != 0)
				w->failure = "contents after a discard";
			/* There, or not there, or just going: whatever it says, it must not crash. */
			(void)dev_read(w->dev, buf, sizeof(buf), GROWN - sizeof(buf));
		} else if (round % 2) {
			stamp[block] = round * 4 + w->number;
			memset(want, (int)stamp[block] | 1, 512);
			memcpy(want, &stamp[block], sizeof(stamp[block]));
			if (dev_write(w->dev, want, 512, offset))
				w->failure = "write of a block";
		} else {
			memset(want, stamp[block] ? (int)stamp[block] | 1 : 0, 512);
			memcpy(want, &stamp[block], sizeof(stamp[block]));
			if (dev_read(w->dev, buf, 512, offset) || memcmp(buf, want, 512) != 0)
				w->failure = "contents of a block";
		}
	}
	return NULL;
}

static atomic_bool resizing;

static void *resize(void *arg)
{
	struct tcmu_device *dev = arg;

	while (resizing) {
		reconfigure_size(dev, GROWN, 0);
		write_bytes(dev, GROWN - 4096, 4096, 1);
		reconfigure_size(dev, SHARED_END + 4 * PRIVATE, 0);
	}
	return NULL;
}

static void check_concurrency(struct tcmu_device *dev)
{
	struct worker workers[4];
	pthread_t resizer;
	unsigned int i;

	must_open(dev);
	resizing = true;
	CHECK(!pthread_create(&resizer, NULL, resize, dev));
	for (i = 0; i < 4; i++) {
		workers[i] = (struct worker){ .dev = dev, .number = i };
		CHECK(!pthread_create(&workers[i].thread, NULL, work, &workers[i]));
	}
	for (i = 0; i < 4; i++)
		CHECK(!pthread_join(workers[i].thread, NULL));
	resizing = false;
	CHECK(!pthread_join(resizer, NULL));
	for (i = 0; i < 4; i++)
		if (workers[i].failure)
			FAIL("%s: thread %u: %s", dev->cfgstring, i, workers[i].failure);
	close_device(dev);
}

static const char *test_concurrency(void)
{
	struct tcmu_device dev;

	configure(&dev, SHARED_END + 4 * PRIVATE, "ram/@");
	check_concurrency(&dev);
	configure(&dev, SHARED_END + 4 * PRIVATE, "ram%s", in_scratch("concurrent-ram"));
	check_concurrency(&dev);
	configure(&dev, SHARED_END + 4 * PRIVATE, "file/%s", in_scratch("concurrent-file"));
	check_concurrency(&dev);
	return NULL;
}

/* Descriptors that a program started by this process would get. */
static int inherited_descriptors(void)
{
	int fd, n = 0;

	for (fd = 0; fd < 256; fd++) {
		int flags = fcntl(fd, F_GETFD);

		n += flags >= 0 && !(flags & FD_CLOEXEC);
	}
	return n;
}

static void check_descriptors(struct tcmu_device *dev)
{
	int descriptors = open_descriptors(), inherited = inherited_descriptors();

	must_open(dev);
	CHECK_EQ(open_descriptors(), descriptors + 1);
	CHECK_EQ(inherited_descriptors(), inherited);
	close_device(dev);
	CHECK_EQ(open_descriptors(), descriptors);
}

static const char *test_descriptors_are_private(void)
{
	struct tcmu_device dev;

	configure(&dev, MIB, "ram/@");
	check_descriptors(&dev);
	configure(&dev, MIB, "ram%s", in_scratch("private"));
	check_descriptors(&dev);
	configure(&dev, MIB, "file/%s", in_scratch("private"));
	check_descriptors(&dev);
	return NULL;
}

static const struct {
	const char *name;
	const char *(*run)(void);
} tests[] = {
	{ "registration", test_registration },
	{ "check_config", test_check_config },
	{ "ram_sizes", test_ram_sizes },
	{ "ram_is_sparse", test_ram_is_sparse },
	{ "ram_reopen", test_ram_reopen },
	{ "ram_long_writes", test_ram_long_writes },
	{ "ram_without_memory", test_ram_without_memory },
	{ "ram_backing_file", test_ram_backing_file },
	{ "file_sizes", test_file_sizes },
	{ "refused_files", test_refused_files },
	{ "one_device_per_file", test_one_device_per_file },
	{ "every_callout", test_every_callout },
	{ "unmap_gives_back", test_unmap_gives_back },
	{ "file_made_shorter", test_file_made_shorter },
	{ "full_file_system", test_full_file_system },
	{ "block_device", test_block_device },
	{ "concurrency", test_concurrency },
	{ "descriptors_are_private", test_descriptors_are_private },
};

int main(int argc, char **argv)
{
	const char *tmp = getenv("TMPDIR");
	int descriptors;
	size_t i;

	if (argc != 2) {
		fprintf(stderr, "usage: handler_test DIRECTORY-OF-THE-HANDLERS\n");
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	snprintf(scratch, sizeof(scratch), "%s/handler_test.XXXXXX", tmp ? tmp : "/tmp");
	if (!mkdtemp(scratch)) {
		perror(scratch);
		return 1;
	}

	before_failing = remove_scratch;
	running = "loading";
	load_handler(argv[1], "ram");
	load_handler(argv[1], "file");
	descriptors = open_descriptors();
	for (i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
		const char *skipped;

		running = tests[i].name;
		alarm(DEADLINE);
		skipped = tests[i].run();
		if (skipped)
			printf("SKIP %s: %s\n", running, skipped);
		else
			printf("ok   %s\n", running);
		CHECK_EQ(open_descriptors(), descriptors);
	}
	remove_scratch();
	return 0;
}
