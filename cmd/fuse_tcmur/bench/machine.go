// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what figures depend on besides the programs. Figures of different machines, or of different hours on one
// that is shared, do not compare.
type machine struct {
	Kernel    string    `json:"kernel"`
	Processor string    `json:"processor"`
	CPUs      int       `json:"cpus"`
	MemoryMiB uint64    `json:"memory_mib"`
	FuseURing string    `json:"fuse_enable_uring"` // "Y", "N", or "" for a kernel without it
	Go        string    `json:"go"`
	Time      time.Time `json:"time"`
}

func thisMachine() machine {
	m := machine{
		CPUs: runtime.NumCPU(), Go: runtime.Version(), Time: time.Now().UTC().Truncate(time.Second),
		Processor: "unknown processor",
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.MemoryMiB = info.Totalram * uint64(info.Unit) >> 20
	}
	if cpuinfo, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(cpuinfo)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				m.Processor = strings.TrimSpace(value)
				break
			}
		}
	}
	if uring, err := os.ReadFile("/sys/module/fuse/parameters/enable_uring"); err == nil {
		m.FuseURing = strings.TrimSpace(string(uring))
	}
	return m
}
