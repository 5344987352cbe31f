package stack

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// ICMPv6 types of neighbour discovery (RFC 4861).
const (
	ndRouterSolicit   = 133
	ndRouterAdvert    = 134
	ndNeighborSolicit = 135
	ndNeighborAdvert  = 136
)

// Options of neighbour discovery (RFC 4861 §4.6, RFC 8106 §5).
const (
	ndSourceLink = 1
	ndTargetLink = 2
	ndPrefix     = 3
	ndMTU        = 5
	ndRDNSS      = 25
	ndDNSSL      = 31
)

// handleND takes an ICMPv6 message of types 133 to 136 whose checksum was verified. m is the message, ip its packet.
func (g *Gateway) handleND(d []byte, ip *wire.IP, m []byte) {
	// RFC 4861 §6.1, §7.1: a hop limit below 255 came through a router, which is forgery.
	if ip.TTL != 255 || m[1] != 0 {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	switch m[0] {
	case ndNeighborSolicit:
		g.handleNS(d, ip, m)
	case ndNeighborAdvert:
		g.handleNA(ip, m)
	case ndRouterSolicit:
		g.handleRS(d, ip, m)
	default: // an advertisement of somebody who is not the router here
		g.drops.Add(frame.DropNotForGateway, 1)
	}
}

// linkOption finds a link-layer address option behind the first skip bytes of m. ok is false when the options are malformed.
func linkOption(m []byte, skip int, typ byte) (mac wire.MAC, found, ok bool) {
	if len(m) < skip {
		return mac, false, false
	}
	for o := m[skip:]; len(o) > 0; {
		if len(o) < 2 || o[1] == 0 || int(o[1])*8 > len(o) {
			return mac, false, false
		}
		n := int(o[1]) * 8
		if o[0] == typ && n == 8 {
			mac, found = wire.MAC(o[2:8]), true
		}
		o = o[n:]
	}
	return mac, found, true
}

func (g *Gateway) handleNS(d []byte, ip *wire.IP, m []byte) {
	mac, hasMAC, ok := linkOption(m, 24, ndSourceLink)
	if !ok {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	target := netip.AddrFrom16([16]byte(m[8:24]))
	dad := ip.Src.IsUnspecified()
	if target.IsMulticast() || dad && hasMAC {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	mine := g.answersFor(target)
	if hasMAC {
		g.learn(ip.Src, mac, mine)
	}
	if !mine {
		return // somebody else is asked, or a container probes its own address before it uses it
	}
	// To a probe (RFC 4862 §5.4.4) everybody hears that the address is taken.
	dst, dstMAC := ip.Src, wire.Src(d)
	flags := byte(0xe0) // router, solicited, override
	if dad {
		dst, dstMAC, flags = allNodes, wire.MAC{0x33, 0x33, 0, 0, 0, 1}, 0xa0
	}
	if !g.isOwn(target) {
		flags &^= 0x80 // a host alias is no router
	}
	r := make([]byte, wire.EthernetLen+wire.IPv6Len+32)
	n := r[wire.EthernetLen+wire.IPv6Len:]
	n[0], n[4] = ndNeighborAdvert, flags
	a := target.As16()
	copy(n[8:], a[:])
	n[24], n[25] = ndTargetLink, 1
	copy(n[26:], g.mac[:])
	g.sendICMPv6(r, target, dst, dstMAC)
}

func (g *Gateway) handleNA(ip *wire.IP, m []byte) {
	mac, hasMAC, ok := linkOption(m, 24, ndTargetLink)
	if !ok {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	// The target may be another of the sender's addresses; whether it is the sender's own is for the switch to enforce.
	if target := netip.AddrFrom16([16]byte(m[8:24])); hasMAC {
		g.learn(target, mac, false)
	}
}

func (g *Gateway) handleRS(d []byte, ip *wire.IP, m []byte) {
	mac, hasMAC, ok := linkOption(m, 8, ndSourceLink)
	if !ok {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if hasMAC && !ip.Src.IsUnspecified() {
		g.learn(ip.Src, mac, true)
	}
	switch {
	case g.ra.Load() == nil:
		g.drops.Add(frame.DropNotForGateway, 1)
	case !g.ras.take():
		g.drops.Add(frame.DropServiceLimit, 1)
	case ip.Src.IsUnspecified():
		g.sendRA(allNodes, wire.MAC{0x33, 0x33, 0, 0, 0, 1})
	default:
		g.sendRA(ip.Src, wire.Src(d))
	}
}

// sendNS asks who has ip, from the gateway's address of the same scope.
func (g *Gateway) sendNS(ip netip.Addr) {
	src := g.own6
	if ip.IsLinkLocalUnicast() {
		src = g.link6
	}
	a := ip.As16()
	dst := netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]})
	r := make([]byte, wire.EthernetLen+wire.IPv6Len+32)
	n := r[wire.EthernetLen+wire.IPv6Len:]
	n[0] = ndNeighborSolicit
	copy(n[8:], a[:])
	n[24], n[25] = ndSourceLink, 1
	copy(n[26:], g.mac[:])
	g.sendICMPv6(r, src, dst, wire.MAC{0x33, 0x33, 0xff, a[13], a[14], a[15]})
}

// sendRA sends the prepared advertisement to one address.
func (g *Gateway) sendRA(dst netip.Addr, mac wire.MAC) {
	pkt := *g.ra.Load()
	r := make([]byte, wire.EthernetLen+wire.IPv6Len+len(pkt))
	copy(r[wire.EthernetLen+wire.IPv6Len:], pkt)
	g.sendICMPv6(r, g.link6, dst, mac)
}

// sendICMPv6 completes and sends the message at r[54:], with hop limit 255.
func (g *Gateway) sendICMPv6(r []byte, src, dst netip.Addr, mac wire.MAC) {
	m := r[wire.EthernetLen+wire.IPv6Len:]
	wire.PutIPv6(r[wire.EthernetLen:], src, dst, wire.ProtoICMPv6, 0, 255, len(m))
	m[2], m[3] = 0, 0
	binary.BigEndian.PutUint16(m[2:], ^wire.Fold(wire.Sum(m, wire.PseudoSum(src, dst, wire.ProtoICMPv6, len(m)))))
	g.sendTo(r, mac, wire.EtherTypeIPv6)
}

// buildRA makes the router advertisement (RFC 4861 §4.2, RFC 8106 §5), an ICMPv6 message with no checksum yet.
func (g *Gateway) buildRA(mtu int) ([]byte, error) {
	c := &g.cfg.RA
	life := uint32(c.Lifetime.Seconds())
	b := make([]byte, 16, 256)
	b[0], b[4] = ndRouterAdvert, 64 // current hop limit
	if !c.NoRouter {
		binary.BigEndian.PutUint16(b[6:], uint16(min(life, 9000))) // router lifetime; RFC 4861 §6.2.1 allows no more
	}
	b = append(b, ndSourceLink, 1)
	b = append(b, g.mac[:]...)
	b = append(b, ndMTU, 1, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(mtu))
	if !c.NoPrefix {
		p := c.Prefix
		if !p.IsValid() {
			p = g.net6
		}
		if !p.Addr().Is6() || p.Addr().Is4In6() || p.Addr().IsLinkLocalUnicast() {
			return nil, fmt.Errorf("router advertisement prefix %s: want an IPv6 prefix that is not link-local", p)
		}
		flags := byte(0x80) // on-link
		if p.Bits() == 64 {
			flags |= 0x40 // autonomous: hosts can only autoconfigure in a /64
		}
		b = append(b, ndPrefix, 4, byte(p.Bits()), flags)
		b = binary.BigEndian.AppendUint32(b, life)
		b = binary.BigEndian.AppendUint32(b, life)
		b = append(b, 0, 0, 0, 0)
		a := p.Masked().Addr().As16()
		b = append(b, a[:]...)
	}
	if len(c.RDNSS) > 0 {
		b = append(b, ndRDNSS, byte(1+2*len(c.RDNSS)), 0, 0)
		b = binary.BigEndian.AppendUint32(b, life)
		for _, s := range c.RDNSS {
			if !s.Is6() || s.Is4In6() {
				return nil, fmt.Errorf("router advertisement resolver %s: want an IPv6 address", s)
			}
			a := s.As16()
			b = append(b, a[:]...)
		}
	}
	if len(c.DNSSL) > 0 {
		at := len(b)
		b = append(b, ndDNSSL, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, life)
		for _, s := range c.DNSSL {
			for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
				if len(label) == 0 || len(label) > 63 {
					return nil, fmt.Errorf("router advertisement search domain %q: labels have 1 to 63 bytes", s)
				}
				b = append(b, byte(len(label)))
				b = append(b, label...)
			}
			b = append(b, 0)
		}
		for (len(b)-at)%8 != 0 {
			b = append(b, 0)
		}
		if (len(b)-at)/8 > 255 {
			return nil, fmt.Errorf("router advertisement: the search domains take %d bytes, more than an option holds", len(b)-at)
		}
		b[at+1] = byte((len(b) - at) / 8)
	}
	if wire.IPv6Len+len(b) > mtu {
		return nil, fmt.Errorf("router advertisement of %d bytes does not fit the MTU of %d; give fewer resolvers or search domains", wire.IPv6Len+len(b), mtu)
	}
	return b, nil
}
