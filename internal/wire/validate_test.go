package wire

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// eth puts an Ethernet header, with a VLAN tag if asked, before a packet.
func eth(packet []byte, tags ...uint16) []byte {
	b := make([]byte, 12, 14+4*len(tags)+len(packet))
	b[0], b[6] = 2, 2
	for _, t := range tags {
		b = binary.BigEndian.AppendUint16(b, t)
		b = binary.BigEndian.AppendUint16(b, 7)
	}
	et := EtherTypeIPv4
	if packet[0]>>4 == 6 {
		et = EtherTypeIPv6
	}
	return append(binary.BigEndian.AppendUint16(b, et), packet...)
}

func tcpSeg(payload int, flags uint8) []byte {
	b := make([]byte, TCPLen+12+payload)
	PutTCP(b, TCP{SrcPort: 1, DstPort: 2, Flags: flags})
	b[12] = 8 << 4 // 12 bytes of options
	return b
}

func udpSeg(payload int) []byte {
	b := make([]byte, UDPLen+payload)
	PutUDP(b, 1, 2, payload)
	return b
}

func TestValidate(t *testing.T) {
	const need, valid = VirtioNeedsCsum, VirtioDataValid
	t4, t6 := eth(v4(ProtoTCP, tcpSeg(4000, TCPAck))), eth(v6(ProtoTCP, tcpSeg(4000, TCPAck), nil))
	u4, u6 := eth(v4(ProtoUDP, udpSeg(4000))), eth(v6(ProtoUDP, udpSeg(4000), nil))
	tv := eth(v4(ProtoTCP, tcpSeg(4000, TCPAck)), EtherTypeVLAN)
	tx := eth(v6(ProtoTCP, tcpSeg(4000, TCPAck), []uint8{extDestOpts}, make([]byte, 8)))
	syn := eth(v4(ProtoTCP, tcpSeg(4000, TCPSyn)))
	frag := bytes.Clone(u4)
	frag[14+6] = 0x20
	refrag(frag[14:])
	padded := append(bytes.Clone(t4), 0)
	short := bytes.Clone(u4)
	short[14+20+5]-- // UDP length
	icmp6 := eth(v6(ProtoICMPv6, make([]byte, 32), nil))
	sctp := eth(v4(132, make([]byte, 32)))
	arp := append(eth(v4(0, nil))[:12], 0x08, 0x06)
	arp = append(arp, make([]byte, 28)...)
	qinq := eth(v4(ProtoTCP, tcpSeg(4000, TCPAck)), EtherTypeQinQ, EtherTypeVLAN)
	deep := eth(v6(ProtoTCP, tcpSeg(4000, TCPAck), []uint8{extDestOpts, extDestOpts}, append([]byte{0, 31}, make([]byte, 254)...), append([]byte{0, 31}, make([]byte, 254)...)))
	badsum := bytes.Clone(u4)
	badsum[14+10] ^= 1
	wrongtype := bytes.Clone(t4)
	wrongtype[12], wrongtype[13] = 0x86, 0xdd

	h := func(flags, gso uint8, size, start, off int) VirtioNetHdr {
		return VirtioNetHdr{Flags: flags, GSOType: gso, HdrLen: 0xbeef, GSOSize: uint16(size), CsumStart: uint16(start), CsumOffset: uint16(off)}
	}
	clean := func(flags, gso uint8, hdr, size, start, off int) VirtioNetHdr {
		return VirtioNetHdr{Flags: flags, GSOType: gso, HdrLen: uint16(hdr), GSOSize: uint16(size), CsumStart: uint16(start), CsumOffset: uint16(off)}
	}
	for _, c := range []struct {
		name string
		data []byte
		in   VirtioNetHdr
		ok   bool
		out  VirtioNetHdr
	}{
		{"zero", nil, VirtioNetHdr{}, true, VirtioNetHdr{}},
		{"only verified", u4, VirtioNetHdr{Flags: valid, HdrLen: 1, CsumStart: 2, CsumOffset: 3, GSOSize: 4}, true, VirtioNetHdr{Flags: valid}},
		{"nothing said", u4, VirtioNetHdr{HdrLen: 1, GSOSize: 4}, true, VirtioNetHdr{}},
		{"unknown flag", u4, h(4, 0, 0, 0, 0), false, VirtioNetHdr{}},
		{"unknown flag beside", u4, h(need|8, 0, 0, 34, 6), false, VirtioNetHdr{}},

		{"UDP checksum", u4, h(need, 0, 9, 34, 6), true, clean(need, 0, 0, 0, 34, 6)},
		{"UDP checksum, verified", u4, h(need|valid, 0, 9, 34, 6), true, clean(need|valid, 0, 0, 0, 34, 6)},
		{"TCP checksum", t6, h(need, 0, 0, 54, 16), true, clean(need, 0, 0, 0, 54, 16)},
		{"ICMPv6 checksum", icmp6, h(need, 0, 0, 54, 2), true, clean(need, 0, 0, 0, 54, 2)},
		{"another protocol's checksum", sctp, h(need, 0, 0, 34, 8), true, clean(need, 0, 0, 0, 34, 8)},
		{"tagged twice", qinq, h(need, 0, 0, 42, 16), true, clean(need, 0, 0, 0, 42, 16)},
		{"in a tunnel", u4, h(need, 0, 0, 34+8+8+14+20, 16), true, clean(need, 0, 0, 0, 84, 16)},
		{"as deep as allowed", u4, h(need, 0, 0, MaxHeaders-18, 16), true, clean(need, 0, 0, 0, MaxHeaders-18, 16)},
		{"too deep", u4, h(need, 0, 0, MaxHeaders-17, 16), false, VirtioNetHdr{}},
		{"wrong field", u4, h(need, 0, 0, 34, 16), false, VirtioNetHdr{}},
		{"ports", u4, h(need, 0, 0, 34, 0), false, VirtioNetHdr{}},
		{"between", u4, h(need, 0, 0, 36, 6), false, VirtioNetHdr{}},
		{"address", u4, h(need, 0, 0, 14+12, 2), false, VirtioNetHdr{}},
		{"source MAC", u4, h(need, 0, 0, 6, 2), false, VirtioNetHdr{}},
		{"source MAC of ARP", arp, h(need, 0, 0, 6, 2), false, VirtioNetHdr{}},
		{"behind the frame", u4, h(need, 0, 0, 34, len(u4)), false, VirtioNetHdr{}},
		{"at the frame's end", arp, h(need, 0, 0, len(arp)-2, 1), false, VirtioNetHdr{}},
		{"behind the packet", append(bytes.Clone(icmp6), 0, 0, 0, 0), h(need, 0, 0, len(icmp6), 0), false, VirtioNetHdr{}},
		{"overflow", u4, h(need, 0, 0, 0xffff, 0xffff), false, VirtioNetHdr{}},
		{"fragment", frag, h(need, 0, 0, 34, 6), false, VirtioNetHdr{}},
		{"no frame", nil, h(need, 0, 0, 0, 0), false, VirtioNetHdr{}},
		{"IP checksum", badsum, h(need, 0, 0, 34, 6), false, VirtioNetHdr{}},
		{"EtherType", wrongtype, h(need, 0, 0, 34, 16), false, VirtioNetHdr{}},
		{"ECN without superframe", t4, h(need, GSOECN, 0, 34, 16), false, VirtioNetHdr{}},

		{"TSO4", t4, h(need, GSOTCPv4, 1448, 34, 16), true, clean(need, GSOTCPv4, 66, 1448, 34, 16)},
		{"TSO4 with ECN", t4, h(need, GSOTCPv4|GSOECN, 1448, 34, 16), true, clean(need, GSOTCPv4|GSOECN, 66, 1448, 34, 16)},
		{"TSO4 tagged", tv, h(need, GSOTCPv4, 1448, 38, 16), true, clean(need, GSOTCPv4, 70, 1448, 38, 16)},
		{"TSO6", t6, h(need, GSOTCPv6, 1428, 54, 16), true, clean(need, GSOTCPv6, 86, 1428, 54, 16)},
		{"TSO6 with extension", tx, h(need, GSOTCPv6, 1428, 62, 16), true, clean(need, GSOTCPv6, 94, 1428, 62, 16)},
		{"USO4", u4, h(need, GSOUDPL4, 1000, 34, 6), true, clean(need, GSOUDPL4, 42, 1000, 34, 6)},
		{"USO6", u6, h(need, GSOUDPL4, 1452, 54, 6), true, clean(need, GSOUDPL4, 62, 1452, 54, 6)},
		{"fits one segment", t4, h(need, GSOTCPv4|GSOECN, 4000, 34, 16), true, clean(need, 0, 0, 0, 34, 16)},
		{"fits one datagram", u6, h(need, GSOUDPL4, 4000, 54, 6), true, clean(need, 0, 0, 0, 54, 6)},

		{"finished superframe", t4, h(0, GSOTCPv4, 1448, 34, 16), false, VirtioNetHdr{}},
		{"verified superframe", t4, h(valid, GSOTCPv4, 1448, 34, 16), false, VirtioNetHdr{}},
		{"TSO4 of IPv6", t6, h(need, GSOTCPv4, 1428, 54, 16), false, VirtioNetHdr{}},
		{"TSO6 of IPv4", t4, h(need, GSOTCPv6, 1428, 34, 16), false, VirtioNetHdr{}},
		{"TSO of UDP", u4, h(need, GSOTCPv4, 1428, 34, 16), false, VirtioNetHdr{}},
		{"USO of TCP", t4, h(need, GSOUDPL4, 1428, 34, 6), false, VirtioNetHdr{}},
		{"USO with ECN", u4, h(need, GSOUDPL4|GSOECN, 1000, 34, 6), false, VirtioNetHdr{}},
		{"UFO", u4, h(need, GSOUDP, 1000, 34, 6), false, VirtioNetHdr{}},
		{"unknown type", u4, h(need, 7, 1000, 34, 6), false, VirtioNetHdr{}},
		{"size zero", t4, h(need, GSOTCPv4, 0, 34, 16), false, VirtioNetHdr{}},
		{"TCP by the byte", t4, h(need, GSOTCPv4, MinTCPSegment-1, 34, 16), false, VirtioNetHdr{}},
		{"too many datagrams", u4, h(need, GSOUDPL4, 4000/MaxUDPSegments, 34, 6), false, VirtioNetHdr{}},
		{"many datagrams", u4, h(need, GSOUDPL4, 4000/MaxUDPSegments+1, 34, 6), true, clean(need, GSOUDPL4, 42, 32, 34, 6)},
		{"SYN", syn, h(need, GSOTCPv4, 1448, 34, 16), false, VirtioNetHdr{}},
		{"wrong start", t4, h(need, GSOTCPv4, 1448, 36, 16), false, VirtioNetHdr{}},
		{"wrong offset", t4, h(need, GSOTCPv4, 1448, 34, 6), false, VirtioNetHdr{}},
		{"padding", padded, h(need, GSOTCPv4, 1448, 34, 16), false, VirtioNetHdr{}},
		{"UDP length", short, h(need, GSOUDPL4, 1000, 34, 6), false, VirtioNetHdr{}},
		{"fragment as superframe", frag, h(need, GSOUDPL4, 1000, 34, 6), false, VirtioNetHdr{}},
		{"superframe tagged twice", qinq, h(need, GSOTCPv4, 1448, 42, 16), false, VirtioNetHdr{}},
		{"superframe of ARP", arp, h(need, GSOTCPv4, 1448, 20, 2), false, VirtioNetHdr{}},
		{"headers without end", deep, h(need, GSOTCPv6, 1448, 14+40+512, 16), false, VirtioNetHdr{}},
		{"cut TCP header", eth(v4(ProtoTCP, tcpSeg(0, TCPAck)[:24])), h(need, GSOTCPv4, 1448, 34, 16), false, VirtioNetHdr{}},
	} {
		got := c.in
		before := bytes.Clone(c.data)
		if ok := got.Validate(c.data); ok != c.ok {
			t.Errorf("%s: %v", c.name, ok)
		} else if ok && got != c.out {
			t.Errorf("%s: header becomes %+v, want %+v", c.name, got, c.out)
		} else if again := got; ok && (!again.Validate(c.data) || again != got) {
			t.Errorf("%s: what was validated becomes %+v", c.name, again)
		}
		if !bytes.Equal(before, c.data) {
			t.Errorf("%s: the frame was written to", c.name)
		}
	}
}

