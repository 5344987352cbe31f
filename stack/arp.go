package stack

import (
	"encoding/binary"
	"net/netip"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// arpLen is an ARP message for Ethernet and IPv4 (RFC 826).
const arpLen = 28

const (
	arpRequest = 1
	arpReply   = 2
)

// handleARP answers requests for the gateway's addresses and host aliases, and learns from replies to its own.
func (g *Gateway) handleARP(d []byte) {
	if len(d) < wire.EthernetLen+arpLen {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	b := d[wire.EthernetLen:]
	if binary.BigEndian.Uint16(b) != 1 || binary.BigEndian.Uint16(b[2:]) != wire.EtherTypeIPv4 || b[4] != 6 || b[5] != 4 {
		g.drops.Add(frame.DropMalformed, 1)
		return
	}
	senderMAC := wire.MAC(b[8:14])
	sender := netip.AddrFrom4([4]byte(b[14:18]))
	target := netip.AddrFrom4([4]byte(b[24:28]))
	probe := sender.IsUnspecified() // RFC 5227: an address conflict probe claims nothing
	if senderMAC.IsGroup() || !g.own4.IsValid() || !probe && !g.validSource(sender) {
		g.drops.Add(frame.DropSpoofIP, 1)
		return
	}
	switch binary.BigEndian.Uint16(b[6:]) {
	case arpReply:
		g.learn(sender, senderMAC, false)
	case arpRequest:
		mine := g.answersFor(target)
		if !probe {
			g.learn(sender, senderMAC, mine)
		}
		if !mine {
			return // a broadcast that means somebody else
		}
		r := make([]byte, wire.EthernetLen+arpLen)
		putARP(r[wire.EthernetLen:], arpReply, g.mac, target, senderMAC, sender)
		g.sendTo(r, wire.Src(d), wire.EtherTypeARP)
	default:
		g.drops.Add(frame.DropMalformed, 1)
	}
}

func (g *Gateway) sendARPRequest(ip netip.Addr) {
	r := make([]byte, wire.EthernetLen+arpLen)
	putARP(r[wire.EthernetLen:], arpRequest, g.mac, g.own4, wire.MAC{}, ip)
	g.sendTo(r, wire.Broadcast, wire.EtherTypeARP)
}

func putARP(b []byte, op uint16, sha wire.MAC, spa netip.Addr, tha wire.MAC, tpa netip.Addr) {
	binary.BigEndian.PutUint16(b, 1)
	binary.BigEndian.PutUint16(b[2:], wire.EtherTypeIPv4)
	b[4], b[5] = 6, 4
	binary.BigEndian.PutUint16(b[6:], op)
	s, t := spa.As4(), tpa.As4()
	copy(b[8:], sha[:])
	copy(b[14:], s[:])
	copy(b[18:], tha[:])
	copy(b[24:], t[:])
}
