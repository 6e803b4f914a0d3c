// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// Memory that outlives hosts. A handler asks for it with tcmur_dev_keep_memory; the front makes a memfd and keeps it
// until the device is gone, so that the next host's handler gets the same one. What is in it, and how large it is, is
// the handler's affair; the front maps it only where the handler says that it is what is on the device: contents.go.
//
// Each host has a socket for that. It asks, the front answers with the descriptor attached; docs/PROTOCOL.md has the
// messages. A host gets at the memory of its own devices only.

const (
	// maxRegions is how many memfds a device can have.
	maxRegions = 4
	// maxMemoryFaults is how many messages that make no sense are put up with before a host is not listened to any more.
	maxMemoryFaults = 16

	memoryNameSize    = 32 // in a request, padded with NULs, of which there is at least one
	memoryRequestSize = 4 + 4 + memoryNameSize
	memoryReplySize   = 4 + 4
)

// memory is what is kept for one device. Methods may be called concurrently, and on nil, which keeps nothing.
type memory struct {
	device string // name, for ps and /proc

	mu      sync.Mutex
	regions map[string]int // descriptors by name; nil once dropped
}

func newMemory(device string) *memory {
	return &memory{device: device, regions: make(map[string]int)}
}

// use implements lender; the region is made if need be. ENODEV: the memory was dropped. ENOSPC: too many regions.
// Otherwise memfd_create's error, or fn's.
func (m *memory) use(name string, fn func(fd int) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.regions == nil {
		return syscall.ENODEV
	}
	fd, ok := m.regions[name]
	if !ok {
		if len(m.regions) == maxRegions {
			return syscall.ENOSPC
		}
		// Not to be sealed: a host that dies could leave it so that its successor cannot write. No seal of ours either,
		// because handlers resize it; nobody but they would be hurt by that.
		var err error
		if fd, err = unix.MemfdCreate("tcmur-"+m.device+"-"+name, unix.MFD_CLOEXEC); err != nil {
			return err
		}
		m.regions[name] = fd
	}
	return fn(fd)
}

// mapRegion maps the first n bytes of a region, which may be shorter, for reading. ENOENT: there is no such region.
// Otherwise mmap's error.
func (m *memory) mapRegion(name string, n int) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fd, ok := m.regions[name]
	if !ok {
		return nil, syscall.ENOENT
	}
	view, err := unix.Mmap(fd, 0, n, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	_ = unix.Madvise(view, unix.MADV_DONTDUMP) // a core dump would read, and so allocate, all of it
	return view, nil
}

// drop gives everything up. The memory is free once no host has it any more.
func (m *memory) drop() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, fd := range m.regions {
		_ = unix.Close(fd) // a memfd has nothing to flush
	}
	m.regions = nil
}

// size is how many bytes the kernel has given to what is kept.
func (m *memory) size() int64 {
	if m == nil {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var bytes int64
	for _, fd := range m.regions {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil {
			bytes += st.Blocks * 512
		}
	}
	return bytes
}

// memoryServer answers one host.
type memoryServer struct {
	log    hclog.Logger
	socket *os.File // our end; non-blocking
	done   chan struct{}

	mu      sync.Mutex
	lenders map[uint32]lender // by minor: the devices that were opened in this host; and objectIndex
	serving bool
}

// lender has descriptors for a host, by name.
type lender interface {
	// use calls fn with the descriptor of that name, which nobody closes meanwhile. Its errors are errnos for the host.
	use(name string, fn func(fd int) error) error
}

// newMemoryServer returns a server and the host's end of its socket. stop must be called in the end.
func newMemoryServer(log hclog.Logger) (*memoryServer, *os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("memory socket: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "memory-host")
	if err := unix.SetNonblock(pair[0], true); err != nil {
		_ = unix.Close(pair[0])
		theirs.Close()
		return nil, nil, fmt.Errorf("memory socket: %w", err)
	}
	return &memoryServer{
		log: log, socket: os.NewFile(uintptr(pair[0]), "memory"), done: make(chan struct{}),
		lenders: make(map[uint32]lender),
	}, theirs, nil
}

// lend lets the host ask for the memory of the device with that minor, or with objectIndex for the handler's shared
// object, from now on.
func (s *memoryServer) lend(index uint32, from lender) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lenders[index] = from
	if !s.serving {
		s.serving = true
		go s.serve()
	}
}

// stop ends the service. When it has returned no goroutine of the server's is left. To be called once.
func (s *memoryServer) stop() {
	s.socket.Close()
	s.mu.Lock()
	serving := s.serving
	s.serving = true // too late for lend
	s.mu.Unlock()
	if serving {
		<-s.done
	}
}

// serve answers until the socket is closed, or the host talks nonsense. It never waits for the host to read.
func (s *memoryServer) serve() {
	defer close(s.done)
	buf := make([]byte, memoryRequestSize+1) // one more shows a message that is too long
	for faults := 0; faults < maxMemoryFaults; {
		// Descriptors that a host attaches are dropped by the kernel: there is no room for them in a plain read.
		n, err := s.socket.Read(buf)
		if err != nil {
			return // closed, by stop or by the host
		}
		if err := s.answer(buf[:n]); err != nil {
			faults++
			s.log.Error("host broke the protocol of the memory socket", "error", err)
		}
	}
	s.log.Error("host is not listened to any more on the memory socket")
}

// answer answers one request. Its error is for a message that is none.
func (s *memoryServer) answer(msg []byte) error {
	if len(msg) != memoryRequestSize {
		return fmt.Errorf("message of %d bytes, not %d", len(msg), memoryRequestSize)
	}
	index := binary.NativeEndian.Uint32(msg[4:])
	name, padding, _ := bytes.Cut(msg[8:], []byte{0})
	if len(name) == memoryNameSize || len(bytes.Trim(padding, "\x00")) > 0 {
		return errors.New("name is not padded with NULs")
	}
	s.mu.Lock()
	from := s.lenders[index]
	s.mu.Unlock()
	reply := bytes.Clone(msg[:memoryReplySize]) // with the request's sequence number
	var err error
	switch {
	case from == nil:
		err = syscall.ENODEV
	case !validRegionName(name):
		err = syscall.EINVAL
	default:
		binary.NativeEndian.PutUint32(reply[4:], 0)
		err = from.use(string(name), func(fd int) error {
			s.send(reply, unix.UnixRights(fd))
			return nil
		})
	}
	if err != nil {
		errno := syscall.EIO
		errors.As(err, &errno)
		binary.NativeEndian.PutUint32(reply[4:], uint32(errno))
		s.send(reply, nil)
	}
	return nil
}

// send sends a reply, or drops it where the host does not read: it then waits in vain, for a limited time.
func (s *memoryServer) send(reply, rights []byte) {
	raw, err := s.socket.SyscallConn()
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) {
			err = unix.Sendmsg(int(fd), reply, rights, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		})
		err = errors.Join(err, controlErr)
	}
	if err != nil {
		s.log.Debug("reply on the memory socket was not sent", "error", err)
	}
}

// validRegionName reports whether a name has the letters that tcmu-runner.h allows.
func validRegionName(name []byte) bool {
	for _, c := range name {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return len(name) > 0
}
