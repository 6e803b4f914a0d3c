// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func newTree(t testing.TB) *Tree {
	t.Helper()
	return must(Init("/nowhere", Options{}))(t)
}

func TestInit(t *testing.T) {
	t.Parallel()
	for _, mountpoint := range []string{"", "relative", "/", "/ends/"} {
		_, err := Init(mountpoint, Options{})
		wantErr(t, "Init "+mountpoint, err, syscall.EINVAL)
	}
	for _, opts := range []Options{{MaxWrite: -1}, {MaxBackground: -1}, {MaxBackground: 1 << 16}} {
		_, err := Init("/m", opts)
		wantErr(t, "Init", err, syscall.EINVAL)
	}
	tree := must(Init("/does/not/exist", Options{}))(t)
	if r := tree.Root(); r.Name() != "" || r.Path() != "/" || !r.IsDir() || r.Data() != nil {
		t.Errorf("root: %q %q", r.Name(), r.Path())
	}
}

func TestAddAndMkdirErrors(t *testing.T) {
	t.Parallel()
	tree, other := newTree(t), newTree(t)
	file := must(tree.Add("file", tree.Root(), 0o600, nil, nil))(t)
	dir := must(tree.Mkdir("dir", tree.Root()))(t)
	gone := must(tree.Mkdir("gone", tree.Root()))(t)
	ok(t, "Rmdir", tree.Rmdir("gone", tree.Root()))

	for _, c := range []struct {
		name   string
		parent *Node
		want   syscall.Errno
	}{
		{"", dir, syscall.EINVAL},
		{".", dir, syscall.EINVAL},
		{"..", dir, syscall.EINVAL},
		{"a/b", dir, syscall.EINVAL},
		{"a\x00b", dir, syscall.EINVAL},
		{strings.Repeat("n", 256), dir, syscall.EINVAL},
		{"n", nil, syscall.EINVAL},
		{"n", other.Root(), syscall.EINVAL},
		{"n", file, syscall.ENOTDIR},
		{"n", gone, syscall.ENOENT},
		{"file", tree.Root(), syscall.EEXIST},
		{"dir", tree.Root(), syscall.EEXIST},
	} {
		_, err := tree.Add(c.name, c.parent, 0o600, nil, nil)
		wantErr(t, "Add "+c.name, err, c.want)
		_, err = tree.Mkdir(c.name, c.parent)
		wantErr(t, "Mkdir "+c.name, err, c.want)
	}
	_, err := tree.Add("n", dir, syscall.S_IFDIR|0o600, nil, nil)
	wantErr(t, "Add of a directory", err, syscall.EINVAL)
	must(tree.Add("n", dir, syscall.S_IFREG|0o600, nil, nil))(t)
	must(tree.Add(strings.Repeat("n", 255), dir, 0o600, nil, nil))(t)
}

func TestRemoveAndRmdirErrors(t *testing.T) {
	t.Parallel()
	tree, other := newTree(t), newTree(t)
	root := tree.Root()
	file := must(tree.Add("file", root, 0o600, nil, nil))(t)
	dir := must(tree.Mkdir("dir", root))(t)
	must(tree.Add("child", dir, 0o600, nil, nil))(t)

	type call func(string, *Node) error
	for verb, c := range map[string]struct {
		call     call
		name     string // exists, but is of the wrong kind
		wrong    syscall.Errno
		good     string
		goodWant error
	}{
		"Remove": {tree.Remove, "dir", syscall.EISDIR, "file", nil},
		"Detach": {tree.Detach, "dir", syscall.EISDIR, "file", nil},
		"Rmdir":  {tree.Rmdir, "file", syscall.ENOTDIR, "dir", nil},
	} {
		wantErr(t, verb+" of nothing", c.call("missing", root), syscall.ENOENT)
		wantErr(t, verb+" of the wrong kind", c.call(c.name, root), c.wrong)
		wantErr(t, verb+" without parent", c.call("n", nil), syscall.EINVAL)
		wantErr(t, verb+" in another tree", c.call("n", other.Root()), syscall.EINVAL)
		wantErr(t, verb+" in a file", c.call("n", file), syscall.ENOTDIR)
	}
	wantErr(t, "Rmdir", tree.Rmdir("dir", root), syscall.ENOTEMPTY)
	ok(t, "Remove", tree.Remove("child", dir))
	ok(t, "Rmdir", tree.Rmdir("dir", root))
	ok(t, "Detach", tree.Detach("file", root))
	wantErr(t, "Remove again", tree.Remove("file", root), syscall.ENOENT)
	if len(tree.nodes) != 1 {
		t.Errorf("%d nodes remain", len(tree.nodes))
	}
}

