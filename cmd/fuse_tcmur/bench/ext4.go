// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ext4Workload is work on a new ext4 file system, on a loop device where the peer's device is a file.
type ext4Workload struct {
	work   ext4Work
	direct bool // the loop device bypasses the page cache of the file below it
}

type ext4Work int

const (
	copyTree ext4Work = iota
	extractTar
)

const ext4Timeout = 3 * time.Minute

// run does the work twice, on a new file system each time, and returns the time that it took the second time until
// all of it had reached the device. The first time decides what memory the kernel has at hand for the second; before
// that it was the previous server's work that did, and the device's past.
func (w *ext4Workload) run(ctx context.Context, b *bed, s *server) (took time.Duration, err error) {
	source, err := b.goSource(ctx)
	if err != nil {
		return 0, err
	}
	argv := []string{"cp", "-r", source}
	if w.work == extractTar {
		archive, err := b.goArchive(ctx, source)
		if err != nil {
			return 0, err
		}
		argv = []string{"tar", "-xf", archive, "-C"}
	}
	device := s.cached
	if w.direct {
		device = s.direct
	}
	if s.peer.name != loop {
		if device, err = attachLoop(ctx, device, w.direct, s.unblock); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, detachLoop(ctx, device, s.unblock)) }()
	}
	for range 2 {
		if took, err = w.once(ctx, s, device, argv); err != nil {
			return 0, err
		}
	}
	return took, nil
}

// once makes a file system, runs argv with the mount point as its last argument, and takes everything away again.
func (w *ext4Workload) once(
	ctx context.Context, s *server, device string, argv []string,
) (took time.Duration, err error) {
	do := func(ctx context.Context, argv ...string) error {
		_, _, err := command{argv: argv, timeout: ext4Timeout, unblock: s.unblock}.run(ctx)
		return err
	}
	// Without discard, all peers keep their memory. Without lazy initialisation, nothing goes on in the background.
	err = do(ctx, "mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", device)
	if err != nil {
		return 0, err
	}
	mountpoint := filepath.Join(s.dir, "ext4")
	if err := os.MkdirAll(mountpoint, 0o700); err != nil {
		return 0, err
	}
	if err := do(ctx, "mount", "-t", "ext4", device, mountpoint); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, do(context.WithoutCancel(ctx), "umount", mountpoint)) }()
	begin := time.Now()
	if err := do(ctx, append(slices.Clip(argv), mountpoint)...); err != nil {
		return 0, err
	}
	if err := do(ctx, "sync", "-f", mountpoint); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

// goSource is the source tree of Go, which every machine with this benchmark has.
func (b *bed) goSource(ctx context.Context) (string, error) {
	if source, ok := b.built["go source"]; ok {
		return source, nil
	}
	out, _, err := command{argv: []string{"go", "env", "GOROOT"}, timeout: buildTimeout}.run(ctx)
	if err != nil {
		return "", err
	}
	source := filepath.Join(strings.TrimSpace(string(out)), "src")
	if _, err := os.Stat(source); err != nil {
		return "", fmt.Errorf("the source of Go is what is copied: %w", err)
	}
	b.built["go source"] = source
	return source, nil
}

func (b *bed) goArchive(ctx context.Context, source string) (string, error) {
	return b.build(ctx, "go.tar", "tar", "-cf", "OUT", "-C", filepath.Dir(source), filepath.Base(source))
}
