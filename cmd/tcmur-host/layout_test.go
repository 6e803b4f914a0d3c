// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

func importsOf(names string) importSet {
	s := importSet{}
	for _, name := range strings.Fields(names) {
		s[name] = true
	}
	return s
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		name     string
		evidence evidence
		want     *layout // nil: EINVAL
	}{
		{"nothing", evidence{}, layoutPrefix},
		{"size 160", evidence{symbolSize: 160}, layout152},
		{"size 184", evidence{symbolSize: 184}, layout153},
		{"size 200", evidence{symbolSize: 200}, layout154},
		{"size of something else", evidence{symbolSize: 152}, layoutPrefix},
		{"override", evidence{override: "1.5.1", symbolSize: 200}, layout152},
		{"override 1.5.3", evidence{override: "1.5.3"}, layout153},
		{"override 1.6", evidence{override: "1.6.0"}, layout154},
		{"bad override", evidence{override: "1.4.1"}, nil},
		{"zbc of 1.6", evidence{imports: importsOf("tcmu_dev_get_write_protect_enabled")}, layout154},
		{"rbd of 1.5.4", evidence{imports: importsOf("tcmu_dev_set_unmap_gran_align tcmu_dev_get_private")}, layout154},
		{"rbd of 1.5.3", evidence{imports: importsOf(
			"tcmur_handle_writesame tcmur_handle_caw tcmu_dev_get_private")}, layout153},
		{"rbd of 1.5.2", evidence{imports: importsOf("tcmur_handle_caw tcmu_notify_conn_lost")}, layout152},
		{"fbo of 1.5.3 or later", evidence{imports: importsOf("tcmu_set_thread_name")}, layoutPrefix},
		{"size beats imports", evidence{symbolSize: 184, imports: importsOf("tcmu_dev_set_unmap_gran_align")}, layout153},
	} {
		got, err := choose(c.evidence)
		if c.want == nil {
			if !errors.Is(err, syscall.EINVAL) {
				t.Errorf("%s: got error %v, want EINVAL", c.name, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%s: got %+v, error %v, want %s", c.name, got, err, c.want.name)
		}
	}
}

// TestLoadLayouts loads objects that have one layout each and compares what the host sees in them.
func TestLoadLayouts(t *testing.T) {
	plain := []string{"open", "close", "read", "write"}
	of152 := append(append([]string{}, plain...), "lock")
	of153 := append(append([]string{}, plain...), "report_event", "init")
	of154 := append(append([]string{}, plain...), "writesame", "caw", "destroy")
	for _, c := range []struct {
		name      string
		flags     []string
		abi       string
		want      string
		callbacks []string
	}{
		{"160 by symbol", []string{"-DWORDS=20"}, "", "1.5.0-1.5.2", of152},
		{"184 by symbol", []string{"-DWORDS=23"}, "", "1.5.3", of153},
		{"200 by symbol", []string{"-DWORDS=25"}, "", "1.5.4-1.6.2", of154},
		{"160 by import", []string{"-DWORDS=20", "-DSTATIC", "-s", "-DIMPORTS=tcmur_handle_caw"}, "", "1.5.0-1.5.2", of152},
		{"200 by import", []string{"-DWORDS=25", "-DSTATIC", "-s", "-DIMPORTS=tcmu_dev_set_unmap_gran_align"}, "",
			"1.5.4-1.6.2", of154},
		{"not stripped", []string{"-DWORDS=23", "-DSTATIC"}, "", "1.5.3", of153},
		{"unknown", []string{"-DWORDS=20", "-DSTATIC", "-s"}, "", "prefix", plain},
		{"override", []string{"-DWORDS=25", "-DSTATIC", "-s"}, "1.5.4", "1.5.4-1.6.2", of154},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := startHost(t)
			reply, err := f.rpc.Load(callCtx(t), &hostpb.LoadRequest{Path: buildHandler(t, "layout.c", c.flags...), Abi: c.abi})
			if err != nil {
				t.Fatal(control.FromStatus(err))
			}
			if reply.GetAbi() != c.want {
				t.Errorf("layout is taken for %s, not for %s", reply.GetAbi(), c.want)
			}
			if diff := cmp.Diff(c.callbacks, reply.GetCallbacks()); diff != "" {
				t.Errorf("callbacks (-want +got):\n%s", diff)
			}
		})
	}
}

// TestLoadRefuses tries objects that must not be run, and looks for errors that explain it.
func TestLoadRefuses(t *testing.T) {
	bad := func(n int) []string { return []string{"-DWORDS=25", fmt.Sprintf("-DBAD=%d", n)} }
	for _, c := range []struct {
		name  string
		flags []string
		want  syscall.Errno
		says  string
	}{
		{"subtype nowhere", bad(1), syscall.ENOEXEC, "subtype does not point to a text"},
		{"subtype with slash", bad(2), syscall.EINVAL, "handler of a/b, not of layout"},
		{"empty subtype", bad(3), syscall.EINVAL, "not of layout"},
		{"no open", bad(4), syscall.ENOEXEC, "no open or no close"},
		{"5000 threads", bad(5), syscall.ENOEXEC, "nr_threads is 5000"},
		{"no read", bad(6), syscall.ENOEXEC, "neither read and write nor handle_cmd"},
		{"foreign callback", bad(7), syscall.ENOEXEC, "write points outside"},
		{"dbus", bad(8), syscall.ENOEXEC, "_is_dbus_handler"},
		{"init fails", bad(9), syscall.EIO, "handler_init failed with 7"},
		{"registers nothing", bad(10), syscall.EIO, "registered no handler"},
		{"struct nowhere", bad(11), syscall.ENOEXEC, "not in readable memory"},
		{"registers twice", bad(12), syscall.EIO, "handler_init failed with 1"},
		{"of 1.4", []string{"-DWORDS=20", "-DSTATIC", "-DIMPORTS=tcmu_get_dev_cfgstring"}, syscall.ENOEXEC,
			"1.4 or earlier"},
		{"missing symbol", []string{"-DWORDS=25", "-DIMPORTS=no_such_function"}, syscall.ENOENT, "no_such_function"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := startHost(t)
			_, err := f.load(buildHandler(t, "layout.c", c.flags...), "layout")
			wantErrno(t, err, c.want)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %q does not say %q", err, c.says)
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		_, err := startHost(t).load("/nonexistent/handler_x.so", "x")
		wantErrno(t, err, syscall.ENOENT)
	})
	t.Run("not an object", func(t *testing.T) {
		_, err := startHost(t).load("/etc/hostname", "x")
		wantErrno(t, err, syscall.ENOENT)
	})
	t.Run("not a handler", func(t *testing.T) {
		_, err := startHost(t).load(buildHandler(t, "empty.c"), "x")
		wantErrno(t, err, syscall.EBADF)
	})
	t.Run("second load", func(t *testing.T) {
		f := startHost(t)
		so := buildHandler(t, "layout.c", "-DWORDS=25")
		f.mustLoad(so, "layout")
		_, err := f.load(so, "layout")
		wantErrno(t, err, syscall.EBUSY)
	})
}
