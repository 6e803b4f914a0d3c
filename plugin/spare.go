// SPDX-License-Identifier: Apache-2.0

package plugin

// A host that is started and has loaded nothing yet is kept ready: starting a process and shaking hands takes longer
// than all the rest of a recovery.

// takeHost returns a host that has loaded nothing: the spare one, the one that is just being started, or a new one.
// Refill should follow, when nobody waits for the processors any more.
func (l *Library) takeHost() (*host, error) {
	l.mu.Lock()
	for l.spare == nil && l.refilled != nil {
		refilled := l.refilled
		l.mu.Unlock()
		<-refilled // sooner than one more that competes with it
		l.mu.Lock()
	}
	h := l.spare
	l.spare = nil
	l.mu.Unlock()
	if h != nil {
		if h.alive() {
			return h, nil
		}
		h.stop()
	}
	return l.startHost()
}

func (l *Library) startHost() (*host, error) {
	return startHost(l.cfg.HostBinary, l.cfg.ChannelMemory, l.wakeWatchdog, l.log.Named("host"))
}

// refill starts a spare host in the background, unless there is one, one is being started, or no handler is loaded.
func (l *Library) refill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spare != nil || l.refilled != nil || len(l.handlers) == 0 {
		return
	}
	refilled := make(chan struct{})
	l.refilled = refilled
	l.background.Go(func() {
		h, err := l.startHost()
		if err != nil {
			l.log.Warn("no spare host process", "error", err)
		}
		l.mu.Lock()
		l.refilled = nil
		close(refilled)
		if err == nil && len(l.handlers) > 0 {
			l.spare, h = h, nil
		}
		l.mu.Unlock()
		if err == nil && h != nil {
			h.stop() // the last handler was unloaded meanwhile
		}
	})
}

// dropSpare ends the spare host when no handler is loaded any more.
func (l *Library) dropSpare() {
	l.mu.Lock()
	var h *host
	if len(l.handlers) == 0 {
		h, l.spare = l.spare, nil
	}
	l.mu.Unlock()
	if h != nil {
		h.stop()
	}
	l.background.Wait()
}
