// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// TestObjectIsKept: what becomes of a handler's file concerns its devices only from a successful reload on. A process
// that takes over loads what was loaded, with the libraries that lie beside it.
func TestObjectIsKept(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(path string) error
	}{
		{"overwritten", func(path string) error { return os.WriteFile(path, []byte("garbage"), 0o755) }},
		{"replaced", func(path string) error {
			if err := os.WriteFile(path+".new", []byte("garbage"), 0o755); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		}},
		{"removed", os.Remove},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, logged := open(t, "fault")
			load(t, l, "fault")
			path := info(t, l, "fault").Path
			if err := l.UnloadHandler(t.Context(), "fault"); err != nil {
				t.Fatal(err)
			}
			linkWithLibrary(t, path)
			load(t, l, "fault")
			d := add(t, l, 0, "/fault/lazy="+t.TempDir()+"/lazy", plugin.DeviceOptions{})
			mustWrite(t, d, block(1), 0)
			if err := tt.damage(path); err != nil {
				t.Fatal(err)
			}
			if err := l.ReloadHandler(t.Context(), "fault"); err == nil {
				t.Error("garbage was loaded")
			}
			mustWrite(t, d, block(2), 4096)
			for range 2 {
				kill(t, l, "fault")
				wantContents(t, d, block(1), 0)
				wantContents(t, d, block(2), 4096)
			}
			logged.waitFor(t, "loading what it was", path)

			_ = os.Remove(path) // the processes have it mapped: never write to it
			linkWithLibrary(t, path)
			if err := l.ReloadHandler(t.Context(), "fault"); err != nil {
				t.Error(err)
			}
			before := logged.String()
			kill(t, l, "fault")
			wantContents(t, d, block(2), 4096)
			if after := logged.String()[len(before):]; len(after) == 0 || strings.Contains(after, "loading what it was") {
				t.Errorf("after a reload the file is what it should be, but:\n%s", after)
			}
		})
	}
}

// linkWithLibrary builds handler fault anew, so that it needs a library which it finds by where it lies itself.
func linkWithLibrary(t *testing.T, path string) {
	t.Helper()
	dir := filepath.Dir(path)
	source := filepath.Join(t.TempDir(), "beside.c")
	if err := os.WriteFile(source, []byte("int beside(void) { return 0; }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	testdata := filepath.Join(testbed.Root(), "plugin", "testdata")
	for _, args := range [][]string{
		{"-o", dir + "/libbeside.so", "-Wl,-soname,libbeside.so", source},
		{"-o", path, "-I" + filepath.Join(testbed.Root(), "plugin", "handlers"), filepath.Join(testdata, "fault.c"),
			"-Wl,--no-as-needed,-rpath,$ORIGIN", "-L" + dir, "-lbeside", "-lpthread"},
	} {
		out, err := exec.Command("gcc", append([]string{"-fPIC", "-shared", "-O1", "-g"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
}
