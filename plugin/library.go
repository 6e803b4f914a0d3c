// SPDX-License-Identifier: Apache-2.0

// Package plugin is libtcmur(3) for Go: it loads tcmu-runner handlers, each in a tcmur-host process of its own, and
// reads, writes and flushes the devices that they serve, by minor number.
//
// A Library owns its handlers, a handler owns one host process and its memory channel, and a Device belongs to one
// handler. Control goes over gRPC (package control), data over shared memory (package shared). Nothing that a handler
// does (crash, hang, exit) reaches the caller's process: its requests end with an error.
//
// Errors carry a syscall.Errno for errors.Is and a message for the user.
//
// Lock order: Library.mu is taken alone and never held across a call to a host; slots in the tables are reserved under
// it and filled in later.
package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/fuse-tcmur/fuse_tcmur/plugin/control"
)

const (
	// DefaultMaxMinors is the number of minors where Config does not say: 0 to 255.
	DefaultMaxMinors = 256
	// LimitMaxMinors is the most that Config may ask for.
	LimitMaxMinors = 4096
	// MaxHandlers is how many handlers can be loaded at once.
	MaxHandlers = 64
	// maxConfigLength is the longest config string in bytes: a handler's buffer is PATH_MAX with its NUL.
	maxConfigLength = 4095
)

// Config is what a Library needs to know.
type Config struct {
	// HandlerPrefixes are tried in order: a handler's path is prefix + subtype + ".so".
	HandlerPrefixes []string
	// HostBinary is the path of tcmur-host.
	HostBinary string
	// MaxMinors is the number of minors, 0 for DefaultMaxMinors.
	MaxMinors int
	// ChannelMemory is the payload memory of each handler's channel in bytes, 0 for shared.DefaultMemory.
	ChannelMemory int64
	// DeathBudget is how many deaths in a row, without a request completed between them, make a handler fail; 0 for
	// DefaultDeathBudget.
	DeathBudget int
	// AllowInsecureHandlers loads also files that others than root and their owner can change or replace.
	AllowInsecureHandlers bool
	// Logger receives the library's and the handlers' messages; nil discards them.
	Logger hclog.Logger
}

// Library is an instance of libtcmur. All methods may be called concurrently.
type Library struct {
	cfg    Config
	log    hclog.Logger
	deaths deathLog

	background sync.WaitGroup // of refill and the watchdog

	mu       sync.Mutex
	handlers map[string]*handler // by subtype; an entry with a nil host is still being loaded
	devices  []*Device           // by minor; a device that is not ready is still being added

	spare     *host         // started, nothing loaded; see spare.go
	refilled  chan struct{} // closed when the spare that is being started is there; nil while none is
	stopWatch chan struct{} // ends the watchdog, which runs while handlers are loaded; nil when it does not

	busy   chan struct{} // holds one if a request was sent while the watchdog slept
	asleep atomic.Bool   // the watchdog is
}

