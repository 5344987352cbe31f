package wire

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// v4 makes an IPv4 packet around an upper-layer packet.
func v4(proto uint8, l4 []byte) []byte {
	b := make([]byte, IPv4Len+len(l4))
	PutIPv4(b, a4, b4, proto, 0x2e, 61, len(b), 0x1234, true)
	copy(b[IPv4Len:], l4)
	return b
}

// v6 makes an IPv6 packet; ext are extension headers, each beginning with a next-header byte that v6 fills in. Their types are exts.
func v6(proto uint8, l4 []byte, exts []uint8, ext ...[]byte) []byte {
	body := bytes.Join(append(ext, l4), nil)
	b := make([]byte, IPv6Len, IPv6Len+len(body))
	first := proto
	if len(exts) > 0 {
		first = exts[0]
	}
	PutIPv6(b, a6, b6, first, 0x2e, 61, len(body))
	off := 0
	for i := range ext {
		next := proto
		if i+1 < len(exts) {
			next = exts[i+1]
		}
		body[off] = next
		off += len(ext[i])
	}
	return append(b, body...)
}

func TestParseIPv4(t *testing.T) {
	good := v4(ProtoUDP, []byte("12345678abc"))
	p, ok := ParseIP(append(bytes.Clone(good), 0, 0, 0), false) // Ethernet padding
	want := IP{Src: a4, Dst: b4, Version: 4, Proto: ProtoUDP, TOS: 0x2e, TTL: 61, HdrLen: 20, Len: 31, DontFragment: true, FragID: 0x1234}
	if !ok || p != want {
		t.Fatalf("got %+v, %v, want %+v", p, ok, want)
	}
	if p.IsFragment() || !p.Src.Is4() {
		t.Error("a whole packet is taken for a fragment, or its address is not 4 bytes")
	}
	resum := func(b []byte) []byte {
		b[10], b[11] = 0, 0
		n := min(int(b[0]&15)*4, len(b))
		binary.BigEndian.PutUint16(b[10:], ^Fold(Sum(b[:n], 0)))
		return b
	}
	edit := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return resum(b)
	}
	for name, b := range map[string][]byte{
		"empty":               {},
		"one byte":            {0x45},
		"cut":                 good[:19],
		"version 5":           edit(func(b []byte) { b[0] = 0x55 }),
		"header 16":           edit(func(b []byte) { b[0] = 0x44 }),
		"header beyond":       edit(func(b []byte) { b[0] = 0x4f }),
		"total below header":  edit(func(b []byte) { b[3] = 19 }),
		"total beyond":        edit(func(b []byte) { b[3] = 32 }),
		"total zero":          edit(func(b []byte) { b[3] = 0 }),
		"checksum":            append(append(bytes.Clone(good[:10]), good[10]^1), good[11:]...),
		"header above total":  edit(func(b []byte) { b[0], b[3] = 0x46, 22 }),
		"nothing but version": {0x40},
	} {
		if p, ok := ParseIP(b, false); ok {
			t.Errorf("%s: taken as %+v", name, p)
		}
	}
	if p, ok := ParseIP(edit(func(b []byte) { b[3] = 0 }), true); !ok || p.Len != 31 {
		t.Errorf("superframe with total length 0: %+v, %v", p, ok)
	}
	p, ok = ParseIP(edit(func(b []byte) { b[6], b[7] = 0x20, 0x03 }), false)
	if !ok || !p.IsFragment() || !p.MoreFrags || p.FragOff != 24 || p.DontFragment {
		t.Errorf("fragment: %+v, %v", p, ok)
	}
}

