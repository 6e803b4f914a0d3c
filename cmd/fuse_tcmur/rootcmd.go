// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// options is the command line.
type options struct {
	mountpoint string
	prefixes   []string
	hostBinary string
	maxMinors  int
	budget     int
	stopAfter  time.Duration
	start      startList
	logLevel   string
	logFormat  string
	logFile    string // absolute path, "" for standard error
	daemon     bool
	pidFile    string // absolute path, "" for none
	config     string // absolute path, "" for none
	// configRequired: the user has named it, so that it must be there.
	configRequired bool
	hints          bool
	ioUring        string
	ctlGroup       string
	ctlAccess      nodeAccess // what ctlGroup means
	insecure       bool
	metricsListen  string // address, "" for none
}

// startItem is something to run once mounted: a command, or a file of commands.
type startItem struct {
	command string
	file    string // absolute path, "" for a command
}

// startList is what -c and --source collect, in the order of the command line.
type startList []startItem

// commandFlag and sourceFlag are the two flags that append to one list (pflag.Value).
type (
	commandFlag struct{ list *startList }
	sourceFlag  struct{ list *startList }
)

func (f commandFlag) String() string { return "" }
func (f commandFlag) Type() string   { return "command" }
func (f commandFlag) Set(value string) error {
	*f.list = append(*f.list, startItem{command: value})
	return nil
}

func (f sourceFlag) String() string { return "" }
func (f sourceFlag) Type() string   { return "file" }
func (f sourceFlag) Set(value string) error {
	path, err := filepath.Abs(value)
	if err != nil {
		return err
	}
	*f.list = append(*f.list, startItem{file: path})
	return nil
}

const longText = `fuse_tcmur mounts a tree in which each device of a tcmu-runner storage handler (handler_*.so) is a
regular file, MOUNTPOINT/dev/SUBTYPE000. It serves in the foreground until SIGINT, SIGTERM, the command
'exit', or an umount from outside. Each handler runs in a process of its own.

Commands are written to MOUNTPOINT/dev/tcmur; write(2) fails with the first failing command's errno:
  echo load ram > /tcmur/dev/tcmur

`

// newRootCommand is the command line as users see it. Its errors carry an exit status, except those of the flag parser.
func newRootCommand() *cobra.Command {
	var opts options
	ownDir := ownDirectory()
	cmd := &cobra.Command{
		Use:   "fuse_tcmur [flags]",
		Short: "Access tcmu-runner storage handlers through a FUSE mount",
		Long:  longText + helpText(),
		Example: "  fuse_tcmur -c 'load ram' -c 'add 0 size=4G /ram/@'\n" +
			"  mkfs.ext4 /tcmur/dev/ram000 && mount /tcmur/dev/ram000 /mnt",
		Args:          cobra.NoArgs,
		Version:       versionString(),
		SilenceErrors: true,
		SilenceUsage:  true,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			opts.configRequired = cmd.Flags().Changed("config")
			return withStatus(exitUsage, opts.complete())
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.daemon && !isDaemonChild() {
				return startDaemon()
			}
			output := cmd.ErrOrStderr()
			var file *logFile
			if opts.logFile != "" {
				var err error
				if file, err = openLogFile(opts.logFile); err != nil {
					return withStatus(exitStartFailed, fmt.Errorf("--log-file: %w", err))
				}
				output = file
			}
			log := opts.newLogger(output)
			becomeIOFlusher(log)
			keepDescriptors()
			spareProcessors()
			service, err := newService(&opts, file, log)
			if err != nil {
				return withStatus(exitStartFailed, err)
			}
			defer service.finish()
			return serve(&opts, cmd.OutOrStdout(), service, log)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&opts.mountpoint, "mountpoint", defaultMountpoint,
		"`directory` to mount on; made if it is missing")
	flags.StringArrayVar(&opts.prefixes, "handler-prefix", defaultHandlerPrefixes(ownDir),
		"where handlers lie: `prefix` SUBTYPE \".so\"; may be repeated, the first match is loaded")
	flags.StringVar(&opts.hostBinary, "host-binary", defaultHostBinary(ownDir), "`path` of tcmur-host")
	flags.IntVar(&opts.maxMinors, "max-minors", defaultMaxMinors, "`number` of minors there are, from 0 on")
	flags.IntVar(&opts.budget, "death-budget", plugin.DefaultDeathBudget,
		"give a handler up after this `number` of deaths in a row without a request completed between them")
	flags.DurationVar(&opts.stopAfter, "stop-timeout", defaultStopTimeout,
		"`time` for flushing and closing all devices at the end; what takes longer is killed")
	flags.VarP(commandFlag{&opts.start}, "command", "c",
		"run a command once mounted; may be repeated; if it fails, so does the start")
	flags.Var(sourceFlag{&opts.start}, "source",
		"run the commands in a file once mounted, in order with the -c commands; may be repeated")
	flags.StringVar(&opts.config, "config", defaultConfig,
		"run the commands in a `file` before all others; one that fails is logged, and the rest run; the default file\n"+
			"may be missing, and an empty name means none")
	flags.StringVar(&opts.ioUring, "fuse-io-uring", string(fusetree.IOUringAuto),
		"take requests over io_uring, not from /dev/fuse: `mode` auto (if the kernel lets us), on or off; it does,\n"+
			"from Linux 6.14 on, after: echo Y > /sys/module/fuse/parameters/enable_uring")
	flags.StringVar(&opts.ctlGroup, "ctl-group", "",
		"let the members of a `group` give commands too; they can make the program load what it finds")
	flags.BoolVar(&opts.insecure, "allow-insecure-handlers", false,
		"load also handlers that others than root and their owner can change or replace")
	flags.StringVar(&opts.metricsListen, "metrics-listen", "",
		"serve metrics for Prometheus over HTTP at an `address`, [HOST]:PORT; without HOST on 127.0.0.1")
	flags.StringVar(&opts.logLevel, "log-level", "info",
		"least `level` that goes to stderr: trace, debug, info, warn or error")
	flags.StringVar(&opts.logFormat, "log-format", "text", "`format` of the log: text or json")
	flags.StringVar(&opts.logFile, "log-file", "",
		"append the log to a `file` and not to stderr; SIGHUP opens it anew")
	flags.BoolVar(&opts.daemon, "daemon", false,
		"serve in the background; return when that has begun, or failed; the log goes to "+defaultLogFile+"\n"+
			"unless --log-file names another")
	flags.StringVar(&opts.pidFile, "pid-file", "",
		"write the process id to a `file` while serving; with --daemon "+defaultPIDFile+" if not given")
	flags.BoolVar(&opts.hints, "hints", false, "print what to try next, even if stdout is not a terminal")
	cmd.AddCommand(newCtlCommand(), newStatusCommand(), newReleaseCommand())
	cmd.SetVersionTemplate("fuse_tcmur {{.Version}}\n")
	cmd.SetHelpTemplate(cmd.HelpTemplate() + exitStatusText)
	return cmd
}

