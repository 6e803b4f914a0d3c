/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tries the helper functions that the host exports, as a handler would; handler_init returns the number of the first
 * line that does not hold. For tests.
 */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "tcmu-runner.h"

#define MUST(condition)                  \
	do {                             \
		if (!(condition))        \
			return __LINE__; \
	} while (0)

static int iovecs(void)
{
	char a[4] = "abcd", b[4] = "efgh", out[8] = "";
	struct iovec fresh[3] = { { a, 4 }, { NULL, 0 }, { b, 4 } };
	struct iovec iov[3];

	memcpy(iov, fresh, sizeof(iov));
	MUST(tcmu_iovec_length(iov, 3) == 8);
	MUST(tcmu_iovec_compare("abcdefgh", iov, 8) == -1);
	MUST(tcmu_iovec_compare("abcdefgX", iov, 8) == 7);
	MUST(tcmu_iovec_compare("abXdefgh", iov, 8) == 2);
	MUST(tcmu_iovec_compare("abcdX", iov, 4) == -1);

	MUST(tcmu_iovec_seek(iov, 4) == 1 && iov[0].iov_len == 0 && iov[2].iov_len == 4);
	memcpy(iov, fresh, sizeof(iov));
	MUST(tcmu_iovec_seek(iov, 5) == 2 && iov[2].iov_base == b + 1 && iov[2].iov_len == 3);
	MUST(tcmu_iovec_seek(iov, 0) == 0);

	memcpy(iov, fresh, sizeof(iov));
	MUST(tcmu_memcpy_from_iovec(out, 6, iov, 3) == 6 && !memcmp(out, "abcdef", 6));
	MUST(iov[0].iov_len == 0 && iov[2].iov_len == 2 && iov[2].iov_base == b + 2);
	MUST(tcmu_memcpy_from_iovec(out, 6, iov, 3) == 2 && !memcmp(out, "gh", 2));

	memcpy(iov, fresh, sizeof(iov));
	MUST(tcmu_memcpy_into_iovec(iov, 3, "01234567", 8) == 8 && !memcmp(a, "0123", 4) && !memcmp(b, "4567", 4));
	MUST(tcmu_memcpy_into_iovec(iov, 3, "x", 1) == 0);

	memcpy(iov, fresh, sizeof(iov));
	MUST(!tcmu_iovec_zeroed(iov, 3));
	tcmu_iovec_zero(iov, 3);
	MUST(tcmu_iovec_zeroed(iov, 3) && iov[0].iov_len == 4 && !b[3]);
	b[3] = 1;
	MUST(!tcmu_iovec_zeroed(iov, 3));
	return 0;
}

static int commands(void)
{
	uint8_t six[16] = { 0x08, 0xff, 0x12, 0x34, 0x07 };
	uint8_t ten[16] = { 0x28, 0, 0x01, 0x02, 0x03, 0x04, 0, 0x05, 0x06 };
	uint8_t twelve[16] = { 0xa8, 0, 0x81, 0x02, 0x03, 0x04, 0x85, 0x06, 0x07, 0x08 };
	uint8_t sixteen[16] = { 0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };

	MUST(tcmu_cdb_get_lba(six) == 0x1f1234 && tcmu_cdb_get_xfer_length(six) == 7);
	MUST(tcmu_cdb_get_lba(ten) == 0x01020304 && tcmu_cdb_get_xfer_length(ten) == 0x0506);
	MUST(tcmu_cdb_get_lba(twelve) == 0x81020304 && tcmu_cdb_get_xfer_length(twelve) == 0x85060708);
	MUST(tcmu_cdb_get_lba(sixteen) == 0x0102030405060708 && tcmu_cdb_get_xfer_length(sixteen) == 0x090a0b0c);
	return 0;
}

