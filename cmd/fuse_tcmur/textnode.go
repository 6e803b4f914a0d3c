// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"sync"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// textMode is the mode of nodes that show something to everybody.
const textMode = 0o444

// textOps are the operations of a read-only node whose contents are made when it is read: a descriptor sees one state
// of things from its first read on, and another one when it reads from the beginning again.
func textOps(contents func() string) *fusetree.Ops {
	return &fusetree.Ops{
		Open: func(file *fusetree.File) error {
			if isWritable(file.Flags) {
				return failf(syscall.EACCES, "%s can only be read", file.Node.Path())
			}
			file.Data = &textView{}
			file.DirectIO = true // the node has no size
			return nil
		},
		Read: func(file *fusetree.File, p []byte, off int64) (int, error) {
			view := file.Data.(*textView)
			view.mu.Lock()
			defer view.mu.Unlock()
			if off == 0 {
				view.text = contents()
			}
			if off < 0 || off >= int64(len(view.text)) {
				return 0, nil
			}
			return copy(p, view.text[off:]), nil
		},
		Truncate: func(*fusetree.File, int64) error {
			return failf(syscall.EACCES, "this can only be read")
		},
	}
}

// textView is what one descriptor sees of a text node.
type textView struct {
	mu   sync.Mutex // guards text
	text string
}

// branch is a directory and what was put below it, to be taken away as one.
type branch struct {
	tree nodeTree
	dir  *fusetree.Node
	// parts are the nodes in the order in which they were made.
	parts []branchPart
}

type branchPart struct {
	parent *fusetree.Node
	name   string
	isDir  bool
}

// newBranch makes a directory. The errors are those of the tree.
func newBranch(tree nodeTree, name string, parent *fusetree.Node) (*branch, error) {
	b := &branch{tree: tree}
	dir, err := b.mkdir(name, parent)
	b.dir = dir
	return b, err
}

func (b *branch) mkdir(name string, parent *fusetree.Node) (*fusetree.Node, error) {
	dir, err := b.tree.Mkdir(name, parent)
	if err == nil {
		b.parts = append(b.parts, branchPart{parent, name, true})
	}
	return dir, err
}

// addTexts puts text nodes into a directory of the branch.
func (b *branch) addTexts(dir *fusetree.Node, texts []attribute) error {
	for _, text := range texts {
		if _, err := b.tree.Add(text.name, dir, textMode, textOps(text.contents), nil); err != nil {
			return err
		}
		b.parts = append(b.parts, branchPart{dir, text.name, false})
	}
	return nil
}

// attribute is one text node.
type attribute struct {
	name     string
	contents func() string
}

// remove takes the branch away, whoever has a part of it open: reads then fail with ENODEV.
func (b *branch) remove() error {
	var failures []error
	for i := len(b.parts) - 1; i >= 0; i-- {
		part := b.parts[i]
		if part.isDir {
			failures = append(failures, b.tree.Rmdir(part.name, part.parent))
		} else {
			failures = append(failures, b.tree.Detach(part.name, part.parent))
		}
	}
	b.parts = nil
	return errors.Join(failures...)
}
