// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// client runs a subcommand of the program and returns what it printed and its exit status.
func (b *bed) client(stdin string, args ...string) (stdout, stderr string, status int) {
	b.Helper()
	cmd := b.command(testbed.Program(b, "fuse_tcmur"), args...)
	var out, errs strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		b.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestE2ECtl drives a server with "fuse_tcmur ctl": what it prints, how it fails, and with which status.
func TestE2ECtl(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start()
	at := "--mountpoint=" + f.mount
	for _, step := range []struct {
		stdin  string
		args   []string
		status int
		out    string // in stdout
		err    string // in stderr
	}{
		{args: []string{"load ram", "add 0 size=1M /ram/@"}, out: "ram000: " + f.path("ram000")},
		{stdin: "# comment\n\necho one\necho two\n", args: []string{"-"}, out: "one\ntwo\n"},
		{args: []string{"load nosuch", "echo unreached"}, status: 4, err: "fuse_tcmur: load nosuch: no such handler"},
		{args: []string{"-k", "load nosuch", "echo reached"}, status: 4, out: "reached", err: "nosuch"},
		{args: []string{"load", "ram"}, status: 4, err: "one command is one argument: 'load SUBTYPE'"},
		{args: []string{"--json", "echo x"}, out: `"output": "x\n"`},
		{args: []string{"--json", "remove 9"}, status: 4, out: `"errno": "ENODEV"`, err: "minor 9"},
		{args: []string{}, status: 2, err: "--help"},
		{args: []string{"--nosuch", "help"}, status: 2, err: "--nosuch"},
	} {
		out, errs, status := b.client(step.stdin, append([]string{"ctl", at}, step.args...)...)
		if status != step.status || !strings.Contains(out, step.out) || !strings.Contains(errs, step.err) ||
			(step.err == "") != (errs == "") || strings.Contains(out, "unreached") {
			t.Errorf("ctl %q: status %d, printed %q and %q; want %d, %q, %q", step.args, status, out, errs,
				step.status, step.out, step.err)
		}
	}
	out, _, _ := b.client("", "ctl", at, "--json", "load nosuch", "echo x")
	var results []map[string]any
	if err := json.Unmarshal([]byte(out), &results); err != nil || len(results) != 1 || results[0]["ok"] != false {
		t.Errorf("ctl --json printed %q (%v)", out, err)
	}
	if out, errs, status := b.client("", "ctl", at, "remove 0", "exit"); status != 0 || out+errs != "" {
		t.Errorf("exit: status %d, %q %q", status, out, errs)
	}
	if len(b.mountsBelow(f.mount)) > 0 {
		t.Error("ctl exit has returned, and the mount is there")
	}
	f.wantExit(0)
}

// TestE2EClientErrors: what ctl and status say where nobody answers, and their exit statuses.
func TestE2EClientErrors(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start()
	dead := b.start()
	if err := dead.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-dead.exited
	empty := t.TempDir()
	for _, test := range []struct {
		mountpoint string
		status     int
		says       []string
	}{
		{empty, 5, []string{"no fuse_tcmur serves " + empty, f.mount, "--mountpoint"}},
		{empty + "/nosuch", 5, []string{"no fuse_tcmur serves"}},
		{"/proc", 5, []string{"what is mounted there is proc"}},
		{f.mount + "/dev", 2, []string{"lies below one", "--mountpoint " + f.mount}},
		{dead.mount, 7, []string{"has died", "umount " + dead.mount}},
	} {
		for _, sub := range []string{"ctl help", "status"} {
			args := append(strings.Fields(sub), "--mountpoint", test.mountpoint)
			out, errs, status := b.client("", args...)
			if status != test.status || out != "" {
				t.Errorf("%q: status %d, want %d; printed %q", args, status, test.status, out)
			}
			for _, text := range test.says {
				if !strings.Contains(errs, text) {
					t.Errorf("%q: %q does not say %q", args, errs, text)
				}
			}
		}
	}
	// Somebody else than root may look, and not give commands.
	program := b.sockets + "/fuse_tcmur"
	b.run("cp", testbed.Program(t, "fuse_tcmur"), program)
	for _, dir := range []string{b.sockets, b.mounts} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	defer os.Remove(program)
	out, status := b.shell(f, "setpriv --reuid=65534 --clear-groups "+program+" ctl --mountpoint $M help")
	if status != 6 || !strings.Contains(out, "as root") {
		t.Errorf("ctl by nobody: status %d, %q", status, out)
	}
	if err := unix.Unmount(dead.mount, unix.MNT_DETACH); err != nil {
		t.Error(err)
	}
}

// status is what "fuse_tcmur status --json" prints.
func (f *front) status() (report struct {
	PID      int
	Handlers []map[string]any
	Devices  []struct {
		Name, Config, State string
		Options             []string
		Size                int64
		OpenCount           int `json:"open_count"`
		Operations          map[string]struct {
			Count, Bytes, Errors uint64
			Latency              struct {
				P99 int64 `json:"p99_ns"`
			}
		}
		LastError *struct{ Text, Errno string } `json:"last_error"`
	}
}) {
	f.Helper()
	out, errs, status := f.client("", "status", "--json", "--mountpoint", f.mount, "--interval=10ms")
	if err := json.Unmarshal([]byte(out), &report); err != nil || status != 0 {
		f.Fatalf("status: %v, status %d\n%s%s", err, status, out, errs)
	}
	return report
}

// TestE2EStatus: status tells what is true, as JSON and for people.
func TestE2EStatus(t *testing.T) {
	b := newBed(t, 60*time.Second, "fault")
	f := b.start()
	host := f.load("fault")
	f.must("add 3 ro timeout=5 /fault/size=0x100000,read:8192=5")
	node := f.open("fault003", os.O_RDONLY|syscall.O_DIRECT)
	for range 10 {
		if _, err := unix.Pread(int(node.Fd()), alignedBlock(), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := unix.Pread(int(node.Fd()), alignedBlock(), 8192); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a read that fails: %v", err)
	}
	s := f.status()
	if s.PID != f.cmd.Process.Pid || len(s.Handlers) != 1 || len(s.Devices) != 1 {
		t.Fatalf("status %+v", s)
	}
	if h := s.Handlers[0]; h["subtype"] != "fault" || h["pid"] != float64(host) || h["state"] != "running" {
		t.Errorf("handler %v", h)
	}
	d := s.Devices[0]
	if d.Name != "fault003" || d.Size != 1<<20 || d.OpenCount != 1 || d.State != "running" ||
		strings.Join(d.Options, " ") != "ro timeout=5" || d.Config != "/fault/size=0x100000,read:8192=5" {
		t.Errorf("device %+v", d)
	}
	if r := d.Operations["read"]; r.Count != 11 || r.Errors != 1 || r.Bytes != 10*4096 || r.Latency.P99 == 0 {
		t.Errorf("reads %+v", r)
	}
	if d.LastError == nil || d.LastError.Errno != "EIO" || !strings.Contains(d.LastError.Text, "at 8192") {
		t.Errorf("last error %+v", d.LastError)
	}
	out, _, _ := b.client("", "status", "--mountpoint", f.mount)
	for _, text := range []string{"fault003", "HANDLER", fmt.Sprint(host), "1 request(s) failed", "ro timeout=5 /fault/"} {
		if !strings.Contains(out, text) {
			t.Errorf("status does not say %q:\n%s", text, out)
		}
	}
	node.Close()
}

// alignedBlock is a buffer that O_DIRECT takes.
func alignedBlock() []byte {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		panic(err)
	}
	return b
}

// TestE2EAttributes reads the attributes below /sys the ways that users do.
func TestE2EAttributes(t *testing.T) {
	b := newBed(t, 60*time.Second)
	f := b.start()
	host := f.load("ram")
	f.must("add 0 size=8M block_size=4096 max_xfer=256K /ram/@\nadd 1 ro /ram/@/2M")
	f.fio("ram000", "--rw=randread", "--bs=8k", "--direct=1", "--number_ios=50", "--size=8M", "--ioengine=psync")
	for path, want := range map[string]string{
		"block/ram000/size":                     "16384\n",
		"block/ram000/ro":                       "0\n",
		"block/ram001/ro":                       "1\n",
		"block/ram000/state":                    "running\n",
		"block/ram000/inflight":                 "       0        0\n",
		"block/ram000/queue/logical_block_size": "4096\n",
		"block/ram000/queue/max_sectors_kb":     "256\n",
		"block/ram000/queue/rotational":         "0\n",
		"block/ram000/queue/nr_requests":        "512\n",
		"hosts/ram/pid":                         fmt.Sprintln(host),
		"hosts/ram/state":                       "running\n",
		"hosts/ram/restarts":                    "0\n",
		"hosts/ram/path":                        testbed.ShippedHandlers() + "ram.so\n",
	} {
		for _, read := range []string{"cat $F", "head -n 1 $F", "dd if=$F bs=1 2>/dev/null", "read -r A < $F; echo \"$A\""} {
			out, status := b.shell(f, "F=$M/sys/"+path+"; IFS=; "+read)
			if status != 0 || out != want {
				t.Errorf("%s of %s: status %d, %q, want %q", read, path, status, out, want)
			}
		}
	}
	var stat [17]int64
	text, err := os.ReadFile(f.mount + "/sys/block/ram000/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text))
	for i := range min(len(fields), len(stat)) {
		_, _ = fmt.Sscan(fields[i], &stat[i])
	}
	if len(fields) != len(stat) || stat[0] != 50 || stat[2] != 50*16 || stat[4] != 0 || stat[8] != 0 {
		t.Errorf("stat %q", text)
	}
	if _, err := os.OpenFile(f.mount+"/sys/block/ram000/ro", os.O_WRONLY, 0); err == nil {
		t.Error("an attribute can be opened for writing")
	}
	if entries, err := os.ReadDir(f.mount + "/sys/modules/ram"); err != nil || len(entries) > 0 {
		t.Errorf("/sys/modules/ram: %v, %v", entries, err)
	}
	// An attribute that is open keeps nothing from going away.
	open, err := os.Open(f.mount + "/sys/block/ram000/stat")
	if err != nil {
		t.Fatal(err)
	}
	f.must("remove 0\nremove 1\nunload ram")
	if _, err := open.Read(make([]byte, 10)); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("reading an attribute of a device that is gone: %v", err)
	}
	open.Close()
	for _, dir := range []string{"block", "hosts", "modules"} {
		if entries, err := os.ReadDir(f.mount + "/sys/" + dir); err != nil || len(entries) > 0 {
			t.Errorf("/sys/%s: %v, %v", dir, entries, err)
		}
	}
}
