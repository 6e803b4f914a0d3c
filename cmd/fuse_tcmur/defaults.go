// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"runtime"
)

const (
	defaultMountpoint = "/tcmur"
	defaultMaxMinors  = 256
	hostBinaryName    = "tcmur-host"
)

// multiarchTriplets maps GOARCH to the directory below /usr/lib where Debian puts the libraries of that architecture.
var multiarchTriplets = map[string]string{
	"386":     "i386-linux-gnu",
	"amd64":   "x86_64-linux-gnu",
	"arm":     "arm-linux-gnueabihf",
	"arm64":   "aarch64-linux-gnu",
	"loong64": "loongarch64-linux-gnu",
	"ppc64le": "powerpc64le-linux-gnu",
	"riscv64": "riscv64-linux-gnu",
	"s390x":   "s390x-linux-gnu",
}

// ownDirectory is the directory of the running binary with symbolic links resolved, or "" if it cannot be told: a link
// in /usr/local/bin to a build tree still finds the build tree's handlers and host.
func ownDirectory() string {
	path, err := os.Executable()
	if err != nil {
		return ""
	}
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved
	}
	return filepath.Dir(path)
}

// defaultHandlerPrefixes lists where handlers are looked for, first match first, when no --handler-prefix is given.
// ownDir may be "".
func defaultHandlerPrefixes(ownDir string) []string {
	const handlers = "tcmu-runner/handler_"
	var prefixes []string
	if ownDir != "" {
		prefixes = append(prefixes, filepath.Join(ownDir, "..", "lib", handlers))
	}
	prefixes = append(prefixes, filepath.Join("/usr/local/lib", handlers))
	if triplet, ok := multiarchTriplets[runtime.GOARCH]; ok {
		prefixes = append(prefixes, filepath.Join("/usr/lib", triplet, handlers))
	}
	return append(prefixes, filepath.Join("/usr/lib64", handlers))
}

// defaultHostBinary is the host program beside the front's own binary, or its bare name (searched in PATH) if the
// front does not know where it lies.
func defaultHostBinary(ownDir string) string {
	if ownDir == "" {
		return hostBinaryName
	}
	return filepath.Join(ownDir, hostBinaryName)
}
