package stack

import (
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// TestFloodSilencesNobodyElse: one container has used up its ICMP errors and resets, another still gets both.
func TestFloodSilencesNobodyElse(t *testing.T) {
	cfg := testConfig()
	cfg.ICMPErrorRate = 200
	var g *Gateway
	cfg.Handlers.UDP = handlerFunc(func(ps []Packet) {
		for i := range ps {
			g.SendUnreachable(&ps[i], UnreachHost, 0)
		}
	})
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	const n = 500
	for range n {
		send(g, ipPacket(con4, far4, wire.ProtoUDP, 64, udp(1, 2, nil)), ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1, 80, 1, 1, tcpACK, nil)))
	}
	got := len(r.take())
	if got == 0 || got > n/2 || g.Drops().Get(frame.DropServiceLimit) != uint64(2*n-got) {
		t.Fatalf("the flooder got %d answers; drops %v", got, drops(g))
	}
	// Many others, so that sharing a bucket with the flooder by chance is met too.
	a := con4
	for range 100 {
		a = a.Next()
		g.SetNeighbor(a, conMAC)
		send(g, ipPacket(a, far4, wire.ProtoUDP, 64, udp(1, 2, nil)))
		if d := r.one(t, g); netip.AddrFrom4([4]byte(d[30:34])) != a || d[34] != icmpUnreachable {
			t.Fatalf("%s got % x", a, d)
		}
	}
}
