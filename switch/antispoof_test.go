package vswitch_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

func tagged(f frame.Frame, tags ...uint16) frame.Frame {
	b := append([]byte{}, f.Data[:12]...)
	for _, t := range tags {
		b = binary.BigEndian.AppendUint16(b, t)
		b = binary.BigEndian.AppendUint16(b, 0)
	}
	return frame.Frame{Data: append(b, f.Data[12:]...), Hdr: f.Hdr}
}

func ip4(src wire.MAC, from, to string, proto uint8, payload ...byte) frame.Frame {
	b := make([]byte, 34, 34+len(payload))
	wire.PutEthernet(b, wire.Broadcast, src, wire.EtherTypeIPv4)
	wire.PutIPv4(b[14:], netip.MustParseAddr(from), netip.MustParseAddr(to), proto, 0, 64, 20+len(payload), 0, true)
	return frame.Frame{Data: append(b, payload...)}
}

// ip4opt is ip4 with four bytes of options.
func ip4opt(src wire.MAC, from, to string, proto uint8, payload ...byte) frame.Frame {
	f := ip4(src, from, to, proto, append([]byte{1, 1, 1, 0}, payload...)...)
	f.Data[14]++ // header length
	binary.BigEndian.PutUint16(f.Data[24:], 0)
	binary.BigEndian.PutUint16(f.Data[24:], ^wire.Fold(wire.Sum(f.Data[14:38], 0)))
	return f
}

func udp(sport, dport uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	return append(binary.BigEndian.AppendUint16(b, dport), 0, 8, 0, 0)
}

func ip6(src wire.MAC, from, to string, proto uint8, payload ...byte) frame.Frame {
	b := make([]byte, 54, 54+len(payload))
	wire.PutEthernet(b, wire.Broadcast, src, wire.EtherTypeIPv6)
	wire.PutIPv6(b[14:], netip.MustParseAddr(from), netip.MustParseAddr(to), proto, 0, 255, len(payload))
	return frame.Frame{Data: append(b, payload...)}
}