func TestParseIPv6(t *testing.T) {
	l4 := []byte("12345678abc")
	opts := func(n int) []byte { return append([]byte{0, byte(n/8 - 1)}, make([]byte, n-2)...) }
	frag := func(off int, more bool) []byte {
		b := make([]byte, 8)
		binary.BigEndian.PutUint16(b[2:], uint16(off))
		if more {
			b[3] |= 1
		}
		binary.BigEndian.PutUint32(b[4:], 0xdeadbeef)
		return b
	}
	p, ok := ParseIP(v6(ProtoUDP, l4, nil), false)
	want := IP{Src: a6, Dst: b6, Version: 6, Proto: ProtoUDP, TOS: 0x2e, TTL: 61, HdrLen: 40, Len: 51, DontFragment: true}
	if !ok || p != want {
		t.Fatalf("got %+v, %v, want %+v", p, ok, want)
	}
	p, ok = ParseIP(v6(ProtoTCP, l4, []uint8{extHopByHop, extRouting, extFragment, extDestOpts}, opts(8), opts(24), frag(0, true), opts(16)), false)
	if !ok || p.Proto != ProtoTCP || p.HdrLen != 40+8+24+8+16 || !p.MoreFrags || p.FragID != 0xdeadbeef || p.FragOff != 0 {
		t.Errorf("extension headers: %+v, %v", p, ok)
	}
	p, ok = ParseIP(v6(ProtoTCP, l4, []uint8{extFragment}, frag(1448, false)), false)
	if !ok || p.FragOff != 1448 || p.MoreFrags || p.HdrLen != 48 || !p.IsFragment() {
		t.Errorf("last fragment: %+v, %v", p, ok)
	}
	// The walk is bounded, and the bound itself is allowed.
	many := func(n int) []byte {
		var types []uint8
		var ext [][]byte
		for range n {
			types, ext = append(types, extDestOpts), append(ext, opts(8))
		}
		return v6(ProtoTCP, l4, types, ext...)
	}
	if _, ok := ParseIP(many(maxExtHeaders), false); !ok {
		t.Error("as many extension headers as allowed are refused")
	}
	if _, ok := ParseIP(many(maxExtHeaders+1), false); ok {
		t.Error("more extension headers than allowed are taken")
	}
	good := v6(ProtoUDP, l4, []uint8{extDestOpts}, opts(8))
	edit := func(f func(b []byte)) []byte { b := bytes.Clone(good); f(b); return b }
	for name, b := range map[string][]byte{
		"cut":                  good[:39],
		"payload beyond":       edit(func(b []byte) { b[5]++ }),
		"option beyond":        edit(func(b []byte) { b[41] = 2 }),
		"option header beyond": edit(func(b []byte) { b[5] = 7 }),
		"fragment cut":         v6(ProtoUDP, nil, []uint8{extFragment}, frag(0, false)[:7]),
		"two fragment headers": v6(ProtoUDP, l4, []uint8{extFragment, extFragment}, frag(0, true), frag(8, false)),
		"version 4":            edit(func(b []byte) { b[0] = 0x40 }),
	} {
		if p, ok := ParseIP(b, false); ok {
			t.Errorf("%s: taken as %+v", name, p)
		}
	}
	if p, ok := ParseIP(edit(func(b []byte) { b[4], b[5] = 0, 0 }), true); !ok || p.Len != len(good) {
		t.Errorf("superframe with payload length 0: %+v, %v", p, ok)
	}
}

func TestPutIPAgainstGVisor(t *testing.T) {
	b := v4(ProtoTCP, make([]byte, 7))
	h := header.IPv4(b)
	if !h.IsValid(len(b)) || !h.IsChecksumValid() || naddr(h.SourceAddress()) != a4 || naddr(h.DestinationAddress()) != b4 ||
		h.TTL() != 61 || h.Protocol() != ProtoTCP || h.ID() != 0x1234 || h.Flags() != header.IPv4FlagDontFragment {
		t.Errorf("gVisor reads %+v", h)
	}
	b = v6(ProtoTCP, make([]byte, 7), nil)
	h6 := header.IPv6(b)
	tos, label := h6.TOS()
	if !h6.IsValid(len(b)) || naddr(h6.SourceAddress()) != a6 || naddr(h6.DestinationAddress()) != b6 || h6.HopLimit() != 61 ||
		h6.NextHeader() != ProtoTCP || tos != 0x2e || label != 0 {
		t.Errorf("gVisor reads %+v", h6)
	}
}

// checkIP compares ParseIP with gVisor on any bytes.
func checkIP(t *testing.T, b []byte) {
	p, ok := ParseIP(b, false)
	if !ok {
		// What we refuse though gVisor's header alone would pass is a checksum or the extension headers.
		if len(b) > 0 && b[0]>>4 == 4 {
			if h := header.IPv4(b); h.IsValid(len(b)) && h.IsChecksumValid() {
				t.Fatalf("gVisor takes %x", b)
			}
		}
		return
	}
	if p.HdrLen > p.Len || p.Len > len(b) || p.HdrLen < 20 {
		t.Fatalf("lengths: %+v of %d bytes", p, len(b))
	}
	if p.Version == 4 {
		h := header.IPv4(b)
		if !h.IsValid(len(b)) || !h.IsChecksumValid() {
			t.Fatalf("gVisor refuses %+v", p)
		}
		if p.Src != naddr(h.SourceAddress()) || p.Dst != naddr(h.DestinationAddress()) || p.Proto != h.Protocol() || p.TTL != h.TTL() ||
			p.HdrLen != int(h.HeaderLength()) || p.Len != int(h.TotalLength()) || p.MoreFrags != h.More() ||
			p.FragOff != int(h.FragmentOffset()) || p.FragID != uint32(h.ID()) {
			t.Fatalf("gVisor disagrees with %+v", p)
		}
		return
	}
	h := header.IPv6(b)
	tos, _ := h.TOS()
	if !h.IsValid(len(b)) || p.Src != naddr(h.SourceAddress()) || p.Dst != naddr(h.DestinationAddress()) || p.TTL != h.HopLimit() ||
		p.Len != IPv6Len+int(h.PayloadLength()) || p.TOS != tos {
		t.Fatalf("gVisor disagrees with %+v", p)
	}
	if p.IsFragment() {
		return
	}
	it := header.MakeIPv6PayloadIterator(header.IPv6ExtensionHeaderIdentifier(h.NextHeader()), buffer.MakeWithData(b[IPv6Len:p.Len]))
	defer it.Release()
	for {
		ext, done, err := it.Next()
		if err != nil {
			return // gVisor also checks what is in the options
		}
		if done {
			return // no next header (59)
		}
		switch e := ext.(type) {
		case header.IPv6RawPayloadHeader:
			if uint8(e.Identifier) != p.Proto || int(e.Buf.Size()) != p.Len-p.HdrLen {
				t.Fatalf("gVisor finds protocol %d, %d bytes; we %+v", e.Identifier, e.Buf.Size(), p)
			}
			e.Release()
			return
		case header.IPv6ExperimentExtHdr:
			return // we do not walk over those
		default:
			ext.Release()
		}
	}
}