func TestExit(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	must(tree.Mkdir("dir", tree.Root()))(t)
	wantErr(t, "Exit", tree.Exit(), syscall.EBUSY)
	ok(t, "Rmdir", tree.Rmdir("dir", tree.Root()))
	ok(t, "Exit", tree.Exit())
	ok(t, "Exit again", tree.Exit())
	_, err := tree.Mkdir("dir", tree.Root())
	wantErr(t, "Mkdir after Exit", err, syscall.ESHUTDOWN)
}

func TestLookupAndPath(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	dev := must(tree.Mkdir("dev", tree.Root()))(t)
	ram := must(tree.Add("ram000", dev, 0o660, nil, "private"))(t)

	for path, want := range map[string]*Node{
		"/":                tree.Root(),
		"/dev":             dev,
		"/dev/ram000":      ram,
		"":                 nil,
		"dev":              nil,
		"/dev/":            nil,
		"//dev":            nil,
		"/dev/.":           nil,
		"/dev/../dev":      nil,
		"/dev/ram":         nil,
		"/dev/ram000/more": nil,
	} {
		if got := tree.Lookup(path); got != want {
			t.Errorf("Lookup(%q) = %v, want %v", path, got, want)
		}
		if want != nil && want.Path() != path {
			t.Errorf("Path() = %q, want %q", want.Path(), path)
		}
	}
	if ram.Name() != "ram000" || ram.Data() != "private" || ram.IsDir() || ram.OpenCount() != 0 {
		t.Errorf("node: %q %v", ram.Name(), ram.Data())
	}
	ok(t, "Remove", tree.Remove("ram000", dev))
	if tree.Lookup("/dev/ram000") != nil || ram.Path() != "/dev/ram000" {
		t.Errorf("after Remove: %v, %q", tree.Lookup("/dev/ram000"), ram.Path())
	}
}

func TestUpdateSizeRefusesNonsense(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	newTree(t).Root().UpdateSize(-1)
}

func TestFormat(t *testing.T) {
	t.Parallel()
	tree := newTree(t)
	sys := must(tree.Mkdir("sys", tree.Root()))(t)
	dev := must(tree.Mkdir("dev", tree.Root()))(t)
	must(tree.Mkdir("modules", sys))(t)
	must(tree.Add("tcmur", dev, 0o600, nil, nil))(t)
	must(tree.Add("ram000", dev, 0o660, nil, nil))(t).UpdateSize(1 << 30)

	want := `MODE                       SIZE  OPEN  NAME
drwxr-xr-x                    -     -  /
drwxr-xr-x                    -     -    dev/
-rw-rw----           1073741824     0      ram000
-rw-------                    0     0      tcmur
drwxr-xr-x                    -     -    sys/
drwxr-xr-x                    -     -      modules/
`
	if diff := cmp.Diff(want, tree.Format()); diff != "" {
		t.Errorf("Format (-want +got):\n%s", diff)
	}
}

func TestHandleTable(t *testing.T) {
	t.Parallel()
	var h handleTable
	var files []*File
	for range 3 * handlePageSize {
		f := &File{}
		if !h.put(f) {
			t.Fatal("table is full")
		}
		files = append(files, f)
	}
	for _, f := range files {
		if f.handle == 0 || h.get(f.handle) != f {
			t.Fatalf("handle %d", f.handle)
		}
	}
	if n := len(h.all()); n != len(files) {
		t.Errorf("%d of %d files", n, len(files))
	}
	f := files[handlePageSize]
	if h.take(f.handle) != f || h.get(f.handle) != nil || h.take(f.handle) != nil {
		t.Error("take")
	}
	again := &File{}
	if !h.put(again) || again.handle != f.handle {
		t.Errorf("handle %d was not used again, but %d", f.handle, again.handle)
	}
	if h.get(^uint64(0)) != nil || h.get(handlePages*handlePageSize-1) != nil {
		t.Error("handle out of nowhere")
	}
	h.free, h.next = nil, handlePages*handlePageSize
	if h.put(&File{}) {
		t.Error("put into a full table")
	}
}