// Init is libtcmur_init: it checks the configuration. No process is started. EINVAL for a bad MaxMinors or no prefix,
// ENOENT when HostBinary does not exist.
func Init(cfg Config) (*Library, error) {
	if cfg.MaxMinors == 0 {
		cfg.MaxMinors = DefaultMaxMinors
	}
	if cfg.MaxMinors < 1 || cfg.MaxMinors > LimitMaxMinors {
		return nil, control.Failf(syscall.EINVAL, "number of minors %d: must be 1 to %d", cfg.MaxMinors, LimitMaxMinors)
	}
	if cfg.DeathBudget == 0 {
		cfg.DeathBudget = DefaultDeathBudget
	}
	if len(cfg.HandlerPrefixes) == 0 {
		return nil, control.Failf(syscall.EINVAL, "no handler prefix given")
	}
	if _, err := os.Stat(cfg.HostBinary); err != nil {
		return nil, fmt.Errorf("host binary: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	return &Library{
		cfg: cfg, log: cfg.Logger,
		handlers: make(map[string]*handler),
		devices:  make([]*Device, cfg.MaxMinors),
		busy:     make(chan struct{}, 1),
	}, nil
}

// Exit is libtcmur_exit: it unloads every handler that has no devices. EBUSY while a device exists.
func (l *Library) Exit(ctx context.Context) error {
	all := l.Handlers()
	failures := make([]error, len(all))
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() {
			if err := l.UnloadHandler(ctx, all[i].Subtype); !errors.Is(err, syscall.ENOENT) {
				failures[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(failures...)
}

// LoadHandler is tcmur_handler_load: it starts a host process and lets it load the handler of the given subtype.
//
// EINVAL: not a possible subtype. EEXIST: loaded already. ENOSPC: MaxHandlers are loaded. ENOENT: no such file, or
// dlopen failed. EPERM: others than root and its owner can change the file. EBADF: not a handler (no handler_init).
// EIO: handler_init failed, or the host died. ENOEXEC: built for a tcmu-runner that cannot be served, or malformed.
func (l *Library) LoadHandler(ctx context.Context, subtype string) error {
	if err := checkSubtype(subtype); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	l.mu.Lock()
	if _, ok := l.handlers[subtype]; ok {
		l.mu.Unlock()
		return control.Failf(syscall.EEXIST, "load %s: already loaded", subtype)
	}
	if len(l.handlers) >= MaxHandlers {
		l.mu.Unlock()
		return control.Failf(syscall.ENOSPC, "load %s: all %d handler slots are in use; unload one first",
			subtype, MaxHandlers)
	}
	l.handlers[subtype] = &handler{subtype: subtype} // reserves the name
	if l.stopWatch == nil {
		stop := make(chan struct{})
		l.stopWatch = stop
		l.background.Go(func() { l.watchdog(stop) })
	}
	l.mu.Unlock()

	h, err := l.loadHandler(ctx, subtype)
	if err != nil {
		l.forget(subtype)
		return fmt.Errorf("load %s: %w", subtype, err)
	}
	l.mu.Lock()
	l.handlers[subtype] = h
	l.mu.Unlock()
	return nil
}

// forget takes a handler that is no more, or came to nothing, out of the table; with the last one goes all that runs
// only while there are any.
func (l *Library) forget(subtype string) {
	l.mu.Lock()
	delete(l.handlers, subtype)
	last := len(l.handlers) == 0
	if last {
		close(l.stopWatch)
		l.stopWatch = nil
	}
	l.mu.Unlock()
	if last {
		l.dropSpare()
	}
}

// checkSubtype refuses what could lead out of the handler directory.
func checkSubtype(subtype string) error {
	switch {
	case subtype == "":
		return control.Failf(syscall.EINVAL, "the name of a handler is missing")
	case strings.ContainsAny(subtype, "/\x00 \t\n") || strings.Contains(subtype, ".."), len(subtype) > 64:
		return control.Failf(syscall.EINVAL, "%q cannot be the name of a handler", subtype)
	}
	return nil
}

// UnloadHandler is tcmur_handler_unload: it ends the handler's host process, which is killed when the context ends
// first.
// ENOENT: not loaded. EBUSY: the handler has devices, or is being loaded.
func (l *Library) UnloadHandler(ctx context.Context, subtype string) error {
	l.mu.Lock()
	h, err := l.findLoaded(subtype)
	if err != nil {
		l.mu.Unlock()
		return fmt.Errorf("unload %s: %w", subtype, err)
	}
	if names := l.devicesOf(h); len(names) > 0 {
		l.mu.Unlock()
		return control.Failf(syscall.EBUSY, "unload %s: remove its devices first: %s", subtype, strings.Join(names, " "))
	}
	l.handlers[subtype] = &handler{subtype: subtype} // nobody may add to it, nor load it again yet
	l.mu.Unlock()

	h.stop(ctx)
	l.log.Info("handler unloaded", "handler", subtype)
	l.forget(subtype)
	return nil
}

// findLoaded returns a loaded handler. ENOENT: not loaded. EBUSY: it is being loaded or unloaded. mu is held.
func (l *Library) findLoaded(subtype string) (*handler, error) {
	h := l.handlers[subtype]
	switch {
	case h == nil:
		return nil, control.Failf(syscall.ENOENT, "no such handler is loaded%s", l.loadedHint())
	case !h.isLoaded():
		return nil, control.Failf(syscall.EBUSY, "it is being loaded or unloaded")
	}
	return h, nil
}

// isLoaded tells a handler from a placeholder for one that is being loaded or unloaded.
func (h *handler) isLoaded() bool { return h.lib != nil }

// loaded returns the loaded handlers.
func (l *Library) loaded() []*handler {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*handler
	for _, h := range l.handlers {
		if h.isLoaded() {
			all = append(all, h)
		}
	}
	return all
}

// devicesServedBy returns the devices that are open in the handler's host, or were in its last one.
func (l *Library) devicesServedBy(h *handler) []*Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*Device
	for _, d := range l.devices {
		if d != nil && d.handler == h && d.served {
			all = append(all, d)
		}
	}
	return all
}

// devicesOf needs mu.
func (l *Library) devicesOf(h *handler) []string {
	var names []string
	for _, d := range l.devices {
		if d != nil && d.handler == h {
			names = append(names, d.name)
		}
	}
	return names
}

// loadedHint is appended to an error about a handler that is not there.
func (l *Library) loadedHint() string {
	var names []string
	for s, h := range l.handlers {
		if h.isLoaded() {
			names = append(names, s)
		}
	}
	if len(names) == 0 {
		return " (none is loaded)"
	}
	slices.Sort(names)
	return " (loaded: " + strings.Join(names, " ") + ")"
}

// findHandler returns the ready handler that a config string names, and the string without its first slash, as handlers
// see it. EINVAL: no leading slash, or too long. ENXIO: no such handler is loaded.
func (l *Library) findHandler(config string) (*handler, string, error) {
	rest, ok := strings.CutPrefix(config, "/")
	if !ok {
		return nil, "", control.Failf(syscall.EINVAL,
			"config string %q does not start with '/': write /SUBTYPE/HANDLER-CFG-STRING", abbreviate(config))
	}
	if len(rest) > maxConfigLength || strings.ContainsRune(rest, 0) {
		return nil, "", control.Failf(syscall.EINVAL, "config string is too long: %d bytes, at most %d",
			len(rest), maxConfigLength)
	}
	subtype, _, _ := strings.Cut(rest, "/")
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.handlers[subtype]
	if h == nil || !h.isLoaded() {
		return nil, "", control.Failf(syscall.ENXIO, "%s: no handler %q is loaded%s; first: load %s",
			abbreviate(config), subtype, l.loadedHint(), subtype)
	}
	return h, rest, nil
}

// abbreviate keeps a user's string fit for a message.
func abbreviate(s string) string {
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}

// CheckConfig is tcmur_check_config: it asks the handler that the config string names whether it accepts it. EINVAL and
// ENXIO as for AddDevice, or what the handler's check_config found wrong (EINVAL).
func (l *Library) CheckConfig(ctx context.Context, config string) error {
	h, rest, err := l.findHandler(config)
	if err != nil {
		return err
	}
	return h.checkConfig(ctx, h.current(), rest)
}

// AddDevice is tcmur_device_add: it opens a device and gives it the minor.
//
// ENODEV: minor out of range. EBUSY: minor in use. EEXIST: a device with this config string exists. EINVAL: the config
// string does not start with '/' or is too long. ENXIO: its handler is not loaded. EIO: the host died. Otherwise the
// errno of the handler's open, with the handler's last message.
func (l *Library) AddDevice(ctx context.Context, minor int, config string, opts DeviceOptions) (*Device, error) {
	if err := opts.check(); err != nil {
		return nil, err
	}
	h, rest, err := l.findHandler(config)
	if err != nil {
		return nil, err
	}
	opts.setDefaults()
	d := &Device{
		minor: minor, name: fmt.Sprintf("%s%03d", h.subtype, minor), config: config, inner: rest, handler: h, opts: opts,
		unflushed: newRetention(), stats: newDeviceStats(), patience: ticks(opts.Timeout), hasFailed: make(chan struct{}),
	}
	d.asked.Store(opts.Size)
	if err := l.reserve(d); err != nil {
		return nil, err
	}
	if opts.Record != "" {
		d.recorder, err = newRecorder(opts.Record, l.log.With("device", d.name))
	}
	if err == nil {
		err = d.firstOpen(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.devices[minor] = nil
		d.recorder.discard(opts.Record)
		return nil, fmt.Errorf("add %d %s: %w", minor, abbreviate(config), err)
	}
	d.ready = true
	l.log.Info("device added", "device", d.name, "config", config, "size", d.size.Load(), "block_size", d.blockSize)
	return d, nil
}

// reserve puts the device into the table, not yet ready.
func (l *Library) reserve(d *Device) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d.minor < 0 || d.minor >= len(l.devices) {
		return control.Failf(syscall.ENODEV, "minor %d is out of range: 0 to %d", d.minor, len(l.devices)-1)
	}
	if old := l.devices[d.minor]; old != nil {
		return control.Failf(syscall.EBUSY, "minor %d is in use by %s (%s); remove %d first",
			d.minor, old.name, old.config, d.minor)
	}
	if l.handlers[d.handler.subtype] != d.handler {
		return control.Failf(syscall.ENXIO, "handler %s was unloaded", d.handler.subtype)
	}
	for _, other := range l.devices {
		if other != nil && other.config == d.config {
			return control.Failf(syscall.EEXIST, "%s is already device %s", abbreviate(d.config), other.name)
		}
	}
	l.devices[d.minor] = d
	return nil
}

// RemoveDevice is tcmur_device_remove: it waits for the device's requests, flushes and closes it. ENODEV: no such
// device. ETIMEDOUT: its requests did not end within the context, and the device is still there. Any other error is
// that of the last flush, and the device is gone all the same.
func (l *Library) RemoveDevice(ctx context.Context, minor int) error {
	l.mu.Lock()
	d, err := l.lookup(minor)
	if err == nil {
		d.ready = false // from here on it is invisible, and its minor is still taken
	}
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	err = d.close(ctx)
	busy := errors.Is(err, errBusy)
	l.mu.Lock()
	if busy {
		d.ready = true
	} else {
		d.served = false
		l.devices[minor] = nil
	}
	l.mu.Unlock()
	if !busy {
		d.recorder.close(err == nil)
		d.unflushed.drop()
	}
	switch {
	case busy:
		return fmt.Errorf("remove: %w", err)
	case err != nil:
		return fmt.Errorf("remove %s: it is removed, but %w", d.name, err)
	}
	l.log.Info("device removed", "device", d.name)
	return nil
}

// Shutdown ends everything: it removes all devices at the same time, then unloads all handlers. What a handler has not
// finished when the context ends is killed with its process. Afterwards no process is left, whatever the result; an
// error says that a device could not be closed properly, so that data may be lost.
func (l *Library) Shutdown(ctx context.Context) error {
	all := l.Devices()
	failures := make([]error, len(all))
	var wg sync.WaitGroup
	for i, d := range all {
		wg.Go(func() {
			err := l.RemoveDevice(ctx, d.minor)
			if errors.Is(err, errBusy) {
				err = errors.Join(err, l.forceRemove(d, 0))
			}
			failures[i] = err
		})
	}
	wg.Wait()
	return errors.Join(append(failures, l.Exit(ctx))...)
}

// lookup needs mu.
func (l *Library) lookup(minor int) (*Device, error) {
	if minor < 0 || minor >= len(l.devices) {
		return nil, control.Failf(syscall.ENODEV, "minor %d is out of range: 0 to %d", minor, len(l.devices)-1)
	}
	d := l.devices[minor]
	if d == nil || !d.ready {
		return nil, control.Failf(syscall.ENODEV, "no device has minor %d", minor)
	}
	return d, nil
}

// Device returns the device with the minor, nil if there is none.
func (l *Library) Device(minor int) *Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	d, err := l.lookup(minor)
	if err != nil {
		return nil
	}
	return d
}

// Devices returns all devices, by minor.
func (l *Library) Devices() []*Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*Device
	for _, d := range l.devices {
		if d != nil && d.ready {
			all = append(all, d)
		}
	}
	return all
}

// Handlers describes the loaded handlers, by subtype.
func (l *Library) Handlers() []HandlerInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []HandlerInfo
	for _, h := range l.handlers {
		if h.isLoaded() {
			all = append(all, h.info())
		}
	}
	slices.SortFunc(all, func(a, b HandlerInfo) int { return cmp.Compare(a.Subtype, b.Subtype) })
	return all
}
