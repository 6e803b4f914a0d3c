// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// readyText is what stdout says once commands are taken: one line, and what to try next if hints are wanted.
func readyText(front *front, hints bool) string {
	ctl := front.nodePath(ctlName)
	var text strings.Builder
	fmt.Fprintf(&text, "serving %s (commands go to %s; 'exit' or Ctrl-C stops)\n", front.mountpoint, ctl)
	if !hints {
		return text.String()
	}
	text.WriteString("What to try next, in another shell:\n")
	tries := []string{
		"exec 3<>" + ctl + "; echo help >&3; cat <&3; exec 3>&-",
		"cat " + ctl,
	}
	if nodes := front.allNodes(); len(nodes) == 0 {
		tries = append(tries,
			"echo load ram > "+ctl,
			"echo add 0 size=1G /ram/@ > "+ctl,
			"ls -l "+front.mountpoint+"/dev")
	} else {
		first := nodes[0]
		for _, node := range nodes {
			if node.device.Minor() < first.device.Minor() {
				first = node
			}
		}
		path := front.nodePath(first.device.Name())
		tries = append(tries,
			"mkfs.ext4 "+path,
			"mount "+path+" /mnt",
			"umount /mnt",
			fmt.Sprintf("echo remove %d > %s", first.device.Minor(), ctl))
	}
	for _, try := range append(tries, "echo exit > "+ctl) {
		text.WriteString("  " + try + "\n")
	}
	return text.String()
}

// isTerminal reports whether somebody is likely to read output as it comes.
func isTerminal(output any) bool {
	file, ok := output.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}
