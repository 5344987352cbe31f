package wire

import (
	"encoding/binary"
	"net/netip"
)

// ICMP types (RFC 792).
const (
	ICMPEchoReply    uint8 = 0
	ICMPUnreachable  uint8 = 3
	ICMPEcho         uint8 = 8
	ICMPTimeExceeded uint8 = 11
	ICMPParamProblem uint8 = 12
)

// ICMPv6 types (RFC 4443, RFC 4861).
const (
	ICMPv6Unreachable  uint8 = 1
	ICMPv6TooBig       uint8 = 2
	ICMPv6TimeExceeded uint8 = 3
	ICMPv6ParamProblem uint8 = 4
	ICMPv6Echo         uint8 = 128
	ICMPv6EchoReply    uint8 = 129
	ICMPv6RouterSol    uint8 = 133
	ICMPv6RouterAdv    uint8 = 134
	ICMPv6NeighborSol  uint8 = 135
	ICMPv6NeighborAdv  uint8 = 136
	ICMPv6Redirect     uint8 = 137
)

// The longest error packet, IP header included: an ICMP error carries as much of the offending packet as fits.
const (
	MaxICMPError   = 576  // RFC 1812 §4.3.2.3
	MaxICMPv6Error = 1280 // RFC 4443 §2.4 (c)
)

// ICMP describes one checked ICMP or ICMPv6 header. What the last four bytes mean depends on Type.
type ICMP struct {
	Type, Code uint8
	Checksum   uint16
	ID, Seq    uint16 // echo messages
	MTU        int    // "too big" and "fragmentation needed": next-hop MTU in bytes, 0 if the router did not say
}

// ParseICMP reads the header at the start of b, the payload of an IP packet of version 4 or 6. ok is false when it is too short.
// The checksum is not verified (VerifyL4 does it).
func ParseICMP(b []byte, version uint8) (m ICMP, ok bool) {
	if len(b) < ICMPLen {
		return m, false
	}
	m.Type, m.Code = b[0], b[1]
	m.Checksum = binary.BigEndian.Uint16(b[2:])
	switch {
	case m.IsEcho(version):
		m.ID = binary.BigEndian.Uint16(b[4:])
		m.Seq = binary.BigEndian.Uint16(b[6:])
	case version == 4 && m.Type == ICMPUnreachable && m.Code == 4:
		m.MTU = int(binary.BigEndian.Uint16(b[6:]))
	case version == 6 && m.Type == ICMPv6TooBig:
		m.MTU = int(min(binary.BigEndian.Uint32(b[4:]), 1<<31-1))
	}
	return m, true
}

// IsEcho reports whether the message is an echo request or reply of IP version 4 or 6.
func (m *ICMP) IsEcho(version uint8) bool {
	if version == 4 {
		return m.Type == ICMPEcho || m.Type == ICMPEchoReply
	}
	return m.Type == ICMPv6Echo || m.Type == ICMPv6EchoReply
}

// IsError reports whether the message is an error, which quotes a packet and must never be answered with another error.
func (m *ICMP) IsError(version uint8) bool {
	if version == 4 {
		switch m.Type {
		case ICMPUnreachable, ICMPTimeExceeded, ICMPParamProblem, 4, 5: // 4 source quench, 5 redirect
			return true
		}
		return false
	}
	// Redirect quotes a packet too and RFC 4443 §2.4 (e.2) forbids to answer it.
	return m.Type < 128 || m.Type == ICMPv6Redirect
}

// PutEcho writes a whole IP packet with an ICMP or ICMPv6 echo message into b and returns its length. typ is one of the four echo
// types and agrees with the addresses' family. b must hold the IP header, ICMPLen and the payload.
func PutEcho(b []byte, src, dst netip.Addr, typ uint8, id, seq uint16, ttl uint8, payload []byte) int {
	n := ICMPLen + len(payload)
	off, proto := IPv6Len, ProtoICMPv6
	if src.Is4() {
		off, proto = PutIPv4(b, src, dst, ProtoICMP, 0, ttl, IPv4Len+n, 0, false), ProtoICMP
	} else {
		PutIPv6(b, src, dst, ProtoICMPv6, 0, ttl, n)
	}
	m := b[off : off+n]
	m[0], m[1] = typ, 0
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	copy(m[ICMPLen:], payload)
	PutL4Checksum(m, src, dst, proto)
	return off + n
}

// ICMPError names an error in the terms of either IP version.
type ICMPError uint8

// The errors a gateway sends. The comment is the type and code for IPv4, then for IPv6.
const (
	ErrNet          ICMPError = iota // no route: 3/0, 1/0
	ErrHost                          // the last hop does not answer: 3/1, 1/3
	ErrPort                          // nobody listens: 3/3, 1/4
	ErrProto                         // protocol not served: 3/2, 4/1 (IPv6 says "unrecognized next header")
	ErrProhibited                    // policy: 3/13, 1/1
	ErrTooBig                        // needs fragmentation, carries the MTU: 3/4, 2/0
	ErrTimeExceeded                  // TTL or hop limit ran out: 11/0, 3/0
	ErrReassembly                    // fragments never became whole: 11/1, 3/1
)

