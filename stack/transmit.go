package stack

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// batch is the scratch of one Transmit call.
type batch struct {
	udp  []Packet
	icmp []Packet
	// local gathers datagrams for one of Handlers.LocalUDP.
	local     []Packet
	localPort uint16
	flow      *conn  // whose segments are queued but not processed yet
	ack       Packet // the last of them, not queued yet, where acked
	acked     bool
}

// Transmit takes frames off the switch, sorts them by protocol and runs each to completion on the caller's goroutine. fs is lent. Frames that the
// gateway does not deliver are counted in Drops, so all of fs counts as accepted, unless the gateway is closed.
func (g *Gateway) Transmit(fs []frame.Frame) int {
	if g.closed.Load() {
		g.drops.Add(frame.DropPortDown, len(fs))
		return 0
	}
	b := g.batches.Get().(*batch)
	for i := range fs {
		g.sort(b, &fs[i])
	}
	g.flush(b)
	g.batches.Put(b)
	return len(fs)
}

// flush hands on everything gathered.
func (g *Gateway) flush(b *batch) {
	g.flushFlow(b)
	g.flushUDP(b)
	g.flushLocal(b)
	if len(b.icmp) > 0 {
		g.cfg.Handlers.ICMP.HandlePackets(b.icmp)
		clear(b.icmp)
		b.icmp = b.icmp[:0]
	}
}

func (g *Gateway) flushUDP(b *batch) {
	if len(b.udp) > 0 {
		g.cfg.Handlers.UDP.HandlePackets(b.udp)
		clear(b.udp)
		b.udp = b.udp[:0]
	}
}

func (g *Gateway) flushLocal(b *batch) {
	if len(b.local) > 0 {
		g.cfg.Handlers.LocalUDP[b.localPort].HandlePackets(b.local)
		clear(b.local)
		b.local = b.local[:0]
	}
}

