package stack

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"patchbay/frame"
	"patchbay/internal/wire"
)

var (
	conMAC  = wire.MAC{0x02, 0x42, 0, 0, 0, 2}
	conLink = linkLocal(conMAC)
)

// recorder is the switch of a gateway that is given frames by hand: it keeps what the gateway sends.
type recorder struct {
	mu sync.Mutex
	fs []frame.Frame
}

func (r *recorder) Forward(fs []frame.Frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range fs {
		r.fs = append(r.fs, frame.Frame{Hdr: f.Hdr, Data: slices.Clone(f.Data)})
	}
}

// take is what was sent since the last call.
func (r *recorder) take() []frame.Frame {
	r.mu.Lock()
	defer r.mu.Unlock()
	fs := r.fs
	r.fs = nil
	return fs
}

// packets is a PacketHandler that keeps copies.
type packets struct {
	calls [][]Packet
}

func (h *packets) HandlePackets(ps []Packet) {
	c := slices.Clone(ps)
	for i := range c {
		c[i].Frame.Data = slices.Clone(c[i].Frame.Data)
	}
	h.calls = append(h.calls, c)
}

func (h *packets) all() (ps []Packet) {
	for _, c := range h.calls {
		ps = append(ps, c...)
	}
	return ps
}

func byHand(t testing.TB, cfg Config) (*Gateway, *recorder) {
	t.Helper()
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	r := &recorder{}
	g.Connect(func() frame.Sink { return r })
	r.take() // the first router advertisement
	return g, r
}

func send(g *Gateway, data ...[]byte) {
	fs := make([]frame.Frame, len(data))
	for i, d := range data {
		fs[i].Data = d
	}
	g.Transmit(fs)
}

// one expects exactly one frame.
func (r *recorder) one(t *testing.T, g *Gateway) []byte {
	t.Helper()
	fs := r.take()
	if len(fs) != 1 {
		t.Fatalf("gateway sent %d frames, want 1; drops %v", len(fs), drops(g))
	}
	return fs[0].Data
}

func (r *recorder) none(t *testing.T) {
	t.Helper()
	if fs := r.take(); len(fs) != 0 {
		t.Fatalf("gateway sent %d frames, want none; the first is % x", len(fs), fs[0].Data)
	}
}

func eth(dst, src wire.MAC, typ uint16, payload []byte) []byte {
	b := make([]byte, wire.EthernetLen, wire.EthernetLen+len(payload))
	wire.PutEthernet(b, dst, src, typ)
	return append(b, payload...)
}

// ipPacket is a frame from the container with a complete IP packet.
func ipPacket(src, dst netip.Addr, proto uint8, ttl uint8, l4 []byte) []byte {
	l4 = slices.Clone(l4)
	var acc uint64
	at := -1
	switch proto {
	case wire.ProtoICMP:
		at = 2
	case wire.ProtoICMPv6:
		at = 2
	case wire.ProtoUDP:
		at = 6
	case wire.ProtoTCP:
		at = 16
	}
	if proto != wire.ProtoICMP {
		acc = wire.PseudoSum(src, dst, proto, len(l4))
	}
	if at >= 0 && at+2 <= len(l4) {
		binary.BigEndian.PutUint16(l4[at:], 0)
		binary.BigEndian.PutUint16(l4[at:], ^wire.Fold(wire.Sum(l4, acc)))
	}
	if src.Is4() {
		h := make([]byte, wire.IPv4Len)
		wire.PutIPv4(h, src, dst, proto, 0, ttl, len(h)+len(l4), 7, false)
		return eth(gwMAC, conMAC, wire.EtherTypeIPv4, append(h, l4...))
	}
	h := make([]byte, wire.IPv6Len)
	wire.PutIPv6(h, src, dst, proto, 0, ttl, len(l4))
	return eth(gwMAC, conMAC, wire.EtherTypeIPv6, append(h, l4...))
}

func udp(src, dst uint16, payload []byte) []byte {
	b := make([]byte, wire.UDPLen)
	binary.BigEndian.PutUint16(b, src)
	binary.BigEndian.PutUint16(b[2:], dst)
	binary.BigEndian.PutUint16(b[4:], uint16(wire.UDPLen+len(payload)))
	return append(b, payload...)
}

