// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// stranger is a user who is neither root nor the one that runs the tests.
const stranger = 65534

// handlerCopy puts handler ram at dir/deep/handler_ram.so and returns its path.
func handlerCopy(t *testing.T, dir string) string {
	t.Helper()
	object, err := os.ReadFile(testbed.ShippedHandlers() + "ram.so")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "deep", "handler_ram.so")
	if err := os.WriteFile(path, object, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestHandlerFileOfOthers: a handler is refused if somebody can change it, or put another one in its place, who is
// neither root nor its owner.
func TestHandlerFileOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("must run as root: files have to be given to others")
	}
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name string
		// change makes of a safe handler in dir/deep what is to be tested, and may return another prefix to find it by.
		change  func(dir, path string) (prefix string)
		refused string // what the reason names, "" for none
	}{
		{"safe", func(string, string) string { return "" }, ""},
		{"its owner is somebody else", func(dir, path string) string {
			must(os.Chown(path, stranger, stranger), os.Chown(filepath.Dir(path), stranger, stranger))
			return ""
		}, ""},
		{"file writable by everybody", func(_, path string) string {
			must(os.Chmod(path, 0o646))
			return ""
		}, "everybody can change"},
		{"file writable by its group", func(_, path string) string {
			must(os.Chmod(path, 0o664))
			return ""
		}, "group 0 can change"},
		{"directory writable by everybody", func(_, path string) string {
			must(os.Chmod(filepath.Dir(path), 0o777))
			return ""
		}, "/deep (mode 0777)"},
		{"directory above writable by its group", func(dir, _ string) string {
			must(os.Chmod(dir, 0o775))
			return ""
		}, "group 0 can change"},
		{"directory above of somebody else", func(dir, _ string) string {
			must(os.Chown(dir, stranger, stranger))
			return ""
		}, "user 65534, who owns it, can change"},
		{"sticky directory: only owners can replace what is in it", func(_, path string) string {
			must(os.Chmod(filepath.Dir(path), 0o777|os.ModeSticky))
			return ""
		}, ""},
		{"sticky directory of somebody else", func(_, path string) string {
			must(os.Chmod(filepath.Dir(path), 0o777|os.ModeSticky), os.Chown(filepath.Dir(path), stranger, stranger))
			return ""
		}, "user 65534, who owns it, can change"},
		{"link in an unsafe directory to a safe file", func(dir, path string) string {
			must(os.Mkdir(dir+"/links", 0o755), os.Chmod(dir+"/links", 0o777), os.Symlink(path, dir+"/links/handler_ram.so"))
			return dir + "/links/handler_"
		}, "/links (mode 0777)"},
		{"link of somebody else in a sticky directory", func(dir, path string) string {
			must(os.Mkdir(dir+"/links", 0o755), os.Chmod(dir+"/links", 0o777|os.ModeSticky),
				os.Symlink(path, dir+"/links/handler_ram.so"), os.Lchown(dir+"/links/handler_ram.so", stranger, stranger))
			return dir + "/links/handler_"
		}, "user 65534, who owns it, can change"},
		{"safe link through an unsafe directory", func(dir, path string) string {
			must(os.Mkdir(dir+"/links", 0o755), os.Symlink("../deep", dir+"/links/d"), os.Chmod(filepath.Dir(path), 0o777))
			return dir + "/links/d/handler_"
		}, "/deep (mode 0777)"},
		{"safe link", func(dir, path string) string {
			must(os.Mkdir(dir+"/links", 0o755), os.Symlink("../deep", dir+"/links/d"))
			return dir + "/links/d/handler_"
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			testbed.Deadline(t, testDeadline)
			testbed.NothingLeft(t)
			dir, err := filepath.EvalSymlinks(t.TempDir())
			must(err)
			path := handlerCopy(t, dir)
			prefix := test.change(dir, path)
			if prefix == "" {
				prefix = strings.TrimSuffix(path, "ram.so")
			}
			load := func(insecure bool) error {
				l, err := plugin.Init(plugin.Config{
					HandlerPrefixes: []string{prefix}, HostBinary: testbed.Program(t, "tcmur-host"),
					AllowInsecureHandlers: insecure,
				})
				must(err)
				defer func() { must(l.Shutdown(context.Background())) }()
				return l.LoadHandler(context.Background(), "ram")
			}
			err = load(false)
			if test.refused == "" {
				must(err)
				return
			}
			if !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), test.refused) ||
				!strings.Contains(err.Error(), "--allow-insecure-handlers") {
				t.Errorf("error %v, want EPERM and %q", err, test.refused)
			}
			must(load(true))
		})
	}
}

// TestReloadOfUnsafeFile: what may not be loaded may not be loaded later either.
func TestReloadOfUnsafeFile(t *testing.T) {
	testbed.Deadline(t, testDeadline)
	testbed.NothingLeft(t)
	path := handlerCopy(t, t.TempDir())
	ctx := context.Background()
	l, err := plugin.Init(plugin.Config{
		HandlerPrefixes: []string{strings.TrimSuffix(path, "ram.so")}, HostBinary: testbed.Program(t, "tcmur-host"),
	})
	if err == nil {
		defer func() { _ = l.Shutdown(ctx) }()
		err = l.LoadHandler(ctx, "ram")
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := l.ReloadHandler(ctx, "ram"); !errors.Is(err, syscall.EPERM) {
		t.Errorf("reload of a file that everybody can change: %v, want EPERM", err)
	}
	if state := l.Handlers()[0].State; state != plugin.HandlerRunning {
		t.Errorf("the handler is %s, want running", state)
	}
}

// TestSubtypeIsNoPath: a subtype names a handler in one of the directories, not one elsewhere.
func TestSubtypeIsNoPath(t *testing.T) {
	l, _ := open(t)
	for _, subtype := range []string{"../ram", "x/../ram", "..", "/ram", "a/b", "ram/", "r..m", "", "r\x00m"} {
		if err := l.LoadHandler(context.Background(), subtype); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("load %q: %v, want EINVAL", subtype, err)
		}
	}
}
