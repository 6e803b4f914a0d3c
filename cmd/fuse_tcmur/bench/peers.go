// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Names of the peers, as flags and results have them.
const (
	ours    = "ours"
	gofuse  = "gofuse"
	libfuse = "libfuse"
	nbdfuse = "nbdfuse"
	loop    = "loop"
)

// peer is one way to have a device in memory.
type peer struct {
	name  string
	label string // what it is, for people
	start func(context.Context, *bed, *server) error
}

// peers is all of them, ours first.
func peers() []peer {
	return []peer{
		{ours, "fuse_tcmur, handler ram in its host process", startOurs},
		{gofuse, "go-fuse, tuned, in process", startGofuse},
		{libfuse, "C libfuse3 low-level, multithreaded, in process", startLibfuse},
		{nbdfuse, "nbdfuse + nbdkit memory", startNbdfuse},
		{loop, "loop device with direct I/O on tmpfs (no FUSE)", startLoop},
	}
}

// server is a peer that runs. Its device is one file, or two files with different caching.
type server struct {
	peer    peer
	dir     string   // its own, holds the mount point
	mount   string   // "" if it has none
	process *process // nil if the kernel serves
	direct  string   // the device's file for O_DIRECT
	cached  string   // and for the page cache
	small   string   // a device of shellSize, for commands; "" if there is none
	undo    []func() error
}

// startFilled is startServer, and writes and reads the whole device once, so that all memory is there and mapped.
func startFilled(ctx context.Context, b *bed, p peer) (*server, error) {
	s, err := startServer(ctx, b, p)
	if err != nil {
		return nil, err
	}
	files := []string{s.direct}
	if p.name == ours && s.cached != s.direct {
		files = append(files, s.cached) // another device; the others have one, with two names
	}
	for _, file := range files {
		if err := fill(ctx, file, b.size, 1, s.unblock); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, errors.Join(err, s.stop()))
		}
	}
	return s, nil
}

// startServer starts p in a directory of its own. The caller stops it.
func startServer(ctx context.Context, b *bed, p peer) (s *server, err error) {
	s = &server{peer: p}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", p.name, errors.Join(err, s.stop()))
			s = nil
		}
	}()
	if s.dir, err = os.MkdirTemp(b.dir, p.name+"-"); err != nil {
		return s, err
	}
	s.onStop(func() error { return os.RemoveAll(s.dir) })
	return s, p.start(ctx, b, s)
}

// onStop registers what stop does, last first.
func (s *server) onStop(f func() error) { s.undo = append(s.undo, f) }

// stop ends the server and removes all that belongs to it. Calls after the first do nothing.
func (s *server) stop() error {
	var errs []error
	for i := len(s.undo) - 1; i >= 0; i-- {
		errs = append(errs, s.undo[i]())
	}
	s.undo = nil
	return errors.Join(errs...)
}

// unblock makes requests fail that the server does not answer. The server is of no use any more.
func (s *server) unblock() {
	if s.mount != "" {
		abort(s.mount)
	}
}

// ended returns why the server has ended, nil if it has not.
func (s *server) ended() error {
	if s.process == nil {
		return nil
	}
	return s.process.ended()
}

// pids lists the server's processes, none if the kernel serves.
func (s *server) pids() []int {
	if s.process == nil {
		return nil
	}
	return s.process.pids()
}

// pin keeps the server on one CPU until the function that it returns is called.
func (s *server) pin(cpu int) (func() error, error) {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return nil, err
	}
	one.Set(cpu)
	pids := s.pids()
	return func() error { return setAffinity(pids, &all) }, setAffinity(pids, &one)
}

// run starts the process of a server that mounts s.mount and waits until the files are there.
func (s *server) run(ctx context.Context, files []string, argv ...string) error {
	p, err := startProcess(argv...)
	if err != nil {
		return err
	}
	s.process = p
	s.onStop(func() error {
		err := unmount(s.mount)
		p.stop()
		return err
	})
	return waitForFiles(ctx, p, s.mount, files...)
}

// makeMount makes the directory that the server mounts on.
func (s *server) makeMount() error {
	s.mount = filepath.Join(s.dir, "mnt")
	return os.Mkdir(s.mount, 0o700)
}

