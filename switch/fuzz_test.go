package vswitch_test

import (
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

func ips(ss ...string) (as []netip.Addr) {
	for _, s := range ss {
		as = append(as, netip.MustParseAddr(s))
	}
	return as
}

// FuzzForward gives arbitrary bytes, cut into two frames, to an open and to a bound port. Nothing panics, every frame is accounted
// for, nothing is written to, and a bound port's frames come from its MAC.
func FuzzForward(f *testing.F) {
	add := func(fr frame.Frame) { f.Add(fr.Data, uint16(0), fr.Hdr.GSOType) }
	add(eth(mac(2), mac(1), "x"))
	add(eth(wire.Broadcast, mac(1), "x"))
	add(arp(mac(1), mac(1), "10.0.0.5"))
	add(tagged(arp(mac(1), mac(1), "10.0.0.6"), 0x8100))
	add(ip4(mac(1), "10.0.0.5", "10.0.0.1", 17, udp(68, 67)...))
	add(ip4(mac(1), "0.0.0.0", "255.255.255.255", 17, udp(68, 67)...))
	add(ip6(mac(1), "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::5", 2, mac(1))...))
	add(ip6(mac(1), "::", "ff02::1", 58, nd(135, "2001:db8::5", 0, mac(1))...))
	add(ip6(mac(1), "fe80::ff:fe00:1", "ff02::2", 58, nd(133, "", 1, mac(1))...))
	add(tagged(ip6(mac(1), "2001:db8::5", "2001:db8::1", 0, 58, 0, 5, 2, 0, 0, 1, 0), 0x88a8, 0x8100))
	f.Add([]byte{}, uint16(3), uint8(0x84))
	f.Fuzz(func(t *testing.T, data []byte, cut uint16, gso uint8) {
		s := vswitch.New(vswitch.Config{Log: quiet(), MaxMACs: 4})
		open, _ := s.AddPort(sink{}, vswitch.PortConfig{MACLimit: 1})
		bound, err := s.AddPort(sink{}, vswitch.PortConfig{MAC: mac(1), Addrs: ips("10.0.0.5", "2001:db8::5")})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.AddPort(portFunc(func(fs []frame.Frame) int {
			for i := range fs {
				if len(fs[i].Data) < wire.EthernetLen {
					t.Error("delivered a frame without a header")
				}
			}
			return len(fs) / 2
		}), none)
		before := string(data)
		n := min(int(cut), len(data))
		fs := []frame.Frame{{Data: data[:n:n], Hdr: wire.VirtioNetHdr{GSOType: gso}}, {Data: data[n:], Hdr: wire.VirtioNetHdr{GSOType: gso}}, {Data: data}}
		s.Ingress(open).Forward(fs)
		s.Ingress(bound).Forward(fs)
		if string(data) != before {
			t.Error("wrote to lent bytes")
		}
		balance(t, s)
		if rx := s.Stats().Total.RxFrames; rx != 6 {
			t.Errorf("rx %d, want 6", rx)
		}
		for _, e := range s.FDB() {
			if e.Port == bound && e.MAC != mac(1) || e.MAC.IsGroup() || e.MAC.IsZero() {
				t.Errorf("learned %+v", e)
			}
		}
	})
}