// logLevels are the values of --log-level, each with more to say than the next.
var logLevels = []string{"trace", "debug", "info", "warn", "error"}

// ioUringModes are the values of --fuse-io-uring.
var ioUringModes = []string{string(fusetree.IOUringAuto), string(fusetree.IOUringOn), string(fusetree.IOUringOff)}

// complete checks the options and makes the paths in them absolute, because serving leaves the working directory.
func (o *options) complete() error {
	var err error
	switch {
	case o.mountpoint == "":
		return errors.New("--mountpoint must not be empty")
	case o.maxMinors < 1 || o.maxMinors > plugin.LimitMaxMinors:
		return fmt.Errorf("--max-minors %d: must be 1 to %d", o.maxMinors, plugin.LimitMaxMinors)
	case o.budget < 1:
		return fmt.Errorf("--death-budget %d: must be at least 1", o.budget)
	case o.stopAfter <= 0:
		return fmt.Errorf("--stop-timeout %v: must be more than 0", o.stopAfter)
	case !slices.Contains(ioUringModes, o.ioUring):
		return fmt.Errorf("--fuse-io-uring %q: must be one of %s", o.ioUring, strings.Join(ioUringModes, ", "))
	case !slices.Contains(logLevels, o.logLevel):
		return fmt.Errorf("--log-level %q: must be one of %s", o.logLevel, strings.Join(logLevels, ", "))
	case o.logFormat != "text" && o.logFormat != "json":
		return fmt.Errorf("--log-format %q: must be text or json", o.logFormat)
	}
	if o.ctlGroup != "" {
		if o.ctlAccess, err = ctlAccessFor(o.ctlGroup); err != nil {
			return fmt.Errorf("--ctl-group: %w", err)
		}
	}
	if o.metricsListen != "" {
		if o.metricsListen, err = metricsAddress(o.metricsListen); err != nil {
			return err
		}
	}
	if o.mountpoint, err = filepath.Abs(o.mountpoint); err != nil {
		return fmt.Errorf("--mountpoint: %w", err)
	}
	if o.mountpoint == "/" {
		return errors.New("--mountpoint: nothing can be mounted on /")
	}
	if o.hostBinary, err = filepath.Abs(o.hostBinary); err != nil {
		return fmt.Errorf("--host-binary: %w", err)
	}
	if err := o.completeService(); err != nil {
		return err
	}
	workDir, err := os.Getwd()
	if err != nil {
		return err
	}
	for i, prefix := range o.prefixes {
		if !filepath.IsAbs(prefix) {
			// Not filepath.Join: a slash at the end of a prefix means something.
			o.prefixes[i] = workDir + "/" + prefix
		}
	}
	return nil
}

// completeService is the part of complete for the files that a service has.
func (o *options) completeService() error {
	if o.daemon && o.logFile == "" {
		o.logFile = defaultLogFile
	}
	if o.daemon && o.pidFile == "" {
		o.pidFile = defaultPIDFile
	}
	for flag, path := range map[string]*string{
		"--log-file": &o.logFile, "--pid-file": &o.pidFile, "--config": &o.config,
	} {
		if *path == "" {
			continue
		}
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return fmt.Errorf("%s: %w", flag, err)
		}
		if strings.HasPrefix(absolute, o.mountpoint+"/") {
			return fmt.Errorf("%s %s: lies below the mount point, where the program would wait for itself", flag, *path)
		}
		*path = absolute
	}
	return nil
}

// newLogger makes the program's log as the options want it.
func (o *options) newLogger(output io.Writer) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name:       "fuse_tcmur",
		Level:      hclog.LevelFromString(o.logLevel),
		Output:     output,
		JSONFormat: o.logFormat == "json",
	})
}