func tcpSegment(src, dst uint16, seq, ack uint32, flags byte, payload []byte) []byte {
	b := make([]byte, wire.TCPLen)
	binary.BigEndian.PutUint16(b, src)
	binary.BigEndian.PutUint16(b[2:], dst)
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	return append(b, payload...)
}

func echo(typ byte, payload string) []byte {
	return append([]byte{typ, 0, 0, 0, 0x12, 0x34, 0, 1}, payload...)
}

func arp(op uint16, sha wire.MAC, spa netip.Addr, tha wire.MAC, tpa netip.Addr) []byte {
	b := make([]byte, arpLen)
	putARP(b, op, sha, spa, tha, tpa)
	return eth(wire.Broadcast, sha, wire.EtherTypeARP, b)
}

// ns is a neighbour solicitation; with no mac it carries no option, as a duplicate address probe.
func ns(src, target netip.Addr, mac wire.MAC) []byte {
	m := make([]byte, 24)
	m[0] = ndNeighborSolicit
	a := target.As16()
	copy(m[8:], a[:])
	if !mac.IsZero() {
		m = append(m, ndSourceLink, 1)
		m = append(m, mac[:]...)
	}
	d := ipPacket(src, netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]}), wire.ProtoICMPv6, 255, m)
	copy(d, []byte{0x33, 0x33, 0xff, a[13], a[14], a[15]})
	return d
}

func TestARP(t *testing.T) {
	g, r := byHand(t, testConfig())
	for _, target := range []netip.Addr{gw4, alias4} {
		send(g, arp(arpRequest, conMAC, con4, wire.MAC{}, target))
		d := r.one(t, g)
		want := eth(conMAC, gwMAC, wire.EtherTypeARP, nil)
		b := make([]byte, arpLen)
		putARP(b, arpReply, gwMAC, target, conMAC, con4)
		if !slices.Equal(d, append(want, b...)) {
			t.Fatalf("answer for %v: % x", target, d)
		}
	}
	if mac, ok := g.nb.lookup(con4); !ok || mac != conMAC {
		t.Fatal("the asker was not learned")
	}
	// A conflict probe for the gateway's own address is answered; one for another is nobody's business, and neither is learned.
	zero := netip.IPv4Unspecified()
	send(g, arp(arpRequest, conMAC, zero, wire.MAC{}, gw4))
	r.one(t, g)
	send(g, arp(arpRequest, conMAC, zero, wire.MAC{}, con4))
	send(g, arp(arpRequest, conMAC, con4, wire.MAC{}, netip.MustParseAddr("10.88.0.77")))
	r.none(t)
	// Claims to the gateway's address, or from outside the subnet, are refused.
	before := g.Drops().Get(frame.DropSpoofIP)
	send(g, arp(arpRequest, conMAC, gw4, wire.MAC{}, gw4), arp(arpReply, conMAC, far4, gwMAC, gw4), arp(arpReply, wire.Broadcast, con4, gwMAC, gw4))
	r.none(t)
	if n := g.Drops().Get(frame.DropSpoofIP) - before; n != 3 {
		t.Fatalf("spoof-ip rose by %d, want 3", n)
	}
	// Every truncation is survived.
	whole := arp(arpRequest, conMAC, con4, wire.MAC{}, gw4)
	for n := range whole {
		send(g, whole[:n])
	}
	r.none(t)
}

