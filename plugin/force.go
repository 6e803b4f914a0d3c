// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

// This file takes devices and handlers away from their users and from a handler that does not cooperate. The handler
// gets a moment to do it properly; then its process is killed. Nothing here waits for a handler.

// forceTimeout is how long a forced removal gives the handler to end the device's requests and close it.
const forceTimeout = time.Second

// errForced is why the requests of such a device fail.
var errForced = errors.New("it was removed by force")

// ForceRemoveDevice removes a device within two seconds. Its requests in progress fail with EIO if they do not end by
// themselves within one; the handler's process is killed then, which the handler's other devices survive. ENODEV: no
// such device. EIO: it is removed, but writes since its last flush may be lost.
func (l *Library) ForceRemoveDevice(minor int) error {
	l.mu.Lock()
	d, err := l.lookup(minor)
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return l.forceRemove(d, forceTimeout)
}

// forceRemove removes a device that should be in the table; ENODEV if it is not any more. patience is what the handler
// gets to close it.
func (l *Library) forceRemove(d *Device, patience time.Duration) error {
	l.mu.Lock()
	if !d.ready {
		l.mu.Unlock()
		return control.Failf(syscall.ENODEV, "remove: %s is being removed", d.name)
	}
	d.ready = false
	l.mu.Unlock()
	err := errBusy
	if patience > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err = d.close(ctx)
		cancel()
	}
	if errors.Is(err, errBusy) {
		d.fail(errForced)
		d.handler.abort()
		_ = d.gate.shut(context.Background()) // its requests end: the device has failed, and the hosts are dead
		err = d.lost(errForced)
	}
	l.mu.Lock()
	d.served = false
	l.devices[d.minor] = nil
	l.mu.Unlock()
	d.recorder.close(err == nil)
	d.unflushed.drop()
	if err != nil {
		return fmt.Errorf("remove %s: removed by force, but %w", d.name, err)
	}
	l.log.Info("device removed by force", "device", d.name)
	return nil
}

// ForceUnloadHandler removes all devices of a handler as ForceRemoveDevice does, and unloads it, within two seconds
// altogether. ENOENT: not loaded. EBUSY: it is being loaded or unloaded. EIO: it is unloaded, but writes since the last
// flush of its devices may be lost.
func (l *Library) ForceUnloadHandler(subtype string) error {
	l.mu.Lock()
	h, err := l.findLoaded(subtype)
	if err != nil {
		l.mu.Unlock()
		return fmt.Errorf("unload %s: %w", subtype, err)
	}
	l.handlers[subtype] = &handler{subtype: subtype} // nobody may add to it, nor load it again yet
	l.mu.Unlock()

	var failures []error
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, d := range l.Devices() {
		if d.handler != h {
			continue
		}
		wg.Go(func() {
			if err := l.forceRemove(d, forceTimeout); err != nil && !errors.Is(err, syscall.ENODEV) {
				mu.Lock()
				failures = append(failures, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), forceTimeout/2)
	defer cancel()
	h.stop(ctx)
	l.log.Info("handler unloaded by force", "handler", subtype)
	l.forget(subtype)
	return errors.Join(failures...)
}
