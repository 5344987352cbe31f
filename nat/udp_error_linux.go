package nat

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/mmsg"
	"patchbay/internal/wire"
)

// Origins of a queued error (linux/errqueue.h).
const (
	eeOriginLocal = 1
	eeOriginICMP  = 2
	eeOriginICMP6 = 3
)

// errBatch bounds how many queued errors are taken at once; the loop comes again for the rest.
const errBatch = 32

// hostError is one entry of a socket's error queue.
type hostError struct {
	origin    uint8
	typ, code uint8
	info      uint32     // the MTU of "too big"
	from      netip.Addr // who sent the ICMP error, or the zero Addr
}

// drainErrors takes the errors queued on s and gives the ICMP ones to the container whose packet they are about. Safe from any goroutine.
func (u *udpNAT) drainErrors(s *packetSock) {
	var (
		name mmsg.Sockaddr
		ctl  [512 / 8]uint64
		data [2048]byte
		room [icmpErrorRoom]byte
	)
	oob := unsafe.Slice((*byte)(unsafe.Pointer(&ctl)), len(ctl)*8)
	for range errBatch {
		iov := unix.Iovec{Base: &data[0]}
		iov.SetLen(len(data))
		var m [1]mmsghdr
		h := &m[0].hdr
		h.Name, h.Namelen = &name[0], unix.SizeofSockaddrInet6
		h.Iov = &iov
		h.SetIovlen(1)
		h.Control = &oob[0]
		h.SetControllen(len(oob))
		s.errMu.Lock() // so that whoever finds the queue empty finds what it said of the MTU
		if n, errno := recvmmsg(s.fd, m[:], unix.MSG_ERRQUEUE); errno != 0 || n == 0 {
			s.errMu.Unlock()
			return
		}
		he, ok := parseHostError(oob[:min(int(h.Controllen), len(oob))])
		if ok && he.origin == eeOriginLocal {
			s.mtu.Store(int32(he.info))
		}
		s.errMu.Unlock()
		if !ok || he.origin == eeOriginLocal {
			continue
		}
		peer, ok := name.Get()
		if !ok {
			continue
		}
		if he.origin == eeOriginICMP && he.typ == 3 && he.code == 4 || he.origin == eeOriginICMP6 && he.typ == 2 {
			s.mtu.Store(int32(he.info))
		}
		u.carryError(s, &he, peer, data[:min(int(m[0].n), len(data))], room[:])
	}
}

// carryError tells the container behind s of the ICMP error he about its packet to peer, of which quote is what the error repeated.
func (u *udpNAT) carryError(s *packetSock, he *hostError, peer netip.AddrPort, quote, room []byte) {
	e, ok := u.containerError(s, he, peer, quote)
	if !ok {
		u.drops.Add(frame.DropNoFlow, 1)
		return
	}
	if !u.errors.allow(e.src.Addr(), u.now()) {
		u.drops.Add(frame.DropRate, 1)
		return
	}
	u.net.Send([]frame.Frame{e.put(room)})
}

// containerError turns the error into one about the packet that the container sent.
func (u *udpNAT) containerError(s *packetSock, he *hostError, peer netip.AddrPort, quote []byte) (e icmpError, ok bool) {
	src, dst, ok := s.owner.origin(peer)
	if !ok {
		return e, false
	}
	v4 := src.Addr().Is4()
	if v4 != (he.origin == eeOriginICMP) {
		// A client of the other IP version, shown as the gateway: the error has no equal there but "unreachable".
		he.typ, he.code, he.info = 3, 1, 0
		if !v4 {
			he.typ, he.code = 1, 3
		}
		he.from = netip.Addr{}
	}
	e = icmpError{typ: he.typ, code: he.code, src: src, dst: dst, ttl: 1, proto: wire.ProtoUDP}
	switch {
	case v4 && he.typ == 3 && he.code == 4:
		e.rest = min(he.info, 0xffff)
	case !v4 && (he.typ == 2 || he.typ == 4):
		e.rest = he.info
	}
	e.from = u.inside(he.from, dst.Addr())
	if s.ping {
		e.proto = wire.ProtoICMP
		if !v4 {
			e.proto = wire.ProtoICMPv6
		}
		// The kernel repeats the ICMP message from its header on.
		if len(quote) < wire.ICMPLen {
			return e, false
		}
		copy(e.transport[:], quote)
		binary.BigEndian.PutUint16(e.transport[4:], src.Port())
		quote = quote[wire.ICMPLen:]
		// The identifier is the container's again and so is, by RFC 1624, the checksum of what is not repeated in full: unknown.
		e.transport[2], e.transport[3] = 0, 0
	} else {
		binary.BigEndian.PutUint16(e.transport[0:], src.Port())
		binary.BigEndian.PutUint16(e.transport[2:], dst.Port())
		binary.BigEndian.PutUint16(e.transport[4:], uint16(wire.UDPLen+len(quote)))
	}
	e.data, e.dataLength = quote, len(quote)
	return e, e.from.IsValid() && e.from.Is4() == v4
}

// inside is the address under which a container sees address a of the host's side: the host alias for the host's loopback, the gateway
// for an unknown sender. like is an address of the IP version that is wanted.
func (u *udpNAT) inside(a, like netip.Addr) netip.Addr {
	version := 6
	if like.Is4() {
		version = 4
	}
	switch {
	case !a.IsValid() || a.IsUnspecified() || a.Is6() && a.IsLinkLocalUnicast(): // an IPv6 one means nothing without its link
		return u.net.Addr(version)
	case a.IsLoopback():
		return u.net.HostAlias(version)
	}
	return a
}

// parseHostError reads the control messages that come with a queued error.
func parseHostError(c []byte) (he hostError, ok bool) {
	for len(c) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(c) {
			return he, false
		}
		d := c[unix.CmsgLen(0):n]
		if (h.Level == unix.IPPROTO_IP && h.Type == unix.IP_RECVERR || h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_RECVERR) && len(d) >= 16 {
			// struct sock_extended_err, then the offender's address.
			he.origin, he.typ, he.code = d[4], d[5], d[6]
			he.info = binary.NativeEndian.Uint32(d[8:])
			if he.origin == eeOriginICMP || he.origin == eeOriginICMP6 {
				var sa mmsg.Sockaddr
				if copy(sa[:], d[16:]) >= unix.SizeofSockaddrInet4 {
					if ap, ok := sa.Get(); ok {
						he.from = ap.Addr()
					}
				}
				return he, true
			}
			return he, he.origin == eeOriginLocal
		}
		c = c[min(len(c), unix.CmsgSpace(n-unix.CmsgLen(0))):]
	}
	return he, false
}