func refrag(ip []byte) {
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^Fold(Sum(ip[:20], 0)))
}

func TestUnfinishedL4(t *testing.T) {
	h := VirtioNetHdr{Flags: VirtioNeedsCsum, CsumStart: 34}
	if !h.UnfinishedL4(34) || h.UnfinishedL4(54) {
		t.Error("the checksum's place is not told")
	}
	h.Flags = VirtioDataValid
	if h.UnfinishedL4(34) {
		t.Error("a verified checksum is called unfinished")
	}
}

func TestVirtioNetHdrEncode(t *testing.T) {
	h := VirtioNetHdr{1, 0x81, 0x0203, 0x0405, 0x0607, 0x0809}
	var b [VirtioNetHdrLen]byte
	h.Encode(b[:])
	if want := [10]byte{1, 0x81, 3, 2, 5, 4, 7, 6, 9, 8}; b != want {
		t.Errorf("% x, want % x", b, want)
	}
	var back VirtioNetHdr
	if back.Decode(b[:]); back != h || back.GSO() != GSOTCPv4 {
		t.Errorf("%+v", back)
	}
}

func FuzzValidate(f *testing.F) {
	hdr := func(h VirtioNetHdr) []byte { b := make([]byte, 10); h.Encode(b); return b }
	add := func(data []byte, h VirtioNetHdr) { f.Add(append(hdr(h), data...)) }
	add(eth(v4(ProtoTCP, tcpSeg(300, TCPAck))), VirtioNetHdr{1, GSOTCPv4, 66, 100, 34, 16})
	add(eth(v6(ProtoTCP, tcpSeg(300, TCPAck), nil), EtherTypeVLAN), VirtioNetHdr{1, GSOTCPv6, 86, 100, 58, 16})
	add(eth(v4(ProtoUDP, udpSeg(300))), VirtioNetHdr{1, GSOUDPL4, 42, 100, 34, 6})
	add(eth(v6(ProtoICMPv6, make([]byte, 32), nil)), VirtioNetHdr{Flags: 1, CsumStart: 54, CsumOffset: 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < VirtioNetHdrLen {
			return
		}
		var h VirtioNetHdr
		h.Decode(b)
		data := b[VirtioNetHdrLen:]
		if _, off, ok := Payload(data); ok && len(data) >= off+IPv4Len && data[off]>>4 == 4 {
			data = bytes.Clone(data)
			n := min(len(data)-off, int(data[off]&15)*4)
			data[off+10], data[off+11] = 0, 0
			binary.BigEndian.PutUint16(data[off+10:], ^Fold(Sum(data[off:off+n], 0)))
		}
		if !h.Validate(data) {
			return
		}
		checkValid(t, &h, data)
		again := h
		if !again.Validate(data) || again != h {
			t.Fatalf("what was validated is refused or changed: %+v, then %+v", h, again)
		}
	})
}