func arp(ether, sender wire.MAC, ip string) frame.Frame {
	b := make([]byte, 14, 42)
	wire.PutEthernet(b, wire.Broadcast, ether, wire.EtherTypeARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(b, sender[:]...)
	b = append(b, netip.MustParseAddr(ip).AsSlice()...)
	return frame.Frame{Data: append(b, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1)}
}

// nd is an ND message of a type with a target (or none) and a link-layer address option (or none).
func nd(typ byte, target string, opt byte, m wire.MAC) []byte {
	b := []byte{typ, 0, 0, 0, 0, 0, 0, 0}
	if target != "" {
		b = append(b, netip.MustParseAddr(target).AsSlice()...)
	}
	if opt != 0 {
		b = append(append(b, opt, 1), m[:]...)
	}
	return b
}

func TestAntiSpoofing(t *testing.T) {
	const ok = frame.Drop(255)
	own, other := mac(1), mac(2)
	hop := func(next byte, rest []byte) []byte { return append([]byte{next, 0, 5, 2, 0, 0, 1, 0}, rest...) }
	ll := "fe80::ff:fe00:1" // EUI-64 of 02:00:00:00:00:01
	for _, c := range []struct {
		name string
		f    frame.Frame
		want frame.Drop
	}{
		{"own IPv4", ip4(own, "10.0.0.5", "10.0.0.1", 17, udp(1, 2)...), ok},
		{"own IPv4, tagged", tagged(ip4(own, "10.0.0.5", "10.0.0.1", 17, udp(1, 2)...), 0x8100), ok},
		{"other MAC", ip4(other, "10.0.0.5", "10.0.0.1", 17, udp(1, 2)...), frame.DropSpoofMAC},
		{"other IPv4", ip4(own, "10.0.0.6", "10.0.0.1", 17, udp(1, 2)...), frame.DropSpoofIP},
		{"other IPv4, tagged", tagged(ip4(own, "10.0.0.6", "10.0.0.1", 17), 0x8100), frame.DropSpoofIP},
		{"other IPv4, 802.1ad", tagged(ip4(own, "10.0.0.6", "10.0.0.1", 17), 0x88a8), frame.DropSpoofIP},
		{"other IPv4, two tags", tagged(ip4(own, "10.0.0.6", "10.0.0.1", 17), 0x88a8, 0x8100), frame.DropSpoofIP},
		{"five tags", tagged(ip4(own, "10.0.0.5", "10.0.0.1", 17), 0x8100, 0x8100, 0x8100, 0x8100, 0x8100), frame.DropMalformed},
		{"tag cut off", frame.Frame{Data: tagged(ip4(own, "10.0.0.5", "10.0.0.1", 17), 0x8100).Data[:16]}, frame.DropMalformed},
		{"IPv4 cut off", frame.Frame{Data: ip4(own, "10.0.0.5", "10.0.0.1", 17).Data[:33]}, frame.DropMalformed},
		{"DHCP client", ip4(own, "0.0.0.0", "255.255.255.255", 17, udp(68, 67)...), ok},
		{"DHCP server", ip4(own, "10.0.0.5", "255.255.255.255", 17, udp(67, 68)...), frame.DropSpoofIP},
		{"DHCP server, tagged", tagged(ip4(own, "10.0.0.5", "10.0.0.7", 17, udp(67, 68)...), 0x8100), frame.DropSpoofIP},
		{"DHCP server, IP options", ip4opt(own, "10.0.0.5", "10.0.0.7", 17, udp(67, 68)...), frame.DropSpoofIP},
		{"DHCP, renewal", ip4(own, "10.0.0.5", "10.0.0.1", 17, udp(68, 67)...), ok},
		{"DHCPv6 server", ip6(own, ll, "fe80::2", 17, udp(547, 546)...), frame.DropSpoofIP},
		{"DHCPv6 server behind hop-by-hop", ip6(own, ll, "fe80::2", 0, hop(17, udp(547, 546))...), frame.DropSpoofIP},
		{"DHCPv6 client", ip6(own, ll, "ff02::1:2", 17, udp(546, 547)...), ok},
		{"unspecified, not DHCP", ip4(own, "0.0.0.0", "255.255.255.255", 17, udp(68, 53)...), frame.DropSpoofIP},
		{"IGMP report", ip4(own, "0.0.0.0", "224.0.0.22", 2), ok},

		{"own ARP", arp(own, own, "10.0.0.5"), ok},
		{"ARP probe", arp(own, own, "0.0.0.0"), ok},
		{"ARP, other IP", arp(own, own, "10.0.0.1"), frame.DropSpoofIP},
		{"ARP, other IP, tagged", tagged(arp(own, own, "10.0.0.1"), 0x8100), frame.DropSpoofIP},
		{"ARP, other sender MAC", arp(own, other, "10.0.0.5"), frame.DropSpoofMAC},
		{"ARP cut off", frame.Frame{Data: arp(own, own, "10.0.0.5").Data[:40]}, frame.DropMalformed},
		{"ARP with odd lengths", func() frame.Frame { f := arp(own, own, "10.0.0.5"); f.Data[18] = 8; return f }(), frame.DropMalformed},

		{"own IPv6", ip6(own, "2001:db8::5", "2001:db8::1", 17, udp(1, 2)...), ok},
		{"own link-local", ip6(own, ll, "ff02::fb", 17, udp(5353, 5353)...), ok},
		{"other IPv6", ip6(own, "2001:db8::6", "2001:db8::1", 17, udp(1, 2)...), frame.DropSpoofIP},
		{"other link-local", ip6(own, "fe80::1", "ff02::fb", 17, udp(5353, 5353)...), frame.DropSpoofIP},
		{"other IPv6 behind hop-by-hop", ip6(own, "2001:db8::6", "2001:db8::1", 0, hop(17, udp(1, 2))...), frame.DropSpoofIP},
		{"IPv6 cut off", frame.Frame{Data: ip6(own, "2001:db8::5", "2001:db8::1", 17).Data[:50]}, frame.DropMalformed},
		{"unspecified, not ICMPv6", ip6(own, "::", "2001:db8::1", 17, udp(1, 2)...), frame.DropSpoofIP},
		{"MLD report", ip6(own, "::", "ff02::16", 0, hop(58, []byte{143, 0, 0, 0, 0, 0, 0, 0})...), ok},

		{"solicit", ip6(own, ll, "ff02::1:ff00:1", 58, nd(135, "2001:db8::1", 1, own)...), ok},
		{"solicit, other source MAC", ip6(own, ll, "ff02::1:ff00:1", 58, nd(135, "2001:db8::1", 1, other)...), frame.DropSpoofMAC},
		{"solicit, other source MAC, behind hop-by-hop", ip6(own, ll, "ff02::1:ff00:1", 0, hop(58, nd(135, "2001:db8::1", 1, other))...), frame.DropSpoofMAC},
		{"DAD for own", ip6(own, "::", "ff02::1:ff00:5", 58, nd(135, "2001:db8::5", 0, own)...), ok},
		{"DAD for another's", ip6(own, "::", "ff02::1:ff00:6", 58, nd(135, "2001:db8::6", 0, own)...), frame.DropSpoofIP},
		{"advert of own", ip6(own, "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::5", 2, own)...), ok},
		{"advert of link-local", ip6(own, ll, "ff02::1", 58, nd(136, ll, 2, own)...), ok},
		{"advert of another's", ip6(own, "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::1", 2, own)...), frame.DropSpoofIP},
		{"advert with another's MAC", ip6(own, "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::5", 2, other)...), frame.DropSpoofMAC},
		{"advert cut off", ip6(own, "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::5", 0, own)[:20]...), frame.DropMalformed},
		{"option of length 0", ip6(own, ll, "ff02::1", 58, append(nd(135, "2001:db8::1", 0, own), 1, 0, 0, 0, 0, 0, 0, 0)...), frame.DropMalformed},
		{"router solicit", ip6(own, ll, "ff02::2", 58, nd(133, "", 1, own)...), ok},
		{"router solicit, other MAC", ip6(own, ll, "ff02::2", 58, nd(133, "", 1, other)...), frame.DropSpoofMAC},
		{"router advert", ip6(own, ll, "ff02::1", 58, nd(134, "", 1, own)...), frame.DropSpoofIP},
		{"redirect", ip6(own, ll, "ff02::1", 58, nd(137, "", 1, own)...), frame.DropSpoofIP},
		{"echo", ip6(own, "2001:db8::5", "2001:db8::1", 58, 128, 0, 0, 0, 0, 0, 0, 0), ok},
		{"other EtherType", eth(wire.Broadcast, own, "x"), ok},
	} {
		t.Run(c.name, func(t *testing.T) {
			bound := vswitch.PortConfig{MAC: own, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("2001:db8::5")}}
			b := newBench(t, vswitch.Config{}, bound, none)
			b.send(0, c.f)
			n := len(b.ports[1].take())
			if c.want == ok {
				if n != 1 {
					t.Errorf("dropped: %v", b.drops(0))
				}
			} else {
				if n != 0 {
					t.Error("delivered")
				}
				b.wantDrop(0, c.want, 1)
			}
			balance(t, b.s)
			// An unbound port is believed.
			b.send(1, func() frame.Frame {
				f := frame.Frame{Data: append([]byte{}, c.f.Data...)}
				copy(f.Data[6:], []byte{2, 0, 0, 0, 0, 77})
				return f
			}())
			if len(b.ports[0].take()) != 1 {
				t.Errorf("unbound port: dropped: %v", b.drops(1))
			}
		})
	}
}

