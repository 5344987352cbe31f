package wire

import (
	"encoding/binary"
	"net/netip"
)

// Upper-layer protocol numbers (IANA).
const (
	ProtoICMP   uint8 = 1
	ProtoTCP    uint8 = 6
	ProtoUDP    uint8 = 17
	ProtoICMPv6 uint8 = 58
)

// Lengths in bytes of headers without options.
const (
	IPv4Len = 20
	IPv6Len = 40
	TCPLen  = 20
	UDPLen  = 8
	ICMPLen = 8
)

// IPv6 extension headers that ParseIP walks over.
const (
	extHopByHop uint8 = 0
	extRouting  uint8 = 43
	extFragment uint8 = 44
	extDestOpts uint8 = 60
)

// maxExtHeaders bounds the walk over IPv6 extension headers: more than this is treated as malformed.
const maxExtHeaders = 8

// IP describes one checked IPv4 or IPv6 packet. Addresses of IPv4 packets are 4-byte netip.Addr, never v4-mapped.
type IP struct {
	Src, Dst netip.Addr
	Version  uint8 // 4 or 6
	Proto    uint8 // upper-layer protocol, behind any IPv6 extension headers
	TOS      uint8 // DSCP and ECN
	TTL      uint8 // hop limit for IPv6
	HdrLen   int   // bytes before the upper layer, extension headers included
	Len      int   // bytes of the whole packet; what lies behind is Ethernet padding

	DontFragment bool // IPv4 DF; always true for IPv6
	MoreFrags    bool
	FragOff      int    // bytes; 0 for the first fragment and for a whole packet
	FragID       uint32 // identification; 0 for an IPv6 packet that is not a fragment
}

// IsFragment reports whether the packet is a piece of a larger one.
func (p *IP) IsFragment() bool { return p.MoreFrags || p.FragOff != 0 }

// ParseIP checks the packet at the start of b and describes it. For a superframe (gso true) an IPv4 total length or
// IPv6 payload length of zero means "all of b", as Linux writes it for packets above 64 KiB. The IPv4 header checksum is verified.
// Upper-layer headers are not looked at.
func ParseIP(b []byte, gso bool) (p IP, ok bool) {
	if len(b) < 1 {
		return p, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b, gso)
	case 6:
		return parseIPv6(b, gso)
	}
	return p, false
}

func parseIPv4(b []byte, gso bool) (p IP, ok bool) {
	if p, ok = readIPv4(b); !ok {
		return p, false
	}
	if p.Len == 0 && gso {
		p.Len = len(b)
	}
	if p.Len < p.HdrLen || p.Len > len(b) {
		return p, false
	}
	return p, Fold(Sum(b[:p.HdrLen], 0)) == 0xffff
}

// readIPv4 reads a header without holding its checksum or total length against it.
func readIPv4(b []byte) (p IP, ok bool) {
	if len(b) < IPv4Len || b[0]>>4 != 4 {
		return p, false
	}
	p.Version = 4
	p.HdrLen = int(b[0]&0xf) * 4
	if p.HdrLen < IPv4Len || p.HdrLen > len(b) {
		return p, false
	}
	p.TOS = b[1]
	p.Len = int(binary.BigEndian.Uint16(b[2:]))
	p.FragID = uint32(binary.BigEndian.Uint16(b[4:]))
	off := binary.BigEndian.Uint16(b[6:])
	p.DontFragment = off&0x4000 != 0
	p.MoreFrags = off&0x2000 != 0
	p.FragOff = int(off&0x1fff) * 8
	p.TTL = b[8]
	p.Proto = b[9]
	p.Src = netip.AddrFrom4([4]byte(b[12:16]))
	p.Dst = netip.AddrFrom4([4]byte(b[16:20]))
	return p, true
}

func parseIPv6(b []byte, gso bool) (p IP, ok bool) {
	if len(b) < IPv6Len {
		return p, false
	}
	n := IPv6Len + int(binary.BigEndian.Uint16(b[4:]))
	if n == IPv6Len && gso {
		n = len(b)
	}
	if n > len(b) {
		return p, false
	}
	p, ok = readIPv6(b, n)
	p.Len = n
	return p, ok
}

// readIPv6 reads the fixed header and walks the extension headers, which must lie within b[:n].
func readIPv6(b []byte, n int) (p IP, ok bool) {
	if len(b) < IPv6Len || n < IPv6Len || b[0]>>4 != 6 {
		return p, false
	}
	p.Version = 6
	p.DontFragment = true
	p.TOS = b[0]<<4 | b[1]>>4
	p.Len = IPv6Len + int(binary.BigEndian.Uint16(b[4:]))
	p.TTL = b[7]
	p.Src = netip.AddrFrom16([16]byte(b[8:24]))
	p.Dst = netip.AddrFrom16([16]byte(b[24:40]))
	next, off, seen := b[6], IPv6Len, false
	for range maxExtHeaders + 1 {
		switch next {
		case extHopByHop, extRouting, extDestOpts:
			if n < off+8 {
				return p, false
			}
			l := (int(b[off+1]) + 1) * 8
			if n < off+l {
				return p, false
			}
			next, off = b[off], off+l
		case extFragment:
			// A second fragment header would let the two disagree about what this packet is.
			if n < off+8 || seen {
				return p, false
			}
			seen = true
			f := binary.BigEndian.Uint16(b[off+2:])
			p.FragOff = int(f &^ 7)
			p.MoreFrags = f&1 != 0
			p.FragID = binary.BigEndian.Uint32(b[off+4:])
			next, off = b[off], off+8
			if p.FragOff != 0 {
				// What follows is the middle of something: the next-header field still names the upper layer's first header.
				p.Proto, p.HdrLen = next, off
				return p, true
			}
		default:
			p.Proto, p.HdrLen = next, off
			return p, true
		}
	}
	return p, false
}

// PutIPv4 writes a 20-byte IPv4 header with its checksum for a packet of total bytes, header included. DF is set when df is. src and
// dst must be IPv4 addresses.
func PutIPv4(b []byte, src, dst netip.Addr, proto, tos, ttl uint8, total int, id uint16, df bool) int {
	_ = b[IPv4Len-1]
	b[0], b[1] = 0x45, tos
	binary.BigEndian.PutUint16(b[2:], uint16(total))
	binary.BigEndian.PutUint16(b[4:], id)
	b[6], b[7] = 0, 0
	if df {
		b[6] = 0x40
	}
	b[8], b[9] = ttl, proto
	b[10], b[11] = 0, 0
	s, d := src.As4(), dst.As4()
	copy(b[12:16], s[:])
	copy(b[16:20], d[:])
	binary.BigEndian.PutUint16(b[10:], ^Fold(Sum(b[:IPv4Len], 0)))
	return IPv4Len
}

// PutIPv6 writes a 40-byte IPv6 header for a packet with payload bytes behind the header. src and dst must be IPv6 addresses.
func PutIPv6(b []byte, src, dst netip.Addr, proto, tos, hopLimit uint8, payload int) int {
	_ = b[IPv6Len-1]
	b[0], b[1], b[2], b[3] = 0x60|tos>>4, tos<<4, 0, 0
	binary.BigEndian.PutUint16(b[4:], uint16(payload))
	b[6], b[7] = proto, hopLimit
	s, d := src.As16(), dst.As16()
	copy(b[8:24], s[:])
	copy(b[24:40], d[:])
	return IPv6Len
}
