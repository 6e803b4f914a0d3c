// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Each step of the way down has its own time limit, so that the program ends whatever a handler, the kernel or a user
// does.
const (
	// forceDelay is how long after a signal that found the mount busy another one still counts as the same: both
	// the terminal and make(1), sudo(8) or timeout(1) may pass on what the user sent once.
	forceDelay = time.Second
	// forceWindow is how soon a second signal must follow one that found the mount busy, to mean it.
	forceWindow = 10 * time.Second
	// exitGrace is how long "exit" waits for its writer, and others, to close the command node and leave the mount.
	exitGrace = time.Second
	// unmountTimeout bounds the wait for the end of serving once the mount is gone.
	unmountTimeout = 5 * time.Second
	// cutOffTimeout is that wait when requests are stuck, perhaps, in hosts that are still to be killed.
	cutOffTimeout = 200 * time.Millisecond
	// defaultStopTimeout bounds flushing and closing all devices; afterwards their hosts are killed. With the other steps
	// it makes five seconds at most.
	defaultStopTimeout = 3 * time.Second
)

// unmountIfIdle answers a signal: it unmounts, or if somebody uses the mount says who, and what to do, and returns
// false. Whether it is used is for the kernel to say, at the moment of the umount.
func (s *server) unmountIfIdle(sig os.Signal) bool {
	err := s.unmountSoon()
	if err == nil && s.awaitEnd() {
		s.log.Info("stopping", "signal", sig.String())
		return true
	}
	if err == nil {
		err = errors.New("the mount was detached while files in it were open")
	}
	s.log.Warn("cannot stop: the mount is in use; close or unmount what uses it, or send the signal again to force",
		"signal", sig.String(), "force_after", s.forceDelay.String(), "force_before", forceWindow.String(),
		"reason", err, "used_by", s.users())
	return false
}

// unmountSoon unmounts. It gives the kernel the time to let go of files whose users are gone: an io_uring that had them
// registered is taken down after its process has ended.
func (s *server) unmountSoon() error {
	deadline := time.After(releaseGrace)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		err := s.unmount()
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		select {
		case <-retry.C:
		case <-deadline:
			s.front.coverAll()
			return err
		}
	}
}

// unmount unmounts everything: first the mounts of single devices, which are on that of the tree. After EBUSY some of
// these may be gone.
func (s *server) unmount() error {
	if err := s.front.uncoverAll(); err != nil {
		return err
	}
	return s.tree.Unmount(false)
}

// users says what keeps the mount busy.
func (s *server) users() string {
	var users []string
	for _, open := range s.front.gate.openDevices() {
		users = append(users, s.front.describeOpen(open.name, open.opens))
	}
	if len(users) == 0 {
		// A command node that is open, or a working directory.
		users = findHolders(s.front.sys, s.front.mountpoint)
	}
	if len(users) == 0 {
		return "nobody this process can see"
	}
	return strings.Join(users, "; ")
}

// unmountAfterExit unmounts after the exit command, which has found all devices idle and shut the gate. The write of
// the command itself came through the mount: its writer gets the answer and the time to close the node.
func (s *server) unmountAfterExit() {
	s.log.Info("stopping", "reason", "exit")
	deadline := time.Now().Add(exitGrace)
	s.front.gate.waitCtlClosed(exitGrace)
	// A release is on its way while the umount is refused, and a shell may have its working directory there.
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for s.unmount() != nil {
		if time.Now().After(deadline) {
			s.log.Warn("unmounting by force: no device is in use, but the mount is", "used_by", s.users())
			s.cutOff()
			return
		}
		select {
		case <-retry.C:
		case <-s.ended:
			return
		}
	}
	s.awaitEnd()
}

// forceUnmount takes the mount away from its users: what they have written so far is flushed, what they have not
// written is lost.
func (s *server) forceUnmount() {
	s.log.Warn("stop forced", "used_by", s.users())
	s.front.gate.shut()
	for _, open := range s.front.gate.openDevices() {
		if open.writers > 0 {
			s.log.Error("still open for writing: what was not written yet is lost", "device", open.name)
			s.dataAtRisk = true
		}
	}
	s.stopTimeout /= 2 // for each of the flush here and the close in the end
	s.front.eachCovered(func(n *deviceNode) { n.writeBackCovered(forcedWriteBack) })
	s.flushAll()
	s.abandon()
	s.cutOff()
}

