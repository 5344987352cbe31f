package nat

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/internal/mmsg"
)

// sockBuf is what is asked of the kernel for each direction of a socket, in bytes; net.core.rmem_max and wmem_max may allow less.
const sockBuf = 2 << 20

// sockOwner is what stands behind a packetSock: a flow or a published port.
type sockOwner interface {
	// origin finds the packet of a container that went out to peer: who sent it and to which address it did.
	origin(peer netip.AddrPort) (src, dst netip.AddrPort, ok bool)
}

// packetSock is a datagram or ping socket of the host. Sends are serialised; the loop alone receives.
type packetSock struct {
	fd    int
	v6    bool // AF_INET6
	dual  bool // AF_INET6 that also speaks IPv4, with v4-mapped names
	ping  bool
	owner sockOwner

	mu     sync.Mutex // serialises sends, and sends with close
	closed bool
	df     dfMode
	gsoMax int          // largest segment that the host cuts for us; 0 for none
	mtu    atomic.Int32 // of the path that refused a packet for its length last
	errMu  sync.Mutex   // of taking an error off the queue and storing mtu
}

// dfMode is what IP_MTU_DISCOVER is set to.
type dfMode uint8

const (
	dfKernel dfMode = iota // what the kernel starts with: fragments where it must
	dfSet                  // never fragments: the sender does its own path MTU discovery
)

// closeSock ends the socket. Nothing is sent on it afterwards; the caller has taken it out of the loop.
func (s *packetSock) closeSock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		unix.Close(s.fd)
	}
}

// setDF makes the host fragment what is too long for the path, or refuse it. s.mu is held.
func (s *packetSock) setDF(m dfMode) {
	if s.df == m {
		return
	}
	s.df = m
	v4, v6 := unix.IP_PMTUDISC_WANT, unix.IPV6_PMTUDISC_WANT
	if m == dfSet {
		v4, v6 = unix.IP_PMTUDISC_DO, unix.IPV6_PMTUDISC_DO
	}
	if s.v6 {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, v6)
	}
	if !s.v6 || s.dual {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, v4)
	}
}

// openUDP makes a UDP socket bound to host. dual lets the unspecified IPv6 address stand for both versions; pktinfo has each datagram say which
// address of the host it came to. Errors are those of socket and bind, bare.
func (s *packetSock) openUDP(host netip.AddrPort, dual, pktinfo bool) error {
	s.v6, s.dual, s.gsoMax = host.Addr().Is6(), dual, maxPayload
	fd, err := openSock(s.v6, unix.IPPROTO_UDP)
	if err != nil {
		return err
	}
	s.fd = fd
	if s.v6 && !dual {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	} else if s.v6 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	s.wantMessages(pktinfo)
	var name mmsg.Sockaddr
	if err := bindRaw(fd, &name, name.Put(host, s.v6, 0)); err != nil {
		unix.Close(fd)
		return err
	}
	return nil
}

// adoptUDP takes over a UDP socket that another process made with openUDP. The caller closes it on error.
func (s *packetSock) adoptUDP(fd int, pktinfo bool) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	s.fd, s.v6, s.gsoMax = fd, domain == unix.AF_INET6, maxPayload
	level, name, do := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if s.v6 {
		only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return err
		}
		s.dual = only == 0
		level, name, do = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	if v, err := unix.GetsockoptInt(fd, level, name); err == nil && v == do {
		s.df = dfSet // whatever its last datagram wanted
	}
	s.wantMessages(pktinfo)
	return nil
}

// wantMessages asks for what datagrams can tell beside their bytes. All of it makes things better where it works; none is needed for datagrams to flow.
func (s *packetSock) wantMessages(pktinfo bool) {
	unix.SetsockoptInt(s.fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	s.wantErrors()
	if !pktinfo {
		return
	}
	if s.v6 {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	} else {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
}

// openPing makes a ping socket. id is the echo identifier it would like to have.
func (s *packetSock) openPing(v6 bool, id uint16) error {
	s.v6, s.ping = v6, true
	proto, any := unix.IPPROTO_ICMP, netip.IPv4Unspecified()
	if v6 {
		proto, any = unix.IPPROTO_ICMPV6, netip.IPv6Unspecified()
	}
	fd, err := openSock(v6, proto)
	if err != nil {
		return err
	}
	s.fd = fd
	s.wantErrors()
	if v6 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
	} else {
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
	}
	var name mmsg.Sockaddr
	if id == 0 || bindRaw(fd, &name, name.Put(netip.AddrPortFrom(any, id), v6, 0)) != nil {
		if err := bindRaw(fd, &name, name.Put(netip.AddrPortFrom(any, 0), v6, 0)); err != nil {
			unix.Close(fd)
			return err
		}
	}
	return nil
}

func openSock(v6 bool, proto int) (int, error) {
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return -1, err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, sockBuf)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sockBuf)
	return fd, nil
}

// wantErrors has ICMP errors queued with what they are about, and datagrams tell their TOS.
func (s *packetSock) wantErrors() {
	if s.v6 {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
	}
	if !s.v6 || s.dual {
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
	}
}

// localPort is the port the socket is bound to, or 0.
func (s *packetSock) localPort() uint16 {
	switch a, _ := unix.Getsockname(s.fd); a := a.(type) {
	case *unix.SockaddrInet4:
		return uint16(a.Port)
	case *unix.SockaddrInet6:
		return uint16(a.Port)
	}
	return 0
}

func bindRaw(fd int, name *mmsg.Sockaddr, n uint32) error {
	_, _, e := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(name)), uintptr(n))
	if e != 0 {
		return e
	}
	return nil
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

func sendmmsg(fd int, ms []mmsghdr) (int, unix.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&ms[0])), uintptr(len(ms)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func recvmmsg(fd int, ms []mmsghdr, flags int) (int, unix.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&ms[0])), uintptr(len(ms)), uintptr(unix.MSG_DONTWAIT|flags), 0, 0)
	return int(n), e
}

// controlLen is room for every control message this package sends or receives at once, with its padding.
const controlLen = 192

// control is a buffer of control messages. It is made of words because the kernel's headers want to be aligned.
type control struct {
	w [controlLen / 8]uint64
	n int
}

func (c *control) bytes() []byte { return unsafe.Slice((*byte)(unsafe.Pointer(&c.w)), controlLen) }

// add appends one message of n bytes of data and returns where they go.
func (c *control) add(level, typ, n int) []byte {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.bytes()[c.n]))
	h.Level, h.Type = int32(level), int32(typ)
	h.SetLen(unix.CmsgLen(n))
	d := c.bytes()[c.n+unix.CmsgLen(0):][:n]
	c.n += unix.CmsgSpace(n)
	return d
}

func (c *control) addInt(level, typ, v int) {
	binary.NativeEndian.PutUint32(c.add(level, typ, 4), uint32(v))
}

// addSource has the packet leave from address a of the host.
func (c *control) addSource(a netip.Addr, v6 bool) {
	if v6 {
		d := c.add(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
		b := a.As16()
		copy(d, b[:])
		clear(d[16:])
		return
	}
	d := c.add(unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	b := a.As4()
	clear(d)
	copy(d[4:8], b[:]) // ipi_spec_dst
}
