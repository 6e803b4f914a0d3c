// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/testbed"
)

// The manual pages against the programs: what can be typed stands in them, and they render without warnings.

func pagePath(page string) string { return filepath.Join(testbed.Root(), "docs", "man", page) }

func readPage(t *testing.T, page string) string {
	t.Helper()
	text, err := os.ReadFile(pagePath(page))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section is what stands in a page below a heading.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\n.SH "+heading+"\n")
	if !ok {
		t.Fatalf("there is no section %s", heading)
	}
	body, _, _ := strings.Cut(rest, "\n.SH ")
	return body
}

var (
	fontEscape  = regexp.MustCompile(`\\f[BIRP]`)
	roffComment = regexp.MustCompile(`(?m)^\.\\".*\n`)
	fontRequest = regexp.MustCompile(`(?m)^\.(B|I|BR|IR|RI|RB|SS|SH) `)
)

// plainRoff removes what the pages have of roff, as far as a search for words needs it.
func plainRoff(text string) string {
	text = roffComment.ReplaceAllString(text, "")
	text = fontEscape.ReplaceAllString(text, "")
	text = fontRequest.ReplaceAllString(text, "")
	return strings.NewReplacer(`\-`, "-", `\(aq`, "'", `\e`, `\`, `\(lq`, `"`, `\(rq`, `"`, `\c`+"\n", "").Replace(text)
}

// containsWord reports whether text has the word, not as a part of a longer one.
func containsWord(text, word string) bool {
	return regexp.MustCompile(`(^|\W)` + regexp.QuoteMeta(word) + `(\W|$)`).MatchString(text)
}

func TestManPagesRender(t *testing.T) {
	pages, err := filepath.Glob(pagePath("*"))
	if err != nil || len(pages) != 4 {
		t.Fatalf("pages %q, error %v; want 4", pages, err)
	}
	for _, page := range pages {
		for _, tool := range [][]string{
			{"mandoc", "-T", "lint", "-W", "warning"},
			{"groff", "-man", "-ww", "-z", "-Tutf8"},
		} {
			out, err := exec.Command(tool[0], append(tool[1:], page)...).CombinedOutput()
			if errors.Is(err, exec.ErrNotFound) {
				t.Fatalf("%v: install mandoc and groff (make deps does)", err)
			}
			if err != nil || len(out) > 0 {
				t.Errorf("%s %s: %v\n%s", tool[0], filepath.Base(page), err, out)
			}
		}
	}
}

// TestManPageFlags: each flag and each subcommand of the command line stands in fuse_tcmur(1), and the page has no
// others.
func TestManPageFlags(t *testing.T) {
	raw := readPage(t, "fuse_tcmur.1")
	page := plainRoff(raw)
	known := map[string]bool{}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.InitDefaultHelpFlag()
		cmd.InitDefaultVersionFlag()
		if cmd.HasParent() && !cmd.Hidden && !containsWord(page, cmd.CommandPath()) {
			t.Errorf("fuse_tcmur.1 does not have the subcommand %q", cmd.CommandPath())
		}
		cmd.Flags().VisitAll(func(flag *pflag.Flag) {
			known["--"+flag.Name] = true
			if flag.Hidden || cmd.Hidden {
				return
			}
			heading := "--" + flag.Name
			if flag.Shorthand != "" {
				heading = "-" + flag.Shorthand + ", " + heading
			}
			if name, _ := pflag.UnquoteUsage(flag); name != "" {
				heading += " " + name
			}
			if !strings.Contains(page, "\n.TP\n"+heading+"\n") {
				t.Errorf("fuse_tcmur.1 has no paragraph with the heading %q", heading)
			}
		})
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(newRootCommand())
	for _, name := range regexp.MustCompile(`\n\.TP\n(?:-\w, )?(--[a-z-]+)`).FindAllStringSubmatch(page, -1) {
		if !known[name[1]] {
			t.Errorf("fuse_tcmur.1 has %s, the program does not", name[1])
		}
	}
}

// TestManPageDefaults: where a flag has a default of one word, its paragraph names it.
func TestManPageDefaults(t *testing.T) {
	page := plainRoff(section(t, readPage(t, "fuse_tcmur.1"), "OPTIONS"))
	newRootCommand().Flags().VisitAll(func(flag *pflag.Flag) {
		switch flag.DefValue {
		case "", "false", "[]":
			return
		}
		if flag.Name == "handler-prefix" || flag.Name == "host-binary" {
			return // depend on where the program is
		}
		for paragraph := range strings.SplitSeq(page, "\n.TP\n") {
			if strings.Contains(paragraph, "--"+flag.Name+" ") && containsWord(paragraph, flag.DefValue) {
				return
			}
		}
		t.Errorf("the paragraph of --%s does not say that the default is %s", flag.Name, flag.DefValue)
	})
}

// TestManPageCommands: each command with its arguments, and each option of add, is the heading of a paragraph, and
// there are no others.
func TestManPageCommands(t *testing.T) {
	page := plainRoff(section(t, readPage(t, "fuse_tcmur.1"), "COMMANDS"))
	headings := map[string]bool{}
	for paragraph := range strings.SplitSeq(page, "\n.TP\n") {
		heading, _, _ := strings.Cut(paragraph, "\n")
		headings[heading] = true
	}
	want := map[string]bool{}
	for _, cmd := range commandTable() {
		want[cmd.synopsis()] = true
	}
	eachAddOption(func(key, value, _ string) {
		if value != "" {
			key += "=" + value
		}
		want[key] = true
	})
	for heading := range want {
		if !headings[heading] {
			t.Errorf("fuse_tcmur.1 has no paragraph with the heading %q", heading)
		}
	}
	for heading := range headings {
		if !want[heading] && !strings.Contains(heading, " is ") && !strings.HasPrefix(heading, "Commands ") {
			t.Errorf("fuse_tcmur.1 describes %q, which the program does not have", heading)
		}
	}
}

// TestManPageExitStatuses: the page has the statuses of the program's help.
func TestManPageExitStatuses(t *testing.T) {
	page := section(t, readPage(t, "fuse_tcmur.1"), "EXIT STATUS")
	for _, line := range regexp.MustCompile(`(?m)^  (\d+)  `).FindAllStringSubmatch(exitStatusText, -1) {
		if !strings.Contains(page, fmt.Sprintf("\n.B %s\n", line[1])) && !strings.HasPrefix(page, ".TP\n.B "+line[1]) {
			t.Errorf("fuse_tcmur.1 does not have exit status %s", line[1])
		}
	}
}

// TestManPageHostFlags: tcmur-host(8) has the flags that the program lists, and no others.
func TestManPageHostFlags(t *testing.T) {
	help, err := exec.Command(testbed.Program(t, "tcmur-host"), "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("tcmur-host --help: %v", err)
	}
	page := plainRoff(readPage(t, "tcmur-host.8"))
	known := map[string]bool{}
	for _, flag := range regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(string(help), -1) {
		known[flag[1]] = true
		if !strings.Contains(page, "\n.TP\n--"+flag[1]) {
			t.Errorf("tcmur-host.8 has no paragraph for --%s", flag[1])
		}
	}
	if len(known) == 0 {
		t.Fatalf("no flags in the help:\n%s", help)
	}
	for _, flag := range regexp.MustCompile(`\n\.TP\n--([a-z-]+)`).FindAllStringSubmatch(page, -1) {
		if !known[flag[1]] {
			t.Errorf("tcmur-host.8 has --%s, the program does not", flag[1])
		}
	}
}