// sort finds out what f is and who gets it.
func (g *Gateway) sort(b *batch, f *frame.Frame) {
	d := f.Data
	if len(d) < wire.EthernetLen {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if dst := wire.Dst(d); dst != g.mac && !dst.IsGroup() { // flooded, and meant for a MAC the switch does not know
		g.drops.Add(frame.DropNotForGateway, 1)
		return
	}
	switch binary.BigEndian.Uint16(d[12:]) {
	case wire.EtherTypeIPv4, wire.EtherTypeIPv6:
		g.sortIP(b, f)
	case wire.EtherTypeARP:
		g.handleARP(d)
	default:
		g.drops.Add(frame.DropNotForGateway, 1)
	}
}

func (g *Gateway) sortIP(b *batch, f *frame.Frame) {
	p := Packet{Frame: *f, L3: wire.EthernetLen}
	var ok bool
	p.IP, ok = wire.ParseIP(f.Data[wire.EthernetLen:], f.Superframe())
	if !ok || (p.IP.Version == 6) != (f.Data[12] == 0x86) {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	if p.IP.IsFragment() {
		if f.Superframe() || !g.mayEnter(&p) {
			g.drops.Add(frame.DropBadHdr, 1)
			return
		}
		whole := g.frags.add(f.Data, wire.EthernetLen, &p.IP)
		if whole == nil {
			return
		}
		p.Frame = frame.Frame{Data: whole}
		if p.IP, ok = wire.ParseIP(whole[wire.EthernetLen:], false); !ok || p.IP.IsFragment() {
			g.drops.Add(frame.DropMalformed, 1)
			return
		}
		// What was gathered so far came earlier; the handlers see packets in order, and the whole frame lives no longer than this call.
		g.sortL4(b, &p)
		g.flush(b)
		return
	}
	g.sortL4(b, &p)
}

// mayEnter checks the source of a packet: an address of the network, or none for the protocols by which a host gets one.
func (g *Gateway) mayEnter(p *Packet) bool {
	if g.validSource(p.IP.Src) {
		return true
	}
	if !p.IP.Src.IsUnspecified() {
		return false
	}
	return p.IP.Proto == wire.ProtoUDP && p.IP.Version == 4 || p.IP.Proto == wire.ProtoICMPv6 && p.IP.Version == 6
}

func (g *Gateway) sortL4(b *batch, p *Packet) {
	if !g.mayEnter(p) {
		g.drops.Add(frame.DropSpoofIP, 1)
		return
	}
	own := g.isOwn(p.IP.Dst)
	switch p.IP.Proto {
	case wire.ProtoTCP:
		if g.isGroup(p.IP.Dst) {
			g.drops.Add(frame.DropNotForGateway, 1)
			return
		}
		if !own && g.expired(p) {
			return
		}
		g.sortTCP(b, p)
	case wire.ProtoUDP:
		g.sortUDP(b, p, own)
	case wire.ProtoICMP, wire.ProtoICMPv6:
		if (p.IP.Proto == wire.ProtoICMPv6) != (p.IP.Version == 6) {
			g.drops.Add(frame.DropMalformed, 1)
			return
		}
		if !g.handleICMP(p, own) || g.expired(p) {
			return
		}
		if g.cfg.Handlers.ICMP == nil {
			g.SendUnreachable(p, UnreachProhibited, 0)
			g.drops.Add(frame.DropNotForGateway, 1)
			return
		}
		b.icmp = append(b.icmp, *p)
	default:
		g.drops.Add(frame.DropNotForGateway, 1)
		if !g.isGroup(p.IP.Dst) {
			typ, code := byte(icmpUnreachable), byte(2) // protocol unreachable
			src := g.own4
			var rest uint32
			if p.IP.Version == 6 {
				typ, code, src, rest = 4, 1, g.own6, 6 // parameter problem: unrecognized next header
			}
			g.sendICMPError(&p.IP, p.Frame.Data[p.L3:p.L3+p.IP.Len], src, typ, code, rest)
		}
	}
}

// expired answers a packet whose TTL ends at this hop, as a router does, so that traceroute shows the gateway.
func (g *Gateway) expired(p *Packet) bool {
	if p.IP.TTL > 1 {
		return false
	}
	g.drops.Add(frame.DropNotForGateway, 1)
	typ, src := byte(icmpTimeExceeded), g.own4
	if p.IP.Version == 6 {
		typ, src = icmp6TimeExceeded, g.own6
	}
	g.sendICMPError(&p.IP, p.Frame.Data[p.L3:p.L3+p.IP.Len], src, typ, 0, 0)
	return true
}

// Ports whose datagrams to everybody the gateway takes.
const (
	portDHCP   = 67
	portDHCPv6 = 547
)

func (g *Gateway) sortUDP(b *batch, p *Packet, own bool) {
	l4 := p.L4()
	if len(l4) < wire.UDPLen {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	n := int(binary.BigEndian.Uint16(l4[4:]))
	if !p.Frame.Superframe() && (n < wire.UDPLen || n > len(l4)) {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	// A checksum of zero means none in IPv4 and is forbidden in IPv6 (RFC 8200 §8.1).
	if p.Frame.Hdr.Flags&(wire.VirtioNeedsCsum|wire.VirtioDataValid) == 0 && !p.Frame.Superframe() {
		if sum := binary.BigEndian.Uint16(l4[6:]); sum != 0 || p.IP.Version == 6 {
			if sum == 0 || wire.Fold(wire.Sum(l4[:n], wire.PseudoSum(p.IP.Src, p.IP.Dst, wire.ProtoUDP, n))) != 0xffff {
				g.drops.Add(frame.DropChecksum, 1)
				return
			}
		}
	}
	port := binary.BigEndian.Uint16(l4[2:])
	group := g.isGroup(p.IP.Dst)
	// What no service of the gateway wants may be an answer to a client that NAT shows as the gateway.
	if own && g.cfg.Handlers.LocalUDP[port] == nil && g.cfg.Handlers.UDP != nil && !p.IP.Src.IsUnspecified() {
		b.udp = append(b.udp, *p)
		return
	}
	if own || group || p.IP.Src.IsUnspecified() {
		h := g.cfg.Handlers.LocalUDP[port]
		switch {
		case h != nil && (!group || port == portDHCP || port == portDHCPv6) && (port == portDHCP || !p.IP.Src.IsUnspecified()):
			if len(b.local) > 0 && b.localPort != port {
				g.flushLocal(b)
			}
			b.localPort = port
			b.local = append(b.local, *p)
		case group || p.IP.Src.IsUnspecified():
			g.drops.Add(frame.DropNotForGateway, 1)
		default:
			g.drops.Add(frame.DropNotForGateway, 1)
			g.SendUnreachable(p, UnreachPort, 0)
		}
		return
	}
	if g.expired(p) {
		return
	}
	if g.cfg.Handlers.UDP == nil {
		g.drops.Add(frame.DropNotForGateway, 1)
		g.SendUnreachable(p, UnreachPort, 0)
		return
	}
	b.udp = append(b.udp, *p)
}
