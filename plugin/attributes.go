// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"slices"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/hostpb"
)

// Attributes are what a device has turned out to be when it was opened: as its handler has set it, read back after the
// handler's open, and not as it was asked for.
type Attributes struct {
	BlockSize  int  // bytes
	MaxXfer    int  // bytes; longer requests are split
	Alignment  int  // bytes; of what the handler is given, other requests are made to fit
	WriteCache bool // the handler says that what is written may need a flush; there may be one all the same
	Rotational bool // the handler does not say that it is a solid-state medium
	CanWrite   bool
	CanFlush   bool
	CanUnmap   bool // otherwise what is discarded is zeroed
	// Guards describes what keeps the device from known bugs of its handler, one guard each; none with GuardsOff.
	Guards []string
}

// Attributes returns the device's attributes.
func (d *Device) Attributes() Attributes {
	a := d.attributes
	a.Guards = slices.Clone(a.Guards)
	return a
}

// attributesIn takes over what a host says; what matters to I/O has been checked.
func (d *Device) attributesIn(r *hostpb.OpenReply) Attributes {
	return Attributes{
		BlockSize: d.blockSize, MaxXfer: d.maxXfer, Alignment: int(d.alignment),
		WriteCache: r.GetWriteCache(), Rotational: r.GetRotational(),
		CanWrite: r.GetCanWrite(), CanFlush: r.GetCanFlush(), CanUnmap: r.GetCanUnmap(), Guards: r.GetGuards(),
	}
}
