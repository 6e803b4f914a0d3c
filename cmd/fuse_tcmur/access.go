// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/fusetree"
)

// ctlGroupMode is that of the command node when a group may use it.
const ctlGroupMode = 0o660

// nodeAccess says who may open a node. What it does not say stays as it is for every node: the user and the group of
// this process, and a mode that depends on what the node is.
type nodeAccess struct {
	mode     uint32 // permission bits, 0: the default. Nobody but root can use a node without any.
	uid, gid uint32
	hasUID   bool
	hasGID   bool
}

// accessOptions are the options of "add" that are for the node.
func accessOptions() []addOption[nodeAccess] {
	return []addOption[nodeAccess]{
		{"mode", "OCTAL", "permissions of the file, default 0660", setMode},
		{"owner", "USER", "name or number of the user who owns the file", setOwner},
		{"group", "GROUP", "name or number of the group of the file", setGroup},
	}
}

func setMode(access *nodeAccess, value string) error {
	mode, err := strconv.ParseUint(value, 8, 32)
	if err != nil || mode > 0o777 || mode == 0 {
		return failf(syscall.EINVAL, "%q is no mode: give permission bits in octal, such as 0640", value)
	}
	access.mode = uint32(mode)
	return nil
}

func setOwner(access *nodeAccess, value string) error {
	uid, err := lookupID("user", value, func() (string, error) {
		found, err := user.Lookup(value)
		if err != nil {
			return "", err
		}
		return found.Uid, nil
	})
	access.uid, access.hasUID = uid, true
	return err
}

func setGroup(access *nodeAccess, value string) error {
	gid, err := lookupID("group", value, func() (string, error) {
		found, err := user.LookupGroup(value)
		if err != nil {
			return "", err
		}
		return found.Gid, nil
	})
	access.gid, access.hasGID = gid, true
	return err
}

// lookupID reads the number of a user or group, or looks the name up. EINVAL: there is none of this name.
func lookupID(kind, value string, lookup func() (string, error)) (uint32, error) {
	text := value
	if _, err := strconv.ParseUint(value, 10, 32); err != nil {
		var unknownUser user.UnknownUserError
		var unknownGroup user.UnknownGroupError
		text, err = lookup()
		switch {
		case errors.As(err, &unknownUser), errors.As(err, &unknownGroup):
			return 0, failf(syscall.EINVAL, "this machine knows no %s %q; give its number, if it has one", kind, value)
		case err != nil:
			return 0, failf(syscall.EINVAL, "%s %q cannot be looked up: %w", kind, value, err)
		}
	}
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil || id == 1<<32-1 { // -1 means "unchanged" to chown(2)
		return 0, failf(syscall.EINVAL, "%q is no number of a %s", value, kind)
	}
	return uint32(id), nil
}

// ctlAccessFor is the access that members of the group have to the command node.
func ctlAccessFor(group string) (nodeAccess, error) {
	access := nodeAccess{mode: ctlGroupMode}
	err := setGroup(&access, group)
	return access, err
}

// permissions are the node's, where normal are those of its kind.
func (a *nodeAccess) permissions(normal uint32) uint32 {
	if a.mode != 0 {
		return a.mode
	}
	return normal
}

// apply gives a node that has just been made to its owner.
func (a *nodeAccess) apply(node *fusetree.Node) {
	if !a.hasUID && !a.hasGID {
		return
	}
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	if a.hasUID {
		uid = a.uid
	}
	if a.hasGID {
		gid = a.gid
	}
	node.UpdateOwner(uid, gid)
}
