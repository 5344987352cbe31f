package wire

import (
	"bytes"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestARP(t *testing.T) {
	in := ARP{Op: ARPReply, SenderMAC: MAC{2, 1, 2, 3, 4, 5}, SenderIP: a4, TargetMAC: MAC{2, 9, 8, 7, 6, 5}, TargetIP: b4}
	b := make([]byte, ARPLen+18)
	if n := PutARP(b, in); n != ARPLen {
		t.Fatalf("%d bytes", n)
	}
	if out, ok := ParseARP(b); !ok || out != in {
		t.Errorf("got %+v, %v, want %+v", out, ok, in)
	}
	if h := header.ARP(b); !h.IsValid() || h.Op() != header.ARPReply || !bytes.Equal(h.ProtocolAddressTarget(), b4.AsSlice()) {
		t.Error("gVisor disagrees")
	}
	for i := range 6 { // hardware and protocol type, both lengths
		b[i] ^= 1
		if _, ok := ParseARP(b); ok {
			t.Errorf("byte %d changed: taken", i)
		}
		b[i] ^= 1
	}
	if _, ok := ParseARP(b[:27]); ok {
		t.Error("27 bytes are taken")
	}
}

func FuzzARP(f *testing.F) {
	b := make([]byte, ARPLen)
	PutARP(b, ARP{Op: ARPRequest, SenderIP: a4, TargetIP: b4})
	f.Add(b)
	f.Add(b[:27])
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := ParseARP(b)
		if want := header.ARP(b).IsValid(); ok != want {
			t.Fatalf("we say %v, gVisor %v", ok, want)
		}
		if ok {
			out := make([]byte, ARPLen)
			PutARP(out, a)
			if !bytes.Equal(out, b[:ARPLen]) {
				t.Fatalf("%x comes back as %x", b[:ARPLen], out)
			}
		}
	})
}

func TestEcho(t *testing.T) {
	b := make([]byte, 200)
	for _, c := range []struct {
		src, dst netip.Addr
		typ      uint8
	}{{a4, b4, ICMPEcho}, {a4, b4, ICMPEchoReply}, {a6, b6, ICMPv6Echo}, {a6, b6, ICMPv6EchoReply}} {
		for _, payload := range [][]byte{nil, []byte("odd"), bytes.Repeat([]byte{0xa5}, 56)} {
			n := PutEcho(b, c.src, c.dst, c.typ, 0x1234, 0xfedc, 64, payload)
			p, ok := ParseIP(b[:n], false)
			if !ok || p.Len != n || p.Src != c.src || p.Dst != c.dst || p.TTL != 64 {
				t.Fatalf("%+v, %v", p, ok)
			}
			l4 := b[p.HdrLen:n]
			m, ok := ParseICMP(l4, p.Version)
			if !ok || m.Type != c.typ || m.ID != 0x1234 || m.Seq != 0xfedc || !m.IsEcho(p.Version) || m.IsError(p.Version) {
				t.Errorf("%+v, %v", m, ok)
			}
			if !VerifyL4(&p, l4) || !gvisorValid(&p, l4) || !bytes.Equal(l4[ICMPLen:], payload) {
				t.Errorf("type %d with %d bytes: checksum or payload is wrong", c.typ, len(payload))
			}
		}
	}
}

