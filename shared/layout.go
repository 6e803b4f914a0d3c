// SPDX-License-Identifier: Apache-2.0

package shared

// This file is Go's view of channel.h, which is the definition. TestLayoutMatchesHeader compares every number.

const (
	channelMagic   = 0x524d4354
	channelVersion = 2

	// RingEntries is the number of entries of each ring, and so the most requests that can be in flight.
	RingEntries = 512
	// MaxPayload is the most bytes that one request may carry.
	MaxPayload = 1 << 20

	arenaOffset = 64 << 10
	ringOffset  = 4096
	sqeSize     = 64
	cqeSize     = 32
)

// Offsets in the head of the submit segment. Written by the front.
const (
	offMagic             = 0
	offVersion           = 4
	offSubmitArenaSize   = 8
	offCompleteArenaSize = 16
	offSQBell            = 64
	offCQWaiting         = 128
)

// Summands of cq_waiting.
const (
	waitingAsleep  = 1
	waitingAttends = 2
)

// Offsets in the head of the complete segment. Written by the host.
const (
	offCQBell     = 64
	offSQSleepers = 128
	offRobust     = 192
)

// sleepersBackSoon in offSQSleepers: a worker in a quick callout will look at the ring.
const sleepersBackSoon = 1 << 31

// Offsets in a submission queue entry.
const (
	sqeSeq     = 0
	sqeTag     = 8
	sqeGen     = 12
	sqeOp      = 16
	sqeDevice  = 20
	sqeOffset  = 24
	sqeLength  = 32
	sqePayload = 40
	sqeFlags   = 48
)

// flagMayInPlace in sqeFlags: a read whose data need not be copied; see flagInPlace.
const flagMayInPlace = 1

// Offsets in a completion queue entry.
const (
	cqeSeq   = 0
	cqeTag   = 8
	cqeGen   = 12
	cqeSTS   = 16
	cqeError = 20 // 16 bits, as cqeFlags
	cqeFlags = 22
	cqeNanos = 24
)

// flagInPlace in cqeFlags: the data is not in the payload but in the device's contents, at the request's offset.
const flagInPlace = 1

// Op is the operation that a request asks of a host.
type Op uint32

// The operations of channel.h.
const (
	OpRead  Op = 1 // payload: filled by the host
	OpWrite Op = 2 // payload: filled by the front before Submit
	OpFlush Op = 3 // no payload; offset and length are 0
	OpUnmap Op = 4 // no payload; contents of the range become undefined
	OpZero  Op = 5 // no payload; the range reads back zeroes
)

// String is the operation's name as logs show it.
func (op Op) String() string {
	switch op {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpUnmap:
		return "unmap"
	case OpZero:
		return "zero"
	}
	return "unknown"
}

// carriesPayload reports whether requests of this operation own a piece of an arena.
func (op Op) carriesPayload() bool { return op == OpRead || op == OpWrite }
