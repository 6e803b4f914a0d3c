// SPDX-License-Identifier: Apache-2.0

package plugin

// WatchdogSleeps reports whether the watchdog does.
func (l *Library) WatchdogSleeps() bool { return l.asleep.Load() }

// Retained is how many bytes of unflushed writes the device holds.
func (d *Device) Retained() int64 { return d.unflushed.held() }

// HasSpare reports whether a host is ready that has loaded nothing.
func (l *Library) HasSpare() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.spare != nil
}