func TestICMPError(t *testing.T) {
	gw4, gw6 := netip.MustParseAddr("10.1.2.1"), netip.MustParseAddr("fd00::1")
	numbers := map[ICMPError][4]uint8{ // type and code for IPv4, then for IPv6: RFC 792, RFC 1812, RFC 4443
		ErrNet: {3, 0, 1, 0}, ErrHost: {3, 1, 1, 3}, ErrPort: {3, 3, 1, 4}, ErrProto: {3, 2, 4, 1}, ErrProhibited: {3, 13, 1, 1},
		ErrTooBig: {3, 4, 2, 0}, ErrTimeExceeded: {11, 0, 3, 0}, ErrReassembly: {11, 1, 3, 1},
	}
	b := make([]byte, 2000)
	for e, want := range numbers {
		for _, size := range []int{8, 9, 100, 1400} {
			udp := bytes.Repeat([]byte{0x5a}, size)
			PutUDP(udp, 1000, 2000, size-8)
			for i, pkt := range [][]byte{v4(ProtoUDP, udp), v6(ProtoUDP, udp, nil)} {
				src, limit, hl := gw4, 576, 28
				if i == 1 {
					src, limit, hl = gw6, 1280, 48
				}
				n, ok := PutICMPError(b, src, e, 1400, pkt)
				if !ok || n > limit || n != min(limit, hl+len(pkt)) {
					t.Fatalf("error %d, %d bytes: length %d, %v", e, size, n, ok)
				}
				p, ok := ParseIP(b[:n], false)
				orig, _ := ParseIP(pkt, false)
				if !ok || p.Src != src || p.Dst != orig.Src || p.Len != n {
					t.Fatalf("%+v, %v", p, ok)
				}
				l4 := b[p.HdrLen:n]
				m, ok := ParseICMP(l4, p.Version)
				if !ok || m.Type != want[2*i] || m.Code != want[2*i+1] || !m.IsError(p.Version) || !VerifyL4(&p, l4) || !gvisorValid(&p, l4) {
					t.Errorf("error %d: %+v, %v", e, m, ok)
				}
				if wantMTU := 1400; (e == ErrTooBig) != (m.MTU == wantMTU) {
					t.Errorf("error %d: MTU %d", e, m.MTU)
				}
				if MayAnswer(&p, l4) {
					t.Errorf("error %d may be answered with an error", e)
				}
				q, ql4, ok := ParseQuote(l4[ICMPLen:])
				if !ok || q != orig {
					t.Errorf("quote %+v, %v, want %+v", q, ok, orig)
				}
				if len(ql4) < 8 || !bytes.Equal(ql4, pkt[orig.HdrLen:][:len(ql4)]) {
					t.Errorf("quoted upper layer is %d bytes", len(ql4))
				}
			}
		}
	}
	pkt := v4(ProtoUDP, make([]byte, 8))
	for name, c := range map[string]struct {
		b, quote []byte
		src      netip.Addr
	}{
		"no quote": {b, nil, gw4}, "cut quote": {b, pkt[:19], gw4}, "other family": {b, pkt, gw6}, "no room": {b[:27], pkt, gw4},
		"no packet": {b, []byte("hello, this is no packet at all, not at all"), gw4}, "no address": {b, pkt, netip.Addr{}},
	} {
		if n, ok := PutICMPError(c.b, c.src, ErrPort, 0, c.quote); ok {
			t.Errorf("%s: %d bytes are written", name, n)
		}
	}
	if n, ok := PutICMPError(b[:30], gw4, ErrPort, 0, pkt); !ok || n != 30 {
		t.Errorf("cut to the buffer: %d, %v", n, ok)
	}
}

