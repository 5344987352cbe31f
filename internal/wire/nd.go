package wire

import (
	"encoding/binary"
	"net/netip"
	"strings"
)

// Neighbor discovery option types (RFC 4861 §4.6, RFC 8106 §5).
const (
	NDSourceLL uint8 = 1
	NDTargetLL uint8 = 2
	NDPrefix   uint8 = 3
	NDMTU      uint8 = 5
	NDRDNSS    uint8 = 25
	NDDNSSL    uint8 = 31
)

// NDHopLimit is the hop limit of every neighbor discovery packet: a receiver then knows that no router forwarded it.
const NDHopLimit = 255

// Well-known multicast destinations (RFC 4291 §2.7.1).
var (
	AllNodes   = netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 15: 1}) // ff02::1
	AllRouters = netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 15: 2}) // ff02::2
)

// SolicitedNode is the multicast group that a neighbor solicitation for IPv6 address a is sent to (RFC 4291 §2.7.1).
func SolicitedNode(a netip.Addr) netip.Addr {
	s := a.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 11: 1, 12: 0xff, 13: s[13], 14: s[14], 15: s[15]})
}

// MulticastMAC is the Ethernet group address of an IP multicast group (RFC 1112 §6.4, RFC 2464 §7).
func MulticastMAC(a netip.Addr) MAC {
	if a.Is4() {
		s := a.As4()
		return MAC{0x01, 0x00, 0x5e, s[1] & 0x7f, s[2], s[3]}
	}
	s := a.As16()
	return MAC{0x33, 0x33, s[12], s[13], s[14], s[15]}
}

// LinkLocal is the fe80::/64 address with the modified EUI-64 of a MAC (RFC 4291 appendix A).
func LinkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// ND is a neighbor solicitation or advertisement, or a router solicitation.
type ND struct {
	Type   uint8      // ICMPv6NeighborSol, ICMPv6NeighborAdv or ICMPv6RouterSol
	Target netip.Addr // not for a router solicitation
	// Link is the source link-layer address of a solicitation or the target's of an advertisement; zero when not given.
	Link MAC
	// The flags of an advertisement.
	Router, Solicited, Override bool
}

// ParseND reads and validates a neighbor solicitation, a neighbor advertisement or a router solicitation as RFC 4861 §6.1.1, §7.1.1 and §7.1.2
// demand, except for the checksum (VerifyL4). p is the packet and l4 its upper layer.
func ParseND(p *IP, l4 []byte) (nd ND, ok bool) {
	if p.Version != 6 || p.Proto != ProtoICMPv6 || p.TTL != NDHopLimit || p.IsFragment() || len(l4) < ICMPLen || l4[1] != 0 {
		return nd, false
	}
	nd.Type = l4[0]
	opts, link := l4[ICMPLen:], NDSourceLL
	switch nd.Type {
	case ICMPv6RouterSol:
	case ICMPv6NeighborSol, ICMPv6NeighborAdv:
		if len(l4) < 24 {
			return nd, false
		}
		nd.Target = netip.AddrFrom16([16]byte(l4[8:24]))
		if nd.Target.IsMulticast() || nd.Target.IsUnspecified() {
			return nd, false
		}
		opts = l4[24:]
		if nd.Type == ICMPv6NeighborAdv {
			link = NDTargetLL
			nd.Router, nd.Solicited, nd.Override = l4[4]&0x80 != 0, l4[4]&0x40 != 0, l4[4]&0x20 != 0
			if nd.Solicited && p.Dst.IsMulticast() {
				return nd, false
			}
		} else if p.Src.IsUnspecified() && p.Dst != SolicitedNode(nd.Target) {
			return nd, false
		}
	default:
		return nd, false
	}
	for len(opts) > 0 {
		var typ uint8
		var val []byte
		if typ, val, opts, ok = NextNDOption(opts); !ok {
			return nd, false
		}
		if typ == link {
			// RFC 4861: a solicitation from the unspecified address carries no link-layer address.
			if len(val) != 6 || p.Src.IsUnspecified() {
				return nd, false
			}
			nd.Link = MAC(val)
		}
	}
	return nd, true
}

// NextNDOption takes one option off the front of opts: its type, its bytes behind type and length (6 plus a multiple of 8 of them), and
// what follows. ok is false when the option is cut short or has length zero; then the whole message is void (RFC 4861 §4.6).
func NextNDOption(opts []byte) (typ uint8, val, rest []byte, ok bool) {
	if len(opts) < 2 {
		return 0, nil, nil, false
	}
	n := int(opts[1]) * 8
	if n == 0 || n > len(opts) {
		return 0, nil, nil, false
	}
	return opts[0], opts[2:n], opts[n:], true
}

// Lengths in bytes of the packets that PutND writes, IPv6 header included.
const (
	NDNeighborLen  = IPv6Len + 24 + 8 // with a link-layer address option
	NDRouterSolLen = IPv6Len + 8 + 8
)

// PutND writes a whole IPv6 packet with the message into b and returns its length, at most NDNeighborLen. A zero nd.Link writes no option, as a
// probe for a duplicate address must do.
func PutND(b []byte, src, dst netip.Addr, nd ND) int {
	n, link := 24, NDSourceLL
	switch nd.Type {
	case ICMPv6RouterSol:
		n = ICMPLen
	case ICMPv6NeighborAdv:
		link = NDTargetLL
	}
	m := b[IPv6Len:]
	clear(m[:n])
	m[0] = nd.Type
	if n == 24 {
		t := nd.Target.As16()
		copy(m[8:24], t[:])
	}
	if nd.Type == ICMPv6NeighborAdv {
		if nd.Router {
			m[4] |= 0x80
		}
		if nd.Solicited {
			m[4] |= 0x40
		}
		if nd.Override {
			m[4] |= 0x20
		}
	}
	if !nd.Link.IsZero() {
		m[n], m[n+1] = link, 1
		copy(m[n+2:n+8], nd.Link[:])
		n += 8
	}
	PutIPv6(b, src, dst, ProtoICMPv6, 0, NDHopLimit, n)
	PutL4Checksum(m[:n], src, dst, ProtoICMPv6)
	return IPv6Len + n
}