// checkValid states what everybody behind Validate relies upon.
func checkValid(t *testing.T, h *VirtioNetHdr, data []byte) {
	t.Helper()
	if h.Flags&VirtioNeedsCsum == 0 {
		if *h != (VirtioNetHdr{Flags: h.Flags & VirtioDataValid}) {
			t.Fatalf("a finished frame with %+v", h)
		}
		return
	}
	field := int(h.CsumStart) + int(h.CsumOffset)
	if field+2 > len(data) || field+2 > MaxHeaders || h.CsumStart < EthernetLen {
		t.Fatalf("checksum outside the frame: %+v, %d bytes", h, len(data))
	}
	et, off, _ := Payload(data)
	if et == EtherTypeIPv4 || et == EtherTypeIPv6 {
		if p, ok := ParseIP(data[off:], false); !ok || field < off+p.HdrLen || field+2 > off+p.Len {
			t.Fatalf("checksum outside the packet: %+v, %+v", h, p)
		}
	}
	if h.GSOType == GSONone {
		if h.HdrLen != 0 || h.GSOSize != 0 {
			t.Fatalf("a plain frame with %+v", h)
		}
		return
	}
	payload := len(data) - int(h.HdrLen)
	if payload <= int(h.GSOSize) || h.GSOSize == 0 || h.HdrLen <= h.CsumStart || int(h.HdrLen) > MaxHeaders {
		t.Fatalf("superframe of %d bytes with %+v", len(data), h)
	}
	if h.GSO() == GSOUDPL4 && (payload+int(h.GSOSize)-1)/int(h.GSOSize) > MaxUDPSegments {
		t.Fatalf("too many datagrams: %d bytes by %d", payload, h.GSOSize)
	}
}