func TestMayAnswer(t *testing.T) {
	ip := func(src, dst string, proto uint8) IP {
		p := IP{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Version: 6, Proto: proto}
		if p.Src.Is4() {
			p.Version = 4
		}
		return p
	}
	echo4, echo6 := []byte{8, 0, 0, 0, 0, 0, 0, 0}, []byte{128, 0, 0, 0, 0, 0, 0, 0}
	for _, c := range []struct {
		name string
		p    IP
		l4   []byte
		want bool
	}{
		{"UDP", ip("10.0.0.2", "192.0.2.1", ProtoUDP), nil, true},
		{"echo", ip("10.0.0.2", "192.0.2.1", ProtoICMP), echo4, true},
		{"echo v6", ip("fd00::2", "2001:db8::1", ProtoICMPv6), echo6, true},
		{"cut ICMP", ip("10.0.0.2", "192.0.2.1", ProtoICMP), echo4[:7], false},
		{"error", ip("10.0.0.2", "192.0.2.1", ProtoICMP), []byte{3, 3, 0, 0, 0, 0, 0, 0}, false},
		{"unknown v6 error", ip("fd00::2", "2001:db8::1", ProtoICMPv6), []byte{100, 0, 0, 0, 0, 0, 0, 0}, false},
		{"redirect v6", ip("fd00::2", "2001:db8::1", ProtoICMPv6), []byte{137, 0, 0, 0, 0, 0, 0, 0}, false},
		{"to multicast", ip("10.0.0.2", "224.0.0.251", ProtoUDP), nil, false},
		{"to broadcast", ip("10.0.0.2", "255.255.255.255", ProtoUDP), nil, false},
		{"from nobody", ip("0.0.0.0", "192.0.2.1", ProtoUDP), nil, false},
		{"from loopback", ip("127.0.0.1", "192.0.2.1", ProtoUDP), nil, false},
		{"from multicast v6", ip("ff02::1", "2001:db8::1", ProtoUDP), nil, false},
		{"to multicast v6", ip("fd00::2", "ff02::fb", ProtoUDP), nil, false},
	} {
		if got := MayAnswer(&c.p, c.l4); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	p := ip("10.0.0.2", "192.0.2.1", ProtoUDP)
	p.FragOff = 8
	if MayAnswer(&p, nil) {
		t.Error("a fragment behind the first may be answered")
	}
}

func FuzzICMP(f *testing.F) {
	b := make([]byte, 1400)
	n, _ := PutICMPError(b, a4, ErrTooBig, 1400, v4(ProtoUDP, make([]byte, 30)))
	f.Add(bytes.Clone(b[20:n]))
	n, _ = PutICMPError(b, a6, ErrTooBig, 1400, v6(ProtoUDP, make([]byte, 30), nil))
	f.Add(bytes.Clone(b[40:n]))
	n = PutEcho(b, a6, b6, ICMPv6Echo, 1, 2, 64, nil)
	f.Add(bytes.Clone(b[40:n]))
	f.Fuzz(func(t *testing.T, b []byte) {
		out := make([]byte, 1300)
		for _, version := range []uint8{4, 6} {
			m, ok := ParseICMP(b, version)
			if ok != (len(b) >= 8) {
				t.Fatalf("%d bytes: %v", len(b), ok)
			}
			p := IP{Src: a4, Dst: b4, Version: 4, Proto: ProtoICMP}
			if version == 6 {
				p = IP{Src: a6, Dst: b6, Version: 6, Proto: ProtoICMPv6}
			}
			if !ok {
				if MayAnswer(&p, b) || VerifyL4(&p, b) && len(b) < 4 {
					t.Fatal("a cut message is taken")
				}
				continue
			}
			if VerifyL4(&p, b) != gvisorValid(&p, b) {
				t.Fatal("gVisor disagrees on the checksum")
			}
			if version == 4 {
				h := header.ICMPv4(b)
				if m.Type != uint8(h.Type()) || m.IsEcho(4) && (m.ID != h.Ident() || m.Seq != h.Sequence()) || m.MTU != 0 && m.MTU != int(h.MTU()) {
					t.Fatalf("gVisor disagrees with %+v", m)
				}
			} else {
				h := header.ICMPv6(b)
				if m.Type != uint8(h.Type()) || m.IsEcho(6) && (m.ID != h.Ident() || m.Seq != h.Sequence()) ||
					m.MTU != 0 && m.MTU != int(min(h.MTU(), 1<<31-1)) || h.Type().IsErrorType() && !m.IsError(6) {
					t.Fatalf("gVisor disagrees with %+v", m)
				}
			}
			if q, l4, ok := ParseQuote(b[ICMPLen:]); ok && (len(l4) < 8 || q.HdrLen+len(l4) > len(b)-ICMPLen) {
				t.Fatalf("quote %+v with %d bytes", q, len(l4))
			}
		}
		for _, src := range []netip.Addr{a4, a6} {
			if n, ok := PutICMPError(out, src, ErrPort, 0, b); ok {
				p, ok := ParseIP(out[:n], false)
				if !ok || p.Len != n || !VerifyL4(&p, out[p.HdrLen:n]) {
					t.Fatalf("error packet is wrong: %+v", p)
				}
			}
		}
	})
}
