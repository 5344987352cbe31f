package vswitch

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// binding is what a port may claim to be: immutable, replaced as a whole.
type binding struct {
	mac   uint64 // 0: any
	any   bool   // any address
	anyLL bool   // any IPv6 link-local address
	v4    []netip.Addr
	v6    []netip.Addr
}

// maxTags is how many VLAN tags are stepped over to find what a bound port says. Linux steps over priority tags one by
// one, so stopping at the first would let anything through behind a second.
const maxTags = 4

// ND messages (RFC 4861 §4) and their options.
const (
	ndRouterSolicit   = 133
	ndRouterAdvert    = 134
	ndNeighborSolicit = 135
	ndNeighborAdvert  = 136
	ndRedirect        = 137
	ndOptSourceLLA    = 1
	ndOptTargetLLA    = 2
)

// newBinding is nil for a port that is bound to nothing.
func newBinding(mac wire.MAC, addrs []netip.Addr) *binding {
	if mac.IsZero() && len(addrs) == 0 {
		return nil
	}
	b := &binding{mac: macBits(mac[:]), any: len(addrs) == 0}
	linkLocal := false
	for _, a := range addrs {
		a = a.Unmap().WithZone("")
		if a.Is4() {
			b.v4 = append(b.v4, a)
			continue
		}
		linkLocal = linkLocal || a.IsLinkLocalUnicast()
		b.v6 = append(b.v6, a)
	}
	if !linkLocal && !mac.IsZero() {
		b.v6 = append(b.v6, eui64(mac))
	}
	b.anyLL = !linkLocal && mac.IsZero()
	return b
}

