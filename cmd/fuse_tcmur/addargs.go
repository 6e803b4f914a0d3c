// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin"
)

// addArgs is what "add" was asked for.
type addArgs struct {
	minor   int
	config  string // begins with '/'
	options plugin.DeviceOptions
	access  nodeAccess
	cache   cacheMode // "" if it was not given
	words   []string  // of the options, as they were given
}

// addOption is one KEY=VALUE, or KEY alone where value is "", that "add" understands before the config string.
type addOption[T any] struct {
	key     string
	value   string // what stands for the value in the help, "" if the option takes none
	summary string
	set     func(options *T, value string) error
}

// addOptions is the table of those that are for the device, as cacheOptions and accessOptions are for its node: the
// parser, the help and the error messages all read them.
func addOptions() []addOption[plugin.DeviceOptions] {
	return []addOption[plugin.DeviceOptions]{
		{"size", "BYTES", "size of the device, where the handler does not know it", setSize},
		{"block_size", "BYTES", "logical block size", setBlockSize},
		{"max_xfer", "BYTES", "largest request the handler is given", setMaxXfer},
		{"ro", "", "read-only", setReadOnly},
		{"discard", "on|off", "give back the space of punched holes (the default), or refuse to punch any", setDiscard},
		{"recovery", "replay|fail", "when its handler dies: send requests again (the default), or fail them", setRecovery},
		{"timeout", "SECONDS", "kill a handler that takes longer for a request; 0 never, default 30", setTimeout},
		{"retain", "BYTES", "unflushed writes to keep for a replay, default 32M; above it a flush is made", setRetention},
		{"guards", "on|off", "off: drive the handler without what is known about its bugs (describe lists it)", setGuards},
		{"format", "", "let the handler format what is there (zbc)", setFormat},
		{"record", "FILE", "record all changes in a new file, in the format of dm-log-writes", setRecord},
	}
}

func setSize(options *plugin.DeviceOptions, value string) (err error) {
	options.Size, err = parseSize(value)
	return err
}

func setBlockSize(options *plugin.DeviceOptions, value string) (err error) {
	options.BlockSize, err = parseSmallSize(value)
	return err
}

func setMaxXfer(options *plugin.DeviceOptions, value string) (err error) {
	options.MaxXfer, err = parseSmallSize(value)
	return err
}

func setReadOnly(options *plugin.DeviceOptions, _ string) error {
	options.ReadOnly = true
	return nil
}

// The values of discard=.
const (
	discardOn  = "on"
	discardOff = "off"
)

func setDiscard(options *plugin.DeviceOptions, value string) error {
	if value != discardOn && value != discardOff {
		return failf(syscall.EINVAL, "%q: must be %s or %s", value, discardOn, discardOff)
	}
	options.NoDiscard = value == discardOff
	return nil
}

// The values of recovery=.
const (
	recoveryReplay = "replay"
	recoveryFail   = "fail"
)

func setRecovery(options *plugin.DeviceOptions, value string) error {
	if value != recoveryReplay && value != recoveryFail {
		return failf(syscall.EINVAL, "%q: must be %s or %s", value, recoveryReplay, recoveryFail)
	}
	options.FailFast = value == recoveryFail
	return nil
}

func setTimeout(options *plugin.DeviceOptions, value string) (err error) {
	options.Timeout, err = parseTimeout(value)
	if err == nil && options.Timeout == 0 {
		options.Timeout = -1 // for ever
	}
	return err
}

func setRecord(options *plugin.DeviceOptions, value string) error {
	if !filepath.IsAbs(value) {
		return failf(syscall.EINVAL, "%q is no absolute path", value)
	}
	options.Record = value
	return nil
}

func setRetention(options *plugin.DeviceOptions, value string) (err error) {
	options.Retention, err = parseSize(value)
	return err
}

func setGuards(options *plugin.DeviceOptions, value string) error {
	if value != "on" && value != "off" {
		return failf(syscall.EINVAL, "%q: must be on or off", value)
	}
	options.GuardsOff = value == "off"
	return nil
}

func setFormat(options *plugin.DeviceOptions, _ string) error {
	options.Format = true
	return nil
}

// parseSmallSize is parseSize for what must fit an int on every platform.
func parseSmallSize(text string) (int, error) {
	size, err := parseSize(text)
	if err == nil && size > math.MaxInt32 {
		return 0, failf(syscall.EINVAL, "%q is too large: less than 2G is possible here", text)
	}
	return int(size), err
}

// parseAdd reads MINOR [KEY=VALUE ...] /SUBTYPE/CFG. The config string begins at the first word that begins with '/'
// and takes the rest of the text as it stands, blanks and '=' included.
func parseAdd(text string) (addArgs, error) {
	var args addArgs
	word, rest := nextWord(text)
	if word == "" || strings.HasPrefix(word, "/") {
		return args, failf(syscall.EINVAL, "the minor number is missing: add MINOR [KEY=VALUE] /SUBTYPE/CFG")
	}
	minor, err := parseMinor(word)
	if err != nil {
		return args, err
	}
	args.minor = minor
	given := map[string]bool{}
	for !strings.HasPrefix(rest, "/") {
		if word, rest = nextWord(rest); word == "" {
			return args, failf(syscall.EINVAL, "the config string is missing, for example /ram/@")
		}
		key, _, _ := strings.Cut(word, "=")
		if given[key] {
			return args, failf(syscall.EINVAL, "%s is given twice", key)
		}
		given[key] = true
		if err := args.set(word); err != nil {
			return args, err
		}
		args.words = append(args.words, word)
	}
	args.config = rest
	return args, nil
}

// set applies one word of "add" that stands before the config string.
func (a *addArgs) set(word string) error {
	known, err := setOption(addOptions(), &a.options, word)
	if !known {
		known, err = setOption(cacheOptions(), &a.cache, word)
	}
	if !known {
		known, err = setOption(accessOptions(), &a.access, word)
	}
	if known {
		return err
	}
	var keys []string
	eachAddOption(func(key, _, _ string) { keys = append(keys, key) })
	return failf(syscall.EINVAL, "unknown option %q (known: %s); the config string begins with '/'",
		word, strings.Join(keys, ", "))
}

// setOption applies a word to options if the table knows it.
func setOption[T any](table []addOption[T], options *T, word string) (known bool, err error) {
	key, value, hasValue := strings.Cut(word, "=")
	for _, option := range table {
		switch {
		case option.key != key:
			continue
		case option.value == "" && hasValue:
			return true, failf(syscall.EINVAL, "%s takes no value", key)
		case option.value != "" && value == "":
			return true, failf(syscall.EINVAL, "%s needs a value: %s=%s", key, key, option.value)
		}
		if err := option.set(options, value); err != nil {
			return true, failf(errnoOf(err), "%s: %w", key, err)
		}
		return true, nil
	}
	return false, nil
}

// eachAddOption tells of every option of "add", in the order of the help.
func eachAddOption(tell func(key, value, summary string)) {
	for _, option := range addOptions() {
		tell(option.key, option.value, option.summary)
	}
	for _, option := range cacheOptions() {
		tell(option.key, option.value, option.summary)
	}
	for _, option := range accessOptions() {
		tell(option.key, option.value, option.summary)
	}
}
