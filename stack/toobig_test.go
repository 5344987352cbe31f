package stack

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// TestAnswerTooBig: what a tunnel could not carry is answered from the gateway, to its sender's MAC, without a neighbour being known.
func TestAnswerTooBig(t *testing.T) {
	g, r := byHand(t, testConfig())
	other := wire.MAC{2, 0, 0, 0, 0, 9}
	con4b, con6b := con4.Next(), con6.Next()
	body := make([]byte, 3000)
	four, six := ipPacket(con4, con4b, wire.ProtoUDP, 64, udp(1, 2, body)), ipPacket(con6, con6b, wire.ProtoUDP, 64, udp(1, 2, body))
	for _, d := range [][]byte{four, six} {
		copy(d, other[:])
	}
	g.AnswerTooBig(four, 1422)
	d := r.one(t, g)
	m := d[34:]
	if wire.Dst(d) != conMAC || wire.Src(d) != gwMAC || m[0] != 3 || m[1] != 4 || binary.BigEndian.Uint32(m[4:]) != 1422 || netip.AddrFrom4([4]byte(d[26:30])) != gw4 ||
		netip.AddrFrom4([4]byte(d[30:34])) != con4 || !slices.Equal(m[8:], four[14:14+576-28]) || wire.Fold(wire.Sum(m, 0)) != 0xffff {
		t.Errorf("over IPv4: % x", d[:50])
	}
	for _, mtu := range []int{1402, 1000} {
		g.AnswerTooBig(six, mtu)
		d = r.one(t, g)
		m = d[54:]
		if wire.Dst(d) != conMAC || m[0] != 2 || m[1] != 0 || binary.BigEndian.Uint32(m[4:]) != uint32(max(mtu, 1280)) || netip.AddrFrom16([16]byte(d[22:38])) != gw6 || len(d) != 14+1280 ||
			!slices.Equal(m[8:], six[14:14+1280-48]) {
			t.Errorf("over IPv6: % x", d[:70])
		}
	}
	// An answer to a ping is no error: its sender is to learn too.
	pong := ipPacket(con4, con4b, wire.ProtoICMP, 64, echo(0, string(body)))
	g.AnswerTooBig(pong, 1422)
	r.one(t, g)
	// A superframe of more than 64 KiB has no length in its header.
	long := slices.Clone(four)
	binary.BigEndian.PutUint16(long[16:], 0)
	binary.BigEndian.PutUint16(long[24:], 0)
	binary.BigEndian.PutUint16(long[24:], ^wire.Fold(wire.Sum(long[14:34], 0)))
	g.AnswerTooBig(long, 1422)
	r.one(t, g)

	// Nobody is told of what is for several, of errors, of strangers, and of what is no packet.
	group := slices.Clone(four)
	copy(group, wire.Broadcast[:])
	stranger := ipPacket(far4, con4b, wire.ProtoUDP, 64, udp(1, 2, body))
	mcast := ipPacket(con4, netip.MustParseAddr("239.1.1.1"), wire.ProtoUDP, 64, udp(1, 2, body))
	about := ipPacket(con4, con4b, wire.ProtoICMP, 64, append([]byte{3, 4, 0, 0, 0, 0, 0, 0}, body...))
	tagged := eth(other, conMAC, wire.EtherTypeVLAN, append([]byte{0, 5, 8, 0}, four[14:]...))
	for _, d := range [][]byte{group, stranger, mcast, about, tagged, four[:20], eth(other, conMAC, wire.EtherTypeIPv4, nil), eth(other, conMAC, wire.EtherTypeIPv6, six[14:40]), nil} {
		g.AnswerTooBig(d, 1422)
		r.none(t)
	}
	// A flood is answered at a bounded rate.
	for range 2000 {
		g.AnswerTooBig(four, 1422)
	}
	if n := len(r.take()); n > 200 || g.Drops().Get(frame.DropServiceLimit) < 1800 {
		t.Fatalf("%d answers to 2000 packets", n)
	}
}

// TestSetMTU: another MTU is advertised at once, and what the gateway sends is cut to it.
func TestSetMTU(t *testing.T) {
	g, r := byHand(t, testConfig())
	g.SetNeighbor(con4, conMAC)
	if err := g.SetMTU(1400); err != nil {
		t.Fatal(err)
	}
	d := r.one(t, g)
	if i := slices.Index(d[70:], ndMTU); d[54] != ndRouterAdvert || i < 0 || binary.BigEndian.Uint32(d[70+i+4:]) != 1400 {
		t.Errorf("advertisement: % x", d)
	}
	out := ipPacket(far4, con4, wire.ProtoUDP, 64, udp(1, 2, make([]byte, 1450)))
	g.Send([]frame.Frame{{Data: out}})
	fs := r.take()
	if len(fs) != 2 || len(fs[0].Data) > 14+1400 || g.MTU() != 1400 {
		t.Errorf("%d frames, MTU %d", len(fs), g.MTU())
	}
	if err := g.SetMTU(1400); err != nil {
		t.Error(err)
	}
	r.none(t)
	for _, mtu := range []int{1279, 65536, -1} {
		if err := g.SetMTU(mtu); err == nil || g.MTU() != 1400 {
			t.Errorf("%d: %v, MTU %d", mtu, err, g.MTU())
		}
	}
}
