// SPDX-License-Identifier: Apache-2.0

package fusetree_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// A tree with one file, whose contents are made when it is read.
func Example() {
	mountpoint, err := os.MkdirTemp("", "fusetree")
	if err != nil {
		panic(err)
	}
	tree, err := fusetree.Init(mountpoint, fusetree.Options{FsName: "example"})
	if err != nil {
		panic(err)
	}

	const text = "Hello from the other side.\n"
	dir, err := tree.Mkdir("greetings", tree.Root())
	if err != nil {
		panic(err)
	}
	node, err := tree.Add("hello", dir, 0o444, &fusetree.Ops{
		Read: func(_ *fusetree.File, p []byte, off int64) (int, error) {
			return strings.NewReader(text).ReadAt(p, off)
		},
	}, nil)
	if err != nil {
		panic(err)
	}
	node.UpdateSize(int64(len(text)))

	fmt.Print(tree.Format())

	ended := make(chan error, 1)
	go func() { ended <- tree.Run() }()
	select {
	case <-tree.Mounted():
	case err := <-ended:
		panic(err)
	}

	// Use the mount from another process.
	out, err := exec.Command("cat", mountpoint+node.Path()).Output()
	if err != nil {
		fmt.Println(err)
	}
	fmt.Printf("%s", out)

	if err := tree.Unmount(false); err != nil {
		fmt.Println(err)
	}
	if err := <-ended; err != nil {
		fmt.Println(err)
	}
	if err := os.Remove(mountpoint); err != nil {
		fmt.Println(err)
	}
	// Output:
	// MODE                       SIZE  OPEN  NAME
	// drwxr-xr-x                    -     -  /
	// drwxr-xr-x                    -     -    greetings/
	// -r--r--r--                   27     0      hello
	// Hello from the other side.
}
