// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	// ctlTimeout is how long a command is waited for: a little longer than a server gives it.
	ctlTimeout = commandTimeout + 30*time.Second
	// exitWait is how long the end of a server is waited for: it takes five seconds at most unless told otherwise.
	exitWait = 30 * time.Second
)

const ctlLong = `ctl has a running fuse_tcmur run commands, and prints what they print. Each argument is one command;
'-' stands for standard input, with one command a line. The first command that fails ends it, unless
--keep-going is given. 'exit' returns when nothing is mounted any more.

`

// ctlOptions is the command line of ctl.
type ctlOptions struct {
	mountpoint string
	json       bool
	keepGoing  bool
	timeout    time.Duration
}

// ctlResult is what became of one command, as --json shows it.
type ctlResult struct {
	Command string `json:"command"`
	OK      bool   `json:"ok"`
	Output  string `json:"output"` // what the command printed; if it failed, the reason is at the end
	Errno   string `json:"errno,omitempty"`
}

func newCtlCommand() *cobra.Command {
	var opts ctlOptions
	cmd := &cobra.Command{
		Use:   "ctl [flags] COMMAND... | -",
		Short: "have a running fuse_tcmur run commands",
		Long:  ctlLong + helpText(),
		Example: "  fuse_tcmur ctl 'load ram' 'add 0 size=4G /ram/@'\n" +
			"  fuse_tcmur ctl - < commands",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runCtl(cmd, &opts, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&opts.mountpoint, "mountpoint", defaultMountpoint, "`directory` of the mount to speak to")
	flags.BoolVar(&opts.json, "json", false, "print what became of each command as a JSON array")
	flags.BoolVarP(&opts.keepGoing, "keep-going", "k", false, "run the other commands too when one fails")
	flags.DurationVar(&opts.timeout, "timeout", ctlTimeout, "`time` to wait for each command")
	return cmd
}

func runCtl(cmd *cobra.Command, opts *ctlOptions, args []string) error {
	lines, err := ctlLines(args, cmd.InOrStdin())
	if err != nil {
		return withStatus(exitUsage, err)
	}
	server, err := findInstance("/proc", opts.mountpoint)
	if err != nil {
		return err
	}
	results := []ctlResult{}
	var failure error
	for _, line := range lines {
		result, err := server.ctl(cmd, opts, line)
		results = append(results, result)
		if err != nil && failure == nil {
			failure = err
		}
		if failure != nil && !opts.keepGoing {
			break
		}
	}
	if opts.json {
		text, err := json.MarshalIndent(results, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", text)
		return errors.Join(failure, err)
	}
	return failure
}

// ctlLines lists the commands that the arguments stand for.
func ctlLines(args []string, stdin io.Reader) ([]string, error) {
	var lines []string
	for _, arg := range args {
		in := io.Reader(strings.NewReader(arg))
		if arg == "-" {
			in = stdin
		}
		scanner := bufio.NewScanner(in)
		scanner.Buffer(nil, maxCtlWrite)
		for scanner.Scan() {
			if name, _ := splitCommand(scanner.Text()); name != "" {
				lines = append(lines, scanner.Text())
			}
		}
		if err := scanner.Err(); err != nil {
			return nil, fmt.Errorf("reading the commands: %w", err)
		}
	}
	return lines, nil
}

// ctl has one command run and shows what becomes of it.
func (i *instance) ctl(cmd *cobra.Command, opts *ctlOptions, line string) (ctlResult, error) {
	ctx, cancel := context.WithTimeout(cmd.Context(), opts.timeout)
	defer cancel()
	stop := showProgress(cmd.ErrOrStderr(), line, func() string {
		if report, err := i.status(ctx); err == nil {
			return describeWork(report.Devices)
		}
		return ""
	})
	defer stop()
	output, err := i.command(ctx, line)
	if err == nil && isExit(line) {
		wait, cancel := context.WithTimeout(cmd.Context(), exitWait)
		defer cancel()
		if i.awaitGone(wait, "/proc") != nil {
			err = withStatus(exitNoAnswer, fmt.Errorf("%s is still mounted after %v: the server's log says why",
				i.place, exitWait))
		}
	}
	stop()
	result := ctlResult{Command: line, OK: err == nil, Output: output}
	if err == nil {
		if !opts.json {
			_, _ = io.WriteString(cmd.OutOrStdout(), output)
		}
		return result, nil
	}
	var known *exitError
	if errors.As(err, &known) {
		return result, err
	}
	errno := errnoOf(err)
	result.Errno = unix.ErrnoName(errno)
	return result, withStatus(exitRefused, refusal(line, output, errno))
}

// isExit reports whether a command ends the server.
func isExit(line string) bool {
	name, _ := splitCommand(line)
	cmd, err := findCommand(name)
	return err == nil && cmd.name == "exit"
}

// refusal makes an error of what a failed command has printed.
func refusal(line, output string, errno syscall.Errno) error {
	text := strings.TrimRight(output, "\n")
	if text == "" {
		text = fmt.Sprintf("%s: %v", line, errno)
	}
	if name, args := splitCommand(line); args == "" && errno == syscall.EINVAL {
		if cmd, err := findCommand(name); err == nil && cmd.args != "" {
			text += fmt.Sprintf(" (one command is one argument: '%s')", cmd.synopsis())
		}
	}
	return errors.New(text)
}
