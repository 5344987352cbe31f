package stack

import (
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// discard is a switch that reads all it is given.
type discard struct{ sum uint64 }

func (d *discard) Forward(fs []frame.Frame) {
	for _, f := range fs {
		d.sum += wire.Sum(f.Data, 0)
	}
}

// FuzzTransmit gives the gateway arbitrary frames, as a hostile container would. The input is a list of frames, each behind a virtio header and
// two bytes of length.
func FuzzTransmit(f *testing.F) {
	list := func(ds ...[]byte) (b []byte) {
		for _, d := range ds {
			var h [wire.VirtioNetHdrLen + 2]byte
			h[10], h[11] = byte(len(d)>>8), byte(len(d))
			b = append(append(b, h[:]...), d...)
		}
		return b
	}
	f.Add(list(arp(arpRequest, conMAC, con4, wire.MAC{}, gw4), ns(con6, gw6, conMAC), ns(netip.IPv6Unspecified(), gw6, wire.MAC{})))
	f.Add(list(ipPacket(con6, allRouters, wire.ProtoICMPv6, 255, append([]byte{ndRouterSolicit, 0, 0, 0, 0, 0, 0, 0, 1, 1}, conMAC[:]...))))
	f.Add(list(ipPacket(con4, gw4, wire.ProtoICMP, 64, echo(icmpEcho, "ping")), ipPacket(con6, gw6, wire.ProtoICMPv6, 64, echo(icmp6Echo, "ping"))))
	f.Add(list(cut(ipPacket(con4, far4, wire.ProtoUDP, 64, udp(1, 2, make([]byte, 3000))), 3, 1480)...))
	f.Add(list(cut(ipPacket(con6, far6, wire.ProtoUDP, 64, udp(1, 2, make([]byte, 3000))), 3, 1448)...))
	f.Add(list(ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1, 80, 1, 0, tcpSYN, nil)), ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1, 80, 2, 0, tcpACK, []byte("x"))), ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1, 80, 2, 0, tcpRST, nil))))
	f.Add(list(ipPacket(con6, far6, wire.ProtoTCP, 64, tcpSegment(1, 81, 1, 0, tcpSYN, nil)), ipPacket(con4, far4, 132, 64, make([]byte, 20)), ipPacket(netip.IPv4Unspecified(), limitedBroadcast, wire.ProtoUDP, 64, udp(68, 67, nil))))

	cfg := testConfig()
	cfg.ICMPErrorRate = 1 << 30
	var g *Gateway
	back := handlerFunc(func(ps []Packet) {
		for i := range ps {
			g.SendUnreachable(&ps[i], Unreachable(i%5), 1300)
		}
	})
	cfg.Handlers = Handlers{UDP: back, ICMP: back, LocalUDP: map[uint16]PacketHandler{67: back, 53: back}, TCP: tcpFunc(func(r TCPRequest) {
		switch r.Dst().Port() % 4 {
		case 0:
			if c, err := r.Accept(); err == nil {
				c.(AsyncConn).Pump(tryOnly{&sink{}}, func(error) {})
				c.(AsyncConn).TryWrite([]byte("hello"))
				go c.Reset()
			}
		case 1:
			r.Refuse()
		case 2:
			r.Unreachable(UnreachHost)
		case 3:
			r.Ignore()
		}
	})}
	g, err := New(cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { g.Close() })
	g.Connect(func() frame.Sink { return &discard{} })
	g.SetNeighbor(con4, conMAC)

	f.Fuzz(func(t *testing.T, b []byte) {
		var fs []frame.Frame
		for len(b) >= wire.VirtioNetHdrLen+2 && len(fs) < 64 {
			var h wire.VirtioNetHdr
			h.Decode(b)
			n := min(int(b[10])<<8|int(b[11]), len(b)-wire.VirtioNetHdrLen-2)
			b = b[wire.VirtioNetHdrLen+2:]
			fr := frame.Frame{Hdr: h, Data: b[:n:n]}
			b = b[n:]
			if len(fr.Data) < wire.EthernetLen || !h.Validate(fr.Data) {
				continue // what the TAP's reader refuses
			}
			fs = append(fs, fr)
		}
		if g.Transmit(fs) != len(fs) {
			t.Fatal("frames not accepted")
		}
		if g.frags.used > g.cfg.Reassembly.MaxBytes || g.nb.dynamic > g.cfg.MaxNeighbors || g.nb.held > heldBytes {
			t.Fatalf("bounds: %d bytes of fragments, %d neighbours, %d bytes held", g.frags.used, g.nb.dynamic, g.nb.held)
		}
	})
}