func TestND(t *testing.T) {
	g, r := byHand(t, testConfig())
	for _, target := range []netip.Addr{gw6, alias6, linkLocal(gwMAC)} {
		send(g, ns(con6, target, conMAC))
		d := r.one(t, g)
		na := header.NDPNeighborAdvert(d[wire.EthernetLen+wire.IPv6Len+4:])
		ip, ok := wire.ParseIP(d[wire.EthernetLen:], false)
		if !ok || ip.Src != target || ip.Dst != con6 || ip.TTL != 255 || wire.Dst(d) != conMAC || d[54] != ndNeighborAdvert {
			t.Fatalf("advertisement for %v: % x", target, d)
		}
		if !na.SolicitedFlag() || !na.OverrideFlag() || na.RouterFlag() != (target != alias6) || netip.AddrFrom16(na.TargetAddress().As16()) != target {
			t.Fatalf("advertisement for %v: flags % x", target, d[58:62])
		}
		if mac := wire.MAC(d[len(d)-6:]); mac != gwMAC {
			t.Fatalf("advertisement for %v says %v", target, mac)
		}
		if wire.Fold(wire.Sum(d[54:], wire.PseudoSum(ip.Src, ip.Dst, wire.ProtoICMPv6, len(d)-54))) != 0xffff {
			t.Fatal("wrong checksum")
		}
	}
	if mac, ok := g.nb.lookup(con6); !ok || mac != conMAC {
		t.Fatal("the asker was not learned")
	}
	// Duplicate address detection: a probe for a container's own address is left alone, one for ours is answered to all.
	send(g, ns(netip.IPv6Unspecified(), con6, wire.MAC{}))
	r.none(t)
	send(g, ns(netip.IPv6Unspecified(), gw6, wire.MAC{}))
	d := r.one(t, g)
	if wire.Dst(d) != (wire.MAC{0x33, 0x33, 0, 0, 0, 1}) || netip.AddrFrom16([16]byte(d[38:54])) != allNodes || d[58]&0x40 != 0 {
		t.Fatalf("answer to a probe for the gateway's address: % x", d)
	}
	// What came through a router, or with a broken option, is refused.
	low := ns(con6, gw6, conMAC)
	low[wire.EthernetLen+7] = 64
	zero := ipPacket(con6, gw6, wire.ProtoICMPv6, 255, append(append([]byte{ndNeighborSolicit, 0, 0, 0, 0, 0, 0, 0}, gw6.AsSlice()...), 1, 0, 0, 0, 0, 0, 0, 0))
	probe := ns(netip.IPv6Unspecified(), gw6, conMAC)
	send(g, low, zero, probe)
	r.none(t)
	if n := g.Drops().Get(frame.DropMalformed); n != 3 {
		t.Fatalf("malformed %d, want 3", n)
	}
}

func TestRouterAdvertisement(t *testing.T) {
	cfg := testConfig()
	cfg.MTU = 1450
	cfg.RA.RDNSS = []netip.Addr{gw6}
	cfg.RA.DNSSL = []string{"patchbay.internal", "example.test."}
	g, r := byHand(t, cfg)
	rs := append([]byte{ndRouterSolicit, 0, 0, 0, 0, 0, 0, 0, ndSourceLink, 1}, conMAC[:]...)
	solicit := ipPacket(conLink, allRouters, wire.ProtoICMPv6, 255, rs)
	send(g, solicit)
	d := r.one(t, g)
	ip, _ := wire.ParseIP(d[wire.EthernetLen:], false)
	if ip.Src != linkLocal(gwMAC) || ip.Dst != conLink || ip.TTL != 255 || wire.Dst(d) != conMAC || d[54] != ndRouterAdvert {
		t.Fatalf("advertisement: % x", d)
	}
	ra := header.NDPRouterAdvert(d[58:])
	if ra.RouterLifetime().Minutes() != 30 || ra.ManagedAddrConfFlag() {
		t.Fatalf("lifetime %v, managed %v", ra.RouterLifetime(), ra.ManagedAddrConfFlag())
	}
	it, err := ra.Options().Iter(true)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for {
		o, done, err := it.Next()
		if err != nil {
			t.Fatal(err)
		}
		if done {
			break
		}
		switch o := o.(type) {
		case header.NDPPrefixInformation:
			seen["prefix"] = o.PrefixLength() == 64 && o.OnLinkFlag() && o.AutonomousAddressConfigurationFlag() && netip.AddrFrom16(o.Prefix().As16()) == g.net6.Addr()
		case header.NDPRecursiveDNSServer:
			a, err := o.Addresses()
			seen["rdnss"] = err == nil && len(a) == 1 && netip.AddrFrom16(a[0].As16()) == gw6
		case header.NDPDNSSearchList:
			n, err := o.DomainNames()
			seen["dnssl"] = err == nil && slices.Equal(n, []string{"patchbay.internal", "example.test"})
		case header.NDPSourceLinkLayerAddressOption:
			seen["mac"] = string(o.EthernetAddress()) == string(gwMAC[:])
		}
	}
	if len(seen) != 4 || !seen["prefix"] || !seen["rdnss"] || !seen["dnssl"] || !seen["mac"] {
		t.Fatalf("options: %v", seen)
	}
	if i := slices.Index(d[70:], ndMTU); i < 0 || binary.BigEndian.Uint32(d[70+i+4:]) != 1450 {
		t.Fatal("no MTU option of 1450")
	}
	// Solicitations are answered at a bounded rate.
	for range 100 {
		send(g, solicit)
	}
	if n := len(r.take()); n > 25 || g.Drops().Get(frame.DropServiceLimit) < 75 {
		t.Fatalf("%d answers to 100 solicitations", n)
	}
	cfg.RA.Off = true
	off, r := byHand(t, cfg)
	send(off, solicit)
	r.none(t)
}

