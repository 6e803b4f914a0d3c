// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// handlerPrefix is where fuse_tcmur finds the handlers that are built here, with --handler-prefix.
func (b *bed) handlerPrefix() string { return filepath.Join(b.dir, "handler_") }

// gcc is a command that compiles for a handler.
func gcc(more ...string) []string {
	return append([]string{"gcc", "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-o", "OUT"}, more...)
}

// buildFault builds the handler of the tests that can be slow.
func (b *bed) buildFault(ctx context.Context) error {
	_, err := b.build(ctx, "handler_fault.so", gcc("-fvisibility=default", "-shared",
		"-I"+filepath.Join(b.root, "plugin/handlers"), filepath.Join(b.root, "plugin/testdata/fault.c"))...)
	return err
}

// buildRams builds the ram handler count times, under different subtypes, since a subtype is loaded only once. It
// returns the subtypes.
func (b *bed) buildRams(ctx context.Context, count int) ([]string, error) {
	const field = `.subtype = "ram"`
	sources := filepath.Join(b.root, "plugin/handlers")
	ram, err := os.ReadFile(filepath.Join(sources, "ram.c"))
	if err != nil {
		return nil, err
	}
	if !strings.Contains(string(ram), field) {
		return nil, fmt.Errorf("%s/ram.c has no %s any more", sources, field)
	}
	var others []string
	for _, name := range []string{"memory", "backing", "config", "fd_io", "pattern"} {
		others = append(others, filepath.Join(sources, name+".c"))
	}
	// One object of all that is the same in each.
	same, err := b.build(ctx, "same.o", append(gcc("-r", "-nostdlib"), others...)...)
	if err != nil {
		return nil, err
	}
	var subtypes []string
	for i := range count {
		subtype := fmt.Sprintf("ram%c", 'a'+i)
		source := filepath.Join(b.dir, subtype+".c")
		text := strings.Replace(string(ram), field, fmt.Sprintf(".subtype = %q", subtype), 1)
		if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
			return nil, err
		}
		_, err := b.build(ctx, "handler_"+subtype+".so", gcc("-shared", "-I"+sources, source, same)...)
		if err != nil {
			return nil, err
		}
		subtypes = append(subtypes, subtype)
	}
	return subtypes, nil
}
