// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// TestVersions drives handlers that were compiled against the struct of each version: what a version has is called,
// and what stands in its place in another one is not.
func TestVersions(t *testing.T) {
	for _, c := range []struct {
		version, abi string
		calls, not   []string
	}{
		{"152", "1.5.0-1.5.2", nil, []string{"init was called", "writesame was called"}},
		{"153", "1.5.3", []string{"init was called"}, []string{"writesame was called"}},
		{"154", "1.5.4-1.6.2", []string{"init was called", "writesame was called"}, nil},
	} {
		t.Run(c.version, func(t *testing.T) {
			f := startHost(t)
			if abi := f.mustLoad(buildHandler(t, "version.c", "-DVERSION="+c.version), "version").GetAbi(); abi != c.abi {
				t.Errorf("layout is taken for %s, not for %s", abi, c.abi)
			}
			f.mustOpen(&hostpb.OpenRequest{Config: "version/", Size: 1 << 20})
			data := pattern(5, 64<<10)
			if err := f.write(0, 4096, data); err != nil {
				t.Fatal(err)
			}
			if err := f.do(sqe{op: opZero, offset: 8192, length: 4096}); err != nil {
				t.Fatal(err)
			}
			clear(data[4096:8192])
			if got, err := f.read(0, 4096, len(data)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read: error %v, data equal: %v", err, bytes.Equal(got, data))
			}
			if err := f.do(sqe{op: opFlush}); err != nil {
				t.Errorf("flush: %v", err)
			}
			if err := f.close(callCtx(t), 0); err != nil {
				t.Error(err)
			}
			for _, text := range append(c.calls, "opened") {
				f.awaitLog(text)
			}
			for _, text := range append(c.not, "called by mistake") {
				if strings.Contains(f.log.String(), text) {
					t.Errorf("the log says %q", text)
				}
			}
		})
	}
}

// TestThreading: how many callouts the known handlers get at a time, and how.
func TestThreading(t *testing.T) {
	shipped := func(name string) string {
		path, err := filepath.Abs("../../lib/tcmu-runner/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	const asManyAsItAsks = 0
	for _, c := range []struct {
		so, subtype  string
		concurrency  uint32
		async, byCDB bool
	}{
		{debianHandler(t, "handler_qcow.so"), "qcow", 1, false, false},
		{debianHandler(t, "handler_file_optical.so"), "fbo", 1, false, true},
		// It has no threads of its own, like an asynchronous handler, and is not one.
		{debianHandler(t, "handler_file_zbc.so"), "zbc", 1, false, true},
		{debianHandler(t, "handler_rbd.so"), "rbd", 1, true, false},
		{shipped("handler_file.so"), "file", asManyAsItAsks, false, false},
	} {
		if c.subtype == "rbd" && builtWith("-asan") {
			continue // AddressSanitizer cannot deal with C++ exceptions in a C program
		}
		reply := startHost(t).mustLoad(c.so, c.subtype)
		if c.concurrency == asManyAsItAsks {
			c.concurrency = uint32(reply.GetNrThreads())
		}
		if reply.GetConcurrency() != c.concurrency || reply.GetAsynchronous() != c.async ||
			reply.GetByCommandBlock() != c.byCDB {
			t.Errorf("%s: %d at a time, asynchronous %v, by command block %v", c.subtype, reply.GetConcurrency(),
				reply.GetAsynchronous(), reply.GetByCommandBlock())
		}
	}
}