func TestEcho(t *testing.T) {
	cfg := testConfig()
	h := &packets{}
	cfg.Handlers.ICMP = h
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	send(g, ipPacket(con4, gw4, wire.ProtoICMP, 64, echo(icmpEcho, "four")), ipPacket(con6, gw6, wire.ProtoICMPv6, 64, echo(icmp6Echo, "six")))
	fs := r.take()
	if len(fs) != 2 {
		t.Fatalf("%d answers; drops %v", len(fs), drops(g))
	}
	for i, want := range []struct {
		src, dst netip.Addr
		typ      byte
		body     string
	}{{gw4, con4, icmpEchoReply, "four"}, {gw6, con6, icmp6EchoReply, "six"}} {
		d := fs[i].Data
		ip, ok := wire.ParseIP(d[wire.EthernetLen:], false)
		m := d[wire.EthernetLen+ip.HdrLen:]
		var acc uint64
		if ip.Version == 6 {
			acc = wire.PseudoSum(ip.Src, ip.Dst, wire.ProtoICMPv6, len(m))
		}
		if !ok || ip.Src != want.src || ip.Dst != want.dst || m[0] != want.typ || string(m[8:]) != want.body || wire.Dst(d) != conMAC || wire.Fold(wire.Sum(m, acc)) != 0xffff {
			t.Fatalf("answer %d: % x", i, d)
		}
	}
	// Nobody else's echo is ever answered here.
	send(g, ipPacket(con4, far4, wire.ProtoICMP, 64, echo(icmpEcho, "x")), ipPacket(con6, far6, wire.ProtoICMPv6, 64, echo(icmp6Echo, "y")), ipPacket(con4, alias4, wire.ProtoICMP, 64, echo(icmpEcho, "z")))
	r.none(t)
	if len(h.calls) != 1 || len(h.calls[0]) != 3 {
		t.Fatalf("handler saw %d calls", len(h.calls))
	}
	bad := ipPacket(con4, gw4, wire.ProtoICMP, 64, echo(icmpEcho, "four"))
	bad[len(bad)-1] ^= 1
	send(g, bad)
	r.none(t)
	if g.Drops().Get(frame.DropChecksum) != 1 {
		t.Fatal("a wrong checksum was not counted")
	}
}

