package udp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/internal/kernel"
	"patchbay/internal/mmsg"
)

// Limits and defaults.
const (
	// MaxDatagram is the longest datagram in bytes: what fits an IPv4 packet.
	MaxDatagram = 65507
	// MaxTrain is the most bytes of datagrams that one message holds.
	MaxTrain = 65507
	// MaxPorts bounds Config.Ports.
	MaxPorts = 64
	// DefaultBuffer is what is asked of the kernel for each direction, in bytes. net.core.rmem_max and wmem_max may allow less.
	DefaultBuffer = 4 << 20
	// DefaultRetryCut is how long a Path does without UDP_SEGMENT after it was refused.
	DefaultRetryCut = 5 * time.Minute

	outerTTL = 64
)

// ErrClosed is what Serve returns on a Socket that was closed before.
var ErrClosed = errors.New("the socket is closed")

// Config says where to listen and how. Zero fields have defaults.
type Config struct {
	// Listen is the local address and port. The zero address, and [::], take both IP versions where the host has IPv6. Port 0 is one of the kernel's choice.
	Listen netip.AddrPort
	// Ports is how many ports datagrams are sent from: 1, or 0, the listening one alone; more, as many further ones of 49152 to 65535 (RFC 7348 §5) where
	// the kernel can choose so, else of its own range. At most MaxPorts.
	Ports int
	// Buffer is the size in bytes of each of the kernel's two buffers; 0 means DefaultBuffer.
	Buffer int
	// NoCut and NoJoin do without UDP_SEGMENT and UDP_GRO on every path.
	NoCut, NoJoin bool
	// RetryCut is how long a Path whose datagrams the kernel would not cut sends them one by one; 0 means DefaultRetryCut.
	RetryCut time.Duration
	// Spin bounds how long an idle Serve keeps looking before its thread sleeps (package spin); 0 means not at all.
	Spin time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// FDs are the descriptors of another Socket's Export, to go on with instead of opening any: Listen and Ports do not matter then. They are taken over, on error too.
	FDs []int
}

// Stats are the counters of a Socket's receiving side, and of errors. Bytes are of UDP payload. Messages are what the kernel handed over,
// Datagrams what it had joined in them.
type Stats struct {
	Messages, Datagrams, Bytes uint64
	// Truncated are messages that did not fit or named no sender; there should be none.
	Truncated uint64
	// Missed are datagrams, joined ones counted once, that the kernel dropped because the buffer was full or a checksum wrong.
	Missed uint64
}

// Socket is a UDP port for many peers. It is safe for concurrent use.
type Socket struct {
	cfg         Config
	v6, dual    bool
	local       netip.AddrPort
	ports       []int // descriptors to send from; the first is the one that listens
	meter       meter
	maxSegments int // of one message; 0 without UDP_SEGMENT
	start       time.Time
	sendmmsg    func(fd int, ms []mmsg.Msg) (int, unix.Errno)
	pool        sync.Pool // of *Batch

	// gate counts Batches in use; Close adds closing to it, which makes it negative for good.
	gate atomic.Int64

	mu      sync.Mutex // guards closed, and the start of a Serve against it
	closed  bool
	serves  sync.WaitGroup
	serving atomic.Bool
	stop    atomic.Bool

	wakeMu sync.Mutex // guards wake against a late interrupt
	wake   int        // eventfd that ends a wait for datagrams, or -1

	_                                   [64]byte
	messages, datagrams, bytes, dropped atomic.Uint64
}

const closing = -1 << 40