// RAPrefix is one prefix of a router advertisement. Lifetimes are in seconds; 0xffffffff is for ever.
type RAPrefix struct {
	Prefix           netip.Prefix
	OnLink, Auto     bool // hosts may make themselves an address (SLAAC) when Auto is set
	Valid, Preferred uint32
}

// RA is a router advertisement. Fields with a zero value say "unspecified" on the wire or leave their option out.
type RA struct {
	HopLimit       uint8
	Managed, Other bool   // addresses, or other things, are to be had by DHCPv6
	Preference     int8   // default router preference of RFC 4191: 1 high, 0 medium, -1 low
	Lifetime       uint16 // seconds as a default router; 0: not one
	Reachable      uint32 // milliseconds
	Retrans        uint32 // milliseconds
	Link           MAC    // source link-layer address
	MTU            uint32 // bytes
	Prefixes       []RAPrefix
	DNS            []netip.Addr // resolvers; at most 127
	Search         []string     // domains to search
	DNSLifetime    uint32       // seconds, for DNS and Search
}

// PutRA writes a whole IPv6 packet with the advertisement into b and returns its length. ok is false when b is too short for it, there are
// too many resolvers for an option, or a search domain is no domain name.
func PutRA(b []byte, src, dst netip.Addr, ra *RA) (n int, ok bool) {
	const fixed = 16
	need := IPv6Len + fixed + 8 + 8 + 32*len(ra.Prefixes) + 8 + 16*len(ra.DNS)
	if len(b) < need || len(ra.DNS) > 127 {
		return 0, false
	}
	m := b[IPv6Len:]
	clear(m[:fixed])
	m[0] = ICMPv6RouterAdv
	m[4] = ra.HopLimit
	if ra.Managed {
		m[5] |= 0x80
	}
	if ra.Other {
		m[5] |= 0x40
	}
	m[5] |= uint8(ra.Preference) & 3 << 3 // 01 high, 00 medium, 11 low
	binary.BigEndian.PutUint16(m[6:], ra.Lifetime)
	binary.BigEndian.PutUint32(m[8:], ra.Reachable)
	binary.BigEndian.PutUint32(m[12:], ra.Retrans)
	n = fixed
	if !ra.Link.IsZero() {
		m[n], m[n+1] = NDSourceLL, 1
		copy(m[n+2:], ra.Link[:])
		n += 8
	}
	if ra.MTU != 0 {
		m[n], m[n+1], m[n+2], m[n+3] = NDMTU, 1, 0, 0
		binary.BigEndian.PutUint32(m[n+4:], ra.MTU)
		n += 8
	}
	for i := range ra.Prefixes {
		p := &ra.Prefixes[i]
		o := m[n : n+32]
		clear(o)
		o[0], o[1], o[2] = NDPrefix, 4, uint8(p.Prefix.Bits())
		if p.OnLink {
			o[3] |= 0x80
		}
		if p.Auto {
			o[3] |= 0x40
		}
		binary.BigEndian.PutUint32(o[4:], p.Valid)
		binary.BigEndian.PutUint32(o[8:], p.Preferred)
		a := p.Prefix.Masked().Addr().As16()
		copy(o[16:], a[:])
		n += 32
	}
	if len(ra.DNS) > 0 {
		m[n], m[n+1], m[n+2], m[n+3] = NDRDNSS, uint8(1+2*len(ra.DNS)), 0, 0
		binary.BigEndian.PutUint32(m[n+4:], ra.DNSLifetime)
		n += 8
		for _, d := range ra.DNS {
			a := d.As16()
			n += copy(m[n:n+16], a[:])
		}
	}
	if len(ra.Search) > 0 {
		l, ok := putDNSSL(m[n:], ra.Search, ra.DNSLifetime)
		if !ok {
			return 0, false
		}
		n += l
	}
	PutIPv6(b, src, dst, ProtoICMPv6, 0, NDHopLimit, n)
	PutL4Checksum(m[:n], src, dst, ProtoICMPv6)
	return IPv6Len + n, true
}

// putDNSSL writes the search list option: domain names in DNS wire format without compression, padded with zeros (RFC 8106 §5.2).
func putDNSSL(o []byte, search []string, lifetime uint32) (n int, ok bool) {
	n = 8
	for _, d := range search {
		d = strings.TrimSuffix(d, ".")
		if len(d) == 0 || len(d) > 253 || len(o) < n+len(d)+2 {
			return 0, false
		}
		for label := range strings.SplitSeq(d, ".") {
			if len(label) == 0 || len(label) > 63 {
				return 0, false
			}
			o[n] = uint8(len(label))
			n += 1 + copy(o[n+1:], label)
		}
		o[n] = 0
		n++
	}
	end := (n + 7) &^ 7
	if end > len(o) || end/8 > 255 {
		return 0, false
	}
	clear(o[n:end])
	o[0], o[1], o[2], o[3] = NDDNSSL, uint8(end/8), 0, 0
	binary.BigEndian.PutUint32(o[4:], lifetime)
	return end, true
}