func TestUDPBatches(t *testing.T) {
	cfg := testConfig()
	out, dhcp, dns := &packets{}, &packets{}, &packets{}
	cfg.Handlers.UDP = out
	cfg.Handlers.LocalUDP = map[uint16]PacketHandler{67: dhcp, 53: dns}
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	var ds [][]byte
	for i := range 10 {
		ds = append(ds, ipPacket(con4, far4, wire.ProtoUDP, 64, udp(uint16(1000+i), 9, []byte{byte(i)})))
	}
	ds = append(ds, ipPacket(con6, far6, wire.ProtoUDP, 64, udp(1010, 9, []byte{10})))
	ds = append(ds, ipPacket(con4, gw4, wire.ProtoUDP, 64, udp(5, 53, []byte("q"))))
	ds = append(ds, ipPacket(netip.IPv4Unspecified(), limitedBroadcast, wire.ProtoUDP, 64, udp(68, 67, []byte("discover"))))
	ds = append(ds, ipPacket(con4, gw4, wire.ProtoUDP, 64, udp(68, 67, []byte("renew"))))
	send(g, ds...)
	r.none(t)
	if len(out.calls) != 1 || len(out.calls[0]) != 11 {
		t.Fatalf("UDP handler: %d calls", len(out.calls))
	}
	for i, p := range out.calls[0] {
		if l4 := p.L4(); l4[8] != byte(i) || len(l4) != 9 {
			t.Fatalf("packet %d is % x", i, l4)
		}
	}
	if len(dns.all()) != 1 || len(dhcp.all()) != 2 {
		t.Fatalf("dns %d, dhcp %d", len(dns.all()), len(dhcp.all()))
	}
	// A port of ours that no service wants may be one of NAT's; without NAT it is refused, from our own address.
	send(g, ipPacket(con4, gw4, wire.ProtoUDP, 64, udp(5, 99, []byte("q"))))
	if len(out.calls) != 2 {
		t.Fatal("NAT was not asked")
	}
	alone, ra := byHand(t, testConfig())
	alone.SetNeighbor(con4, conMAC)
	send(alone, ipPacket(con4, gw4, wire.ProtoUDP, 64, udp(5, 99, []byte("q"))))
	d := ra.one(t, alone)
	ip, _ := wire.ParseIP(d[wire.EthernetLen:], false)
	if m := d[34:]; ip.Src != gw4 || ip.Dst != con4 || m[0] != icmpUnreachable || m[1] != 3 || m[8]>>4 != 4 {
		t.Fatalf("answer: % x", d)
	}
	// Sources that cannot be: the gateway's, another network's, the subnet's own number, a broadcast.
	before := g.Drops().Get(frame.DropSpoofIP)
	for _, src := range []string{"10.88.0.1", "192.0.2.1", "10.88.0.0", "10.88.255.255", "10.88.255.254", "224.0.0.1"} {
		send(g, ipPacket(netip.MustParseAddr(src), far4, wire.ProtoUDP, 64, udp(1, 2, nil)))
	}
	for _, src := range []string{"fd00:88::1", "2001:db8::1", "ff02::1"} {
		send(g, ipPacket(netip.MustParseAddr(src), far6, wire.ProtoUDP, 64, udp(1, 2, nil)))
	}
	r.none(t)
	if n := g.Drops().Get(frame.DropSpoofIP) - before; n != 9 || len(out.calls) != 2 {
		t.Fatalf("spoof-ip rose by %d, want 9", n)
	}
	// Broadcasts and multicasts that mean nobody here, and frames for another station.
	other := ipPacket(con4, far4, wire.ProtoUDP, 64, udp(1, 2, nil))
	copy(other, []byte{2, 9, 9, 9, 9, 9})
	before = g.Drops().Get(frame.DropNotForGateway)
	send(g, other, ipPacket(con4, limitedBroadcast, wire.ProtoUDP, 64, udp(1, 138, nil)), ipPacket(con4, g.bcast4, wire.ProtoUDP, 64, udp(1, 53, nil)),
		ipPacket(con4, netip.MustParseAddr("224.0.0.251"), wire.ProtoUDP, 255, udp(5353, 5353, nil)))
	r.none(t)
	if n := g.Drops().Get(frame.DropNotForGateway) - before; n != 4 || len(dns.all()) != 1 {
		t.Fatalf("not-for-gateway rose by %d, want 4", n)
	}
}

func TestUDPSortAllocatesNothing(t *testing.T) {
	cfg := testConfig()
	n := 0
	cfg.Handlers.UDP = handlerFunc(func(ps []Packet) { n += len(ps) })
	g, _ := byHand(t, cfg)
	var fs []frame.Frame
	for i := range 32 {
		src, dst := con4, far4
		if i%2 == 1 {
			src, dst = con6, far6
		}
		fs = append(fs, frame.Frame{Data: ipPacket(src, dst, wire.ProtoUDP, 64, udp(1, 2, make([]byte, 1400)))})
	}
	if a := testing.AllocsPerRun(200, func() { g.Transmit(fs) }); a != 0 && !raceEnabled { // under -race sync.Pool forgets on purpose
		t.Fatalf("%v allocations for 32 datagrams, want 0", a)
	}
	if n != 201*32 {
		t.Fatalf("%d datagrams handled", n)
	}
}

type handlerFunc func([]Packet)

func (f handlerFunc) HandlePackets(ps []Packet) { f(ps) }