// spanIP is a second reading of the IP header: it must never disagree with ParseIP.
func FuzzSpanIP(f *testing.F) {
	f.Add(v4(ProtoUDP, []byte("12345678abc")), true)
	f.Add(v6(ProtoUDP, []byte("12345678abc"), nil), false)
	f.Add(v6(ProtoUDP, []byte("12345678abc"), []uint8{extHopByHop, extFragment}, make([]byte, 8), make([]byte, 8)), false)
	f.Add(v6(44, make([]byte, 8), nil), false)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend && len(b) >= IPv4Len {
			b = bytes.Clone(b)
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], ^Fold(Sum(b[:min(len(b), int(b[0]&15)*4)], 0)))
		}
		p, ok := ParseIP(b, false)
		for _, et := range []uint16{EtherTypeIPv4, EtherTypeIPv6} {
			s, sok := spanIP(b, et)
			if sok != (ok && (p.Version == 4) == (et == EtherTypeIPv4)) {
				t.Fatalf("spanIP %v, ParseIP %v", sok, ok)
			}
			if want := (ipSpan{p.HdrLen, p.Len, p.Proto, p.Version == 4, p.IsFragment()}); sok && s != want {
				t.Fatalf("spanIP %+v, ParseIP %+v", s, want)
			}
		}
	})
}