// TypeCode gives the numbers for IP version 4 or 6.
func (e ICMPError) TypeCode(version uint8) (typ, code uint8) {
	if version == 4 {
		switch e {
		case ErrHost:
			return ICMPUnreachable, 1
		case ErrPort:
			return ICMPUnreachable, 3
		case ErrProto:
			return ICMPUnreachable, 2
		case ErrProhibited:
			return ICMPUnreachable, 13
		case ErrTooBig:
			return ICMPUnreachable, 4
		case ErrTimeExceeded:
			return ICMPTimeExceeded, 0
		case ErrReassembly:
			return ICMPTimeExceeded, 1
		}
		return ICMPUnreachable, 0
	}
	switch e {
	case ErrHost:
		return ICMPv6Unreachable, 3
	case ErrPort:
		return ICMPv6Unreachable, 4
	case ErrProto:
		return ICMPv6ParamProblem, 1
	case ErrProhibited:
		return ICMPv6Unreachable, 1
	case ErrTooBig:
		return ICMPv6TooBig, 0
	case ErrTimeExceeded:
		return ICMPv6TimeExceeded, 0
	case ErrReassembly:
		return ICMPv6TimeExceeded, 1
	}
	return ICMPv6Unreachable, 0
}

// MayAnswer reports whether an ICMP error may be sent about packet p, whose upper-layer packet is l4: not about another error, a
// fragment that is not the first, or a packet from or to an address that is not one host's (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)).
// It cannot know subnet-directed broadcast addresses, nor whether the frame went to a group MAC: the caller does.
func MayAnswer(p *IP, l4 []byte) bool {
	if p.FragOff != 0 || p.Src.IsUnspecified() || p.Src.IsMulticast() || p.Dst.IsMulticast() {
		return false
	}
	if p.Version == 4 {
		if s := p.Src.As4(); s == [4]byte{255, 255, 255, 255} || s[0] == 127 || s[0] == 0 {
			return false
		}
		if p.Dst.As4() == [4]byte{255, 255, 255, 255} {
			return false
		}
	}
	if (p.Version == 4 && p.Proto == ProtoICMP) || (p.Version == 6 && p.Proto == ProtoICMPv6) {
		m, ok := ParseICMP(l4, p.Version)
		return ok && !m.IsError(p.Version)
	}
	return true
}

// PutICMPError writes a whole IP packet into b that tells the sender of the quoted packet about e, and returns its length. src is who tells it,
// of the quoted packet's family; quote is the offending IP packet from its first byte, cut to what an error may carry
// (MaxICMPError, MaxICMPv6Error) and to what b holds. mtu is for ErrTooBig. ok is false when quote is not an IP packet, src
// is of the other family, or b is too short for the headers. Ask MayAnswer first.
func PutICMPError(b []byte, src netip.Addr, e ICMPError, mtu int, quote []byte) (n int, ok bool) {
	if len(quote) == 0 {
		return 0, false
	}
	var m []byte
	var dst netip.Addr
	off, proto, limit, version := IPv6Len, ProtoICMPv6, MaxICMPv6Error, quote[0]>>4
	switch {
	case version == 4 && len(quote) >= IPv4Len && src.Is4():
		off, proto, limit = IPv4Len, ProtoICMP, MaxICMPError
		dst = netip.AddrFrom4([4]byte(quote[12:16]))
	case version == 6 && len(quote) >= IPv6Len && src.Is6():
		dst = netip.AddrFrom16([16]byte(quote[8:24]))
	default:
		return 0, false
	}
	limit = min(limit, len(b))
	if limit < off+ICMPLen {
		return 0, false
	}
	quote = quote[:min(len(quote), limit-off-ICMPLen)]
	n = off + ICMPLen + len(quote)
	if proto == ProtoICMP {
		// Precedence 6, internetwork control: RFC 1812 §4.3.2.5.
		PutIPv4(b, src, dst, proto, 0xc0, 64, n, 0, true)
	} else {
		PutIPv6(b, src, dst, proto, 0, 64, n-off)
	}
	m = b[off:n]
	clear(m[:ICMPLen])
	m[0], m[1] = e.TypeCode(version)
	if e == ErrTooBig {
		if version == 4 {
			binary.BigEndian.PutUint16(m[6:], uint16(min(max(mtu, 0), 0xffff)))
		} else {
			binary.BigEndian.PutUint32(m[4:], uint32(max(mtu, 0)))
		}
	} else if version == 6 && e == ErrProto {
		binary.BigEndian.PutUint32(m[4:], 6) // pointer: the next-header field of the quoted packet
	}
	copy(m[ICMPLen:], quote)
	PutL4Checksum(m, src, dst, proto)
	return n, true
}

// ParseQuote reads the packet that an ICMP error quotes: quote is what follows the error's ICMPLen bytes. The quoted packet is usually cut short:
// l4 is what there is of its upper layer, at least 8 bytes (ports, or an echo's identifier). Neither checksum nor total length is held
// against it, since routers on the way may have changed both; p.Len is what the quoted header claims.
func ParseQuote(quote []byte) (p IP, l4 []byte, ok bool) {
	if len(quote) < 1 {
		return p, nil, false
	}
	switch quote[0] >> 4 {
	case 4:
		p, ok = readIPv4(quote)
	case 6:
		// Extension headers are walked as far as there are bytes.
		p, ok = readIPv6(quote, len(quote))
	}
	if !ok || p.FragOff != 0 || len(quote) < p.HdrLen+8 {
		return p, nil, false
	}
	return p, quote[p.HdrLen:min(len(quote), max(p.Len, p.HdrLen+8))], true
}
