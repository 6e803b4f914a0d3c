// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// loadHandler brings a shared object in and makes its handler that of the process. path is what it is called, image
// what is loaded: the same, unless that is a copy. want is the subtype that it has to register, "" for any; abi the
// user's word on its layout, "" for none.
//
// Errors: ENOENT, cannot be dlopened; EBADF, no handler_init; EIO, handler_init or init failed or registered nothing;
// ENOEXEC, built for 1.4 or malformed; EINVAL, abi unknown or another subtype.
func loadHandler(path, image, want, abi string) (*handlerStruct, error) {
	if abi != "" {
		if _, err := choose(evidence{override: abi}); err != nil {
			return nil, err // before anything of the object runs
		}
	}
	object, err := readObject(image)
	if err == nil {
		err = object.rejectOld(path)
		if err != nil {
			return nil, err
		}
	} else {
		object = &objectFile{} // dlopen will say what is wrong
	}
	if err := dlopen(image); err != nil {
		return nil, err
	}
	result, logged, err := handlerInit(path)
	if err != nil {
		return nil, err
	}
	if result != 0 {
		return nil, control.Failf(syscall.EIO, "%s: its handler_init failed with %d%s", path, result, said(logged))
	}
	h, err := adoptable(process{}, object, want, abi)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if result := adopt(h, quirksOf(h)); result != 0 {
		return nil, control.Failf(syscall.EIO, "%s: its init failed with %d", path, result)
	}
	return h, nil
}

// adoptable finds the handler to use among those that were registered.
func adoptable(m memory, object *objectFile, want, abi string) (*handlerStruct, error) {
	addresses := registered()
	if len(addresses) == 0 {
		return nil, control.Failf(syscall.EIO, "its handler_init registered no handler")
	}
	var others []string
	for _, address := range addresses {
		subtype, ok := readSubtype(m, address)
		if want != "" && ok && subtype != want {
			others = append(others, subtype)
			continue
		}
		e := evidence{override: abi, symbolSize: m.symbolSize(address), imports: object.imports}
		if base, ok := m.image(address); ok && e.symbolSize == 0 {
			e.symbolSize = object.objects[uint64(address-base)]
		}
		l, err := choose(e)
		if err != nil {
			return nil, err
		}
		return readHandler(m, address, l)
	}
	return nil, control.Failf(syscall.EINVAL, "it is the handler of %s, not of %s", strings.Join(others, ", "), want)
}

// said appends what a handler logged to the report of its failure.
func said(logged string) string {
	if logged == "" {
		return ""
	}
	return ": " + logged
}
