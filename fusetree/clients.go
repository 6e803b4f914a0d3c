// SPDX-License-Identifier: Apache-2.0

package fusetree

import (
	"sync/atomic"
	"time"
)

const (
	// maxClients is how many threads' places a reader remembers at a time.
	maxClients = 64
	// A reader looks where a client is every lookOften, and while that is the same place, half as often each time,
	// down to every lookSeldom.
	lookOften  = 4 * time.Millisecond
	lookSeldom = 256 * time.Millisecond
	// clockEvery is for how many requests it takes the time, and its own place, to be the same.
	clockEvery = 16
)

// clients is the threads whose requests a reader has read lately, while there were several of them. It belongs to the
// reader.
type clients struct {
	repliers *repliers
	list     [maxClients]*client // by thread, where several belong into one place the first
	now      time.Time
	requests int
	here     atomic.Int32 // the processor that the reader runs on; -1 if that cannot be told
	asleep   atomic.Bool  // the reader is, or is about to be, and will not look after the repliers
}

// client is a thread that makes requests.
type client struct {
	all      *clients
	tid      uint32
	due      time.Time // of the next look
	interval time.Duration
	most     int32 // requests under way at a time since the last look
	places   places
	ways     [2]clientWay

	waiting atomic.Int32            // requests under way
	replier atomic.Pointer[replier] // on the client's processor, if it makes one request at a time; nil if not
}

// clientWay is the origin of a client's requests on one descriptor.
type clientWay struct {
	*client
	from *descriptor
}

// reply implements origin.
func (w *clientWay) reply(r *IO, data []byte) {
	w.waiting.Add(-1)
	if p := w.replier.Load(); p != nil && len(data) <= replierRoom && !w.all.asleep.Load() {
		if here := int(w.all.here.Load()); here >= 0 && here != p.cpu && p.post(w.from.fd, r, data) {
			if w.all.asleep.Load() {
				p.send()
			}
			return
		}
	}
	w.from.reply(r, data)
}

// of returns the client with that thread ID; nil if there is none to be had.
func (c *clients) of(tid uint32) *client {
	if c.requests%clockEvery == 0 {
		c.now = time.Now()
		cpu, ok := processor()
		if !ok {
			cpu = -1
		}
		c.here.Store(int32(cpu))
	}
	c.requests++
	place := &c.list[tid%maxClients]
	k := *place
	switch {
	case k != nil && c.now.Before(k.due):
		if k.tid != tid {
			return nil
		}
		return k
	case k == nil || k.tid != tid:
		k = &client{all: c, tid: tid, most: 2} // until more is known
		*place = k
	}
	c.look(k)
	k.due = c.now.Add(k.interval)
	return k
}

// look finds out what is the best way of replies to a client.
func (c *clients) look(k *client) {
	var p *replier
	if k.most <= 1 {
		where, known := k.places.of(k.tid)
		switch {
		case !known: // as it is, until the next look
			k.interval = lookOften
			return
		case where.ok:
			p = c.repliers.on(where.cpu)
		}
	}
	k.most = 0
	k.interval = min(max(2*k.interval, lookOften), lookSeldom)
	if k.replier.Swap(p) != p {
		k.interval = lookOften
	}
}

// begin takes note of a request of the client that was read from a descriptor, and returns its origin. If it is not
// going to be replied to that way, cancel must follow.
func (k *client) begin(from *descriptor) origin {
	k.most = max(k.most, k.waiting.Add(1))
	for i := range k.ways {
		w := &k.ways[i]
		if w.from == nil {
			*w = clientWay{k, from}
		}
		if w.from == from {
			return w
		}
	}
	panic("fusetree: a reader has two descriptors")
}

func (k *client) cancel() { k.waiting.Add(-1) }