// flushAll flushes all devices at the same time. One that fails or takes too long puts data at risk.
func (s *server) flushAll() {
	var done sync.WaitGroup
	failures := make(chan struct{}, 1)
	for _, node := range s.front.allNodes() {
		done.Go(func() {
			if err := node.device.Flush(); err != nil {
				s.log.Error("flush failed", "device", node.device.Name(), "reason", err)
				select {
				case failures <- struct{}{}:
				default:
				}
			}
		})
	}
	all := make(chan struct{})
	go func() {
		done.Wait()
		close(all)
	}()
	select {
	case <-all:
	case <-time.After(s.stopTimeout):
		s.log.Error("flushing takes too long, going on without", "limit", s.stopTimeout.String())
		s.dataAtRisk = true
	}
	select {
	case <-failures:
		s.dataAtRisk = true
	default:
	}
}

// cutOff takes the mount away from whoever uses it.
func (s *server) cutOff() {
	s.front.cutCovers()
	if err := s.tree.Abort(); err != nil {
		s.log.Warn("cutting the mount's users off", "reason", err)
	}
	s.awaitEndFor(cutOffTimeout)
}

// unmountForCleanUp gets the mount out of the way after a failed start.
func (s *server) unmountForCleanUp() {
	s.front.gate.shut()
	if s.unmount() != nil {
		s.cutOff()
		return
	}
	s.awaitEnd()
}

// awaitEnd waits until the tree is served no more, and reports whether that came true in time.
func (s *server) awaitEnd() bool { return s.awaitEndFor(unmountTimeout) }

func (s *server) awaitEndFor(limit time.Duration) bool {
	select {
	case <-s.ended:
		return true
	case <-time.After(limit):
		return false
	}
}

// cleanUp is the one way out: devices, handlers, nodes, mount point, whatever the reason for the stop was. It may find
// any part of them missing.
func (s *server) cleanUp() {
	s.front.gate.shut()
	s.metrics.stop()
	s.abandonRestore()
	// Its own time limit: the contexts of the work are over by now, and the devices must be flushed all the same.
	ctx, cancel := context.WithTimeout(context.Background(), s.stopTimeout)
	defer cancel()
	stop := showProgress(s.stdout, "flushing and closing", func() string {
		return describeWork(s.interp.status().Devices)
	})
	err := s.lib.Shutdown(ctx)
	stop()
	if err != nil {
		s.log.Error("closing devices and handlers", "reason", err)
		s.dataAtRisk = true
	}
	// Operations that hung in a handler have ended with its host.
	if !s.awaitEnd() {
		s.log.Warn("still serving the mount", "used_by", s.users())
	}
	if err := s.removeTree(); err != nil {
		s.log.Warn("taking the tree down", "reason", err)
	}
	s.point.remove(s.log)
	if s.dataAtRisk {
		s.log.Error("stopped; data may be lost")
		return
	}
	s.log.Info("stopped")
}

// abandonRestore ends what the config file has begun, and waits a moment for it to come true: its devices would be
// added behind the back of the clean-up.
func (s *server) abandonRestore() {
	if s.restoring == nil {
		return
	}
	s.endRestore()
	ctx, cancel := context.WithTimeout(context.Background(), cutOffTimeout)
	defer cancel()
	if left := s.restoring.settle(ctx, cutOffTimeout); len(left) > 0 {
		s.log.Warn("commands do not end", "commands", strings.Join(left, "; "))
	}
}

// removeTree removes all nodes. Nodes that are open after a forced stop are detached.
func (s *server) removeTree() error {
	var failures []error
	drop := func(err error) {
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			failures = append(failures, err)
		}
	}
	front := s.front
	for _, node := range front.allNodes() {
		drop(front.detach(node))
	}
	drop(s.tree.Detach(ctlName, front.devDir))
	for _, subtype := range front.allModules() {
		drop(front.removeModule(subtype))
	}
	drop(s.tree.Detach(statusName, front.sysDir))
	drop(s.tree.Detach(metricsName, front.sysDir))
	drop(s.tree.Rmdir("hosts", front.sysDir))
	drop(s.tree.Rmdir("block", front.sysDir))
	drop(s.tree.Rmdir("modules", front.sysDir))
	drop(s.tree.Rmdir("sys", s.tree.Root()))
	drop(s.tree.Rmdir("dev", s.tree.Root()))
	drop(s.tree.Exit())
	return errors.Join(failures...)
}
