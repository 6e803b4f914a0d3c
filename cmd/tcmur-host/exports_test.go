// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/elf"
	"strings"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// required are the 51 functions that handlers of tcmu-runner 1.5.0 to 1.6.2 import between them.
var required = strings.Fields(`
	tcmur_register_handler tcmur_dev_get_private tcmur_dev_set_private tcmu_dev_get_private tcmu_dev_get_cfgstring
	tcmu_cfgfs_dev_get_info_u64 tcmu_cfgfs_dev_get_attr_int tcmu_cfgfs_dev_get_wwn tcmur_dev_update_size
	tcmu_make_absolute_logfile

	tcmu_dev_set_num_lbas tcmu_dev_get_num_lbas tcmu_dev_set_block_size tcmu_dev_get_block_size
	tcmu_dev_get_max_xfer_len tcmu_dev_set_opt_xcopy_rw_len tcmu_dev_set_max_unmap_len tcmu_dev_get_max_unmap_len
	tcmu_dev_set_opt_unmap_gran tcmu_dev_get_opt_unmap_gran tcmu_dev_set_unmap_gran_align
	tcmu_dev_get_unmap_gran_align tcmu_dev_set_write_cache_enabled tcmu_dev_get_write_cache_enabled
	tcmu_dev_set_solid_state_media tcmu_dev_get_solid_state_media tcmu_dev_get_unmap_enabled
	tcmu_dev_get_write_protect_enabled

	tcmur_cmd_complete tcmu_notify_conn_lost tcmu_notify_lock_lost tcmu_notify_cmd_timed_out
	tcmur_handle_writesame tcmur_handle_caw

	tcmu_err_message tcmu_warn_message tcmu_info_message tcmu_dbg_message

	tcmu_iovec_length tcmu_iovec_seek tcmu_iovec_zero tcmu_iovec_zeroed tcmu_iovec_compare tcmu_memcpy_into_iovec
	tcmu_memcpy_from_iovec tcmu_cdb_get_lba tcmu_cdb_get_xfer_length

	tcmu_sense_set_data tcmu_sense_set_info tcmu_sense_set_key_specific_info tcmu_set_thread_name`)

// additional are further functions of tcmu-runner, for handlers that nobody here has seen.
var additional = strings.Fields(`
	__tcmu_sense_set_data tcmu_crit_message tcmu_dbg_scsi_cmd_message tcmu_get_log_level tcmu_set_log_level
	tcmu_lba_to_byte tcmu_byte_to_lba tcmu_cdb_to_byte tcmu_cdb_get_length tcmu_cmd_seek tcmu_dev_set_max_xfer_len
	tcmu_dev_get_opt_xcopy_rw_len tcmu_dev_set_write_protect_enabled tcmu_dev_get_uio_name`)

// extensions are ours, declared weak for handlers.
var extensions = strings.Fields(`tcmur_dev_keep_memory tcmur_dev_set_writes_survive
	tcmur_dev_set_unmap_zeroes tcmur_dev_set_seek tcmur_dev_set_contents tcmur_cmd_answer_in_place`)

// ofGo says whether a symbol comes from Go's runtime, the linker or the C library's start files.
func ofGo(name string) bool {
	for _, prefix := range []string{"_cgo_", "x_cgo_", "x_crosscall", "crosscall", "_"} {
		if strings.HasPrefix(name, prefix) && !strings.HasPrefix(name, "__tcmu") {
			return true
		}
	}
	return name == "main" || name == "fatalf" || name == "data_start"
}

// TestHelpers has a handler try the functions that it gets. It returns the number of the line that does not hold.
func TestHelpers(t *testing.T) {
	f := startHost(t)
	f.mustLoad(buildHandler(t, "helpers.c"), "helpers")
	open := f.mustOpen(&hostpb.OpenRequest{Config: "helpers/x", Size: 1000000, BlockSize: 4096})
	if open.GetSize() != 204800 || open.GetBlockSize() != 2048 || !open.GetWriteCache() || open.GetRotational() ||
		open.GetCanFlush() || open.GetCanUnmap() || !open.GetCanZero() {
		t.Errorf("open reply is %v", open)
	}
	if err := f.do(sqe{op: opFlush}); err != nil {
		t.Errorf("flush without a flush callout: %v", err)
	}
	f.awaitLog("m is Invalid cross-device link")
	if strings.Contains(f.log.String(), "not shown") {
		t.Error("a debug message was logged")
	}
}

// TestExports compares the dynamic symbols of the binary with what handlers may and must find there: a name too few
// keeps a handler from loading, a name too many replaces a handler's own function of that name.
func TestExports(t *testing.T) {
	if len(required) != 51 {
		t.Fatalf("the list has %d names, not 51", len(required))
	}
	f, err := elf.Open(hostBinary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	exported := map[string]bool{}
	for _, s := range symbols {
		if s.Section != elf.SHN_UNDEF {
			exported[s.Name] = true
		}
	}
	for _, name := range required {
		if !exported[name] {
			t.Errorf("%s is not exported", name)
		}
		delete(exported, name)
	}
	for _, name := range additional {
		if !exported[name] {
			t.Errorf("%s is not exported", name)
		}
		delete(exported, name)
	}
	for _, name := range extensions {
		if !exported[name] {
			t.Errorf("%s is not exported", name)
		}
		delete(exported, name)
	}
	for name := range exported {
		if !ofGo(name) {
			t.Errorf("%s is exported", name)
		}
	}
}
