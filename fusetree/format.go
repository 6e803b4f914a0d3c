// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
)

// Format returns the tree as text for people, one node a line, children below their directory, indented and sorted by
// name: permissions, size in bytes, number of open files ("-" for directories), name. What is below the directories in
// folded is left out.
func (t *Tree) Format(folded ...*Node) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s %20s %5s  %s\n", "MODE", "SIZE", "OPEN", "NAME")
	t.mu.Lock()
	defer t.mu.Unlock()
	t.root.format(&b, 0, folded)
	return b.String()
}

// format writes n and what is below it. Tree.mu is held.
func (n *Node) format(b *strings.Builder, depth int, folded []*Node) {
	n.attrMu.Lock()
	a := n.attr
	n.attrMu.Unlock()

	mode := fs.FileMode(a.mode & 0o777)
	size, opens, suffix := fmt.Sprint(a.size), fmt.Sprint(n.opens), ""
	if n.dir {
		mode |= fs.ModeDir
		size, opens, suffix = "-", "-", "/"
	}
	fmt.Fprintf(b, "%-10s %20s %5s  %s%s%s\n", mode, size, opens, strings.Repeat("  ", depth), n.name, suffix)
	if slices.Contains(folded, n) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		n.children[name].format(b, depth+1, folded)
	}
}
