// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

// parseFlags runs the command line as far as the checks of the options.
func parseFlags(t *testing.T, args ...string) error {
	t.Helper()
	cmd := newRootCommand()
	cmd.RunE = func(*cobra.Command, []string) error { return nil }
	cmd.SetArgs(args)
	return cmd.Execute()
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"argument"}, {"--nosuch"}, {"--mountpoint="}, {"--mountpoint", "/"},
		{"--max-minors", "0"}, {"--max-minors", "x"}, {"--max-minors", "1000000"},
		{"--log-level", "loud"}, {"--log-format", "xml"}, {"-c"},
		{"--log-file=/tcmur/log"}, {"--config=/tcmur/dev/tcmur"}, {"--fuse-io-uring", "yes"}, {"--fuse-io-uring="},
	} {
		var stderr bytes.Buffer
		if got := report(parseFlags(t, args...), &stderr); got != exitUsage {
			t.Errorf("%q: exit status %d", args, got)
		}
		if !strings.HasPrefix(stderr.String(), "fuse_tcmur: ") || !strings.Contains(stderr.String(), "--help") {
			t.Errorf("%q: stderr %q", args, stderr.String())
		}
	}
}

func TestGoodFlags(t *testing.T) {
	for _, args := range [][]string{
		{}, {"--mountpoint", "rel/dir/"}, {"--log-level", "trace", "--log-format", "json"},
		{"--max-minors", "4096"}, {"--handler-prefix", "/a/handler_", "--handler-prefix", "b,c_"},
		{"--hints", "-c", "load ram"}, {"--fuse-io-uring=on"}, {"--fuse-io-uring", "off"},
	} {
		if err := parseFlags(t, args...); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestStartOrder: -c and --source run in the order in which they were given, and file names become absolute.
func TestStartOrder(t *testing.T) {
	var list startList
	cmd := &cobra.Command{}
	cmd.Flags().VarP(commandFlag{&list}, "command", "c", "")
	cmd.Flags().Var(sourceFlag{&list}, "source", "")
	args := []string{"-c", "load a, b", "--source", "x", "--command", "load c", "--source", "/y"}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	want := startList{{command: "load a, b"}, {file: dir + "/x"}, {command: "load c"}, {file: "/y"}}
	if diff := cmp.Diff(want, list, cmp.AllowUnexported(startItem{})); diff != "" {
		t.Error(diff)
	}
}

func TestRelativePathsBecomeAbsolute(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	opts := options{
		mountpoint: "m/", prefixes: []string{"p/", "/q_"}, hostBinary: "h",
		maxMinors: 1, budget: 1, stopAfter: 1, logLevel: "info", logFormat: "text", ioUring: "off",
	}
	if err := opts.complete(); err != nil {
		t.Fatal(err)
	}
	if opts.mountpoint != dir+"/m" || opts.hostBinary != dir+"/h" ||
		!slices.Equal(opts.prefixes, []string{dir + "/p/", "/q_"}) {
		t.Errorf("options: %+v", opts)
	}
}

func TestHelpAndVersion(t *testing.T) {
	for arg, wants := range map[string][]string{
		"--help": {
			"EXIT STATUS", "--mountpoint", "--handler-prefix", "--host-binary", "--source", "-c, --command",
			"--log-level", "--log-format", "--version", "--max-minors", "--fuse-io-uring",
			"add MINOR [KEY=VALUE ...] /SUBTYPE/CFG", "/tcmur",
		},
		"--version": {"fuse_tcmur " + versionString()},
	} {
		var out bytes.Buffer
		cmd := newRootCommand()
		cmd.SetOut(&out)
		cmd.SetArgs([]string{arg})
		if err := cmd.Execute(); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
		for _, want := range wants {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s does not mention %q", arg, want)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	prefixes := defaultHandlerPrefixes("/opt/ft/bin")
	if prefixes[0] != "/opt/ft/lib/tcmu-runner/handler_" ||
		!slices.Contains(prefixes, "/usr/local/lib/tcmu-runner/handler_") ||
		prefixes[len(prefixes)-1] != "/usr/lib64/tcmu-runner/handler_" {
		t.Errorf("handler prefixes %q", prefixes)
	}
	if got := defaultHostBinary("/opt/ft/bin"); got != filepath.Join("/opt/ft/bin", "tcmur-host") {
		t.Errorf("host binary %q", got)
	}
}