func TestBind(t *testing.T) {
	b := newBench(t, vswitch.Config{}, vswitch.PortConfig{MAC: mac(1)}, none)
	f := ip4(mac(1), "10.0.0.5", "10.0.0.1", 17)
	ra := ip6(mac(1), "fe80::1", "ff02::1", 58, nd(134, "", 1, mac(1))...)
	got := func() int { b.send(0, f, ra); return len(b.ports[1].take()) }
	if n := got(); n != 2 {
		t.Errorf("bound to a MAC alone: %d of 2 delivered", n)
	}
	for addr, want := range map[string]int{"10.0.0.5": 1, "10.0.0.6": 0} {
		if err := b.s.Bind(b.ids[0], []netip.Addr{netip.MustParseAddr(addr)}); err != nil {
			t.Fatal(err)
		}
		if n := got(); n != want {
			t.Errorf("bound to %s: %d delivered, want %d", addr, n, want)
		}
	}
	if err := b.s.Bind(99, nil); err == nil {
		t.Error("bound a port that is not there")
	}
	// Addresses without a MAC: any link-local source passes, unless one is named.
	b = newBench(t, vswitch.Config{}, vswitch.PortConfig{Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5")}}, none)
	b.send(0, ip6(mac(3), "fe80::3", "ff02::fb", 17, udp(1, 2)...))
	if len(b.ports[1].take()) != 1 {
		t.Errorf("link-local source: %v", b.drops(0))
	}
	// What is dropped as spoofed is not learned.
	b.send(0, ip4(mac(4), "10.0.0.9", "10.0.0.1", 17))
	for _, e := range b.s.FDB() {
		if e.MAC == mac(4) {
			t.Error("learned from a spoofed frame")
		}
	}
}
