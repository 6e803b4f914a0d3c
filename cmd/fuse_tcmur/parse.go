// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The grammar of the command language. Nothing in this file touches anything but its arguments.

// blanks separate words. A carriage return counts, so that command files with DOS line ends work.
const blanks = " \t\r\v\f"

// splitCommand takes one line apart into the command's name and the trimmed text after it. A comment begins at a '#'
// that stands at the beginning of the line or after a blank: a '#' inside a word belongs to the word. name is "" when
// the line holds no command.
func splitCommand(line string) (name, args string) {
	return nextWord(strings.Trim(line[:commentStart(line)], blanks))
}

// commentStart is the index of the '#' that begins line's comment, or the line's length.
func commentStart(line string) int {
	for i := range len(line) {
		if line[i] == '#' && (i == 0 || strings.IndexByte(blanks, line[i-1]) >= 0) {
			return i
		}
	}
	return len(line)
}

// nextWord cuts the first word off text. The rest has no leading blanks.
func nextWord(text string) (word, rest string) {
	text = strings.TrimLeft(text, blanks)
	end := strings.IndexAny(text, blanks)
	if end < 0 {
		return text, ""
	}
	return text[:end], strings.TrimLeft(text[end:], blanks)
}

// parseMinor reads a minor number as strtoul(3) with base 0 does: decimal, 0x hexadecimal or 0 octal, with an optional
// sign that wraps around below zero. Unlike strtoul it refuses text after the number (EINVAL). A number that no minor
// can have, negative ones among them, is ENODEV, as libtcmur says of a minor out of range.
func parseMinor(text string) (int, error) {
	digits, negative := text, false
	switch {
	case strings.HasPrefix(text, "-"):
		digits, negative = text[1:], true
	case strings.HasPrefix(text, "+"):
		digits = text[1:]
	}
	base := 10
	switch {
	case len(digits) > 2 && digits[0] == '0' && (digits[1] == 'x' || digits[1] == 'X'):
		digits, base = digits[2:], 16
	case len(digits) > 1 && digits[0] == '0':
		digits, base = digits[1:], 8
	}
	for i := range len(digits) {
		if !isDigit(digits[i], base) {
			return 0, badMinor(text)
		}
	}
	if digits == "" {
		return 0, badMinor(text)
	}
	// Only digits of the base are left, so that the one error possible is a number that is too large.
	value, err := strconv.ParseUint(digits, base, 64)
	if err != nil || value > math.MaxInt32 || (negative && value != 0) {
		return 0, failf(syscall.ENODEV, "minor %s is out of range", text)
	}
	return int(value), nil
}

func badMinor(text string) error {
	return failf(syscall.EINVAL, "%q is not a minor number: give it as 10, 0xa or 012", text)
}

func isDigit(c byte, base int) bool {
	value := math.MaxInt
	switch {
	case c >= '0' && c <= '9':
		value = int(c - '0')
	case c >= 'a' && c <= 'f':
		value = int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		value = int(c-'A') + 10
	}
	return value < base
}

// sizeSuffixes are the powers of 1024 a size may be followed by, in either case and with or without "iB".
const sizeSuffixes = "KMGT"

// parseSize reads a number of bytes greater than zero, such as 512, 64K, 64KiB or 1T. A decimal suffix (KB, MB) is
// refused rather than guessed at.
func parseSize(text string) (int64, error) {
	number := strings.TrimRight(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	suffix := strings.ToUpper(text[len(number):])
	shift := 0
	if suffix != "" {
		power := strings.IndexByte(sizeSuffixes, suffix[0])
		if power < 0 || (len(suffix) > 1 && suffix[1:] != "IB") {
			return 0, badSize(text)
		}
		shift = 10 * (power + 1)
	}
	for i := range len(number) {
		if !isDigit(number[i], 10) {
			return 0, badSize(text)
		}
	}
	value, err := strconv.ParseInt(number, 10, 64)
	switch {
	case number == "":
		return 0, badSize(text)
	case err != nil || value > math.MaxInt64>>shift:
		return 0, failf(syscall.EINVAL, "%q is too large for a size", text)
	case value == 0:
		return 0, failf(syscall.EINVAL, "a size of 0 is not possible")
	}
	return value << shift, nil
}

func badSize(text string) error {
	return failf(syscall.EINVAL, "%q is not a size: give it in bytes, or with K, M, G or T (powers of 1024)", text)
}

// maxTimeout is the longest timeout that can be asked for.
const maxTimeout = 24 * time.Hour

// parseTimeout reads a time in seconds, such as 30 or 1.5, or with one of the units that time.ParseDuration knows
// (500ms, 2m). 0 is possible, what is negative or longer than a day is not.
func parseTimeout(text string) (time.Duration, error) {
	timeout, err := time.ParseDuration(text)
	if err != nil {
		timeout, err = time.ParseDuration(text + "s")
	}
	switch {
	case err != nil:
		return 0, failf(syscall.EINVAL, "%q is not a time: give it in seconds, or as 500ms or 2m", text)
	case timeout < 0 || timeout > maxTimeout:
		return 0, failf(syscall.EINVAL, "%q is no timeout: at most 24h is possible, and 0 for none", text)
	}
	return timeout, nil
}

// takeForce tells whether text begins with the word --force, and returns what follows it.
func takeForce(text string) (rest string, forced bool) {
	if word, rest := nextWord(text); word == forceWord {
		return rest, true
	}
	return text, false
}

// forceWord asks a command to get its way at once, whatever a handler or a user does.
const forceWord = "--force"

// parseSubtype checks that args is one word. Whether it can name a handler is for libtcmur to say.
func parseSubtype(args string) (string, error) {
	subtype, rest := nextWord(args)
	switch {
	case subtype == "":
		return "", failf(syscall.EINVAL, "the handler's subtype is missing, for example: ram")
	case rest != "":
		return "", failf(syscall.EINVAL, "one subtype at a time: nothing may follow %q", subtype)
	}
	return subtype, nil
}
