// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// smallLibrary has no room for the sizes that fuzzing comes upon.
type smallLibrary struct{ *fakeLibrary }

func (l smallLibrary) AddDevice(
	ctx context.Context, minor int, config string, options plugin.DeviceOptions,
) (device, error) {
	options.Size = min(options.Size, 1<<12)
	return l.fakeLibrary.AddDevice(ctx, minor, config, options)
}

// FuzzCtlWrite checks what must hold whatever anybody writes to the command node: an errno that write(2) can return, a
// text to read for each failure, and a tree that shows what is loaded and added, no more and no less.
func FuzzCtlWrite(f *testing.F) {
	for _, text := range []string{
		"", "\n\n", "load ram\nadd 0 /ram/@\nremove 0\nunload ram",
		"load ram\nadd 0 size=1T ro /ram/@\nunload ram\nadd 0 /ram/x",
		"load nosuch\nload a/b\nload .\nload ..\nload \xff", "help\ndump\necho x\nhelp add",
		"e\nl\nad 0\nr 0", "exit\nload ram",
		"load ram # twice\r\nload ram\x00", "source /nonexistent/file\nsource relative\nsource /test/mount/dev/tcmur",
		"load tcmur\nadd 0 /tcmur/\nadd 1 /tcmur/\nadd 0x7fffffff /tcmur/", "add -0 /x\nadd 00 /x\nload x\nadd +1 /x",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r := newRig(t)
		r.front.lib = smallLibrary{r.lib}
		ctl := r.openCtl(t)
		err := ctl.write(text)
		printed := ctl.cat(t)
		if errno := errnoOf(err); errno > 133 {
			t.Fatalf("errno %d", errno)
		}
		if err != nil && !strings.Contains(printed, err.Error()) {
			t.Fatalf("write fails with %q, but what can be read is %q", err, printed)
		}
		if err == nil && strings.Contains(r.log.String(), "command failed") {
			t.Fatalf("a failure was logged, but write succeeded:\n%s", r.log)
		}
		for _, handler := range r.lib.handlers {
			if !r.exists("/sys/modules/" + handler) {
				t.Errorf("no /sys/modules/%s", handler)
			}
		}
		if n := len(r.front.allModules()); n != len(r.lib.handlers) {
			t.Errorf("%d handlers are loaded, %d are shown", len(r.lib.handlers), n)
		}
		for minor, device := range r.lib.devices {
			if r.front.node(minor) == nil || !r.exists("/dev/"+device.Name()) {
				t.Errorf("no node for %s", device.Name())
			}
		}
		if n := len(r.front.allNodes()); n != len(r.lib.devices) {
			t.Errorf("%d devices were added, %d are shown", len(r.lib.devices), n)
		}
		if again := fmt.Sprint(errnoOf(ctl.write("dump"))); again != "errno 0" && !strings.Contains(again, "shutdown") {
			t.Errorf("after it, dump fails: %s", again)
		}
	})
}