static int sense(void)
{
	uint8_t s[TCMU_SENSE_BUFFERSIZE];

	memset(s, 0xff, sizeof(s));
	MUST(tcmu_sense_set_data(s, 5, 0x2104) == TCMU_STS_PASSTHROUGH_ERR);
	MUST(s[0] == 0x70 && s[2] == 5 && s[7] == 10 && s[12] == 0x21 && s[13] == 4 && !s[1] && !s[95]);
	memset(s, 0xff, sizeof(s));
	tcmu_sense_set_info(s, 0x01020304);
	MUST(s[0] == 0x80 && !memcmp(s + 3, "\1\2\3\4", 4) && !s[17] && s[18] == 0xff);
	memset(s, 0xff, sizeof(s));
	tcmu_sense_set_key_specific_info(s, 0x0102);
	MUST(s[15] == 0x80 && s[16] == 1 && s[17] == 2 && !s[0] && s[18] == 0xff);
	return 0;
}

static int open_(struct tcmu_device *dev, bool reopen)
{
	char path[PATH_MAX];
	char *wwn;
	int ret = 77;

	(void)reopen;
	MUST(!strcmp(tcmu_dev_get_cfgstring(dev), "helpers/x"));
	MUST(tcmu_cfgfs_dev_get_info_u64(dev, "Size", &ret) == 1000000 && ret == 0);
	MUST(tcmu_cfgfs_dev_get_info_u64(dev, "Other", &ret) == 0 && ret == -EINVAL);
	MUST(tcmu_cfgfs_dev_get_attr_int(dev, "hw_block_size") == 4096);
	MUST(tcmu_cfgfs_dev_get_attr_int(dev, "hw_max_sectors") == 256);
	MUST(tcmu_cfgfs_dev_get_attr_int(dev, "other") == -ENOENT);
	wwn = tcmu_cfgfs_dev_get_wwn(dev);
	MUST(wwn && strlen(wwn) == 16);
	free(wwn);
	MUST(!tcmu_make_absolute_logfile(path, "x.log") && path[0] == '/' && !strcmp(strrchr(path, '/'), "/x.log"));

	MUST(tcmu_dev_get_block_size(dev) == 4096 && tcmu_dev_get_num_lbas(dev) == 244);
	MUST(tcmu_dev_get_max_xfer_len(dev) == 256 && tcmu_dev_get_opt_unmap_gran(dev) == 256);
	MUST(tcmu_dev_get_max_unmap_len(dev) == 33554432 && tcmu_dev_get_unmap_gran_align(dev) == 0);
	MUST(!tcmu_dev_get_write_cache_enabled(dev) && !tcmu_dev_get_solid_state_media(dev));
	MUST(!tcmu_dev_get_write_protect_enabled(dev) && !tcmu_dev_get_unmap_enabled(dev));
	MUST(!tcmur_dev_get_private(dev) && tcmu_dev_get_private(dev));
	for (int i = 0; i < 512; i++)
		MUST(!((char *)tcmu_dev_get_private(dev))[i]);

	MUST(tcmur_dev_update_size(dev, 0) == -EINVAL);
	MUST(tcmur_dev_update_size(dev, 2000000) == 0 && tcmu_dev_get_num_lbas(dev) == 488);
	tcmu_dev_set_write_cache_enabled(dev, true);
	tcmu_dev_set_solid_state_media(dev, true);
	tcmu_dev_set_block_size(dev, 2048);
	tcmu_dev_set_num_lbas(dev, 100);
	errno = EXDEV;
	tcmu_dbg(dev, "not shown\n");
	tcmu_info(dev, "m is %m\n");
	MUST(errno == EXDEV);
	return 0;
}

static void close_(struct tcmu_device *dev)
{
	(void)dev;
}

static int io(struct tcmu_device *dev, struct tcmur_cmd *cmd, struct iovec *iov, size_t cnt, size_t len, off_t off)
{
	(void)dev, (void)cmd, (void)iov, (void)cnt, (void)len, (void)off;
	return TCMU_STS_OK;
}

static struct tcmur_handler handler = {
	.name = "helpers",
	.subtype = "helpers",
	.cfg_desc = "x",
	.open = open_,
	.close = close_,
	.nr_threads = 1,
	.read = io,
	.write = io,
};

int handler_init(void)
{
	int line = iovecs();

	if (!line)
		line = commands();
	if (!line)
		line = sense();
	return line ? line : tcmur_register_handler(&handler);
}