func FuzzParseIP(f *testing.F) {
	f.Add(v4(ProtoUDP, []byte("12345678abc")))
	f.Add(v6(ProtoUDP, []byte("12345678abc"), nil))
	f.Add(v6(ProtoUDP, []byte("12345678abc"), []uint8{extHopByHop, extFragment}, make([]byte, 8), make([]byte, 8)))
	f.Add(v6(ProtoTCP, make([]byte, 20), []uint8{extDestOpts, extRouting}, append([]byte{0, 1}, make([]byte, 14)...), make([]byte, 8)))
	f.Fuzz(func(t *testing.T, b []byte) {
		checkIP(t, b)
		if len(b) >= IPv4Len && b[0]>>4 == 4 {
			// Random bytes hardly ever have a right checksum: mend it and look again.
			b = bytes.Clone(b)
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], ^Fold(Sum(b[:min(len(b), int(b[0]&15)*4)], 0)))
			checkIP(t, b)
		}
		if p, ok := ParseIP(b, true); ok && (p.HdrLen > p.Len || p.Len > len(b)) {
			t.Fatalf("lengths: %+v of %d bytes", p, len(b))
		}
	})
}

func TestPayload(t *testing.T) {
	eth := make([]byte, 22)
	PutEthernet(eth, MAC{1}, MAC{2}, EtherTypeARP)
	if et, off, ok := Payload(eth); et != EtherTypeARP || off != 14 || !ok {
		t.Errorf("untagged: %#x, %d, %v", et, off, ok)
	}
	PutEthernet(eth, MAC{1}, MAC{2}, EtherTypeVLAN)
	eth[16], eth[17] = 0x86, 0xdd
	if et, off, ok := Payload(eth); et != EtherTypeIPv6 || off != 18 || !ok {
		t.Errorf("tagged: %#x, %d, %v", et, off, ok)
	}
	for _, n := range []int{0, 13, 17} {
		if _, _, ok := Payload(eth[:n]); ok {
			t.Errorf("%d bytes of a tagged frame are taken", n)
		}
	}
	if Dst(eth) != (MAC{1}) || Src(eth) != (MAC{2}) {
		t.Error("addresses")
	}
}

func TestMAC(t *testing.T) {
	m, err := ParseMAC("02:00:5e:10:00:01")
	if err != nil || m.String() != "02:00:5e:10:00:01" || m.IsGroup() || m.IsZero() {
		t.Errorf("%v, %v", m, err)
	}
	for _, s := range []string{"", "02:00:5e:10:00", "02:00:5e:10:00:01:02:03"} {
		if _, err := ParseMAC(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
	if b, _ := m.MarshalText(); string(b) != m.String() {
		t.Errorf("text %q", b)
	}
	var u MAC
	if err := u.UnmarshalText([]byte("ff:ff:ff:ff:ff:ff")); err != nil || u != Broadcast || !u.IsGroup() {
		t.Errorf("%v, %v", u, err)
	}
	if got := MulticastMAC(netip.MustParseAddr("239.129.2.3")); got.String() != "01:00:5e:01:02:03" {
		t.Errorf("group address %v", got)
	}
	if got := MulticastMAC(SolicitedNode(netip.MustParseAddr("2001:db8::aa:bbcc"))); got.String() != "33:33:ff:aa:bb:cc" {
		t.Errorf("group address %v", got)
	}
	if got := LinkLocal(m); got != netip.MustParseAddr("fe80::5eff:fe10:1") {
		t.Errorf("link-local address %v", got)
	}
}
