// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// importSet holds the names that a shared object expects from the program around it.
type importSet map[string]bool

func (s importSet) any(names ...string) bool {
	for _, name := range names {
		if s[name] {
			return true
		}
	}
	return false
}

// objectFile is what the file of a shared object tells before it is loaded.
type objectFile struct {
	imports importSet
	objects map[uint64]uint64 // sizes of data symbols by address, from .symtab; empty in stripped files
}

// readObject looks into the file. A file that is no ELF object gives an error; dlopen has the better words for it.
func readObject(path string) (*objectFile, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()

	o := &objectFile{imports: importSet{}, objects: map[uint64]uint64{}}
	imported, err := f.ImportedSymbols()
	if err != nil {
		return nil, fmt.Errorf("read the imports of %s: %w", path, err)
	}
	for _, s := range imported {
		o.imports[s.Name] = true
	}
	symbols, err := f.Symbols()
	if err != nil {
		return o, nil // stripped, as distributions do
	}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) == elf.STT_OBJECT && s.Size != 0 {
			o.objects[s.Value] = s.Size
		}
	}
	return o, nil
}

// rejectOld refuses objects built for tcmu-runner 1.4 and earlier, whose read and write are swapped. ENOEXEC: the file
// is there and may be in order, but is not in a format that can be run here.
func (o *objectFile) rejectOld(path string) error {
	for _, name := range []string{"tcmu_get_dev_cfgstring", "tcmu_get_dev_private", "tcmu_set_dev_private"} {
		if o.imports[name] {
			return control.Failf(syscall.ENOEXEC,
				"%s was built for tcmu-runner 1.4 or earlier (it imports %s), whose handlers work differently: "+
					"rebuild it for 1.5 or later", path, name)
		}
	}
	return nil
}

// librariesBeside lists the libraries that an object needs and that it looks for relative to where it is ($ORIGIN), for
// a copy that the dynamic linker finds elsewhere than at path. Those that are loaded already are not looked for again.
func librariesBeside(image, path string) []string {
	f, err := elf.Open(image)
	if err != nil {
		return nil // dlopen will say what is wrong
	}
	defer f.Close()
	needed, _ := f.DynString(elf.DT_NEEDED)
	folders, _ := f.DynString(elf.DT_RUNPATH)
	if len(folders) == 0 {
		folders, _ = f.DynString(elf.DT_RPATH)
	}
	origin := filepath.Dir(path)
	var found []string
	for _, name := range needed {
		for _, folder := range strings.Split(strings.Join(folders, ":"), ":") {
			at := strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin).Replace(folder)
			if library := filepath.Join(at, name); at != folder && isFile(library) {
				found = append(found, library)
				break
			}
		}
	}
	return found
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}