func TestParsersDoNotAllocate(t *testing.T) {
	big := eth(v4(ProtoTCP, tcpSeg(4000, TCPAck)))
	nd := make([]byte, NDNeighborLen)
	quote := make([]byte, 1280)
	arp := make([]byte, ARPLen)
	PutARP(arp, ARP{Op: ARPReply, SenderIP: a4, TargetIP: b4})
	echo := v6(ProtoICMPv6, make([]byte, 32), nil)
	for name, f := range map[string]func(){
		"Validate": func() { h := VirtioNetHdr{1, GSOTCPv4, 0, 1448, 34, 16}; ok = h.Validate(big) },
		"ParseIP":  func() { _, ok = ParseIP(big[14:], false) },
		"ParseTCP": func() { _, ok = ParseTCP(big[34:]) },
		"ParseUDP": func() { _, ok = ParseUDP(big[34:]) },
		"ParseARP": func() { _, ok = ParseARP(arp) },
		"ND": func() {
			n := PutND(nd, lla, SolicitedNode(a6), ND{Type: ICMPv6NeighborSol, Target: a6, Link: mac1})
			p, _ := ParseIP(nd[:n], false)
			if _, ok = ParseND(&p, nd[p.HdrLen:]); !ok || !VerifyL4(&p, nd[p.HdrLen:]) {
				t.Fatal("refused")
			}
		},
		"ICMP": func() {
			n, _ := PutICMPError(quote, a6, ErrPort, 0, echo)
			p, _ := ParseIP(quote[:n], false)
			_, _ = ParseICMP(quote[p.HdrLen:n], 6)
			_, _, ok = ParseQuote(quote[p.HdrLen+ICMPLen : n])
			PutEcho(quote, a4, b4, ICMPEcho, 1, 2, 64, arp)
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

var ok bool

func BenchmarkValidate(b *testing.B) {
	t4, t6 := eth(v4(ProtoTCP, tcpSeg(60000, TCPAck))), eth(v6(ProtoTCP, tcpSeg(60000, TCPAck), nil))
	for _, c := range []struct {
		name string
		data []byte
		h    VirtioNetHdr
	}{
		{"zero", t4, VirtioNetHdr{}},
		{"csum", t4, VirtioNetHdr{Flags: 1, CsumStart: 34, CsumOffset: 16}},
		{"tso4", t4, VirtioNetHdr{1, GSOTCPv4, 0, 1448, 34, 16}},
		{"tso6", t6, VirtioNetHdr{1, GSOTCPv6, 0, 1428, 54, 16}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				h := c.h
				ok = h.Validate(c.data)
			}
			if !ok {
				b.Fatal("refused")
			}
		})
	}
}