// runOurs mounts fuse_tcmur and has it run the commands, which make the devices that files name, below dev.
func (s *server) runOurs(ctx context.Context, b *bed, files []string, commands []string, flags ...string) error {
	if err := s.makeMount(); err != nil {
		return err
	}
	argv := append([]string{b.ours, "--mountpoint", s.mount, "--log-level", "warn"}, flags...)
	for _, command := range commands {
		argv = append(argv, "-c", command)
	}
	paths := []string{s.control()}
	for _, file := range files {
		paths = append(paths, s.device(file))
	}
	return s.run(ctx, paths, argv...)
}

// device is the path of a device of ours.
func (s *server) device(name string) string { return filepath.Join(s.mount, "dev", name) }

// control is the path of our node for commands.
func (s *server) control() string { return s.device("tcmur") }

// startOurs has one device, or two if direct and cached I/O want different options.
func startOurs(ctx context.Context, b *bed, s *server) error {
	commands := []string{"load ram", fmt.Sprintf("add 0 %s size=%d /ram/@", b.addDirect, b.size)}
	files := []string{"ram000"}
	if b.addCached != b.addDirect {
		// Another configuration string, since the same one is the same device.
		commands = append(commands, fmt.Sprintf("add 1 %s /ram/@/%d", b.addCached, b.size))
		files = append(files, "ram001")
	}
	if err := s.runOurs(ctx, b, files, commands, b.oursFlags...); err != nil {
		return err
	}
	s.direct, s.cached = s.device(files[0]), s.device(files[len(files)-1])
	return nil
}

// runPeer runs a peer of our own making.
func runPeer(ctx context.Context, b *bed, s *server, program string) error {
	if err := s.makeMount(); err != nil {
		return err
	}
	s.direct, s.cached = filepath.Join(s.mount, "direct"), filepath.Join(s.mount, "cached")
	argv := []string{program, s.mount, strconv.FormatInt(b.size, 10)}
	if b.writeback {
		argv = append(argv, "writeback")
	}
	return s.run(ctx, []string{s.direct, s.cached}, argv...)
}

func startGofuse(ctx context.Context, b *bed, s *server) error {
	program, err := b.buildGofuse(ctx)
	if err != nil {
		return err
	}
	return runPeer(ctx, b, s, program)
}

func startLibfuse(ctx context.Context, b *bed, s *server) error {
	program, err := b.buildLibfuse(ctx)
	if err != nil {
		return err
	}
	return runPeer(ctx, b, s, program)
}

// startNbdfuse lets nbdfuse start nbdkit with a socket, over which it opens several connections.
func startNbdfuse(ctx context.Context, b *bed, s *server) error {
	if err := s.makeMount(); err != nil {
		return err
	}
	s.direct = filepath.Join(s.mount, "nbd")
	s.cached = s.direct
	return s.run(ctx, []string{s.direct}, "nbdfuse", s.direct, "[",
		"nbdkit", "--foreground", "memory", strconv.FormatInt(b.size, 10), "]")
}

// startLoop has a tmpfs of its own.
func startLoop(ctx context.Context, b *bed, s *server) error {
	tmpfs := filepath.Join(s.dir, "tmpfs")
	if err := os.Mkdir(tmpfs, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("bench", tmpfs, "tmpfs", 0, fmt.Sprintf("size=%d", b.size+1<<20)); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	s.onStop(func() error { return unmount(tmpfs) })
	file := filepath.Join(tmpfs, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, b.size); err != nil {
		return err
	}
	device, err := attachLoop(ctx, file, true, nil)
	if err != nil {
		return err
	}
	s.onStop(func() error { return detachLoop(ctx, device, nil) })
	s.direct, s.cached = device, device
	return nil
}

// fill writes and reads the whole device, depth requests at a time.
func fill(ctx context.Context, file string, size int64, depth int, unblock func()) error {
	for _, rw := range []string{"write", "read"} {
		_, err := runFio(ctx, fioRun{
			file: file, size: size, timeout: 2 * time.Minute, unblock: unblock,
			options: fioOptions{
				"rw": rw, "bs": "1m", "ioengine": "io_uring", "iodepth": strconv.Itoa(depth), "direct": "1",
			},
		})
		if err != nil {
			return fmt.Errorf("%s the whole device: %w", rw, err)
		}
	}
	return nil
}
