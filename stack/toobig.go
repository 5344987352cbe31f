package stack

import (
	"encoding/binary"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// AnswerTooBig tells the sender of a frame that a port of the network could not carry it, since no IP packet of more than mtu bytes fits there: with ICMP "fragmentation
// needed" or ICMPv6 "packet too big" from the gateway's address, as a router in that place would. data is the frame, lent, from its destination MAC; it may be a superframe. Nothing is
// said about what is for several receivers, about an error, to an address that is not of the network, or beyond Config.ICMPErrorRate. It does not block.
func (g *Gateway) AnswerTooBig(data []byte, mtu int) {
	if g.closed.Load() || len(data) < wire.EthernetLen || data[0]&1 != 0 {
		return
	}
	switch etherType := binary.BigEndian.Uint16(data[12:]); etherType { // no tags: the gateway is on the untagged network alone
	case wire.EtherTypeIPv4, wire.EtherTypeIPv6:
		ip, ok := wire.ParseIP(data[wire.EthernetLen:], true)
		if !ok {
			return
		}
		src, typ, code := g.own4, byte(icmpUnreachable), byte(4)
		if ip.Version == 6 {
			src, typ, code = g.own6, icmp6TooBig, 0
			mtu = max(mtu, minMTU6) // RFC 8200 §5: a host need not believe less
		}
		r := g.icmpError(&ip, data[wire.EthernetLen:wire.EthernetLen+ip.Len], src, typ, code, uint32(mtu))
		if r == nil {
			return
		}
		t := g.tx.get()
		if t == nil {
			g.drops.Add(frame.DropNoPort, 1)
			return
		}
		// Straight to the sender: its address may not be resolved yet.
		wire.PutEthernet(r, wire.Src(data), g.mac, etherType)
		t.add(frame.Frame{Data: r})
		t.flush()
		g.tx.put(t)
	}
}
