package stack

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// inBubble is byHand without netstack, whose goroutines do not sleep the way package synctest understands.
func inBubble(t *testing.T, cfg Config) (*Gateway, *recorder) {
	t.Helper()
	g, err := newGateway(cfg)
	if err != nil {
		t.Fatal(err)
	}
	go g.housekeeping()
	r := &recorder{}
	g.Connect(func() frame.Sink { return r })
	r.take()
	return g, r
}

func datagram(dst netip.Addr, mark byte) frame.Frame {
	src := far4
	if dst.Is6() {
		src = far6
	}
	return frame.Frame{Data: ipPacket(src, dst, wire.ProtoUDP, 64, udp(1, 2, []byte{mark}))}
}

func TestResolve(t *testing.T) {
	for _, dst := range []netip.Addr{con4, con6} {
		g, r := byHand(t, testConfig())
		for i := range byte(heldFrames + 2) {
			g.Send([]frame.Frame{datagram(dst, i)})
		}
		d := r.one(t, g) // one request for all of them
		if dst.Is4() {
			if wire.Dst(d) != wire.Broadcast || netip.AddrFrom4([4]byte(d[38:42])) != con4 {
				t.Fatalf("request % x", d)
			}
			send(g, arp(arpReply, conMAC, con4, gwMAC, gw4))
		} else {
			if d[54] != ndNeighborSolicit || netip.AddrFrom16([16]byte(d[62:78])) != con6 || d[0] != 0x33 {
				t.Fatalf("request % x", d)
			}
			m := append([]byte{ndNeighborAdvert, 0, 0, 0, 0x60, 0, 0, 0}, con6.AsSlice()...)
			m = append(append(m, ndTargetLink, 1), conMAC[:]...)
			send(g, ipPacket(con6, gw6, wire.ProtoICMPv6, 255, m))
		}
		fs := r.take()
		if len(fs) != heldFrames || wire.Dst(fs[0].Data) != conMAC || wire.Src(fs[0].Data) != gwMAC || fs[0].Data[len(fs[0].Data)-1] != 2 {
			t.Fatalf("%d frames came after the answer; drops %v", len(fs), drops(g))
		}
		if g.Drops().Get(frame.DropUnresolved) != 2 || g.nb.held != 0 {
			t.Fatalf("drops %v, %d bytes held", drops(g), g.nb.held)
		}
		g.Send([]frame.Frame{datagram(dst, 99)})
		r.one(t, g)
	}
}

func TestUnresolved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, r := inBubble(t, testConfig())
		defer g.Close()
		g.Send([]frame.Frame{datagram(con4, 0), datagram(netip.MustParseAddr("192.0.2.99"), 0), datagram(gw4, 0)})
		time.Sleep(5500 * time.Millisecond)
		if n := len(r.take()); n != neighborProbes {
			t.Errorf("%d requests, want %d", n, neighborProbes)
		}
		if n := g.Drops().Get(frame.DropUnresolved); n != 3 || len(g.nb.m) != 0 || g.nb.held != 0 {
			t.Errorf("drops %v, %d entries, %d bytes", drops(g), len(g.nb.m), g.nb.held)
		}
	})
}

// TestNeighborAge: a neighbour that answers stays, one that went away is forgotten, and one the node set is never asked.
func TestNeighborAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, r := inBubble(t, testConfig())
		defer g.Close()
		gone := netip.MustParseAddr("10.88.0.3")
		fixed := netip.MustParseAddr("10.88.0.4")
		send(g, arp(arpRequest, conMAC, con4, wire.MAC{}, gw4), arp(arpRequest, wire.MAC{2, 0, 0, 0, 0, 3}, gone, wire.MAC{}, gw4))
		g.SetNeighbor(fixed, wire.MAC{2, 0, 0, 0, 0, 4})
		send(g, arp(arpReply, wire.MAC{2, 0, 0, 0, 0, 66}, fixed, gwMAC, gw4)) // a lie
		r.take()
		asked := map[netip.Addr]int{}
		time.Sleep(500 * time.Millisecond) // between the gateway's own ticks, so that an answer is there before the next
		for range 70 {
			time.Sleep(time.Second)
			for _, f := range r.take() {
				if f.Data[12] != 0x08 || f.Data[13] != 0x06 {
					continue
				}
				ip := netip.AddrFrom4([4]byte(f.Data[38:42]))
				asked[ip]++
				if ip == con4 {
					send(g, arp(arpReply, conMAC, con4, gwMAC, gw4))
				}
			}
		}
		if asked[con4] != 1 || asked[gone] != neighborProbes || asked[fixed] != 0 {
			t.Errorf("asked %v", asked)
		}
		_, ok := g.nb.lookup(con4)
		_, left := g.nb.lookup(gone)
		mac, set := g.nb.lookup(fixed)
		if !ok || left || !set || mac != (wire.MAC{2, 0, 0, 0, 0, 4}) {
			t.Errorf("%v %v %v", ok, left, mac)
		}
		g.DelNeighbor(fixed)
		if _, set := g.nb.lookup(fixed); set {
			t.Error("still there after DelNeighbor")
		}
	})
}

func TestNeighborLimit(t *testing.T) {
	cfg := testConfig()
	cfg.MaxNeighbors = 10
	g, r := byHand(t, cfg)
	for i := range 100 {
		send(g, arp(arpRequest, conMAC, netip.AddrFrom4([4]byte{10, 88, 2, byte(i + 1)}), wire.MAC{}, gw4))
	}
	if len(r.take()) != 100 {
		t.Error("requests went unanswered")
	}
	if len(g.nb.m) > 10 || g.nb.dynamic != len(g.nb.m) {
		t.Errorf("%d entries, %d counted, at most 10 wanted", len(g.nb.m), g.nb.dynamic)
	}
	g.SetNeighbor(con4, conMAC)
	if _, ok := g.nb.lookup(con4); !ok {
		t.Error("no room for what the node set")
	}
}

// TestGroups: broadcast and multicast need no answer to find their MAC.
func TestGroups(t *testing.T) {
	g, r := byHand(t, testConfig())
	for dst, mac := range map[string]wire.MAC{
		"255.255.255.255": wire.Broadcast,
		"10.88.255.255":   wire.Broadcast,
		"239.129.2.3":     {0x01, 0x00, 0x5e, 0x01, 2, 3},
		"ff02::1:2":       {0x33, 0x33, 0, 1, 0, 2},
	} {
		g.Send([]frame.Frame{datagram(netip.MustParseAddr(dst), 0)})
		if d := r.one(t, g); wire.Dst(d) != mac || wire.Src(d) != gwMAC {
			t.Errorf("%s went to %v", dst, wire.Dst(d))
		}
	}
}

func TestRAIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, r := inBubble(t, testConfig())
		defer g.Close()
		time.Sleep(17 * time.Second)
		if d := r.one(t, g); d[54] != ndRouterAdvert || wire.Dst(d) != (wire.MAC{0x33, 0x33, 0, 0, 0, 1}) {
			t.Errorf("% x", d)
		}
		time.Sleep(10 * time.Minute)
		if n := len(r.take()); n < 4 || n > 6 {
			t.Errorf("%d advertisements in the next ten minutes", n)
		}
	})
}