func TestTTL(t *testing.T) {
	cfg := testConfig()
	cfg.Handlers.UDP, cfg.Handlers.ICMP = &packets{}, &packets{}
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	for _, d := range [][]byte{
		ipPacket(con4, far4, wire.ProtoUDP, 1, udp(1, 33434, nil)),
		ipPacket(con4, far4, wire.ProtoICMP, 1, echo(icmpEcho, "")),
		ipPacket(con4, far4, wire.ProtoTCP, 1, tcpSegment(1, 80, 0, 0, tcpSYN, nil)),
	} {
		send(g, d)
		if a := r.one(t, g); a[34] != icmpTimeExceeded || netip.AddrFrom4([4]byte(a[26:30])) != gw4 {
			t.Fatalf("answer % x", a)
		}
	}
	send(g, ipPacket(con6, far6, wire.ProtoUDP, 1, udp(1, 33434, nil)))
	if a := r.one(t, g); a[54] != icmp6TimeExceeded || netip.AddrFrom16([16]byte(a[22:38])) != gw6 {
		t.Fatalf("answer % x", a)
	}
}

// TestErrorsAboutErrors: RFC 1122 forbids them.
func TestErrorsAboutErrors(t *testing.T) {
	g, r := byHand(t, testConfig())
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	quote := append([]byte{icmpUnreachable, 3, 0, 0, 0, 0, 0, 0}, make([]byte, 28)...)
	send(g, ipPacket(con4, far4, wire.ProtoICMP, 1, quote), ipPacket(con4, gw4, wire.ProtoICMP, 64, quote))
	send(g, ipPacket(con4, limitedBroadcast, wire.ProtoUDP, 1, udp(1, 2, nil)))
	r.none(t)
	// Protocols nobody serves are told so.
	send(g, ipPacket(con4, far4, 132, 64, make([]byte, 16)))
	if d := r.one(t, g); d[34] != icmpUnreachable || d[35] != 2 {
		t.Fatalf("answer % x", d)
	}
}

func TestSendUnreachable(t *testing.T) {
	cfg := testConfig()
	h := &packets{}
	cfg.Handlers.UDP = h
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	body := make([]byte, 3000)
	send(g, ipPacket(con4, far4, wire.ProtoUDP, 64, udp(1, 2, body)), ipPacket(con6, far6, wire.ProtoUDP, 64, udp(1, 2, body)))
	ps := h.all()
	for _, c := range []struct {
		why        Unreachable
		t4, c4     byte
		t6, c6     byte
		src4, src6 netip.Addr
	}{
		{UnreachNet, 3, 0, 1, 0, gw4, gw6},
		{UnreachHost, 3, 1, 1, 3, gw4, gw6},
		{UnreachPort, 3, 3, 1, 4, far4, far6},
		{UnreachProhibited, 3, 13, 1, 1, gw4, gw6},
		{UnreachTooBig, 3, 4, 2, 0, gw4, gw6},
	} {
		g.SendUnreachable(&ps[0], c.why, 1400)
		d := r.one(t, g)
		m := d[34:]
		if m[0] != c.t4 || m[1] != c.c4 || len(d) != 14+576 || netip.AddrFrom4([4]byte(d[26:30])) != c.src4 || !slices.Equal(m[8:], ps[0].Frame.Data[14:14+576-28]) {
			t.Errorf("%v over IPv4: % x", c.why, d[:50])
		}
		if c.why == UnreachTooBig && binary.BigEndian.Uint16(m[6:]) != 1400 {
			t.Errorf("MTU % x", m[4:8])
		}
		g.SendUnreachable(&ps[1], c.why, 1400)
		d = r.one(t, g)
		m = d[54:]
		if m[0] != c.t6 || m[1] != c.c6 || len(d) != 14+1280 || netip.AddrFrom16([16]byte(d[22:38])) != c.src6 {
			t.Errorf("%v over IPv6: % x", c.why, d[:70])
		}
		if c.why == UnreachTooBig && binary.BigEndian.Uint32(m[4:]) != 1400 {
			t.Errorf("MTU % x", m[4:8])
		}
	}
	// A flood is answered at a bounded rate.
	for range 2000 {
		g.SendUnreachable(&ps[0], UnreachPort, 0)
	}
	if n := len(r.take()); n > 200 || g.Drops().Get(frame.DropServiceLimit) < 1800 {
		t.Fatalf("%d answers to 2000 packets", n)
	}
}
