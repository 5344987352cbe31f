package stack

import (
	"encoding/binary"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// ICMP and ICMPv6 types (RFC 792, RFC 4443).
const (
	icmpEchoReply    = 0
	icmpUnreachable  = 3
	icmpEcho         = 8
	icmpTimeExceeded = 11

	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6Echo         = 128
	icmp6EchoReply    = 129
)

// handleICMP takes an ICMP or ICMPv6 packet. It reports whether p is for Handlers.ICMP.
func (g *Gateway) handleICMP(p *Packet, own bool) bool {
	m := p.L4()
	if len(m) < wire.ICMPLen {
		g.drops.Add(frame.DropMalformed, 1)
		return false
	}
	echo, v6 := byte(icmpEcho), p.IP.Version == 6
	var acc uint64
	if v6 {
		echo = icmp6Echo
		acc = wire.PseudoSum(p.IP.Src, p.IP.Dst, wire.ProtoICMPv6, len(m))
	}
	if p.Frame.Hdr.Flags&(wire.VirtioNeedsCsum|wire.VirtioDataValid) == 0 && wire.Fold(wire.Sum(m, acc)) != 0xffff {
		g.drops.Add(frame.DropChecksum, 1)
		return false
	}
	if v6 && m[0] >= ndRouterSolicit && m[0] <= ndNeighborAdvert {
		g.handleND(p.Frame.Data, &p.IP, m)
		return false
	}
	group := g.isGroup(p.IP.Dst)
	switch {
	case m[0] != echo || m[1] != 0 || group || !g.validSource(p.IP.Src):
		g.drops.Add(frame.DropNotForGateway, 1)
		return false
	case own:
		g.echoReply(p, m)
		return false
	}
	return true
}

// echoReply answers an echo request to one of the gateway's own addresses.
func (g *Gateway) echoReply(p *Packet, m []byte) {
	hdr, typ, proto := wire.IPv4Len, byte(icmpEchoReply), wire.ProtoICMP
	if p.IP.Version == 6 {
		hdr, typ, proto = wire.IPv6Len, icmp6EchoReply, wire.ProtoICMPv6
	}
	if hdr+len(m) > maxMTU {
		g.drops.Add(frame.DropTooBig, 1)
		return
	}
	r := make([]byte, wire.EthernetLen+hdr+len(m))
	q := r[wire.EthernetLen+hdr:]
	copy(q, m)
	q[0] = typ
	g.finishICMP(r, hdr, proto, p.IP.Dst, p.IP.Src, p.IP.TOS)
	g.sendOne(r)
}

// finishICMP writes the IP header and checksum around the message at r[14+hdr:].
func (g *Gateway) finishICMP(r []byte, hdr int, proto uint8, src, dst netip.Addr, tos uint8) {
	q := r[wire.EthernetLen+hdr:]
	q[2], q[3] = 0, 0
	var acc uint64
	if proto == wire.ProtoICMPv6 {
		wire.PutIPv6(r[wire.EthernetLen:], src, dst, proto, tos, 64, len(q))
		acc = wire.PseudoSum(src, dst, proto, len(q))
	} else {
		wire.PutIPv4(r[wire.EthernetLen:], src, dst, proto, tos, 64, hdr+len(q), uint16(g.ipID.Add(1)), false)
	}
	binary.BigEndian.PutUint16(q[2:], ^wire.Fold(wire.Sum(q, acc)))
}

// SendUnreachable answers packet p with the ICMP error for why; see Network.
func (g *Gateway) SendUnreachable(p *Packet, why Unreachable, mtu int) {
	data := p.Frame.Data[p.L3 : p.L3+p.IP.Len]
	g.sendError(&p.IP, data, why, mtu)
}

// errorCode is the type and code of an ICMP error.
func errorCode(why Unreachable, v6 bool) (typ, code byte) {
	if v6 {
		switch why {
		case UnreachNet:
			return icmp6Unreachable, 0
		case UnreachPort:
			return icmp6Unreachable, 4
		case UnreachProhibited:
			return icmp6Unreachable, 1
		case UnreachTooBig:
			return icmp6TooBig, 0
		}
		return icmp6Unreachable, 3
	}
	switch why {
	case UnreachNet:
		return icmpUnreachable, 0
	case UnreachPort:
		return icmpUnreachable, 3
	case UnreachProhibited:
		return icmpUnreachable, 13
	case UnreachTooBig:
		return icmpUnreachable, 4
	}
	return icmpUnreachable, 1
}

// sendError tells the source of the IP packet in data why it was not carried.
func (g *Gateway) sendError(ip *wire.IP, data []byte, why Unreachable, mtu int) {
	v6 := ip.Version == 6
	typ, code := errorCode(why, v6)
	var rest uint32
	if why == UnreachTooBig {
		rest = uint32(mtu)
	}
	src := g.own4
	if v6 {
		src = g.own6
	}
	if why == UnreachPort || !src.IsValid() {
		src = ip.Dst // it is that host's port which is closed
	}
	g.sendICMPError(ip, data, src, typ, code, rest)
}

// sendICMPError sends an ICMP error that quotes data, where RFC 1122 §3.2.2 and RFC 4443 §2.4 allow one.
func (g *Gateway) sendICMPError(ip *wire.IP, data []byte, src netip.Addr, typ, code byte, rest uint32) {
	if r := g.icmpError(ip, data, src, typ, code, rest); r != nil {
		g.sendOne(r)
	}
}

// icmpError is such an error with room for the Ethernet header in front, or nil where none is allowed.
func (g *Gateway) icmpError(ip *wire.IP, data []byte, src netip.Addr, typ, code byte, rest uint32) []byte {
	if g.isGroup(ip.Dst) || !g.validSource(ip.Src) || ip.FragOff != 0 || !src.IsValid() {
		return nil
	}
	// Never an error about an error.
	if t := data[min(ip.HdrLen, len(data)-1)]; ip.Proto == wire.ProtoICMP && ip.Version == 4 && t != icmpEcho && t != icmpEchoReply ||
		ip.Proto == wire.ProtoICMPv6 && t < 128 {
		return nil
	}
	if !g.errs.take(ip.Src) {
		g.drops.Add(frame.DropServiceLimit, 1)
		return nil
	}
	hdr, proto, limit := wire.IPv4Len, wire.ProtoICMP, minMTU4
	if ip.Version == 6 {
		hdr, proto, limit = wire.IPv6Len, wire.ProtoICMPv6, minMTU6
	}
	quote := min(len(data), limit-hdr-wire.ICMPLen)
	r := make([]byte, wire.EthernetLen+hdr+wire.ICMPLen+quote)
	q := r[wire.EthernetLen+hdr:]
	q[0], q[1] = typ, code
	binary.BigEndian.PutUint32(q[4:], rest)
	copy(q[wire.ICMPLen:], data[:quote])
	g.finishICMP(r, hdr, proto, src, ip.Src, 0)
	return r
}