// eui64 is the link-local address that a host makes from its MAC (RFC 4291 appendix A).
func eui64(m wire.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

func (b *binding) allows(a netip.Addr) bool {
	switch {
	case b.any:
		return true
	case a.Is4():
		return slices.Contains(b.v4, a)
	case b.anyLL && a.IsLinkLocalUnicast():
		return true
	}
	return slices.Contains(b.v6, a)
}

// check reports whether the frame, of at least wire.EthernetLen bytes, claims an address that is not the port's.
func (b *binding) check(data []byte, gso bool) (frame.Drop, bool) {
	src := macBits(data[6:])
	switch {
	case src == 0 || data[6]&1 != 0:
		return frame.DropGroupSource, true
	case b.mac != 0 && src != b.mac:
		return frame.DropSpoofMAC, true
	}
	etherType, off := binary.BigEndian.Uint16(data[12:]), wire.EthernetLen
	for tags := 0; etherType == wire.EtherTypeVLAN || etherType == wire.EtherTypeQinQ; tags++ {
		if tags == maxTags || len(data) < off+wire.VLANTagLen {
			return frame.DropMalformed, true
		}
		etherType = binary.BigEndian.Uint16(data[off+2:])
		off += wire.VLANTagLen
	}
	switch etherType {
	case wire.EtherTypeARP:
		return b.checkARP(data[off:])
	case wire.EtherTypeIPv4:
		return b.checkIPv4(data[off:])
	case wire.EtherTypeIPv6:
		return b.checkIPv6(data[off:], gso)
	}
	return 0, false
}

func (b *binding) checkARP(p []byte) (frame.Drop, bool) {
	if len(p) < 28 {
		return frame.DropMalformed, true
	}
	// Ethernet and IPv4 only: other lengths would put the sender elsewhere.
	if p[4] != 6 || p[5] != 4 {
		return frame.DropMalformed, true
	}
	if b.mac != 0 && macBits(p[8:]) != b.mac {
		return frame.DropSpoofMAC, true
	}
	sender := [4]byte(p[14:18])
	if sender != [4]byte{} && !b.allows(netip.AddrFrom4(sender)) {
		return frame.DropSpoofIP, true
	}
	return 0, false
}

func (b *binding) checkIPv4(p []byte) (frame.Drop, bool) {
	if len(p) < wire.IPv4Len || p[0]>>4 != 4 {
		return frame.DropMalformed, true
	}
	src := netip.AddrFrom4([4]byte(p[12:16]))
	if src.IsUnspecified() {
		// A DHCP client, or an IGMP report, before there is an address.
		n := int(p[0]&0xf) * 4
		dhcp := p[9] == wire.ProtoUDP && len(p) >= n+4 && n >= wire.IPv4Len && binary.BigEndian.Uint16(p[n+2:]) == 67
		if dhcp || p[9] == 2 || b.any {
			return 0, false
		}
		return frame.DropSpoofIP, true
	}
	if !b.allows(src) || p[9] == wire.ProtoUDP && binary.BigEndian.Uint16(p[6:])&0x1fff == 0 && b.offers(p[min(int(p[0]&0xf)*4, len(p)):], 67, 68) {
		return frame.DropSpoofIP, true
	}
	return 0, false
}

// offers reports whether the UDP datagram is one of a DHCP server, which like a router's advertisement would have its receivers send everything
// to whoever sent it.
func (b *binding) offers(udp []byte, server, client uint16) bool {
	return !b.any && len(udp) >= 4 && binary.BigEndian.Uint16(udp) == server && binary.BigEndian.Uint16(udp[2:]) == client
}

func (b *binding) checkIPv6(p []byte, gso bool) (frame.Drop, bool) {
	if len(p) < wire.IPv6Len || p[0]>>4 != 6 {
		return frame.DropMalformed, true
	}
	src := netip.AddrFrom16([16]byte(p[8:24]))
	if next := p[6]; next == wire.ProtoTCP || next == wire.ProtoUDP {
		if !b.allows(src) || next == wire.ProtoUDP && b.offers(p[wire.IPv6Len:], 547, 546) {
			return frame.DropSpoofIP, true
		}
		return 0, false
	}
	ip, ok := wire.ParseIP(p, gso)
	if !ok {
		return frame.DropMalformed, true
	}
	if !b.allows(src) && !(src.IsUnspecified() && ip.Proto == wire.ProtoICMPv6) {
		return frame.DropSpoofIP, true
	}
	if ip.Proto == wire.ProtoUDP && ip.FragOff == 0 && b.offers(p[ip.HdrLen:ip.Len], 547, 546) {
		return frame.DropSpoofIP, true
	}
	// RFC 6980: hosts ignore ND in fragments; the middle of something has no type to look at.
	if ip.Proto != wire.ProtoICMPv6 || ip.FragOff != 0 {
		return 0, false
	}
	return b.checkND(p[ip.HdrLen:ip.Len], src)
}

func (b *binding) checkND(m []byte, src netip.Addr) (frame.Drop, bool) {
	if len(m) < wire.ICMPLen {
		return frame.DropMalformed, true
	}
	opts, opt := 0, byte(ndOptSourceLLA)
	switch m[0] {
	case ndRouterAdvert, ndRedirect:
		if b.any {
			return 0, false
		}
		return frame.DropSpoofIP, true
	case ndRouterSolicit:
		opts = 8
	case ndNeighborSolicit, ndNeighborAdvert:
		if opts = 24; len(m) < opts {
			return frame.DropMalformed, true
		}
		// Whoever asks about an address without having one is about to take it.
		claims := m[0] == ndNeighborAdvert || src.IsUnspecified()
		if claims && !b.allows(netip.AddrFrom16([16]byte(m[8:24]))) {
			return frame.DropSpoofIP, true
		}
		if m[0] == ndNeighborAdvert {
			opt = ndOptTargetLLA
		}
	default:
		return 0, false
	}
	for o := m[opts:]; len(o) >= 8; {
		n := int(o[1]) * 8
		if n == 0 || n > len(o) {
			return frame.DropMalformed, true
		}
		if o[0] == opt && b.mac != 0 && macBits(o[2:]) != b.mac {
			return frame.DropSpoofMAC, true
		}
		o = o[n:]
	}
	return 0, false
}