// Listen opens a Socket in the network namespace of the calling thread. Its error says which address could not be had and what to do.
func Listen(cfg Config) (_ *Socket, err error) {
	defer func() {
		if err != nil {
			for _, fd := range cfg.FDs {
				unix.Close(fd)
			}
		}
	}()
	switch {
	case cfg.Ports < 0 || cfg.Ports > MaxPorts:
		return nil, fmt.Errorf("listen on %v: %d ports to send from: want 1 to %d", cfg.Listen, cfg.Ports, MaxPorts)
	case cfg.Listen.Addr().IsMulticast():
		return nil, fmt.Errorf("listen on %v: it is a group address: give one of this host's, or none", cfg.Listen)
	case cfg.Listen.Addr().Zone() != "":
		return nil, fmt.Errorf("listen on %v: link-local addresses cannot be listened on: use [::]", cfg.Listen)
	}
	cfg.Ports = max(cfg.Ports, 1)
	if cfg.Buffer == 0 {
		cfg.Buffer = DefaultBuffer
	}
	if cfg.RetryCut == 0 {
		cfg.RetryCut = DefaultRetryCut
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Socket{cfg: cfg, start: cfg.Now(), wake: -1, meter: meter{fd4: -1, fd6: -1}, sendmmsg: mmsg.Send}
	s.pool.New = func() any { return newBatch(s) }
	open := s.open
	if len(cfg.FDs) > 0 {
		open = s.inherit
	}
	if err := open(); err != nil {
		s.ports = s.ports[:len(s.ports)-len(cfg.FDs)] // which are closed above
		s.closeFDs()
		if len(cfg.FDs) > 0 {
			return nil, fmt.Errorf("go on with sockets that were handed over: %w: let them go and listen anew", err)
		}
		return nil, explain(cfg.Listen, err)
	}
	if !cfg.NoCut {
		s.maxSegments = min(kernel.UDPMaxSegments(), maxDatagrams)
	}
	return s, nil
}

// open makes all descriptors.
func (s *Socket) open() error {
	addr := s.cfg.Listen.Addr()
	s.v6 = !addr.Is4()
	s.dual = !addr.IsValid() || addr == netip.IPv6Unspecified()
	host := netip.AddrPortFrom(addr, s.cfg.Listen.Port())
	if !addr.IsValid() {
		host = netip.AddrPortFrom(netip.IPv6Unspecified(), host.Port())
	}
	fd, err := s.socket()
	if err == nil {
		err = bind(fd, host)
	}
	if err != nil && !addr.IsValid() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		// A host without IPv6.
		if fd >= 0 {
			unix.Close(fd)
		}
		s.v6, s.dual = false, false
		host = netip.AddrPortFrom(netip.IPv4Unspecified(), host.Port())
		if fd, err = s.socket(); err == nil {
			err = bind(fd, host)
		}
	}
	if fd >= 0 {
		s.ports = append(s.ports, fd)
	}
	if err != nil {
		return err
	}
	s.local = localAddr(fd)
	setReceiving(fd, s.v6, s.dual, !s.cfg.NoJoin)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, s.cfg.Buffer)
	for len(s.ports) < s.cfg.Ports {
		fd, err := s.socket()
		if err != nil {
			return err
		}
		s.ports = append(s.ports, fd)
		// Nobody reads here: peers answer to the port they were told (RFC 7348 §5).
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0)
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, 65535<<16|49152)
		if err := bind(fd, netip.AddrPortFrom(host.Addr(), 0)); err != nil {
			return err
		}
	}
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	return s.meter.open(s, host.Addr())
}

// inherit goes on with the descriptors of Config.FDs, the first of which listens.
func (s *Socket) inherit() error {
	s.ports = slices.Clone(s.cfg.FDs)
	if len(s.ports) > MaxPorts {
		return fmt.Errorf("%d descriptors: at most %d", len(s.ports), MaxPorts)
	}
	for i, fd := range s.ports {
		if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || typ != unix.IPPROTO_UDP {
			return fmt.Errorf("descriptor %d of those that were handed over is no UDP socket", i)
		}
	}
	s.local = localAddr(s.ports[0])
	s.v6 = !s.local.Addr().Is4()
	if s.v6 {
		only, err := unix.GetsockoptInt(s.ports[0], unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
		s.dual = only == 0
	}
	s.cfg.Listen = s.local
	var err error
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	return s.meter.open(s, s.local.Addr())
}

// Export duplicates the descriptors, for a Socket of another process that Listen makes with them as Config.FDs. Until that one's Serve, and from the end of this one's, what comes waits in
// the kernel's buffer. While both serve, each gets a part.
func (s *Socket) Export() ([]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("hand over %v: %w", s.local, ErrClosed)
	}
	var fds []int
	for _, fd := range s.ports {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, fmt.Errorf("hand over %v: %w", s.local, os.NewSyscallError("fcntl", err))
		}
		fds = append(fds, d)
	}
	return fds, nil
}

// socket makes a socket of the right family with what sending wants.
func (s *Socket) socket() (int, error) {
	domain := unix.AF_INET
	if s.v6 {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if s.v6 {
		only := 1
		if s.dual {
			only = 0
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only)
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, outerTTL)
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
	}
	if !s.v6 || s.dual {
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, outerTTL)
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, s.cfg.Buffer)
	return fd, nil
}

