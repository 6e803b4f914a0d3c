// SPDX-License-Identifier: Apache-2.0

package main

import "strings"

// defaultBlockSize is what handlers are told where neither the user nor the subtype says otherwise; bytes.
const defaultBlockSize = 512

// quirks is what the handlers of one subtype need beyond what their struct says.
type quirks struct {
	// blockSize in bytes is what the handler has to be told; 0: anything.
	blockSize uint32
	// alignment in bytes of offsets and lengths; 0: 1 for read and write, the block size for command blocks.
	alignment uint32
	// serial: callouts for one device must not overlap, whatever nr_threads says.
	serial bool
	// pathOnly: the configuration string is passed without the subtype.
	pathOnly bool
	// measure finds the size that the handler has to be told, and checks what must not be left to the handler.
	measure func(m measurement) (sizing, error)
	// formats: the handler can format what a device is made of, and measure heeds measurement.format.
	formats bool
	// guards are those that devices of the handler get, for people.
	guards []string
	// sizeInRefusal finds the size in what the handler logs when it is told a wrong one.
	sizeInRefusal func(logged string) (uint64, bool)
}

// measurement is what is known about a device before its open.
type measurement struct {
	rest    string // the configuration string after "subtype/"
	size    uint64 // bytes that the user asked for; 0: nothing
	reopen  bool
	subtype string
	// readOnly: the device is not to be written to.
	readOnly bool
	// format: what is there may be formatted.
	format bool
	// guardsOff: the handler gets what it was given, whatever it makes of it.
	guardsOff bool
}

// sizing is the answer.
type sizing struct {
	size     uint64                 // bytes to tell the handler; 0: it knows better
	config   string                 // what to pass instead of the configuration string; "": that itself
	boundary func() (uint64, error) // after open: no callout may cross a multiple of that many bytes
	guard    guard
	// writesSurvive: what has completed is out of the process, without a flush, and must not be sent again.
	writesSurvive bool
}

// quirksOf says how to treat h.
func quirksOf(h *handlerStruct) quirks {
	switch h.subtype {
	case "qcow":
		return quirks{blockSize: 512, alignment: 512, serial: true, measure: measureQcow, guards: guardsOfQcow}
	case "zbc":
		return quirks{serial: true, formats: true, measure: measureZbc, guards: guardsOfZbc}
	case "fbo":
		return quirks{serial: true, measure: measureFbo, guards: guardsOfFbo}
	case "file":
		return quirks{measure: measureFile}
	case "rbd":
		return quirks{sizeInRefusal: rbdSizeInRefusal}
	case "ram", "dbd":
		// fuse_tcmur's predecessor cut the subtype off, and its handlers rely on that; they are of that layout.
		return quirks{pathOnly: h.layout == layout152}
	}
	return quirks{}
}

// configFor is the string to pass to the handler, given "subtype/rest".
func (q quirks) configFor(config string) string {
	if q.pathOnly {
		if i := strings.IndexByte(config, '/'); i >= 0 {
			return config[i:]
		}
	}
	return config
}
