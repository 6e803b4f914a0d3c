// SPDX-License-Identifier: Apache-2.0

package main

import "runtime/debug"

// version is set by the linker: -ldflags '-X main.version=1.2.3'.
var version = ""

// versionString names this build: what the linker was told, else what the Go tool recorded about the module and its
// commit.
func versionString() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	name := info.Main.Version
	if name == "" || name == "(devel)" {
		name = "devel"
		for _, setting := range info.Settings {
			switch {
			case setting.Key == "vcs.revision" && len(setting.Value) >= 12:
				name += "-" + setting.Value[:12]
			case setting.Key == "vcs.modified" && setting.Value == "true":
				name += "-dirty"
			}
		}
	}
	return name
}
