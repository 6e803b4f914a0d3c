// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"encoding/json"
	"strings"
)

const (
	// crashPrefix begins the lines that a host writes when it crashes: go-plugin takes the first word for their level.
	crashPrefix = "[ERROR] handler "
	// printedPrefix begins the message of a line that the handler itself has printed.
	printedPrefix = "handler printed: "
	// crashContext is how many printed lines before the crash belong to the story: assertions, as a rule.
	crashContext = 3
	// crashLines bounds what is kept of a crash: a panic of the host's own may be long.
	crashLines = 64
)

// crashReport picks what concerns the death of a host out of its raw log: the lines of its crash report, without their
// prefix, what else is no log line (Go's own panics), and the last few lines that the handler printed. The log may
// begin in the middle of a line. "" when the host has said nothing about its death.
func crashReport(log string) string {
	var report, printed []string
	crashed := false
	whole := false // the line begins where it begins
	for line := range strings.Lines(log) {
		text, terminated := strings.CutSuffix(line, "\n")
		first := !whole
		whole = terminated
		switch message, isLog := logMessage(text); {
		case strings.HasPrefix(text, crashPrefix):
			crashed = true
			report = append(report, strings.TrimPrefix(text, crashPrefix))
		case isLog:
			if said, ok := strings.CutPrefix(message, printedPrefix); ok {
				printed = append(printed, "printed: "+said)
			}
		case !first && text != "":
			crashed = true
			report = append(report, text)
		}
	}
	if !crashed {
		return ""
	}
	printed = printed[max(0, len(printed)-crashContext):]
	return strings.Join(append(printed, report[:min(len(report), crashLines)]...), "\n") + "\n"
}

// logMessage is the message of a line of the host's log, which is JSON.
func logMessage(line string) (string, bool) {
	if !strings.HasPrefix(line, "{") {
		return "", false
	}
	var entry struct {
		Message string `json:"@message"`
	}
	if json.Unmarshal([]byte(line), &entry) != nil {
		return "", false
	}
	return entry.Message, true
}
