// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// bed is what all servers of one run share.
type bed struct {
	root string // of the source tree
	dir  string // temporary, removed by close
	ours string // bin/fuse_tcmur

	size      int64    // of each device, in bytes
	writeback bool     // in the peers of our own making, writes to cached files are written back
	addDirect string   // options of add for direct I/O
	addCached string   // and for I/O through the page cache
	oursFlags []string // more flags for fuse_tcmur

	built map[string]string // programs, by name
	undo  []func() error    // what close does besides
	fio   time.Duration     // the CPU time of a fio that does nothing
}

const buildTimeout = 5 * time.Minute

func newBed(ctx context.Context) (*bed, error) {
	out, _, err := command{argv: []string{"go", "env", "GOMOD"}, timeout: buildTimeout}.run(ctx)
	if err != nil {
		return nil, err
	}
	module := strings.TrimSpace(string(out))
	if filepath.Base(module) != "go.mod" {
		return nil, errors.New("run this in the source tree: go run ./cmd/fuse_tcmur/bench")
	}
	b := &bed{root: filepath.Dir(module), built: map[string]string{}}
	b.ours = filepath.Join(b.root, "bin", "fuse_tcmur")
	if _, err := os.Stat(b.ours); err != nil {
		return nil, fmt.Errorf("%w: run make first", err)
	}
	// What is mounted appears in mountinfo by its real path.
	if b.dir, err = os.MkdirTemp("", "tcmur-bench-"); err != nil {
		return nil, err
	}
	if b.dir, err = filepath.EvalSymlinks(b.dir); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *bed) close() error {
	errs := []error{os.RemoveAll(b.dir)}
	for _, undo := range b.undo {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}

// onClose registers what close does besides.
func (b *bed) onClose(f func() error) { b.undo = append(b.undo, f) }

// installPackages installs what the peers consist of.
func (b *bed) installPackages(ctx context.Context) error {
	_, _, err := command{
		argv: []string{filepath.Join(b.root, ".ci", "packages"), "e2fsprogs", "fio", "gcc", "libfuse3-dev", "libnbd-bin",
			"nbdkit", "pkg-config"},
		timeout: 15 * time.Minute,
	}.run(ctx)
	return err
}

// build runs the command that makes a program, at most once per name. The command gets the path to write to as "OUT".
func (b *bed) build(ctx context.Context, name string, argv ...string) (string, error) {
	if path, ok := b.built[name]; ok {
		return path, nil
	}
	path := filepath.Join(b.dir, name)
	for i, arg := range argv {
		if arg == "OUT" {
			argv[i] = path
		}
	}
	if _, _, err := (command{argv: argv, timeout: buildTimeout}).run(ctx); err != nil {
		return "", err
	}
	b.built[name] = path
	return path, nil
}

func (b *bed) buildGofuse(ctx context.Context) (string, error) {
	return b.build(ctx, "gofuse", "go", "build", "-o", "OUT", filepath.Join(b.root, "cmd/fuse_tcmur/bench/gofuse"))
}

func (b *bed) buildLibfuse(ctx context.Context) (string, error) {
	flags, _, err := command{
		argv: []string{"pkg-config", "--cflags", "--libs", "fuse3"}, timeout: buildTimeout,
	}.run(ctx)
	if err != nil {
		return "", err
	}
	argv := []string{"gcc", "-std=gnu11", "-O2", "-o", "OUT", filepath.Join(b.root, "cmd/fuse_tcmur/bench/libfuse/mem.c"),
		"-pthread"}
	return b.build(ctx, "libfuse", append(argv, strings.Fields(string(flags))...)...)
}
