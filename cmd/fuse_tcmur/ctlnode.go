// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"sync"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

const (
	ctlName = "tcmur"
	// ctlMode keeps everybody but root out: who can write commands can make root load a shared object.
	ctlMode = 0o600
	// ctlBlockSize is the buffer that stdio uses for the node: lines written together arrive together.
	ctlBlockSize = 4096
	// maxCtlWrite is the longest write(2) of commands in bytes. It is half of what the kernel sends at once, so
	// that the first piece of a longer write is recognized for what it is, and no command is ever cut in two.
	maxCtlWrite = maxWrite / 2
	// maxCtlOutput is how much a descriptor keeps of what was not read, in bytes; the oldest goes first.
	maxCtlOutput = 1 << 20
)

// ctlNode is the node that takes commands.
type ctlNode struct {
	ctx    context.Context // of the commands; ends when the stop is forced
	interp *interpreter
	gate   *gate
}

// ctlSession is one open of the command node.
type ctlSession struct {
	mu     sync.Mutex // guards the fields below
	spoken bool       // a command was given
	unread bytes.Buffer
	// view is what a descriptor reads that gave no command, made at its first read.
	view []byte
}

// ops is the command node's side of its tree node.
func (c *ctlNode) ops() *fusetree.Ops {
	return &fusetree.Ops{
		Open:    c.open,
		Release: func(*fusetree.File) { c.gate.leaveCtl() },
		Read:    c.read,
		Write:   c.write,
		// The shell's > truncates.
		Truncate: func(*fusetree.File, int64) error { return nil },
		// Commands have taken effect when write(2) returns.
		Fsync: func(*fusetree.File, bool) error { return nil },
	}
}

func (c *ctlNode) open(file *fusetree.File) error {
	if err := c.gate.enterCtl(); err != nil {
		return err
	}
	file.Data = &ctlSession{}
	file.DirectIO = true // the node has no size, and every read and write means something
	return nil
}

// write runs the lines of p. The offset says nothing: a command node is no place to seek in.
func (c *ctlNode) write(file *fusetree.File, p []byte, _ int64, _ fusetree.WriteFlags) (int, error) {
	session := file.Data.(*ctlSession)
	if len(p) > maxCtlWrite {
		return 0, session.refuse(failf(syscall.EINVAL, "over %d bytes at once: use source FILE", maxCtlWrite))
	}
	if bytes.IndexByte(p, 0) >= 0 {
		return 0, session.refuse(failf(syscall.EINVAL, "NUL bytes are no command"))
	}
	var out bytes.Buffer
	err := c.interp.run(c.ctx, script{text: string(p)}, &out)
	session.keep(out.Bytes())
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// refuse lets the writer read why nothing was run.
func (s *ctlSession) refuse(err error) error {
	s.keep([]byte(err.Error() + "\n"))
	return err
}

// keep adds text to what the descriptor can read.
func (s *ctlSession) keep(text []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoken = true
	s.unread.Write(text)
	if excess := s.unread.Len() - maxCtlOutput; excess > 0 {
		s.unread.Next(excess)
	}
}

// read gives a descriptor that has written what its commands printed, each byte once and whatever the offset, which
// the writes have moved; then end of file. Any other descriptor reads a snapshot of the tree like a file.
func (c *ctlNode) read(file *fusetree.File, p []byte, off int64) (int, error) {
	session := file.Data.(*ctlSession)
	session.mu.Lock()
	defer session.mu.Unlock()
	if session.spoken {
		n, _ := session.unread.Read(p) // io.EOF is no error here
		return n, nil
	}
	if session.view == nil {
		session.view = []byte(c.interp.snapshot())
	}
	if off < 0 || off >= int64(len(session.view)) {
		return 0, nil
	}
	return copy(p, session.view[off:]), nil
}