// setReceiving asks for what Serve wants to know of a datagram. All of it makes things better; none is needed for them to flow.
func setReceiving(fd int, v6, dual, join bool) {
	if join {
		unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	}
	if v6 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
	}
	if !v6 || dual {
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
	}
}

func bind(fd int, ap netip.AddrPort) error {
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	if ap.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return os.NewSyscallError("bind", unix.Bind(fd, sa))
}

func localAddr(fd int) netip.AddrPort {
	switch a, _ := unix.Getsockname(fd); a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// explain makes the error of open one that says what to do.
func explain(ap netip.AddrPort, err error) error {
	remedy := "see whether the address is one of this host's"
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		remedy = "another program has the port: choose another port or end it"
	case errors.Is(err, unix.EACCES):
		remedy = kernel.PortRemedy(int(ap.Port()))
	case errors.Is(err, unix.EADDRNOTAVAIL):
		remedy = "the host has no such address: see `ip address`"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		remedy = "raise the limit of open files (ulimit -n)"
	}
	return fmt.Errorf("listen on %v: %w: %s", ap, err, remedy)
}

// now is nanoseconds since the Socket was made.
func (s *Socket) now() int64 { return int64(s.cfg.Now().Sub(s.start)) }

// LocalAddr is the address and port the Socket listens on.
func (s *Socket) LocalAddr() netip.AddrPort { return s.local }

// MaxSegments is how many datagrams the kernel cuts out of one message; 0 where it cannot, or Config.NoCut says that it should not.
func (s *Socket) MaxSegments() int { return s.maxSegments }

// Stats reads the counters, one after the other while traffic goes on.
func (s *Socket) Stats() Stats {
	return Stats{Messages: s.messages.Load(), Datagrams: s.datagrams.Load(), Bytes: s.bytes.Load(), Truncated: s.dropped.Load(), Missed: s.missed()}
}

// missed is the kernel's own counter (SK_MEMINFO_DROPS).
func (s *Socket) missed() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0
	}
	const drops = 8
	var info [16]uint32
	n := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.ports[0]), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 || n < 4*(drops+1) {
		return 0
	}
	return uint64(info[drops])
}

// Join makes the Socket a member of a multicast group on the interface with number ifindex, so that it hears what a kernel's vxlan device sends to its
// group. The Socket must listen on an unspecified address. It ends with the Socket.
func (s *Socket) Join(group netip.Addr, ifindex int) error {
	group = group.Unmap()
	var err error
	switch a := s.cfg.Listen.Addr(); {
	case !group.IsMulticast():
		return fmt.Errorf("join %v: it is no group address", group)
	case a.IsValid() && !a.IsUnspecified():
		return fmt.Errorf("join %v: %v hears no group: listen on the unspecified address", group, s.local)
	case group.Is4() && (!s.v6 || s.dual):
		err = unix.SetsockoptIPMreqn(s.ports[0], unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(ifindex)})
	case group.Is6() && s.v6:
		err = unix.SetsockoptIPv6Mreq(s.ports[0], unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(ifindex)})
	default:
		err = unix.EAFNOSUPPORT
	}
	if err != nil {
		return fmt.Errorf("join %v on interface %d: %w: see whether the interface is up and has an address of that IP version", group, ifindex, err)
	}
	return nil
}

// Close ends Serve, waits for it and for every Batch that is in use, and closes the descriptors. Idempotent. It must not be called from a Handler, or by
// whoever holds a Batch.
func (s *Socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.interrupt()
	s.serves.Wait()
	s.gate.Add(closing)
	for s.gate.Load() != closing {
		time.Sleep(50 * time.Microsecond)
	}
	s.closeFDs()
	return nil
}

func (s *Socket) closeFDs() {
	for _, fd := range s.ports {
		unix.Close(fd)
	}
	s.wakeMu.Lock()
	if s.wake >= 0 {
		unix.Close(s.wake)
		s.wake = -1
	}
	s.wakeMu.Unlock()
	s.meter.close()
}

// interrupt makes Serve return soon, from any goroutine.
func (s *Socket) interrupt() {
	s.wakeMu.Lock()
	defer s.wakeMu.Unlock()
	s.stop.Store(true)
	one := [8]byte{1: 1} // any value but zero, in either byte order
	_, _ = unix.Write(s.wake, one[:])
}
