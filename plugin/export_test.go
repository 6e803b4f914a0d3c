// SPDX-License-Identifier: Apache-2.0

package plugin

// RestTime is after how long without requests the watchdog sleeps.
const RestTime = (watchfulTicks + 1) * tick

// Retained is how many bytes of unflushed writes the device holds.
func (d *Device) Retained() int64 { return d.unflushed.held() }

// HasSpare reports whether a host is ready that has loaded nothing.
func (l *Library) HasSpare() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.spare != nil
}
