package offload

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var (
	a4, b4 = netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("192.0.2.200")
	a6, b6 = netip.MustParseAddr("fd00:1:2:3::4"), netip.MustParseAddr("2001:db8:ffff::1")
)

// shape describes a superframe to be made.
type shape struct {
	v6, udp, vlan bool
	ipOpts        int // bytes of IPv4 options, or of an IPv6 destination options header, a multiple of 8
	tcpOpts       int // bytes
	payload, size int
	flags         uint8
	seq           uint32
	id            uint16
	ports         uint16 // added to the ports, so that flows differ
}

// super makes the superframe. It is valid by VirtioNetHdr.Validate.
func super(s shape) frame.Frame {
	l4 := make([]byte, wire.TCPLen+s.tcpOpts, wire.TCPLen+s.tcpOpts+s.payload)
	h := wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOSize: uint16(s.size)}
	proto := wire.ProtoTCP
	if s.udp {
		l4, proto = l4[:wire.UDPLen], wire.ProtoUDP
		wire.PutUDP(l4, 1000+s.ports, 2000, s.payload)
		h.GSOType, h.CsumOffset = wire.GSOUDPL4, wire.UDPChecksumOff
	} else {
		wire.PutTCP(l4, wire.TCP{SrcPort: 1000 + s.ports, DstPort: 2000, Seq: s.seq, Ack: 77, Flags: s.flags, Window: 501, Urgent: 0})
		l4[12] = uint8(len(l4)/4) << 4
		for i := range s.tcpOpts {
			l4[wire.TCPLen+i] = byte(i*37 + 5)
		}
		h.GSOType, h.CsumOffset = wire.GSOTCPv4, wire.TCPChecksumOff
		if s.v6 {
			h.GSOType = wire.GSOTCPv6
		}
		if s.flags&wire.TCPCwr != 0 {
			h.GSOType |= wire.GSOECN
		}
	}
	rng := rand.New(rand.NewPCG(uint64(s.payload), uint64(s.size)))
	for range s.payload {
		l4 = append(l4, byte(rng.Uint32()))
	}
	src, dst := a4, b4
	if s.v6 {
		src, dst = a6, b6
	}
	wire.PutPartialL4(l4, src, dst, proto, len(l4))

	d := make([]byte, 12, 128+len(l4))
	copy(d, "\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02")
	if s.vlan {
		d = append(d, 0x81, 0x00, 0x20, 0x07)
	}
	et := wire.EtherTypeIPv4
	if s.v6 {
		et = wire.EtherTypeIPv6
	}
	d = binary.BigEndian.AppendUint16(d, et)
	l3 := len(d)
	if s.v6 {
		d = append(d, make([]byte, wire.IPv6Len)...)
		next := proto
		if s.ipOpts > 0 {
			next = 60
		}
		wire.PutIPv6(d[l3:], src, dst, next, 0x2, 63, s.ipOpts+len(l4))
		if s.ipOpts > 0 {
			d = append(d, proto, byte(s.ipOpts/8-1), 1, byte(s.ipOpts-4)) // PadN
			d = append(d, make([]byte, s.ipOpts-4)...)
		}
	} else {
		d = append(d, make([]byte, wire.IPv4Len+s.ipOpts)...)
		ip := d[l3:]
		wire.PutIPv4(ip, src, dst, proto, 0x2, 63, len(ip)+len(l4), s.id, true)
		ip[0] = 0x40 | uint8(len(ip)/4)
		for i := range s.ipOpts {
			ip[wire.IPv4Len+i] = 1 // NOP
		}
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^wire.Fold(wire.Sum(ip, 0)))
	}
	h.CsumStart = uint16(len(d))
	f := frame.Frame{Hdr: h, Data: append(d, l4...)}
	return f
}

// cut segments f into whole frames.
func cut(t testing.TB, f *frame.Frame) [][]byte {
	var s Segmenter
	n, ok := s.Reset(f)
	if !ok {
		t.Fatalf("Reset refuses %+v of %d bytes", f.Hdr, len(f.Data))
	}
	var out [][]byte
	for range n {
		out = append(out, s.Append(nil))
	}
	return out
}

func addr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// checkWhole has gVisor check all checksums and lengths of a finished frame. It returns the parsed IP header and its offset.
func checkWhole(t testing.TB, d []byte) (wire.IP, int) {
	t.Helper()
	_, off, ok := wire.Payload(d)
	if !ok {
		t.Fatalf("no Ethernet frame: %x", d)
	}
	p, ok := wire.ParseIP(d[off:], false)
	if !ok || p.Len != len(d)-off {
		t.Fatalf("IP header is wrong: %+v, %v, %d bytes", p, ok, len(d)-off)
	}
	if p.Version == 4 && !header.IPv4(d[off:]).IsChecksumValid() {
		t.Fatal("IP checksum is wrong")
	}
	l4 := d[off+p.HdrLen:]
	switch p.Proto {
	case wire.ProtoTCP:
		h := header.TCP(l4)
		pay := l4[h.DataOffset():]
		if !h.IsChecksumValid(addr(p.Src), addr(p.Dst), checksum.Checksum(pay, 0), uint16(len(pay))) {
			t.Fatal("TCP checksum is wrong")
		}
	case wire.ProtoUDP:
		h := header.UDP(l4)
		if int(h.Length()) != len(l4) || h.Checksum() == 0 ||
			!h.IsChecksumValid(addr(p.Src), addr(p.Dst), checksum.Checksum(l4[wire.UDPLen:], 0)) {
			t.Fatal("UDP length or checksum is wrong")
		}
	}
	return p, off
}

// checkSegments holds the segments of f against what RFC and Linux say they are. It is written from the frame's bytes, not with Segmenter's means.
func checkSegments(t testing.TB, f *frame.Frame, segs [][]byte) {
	t.Helper()
	_, l3, _ := wire.Payload(f.Data)
	orig, ok := wire.ParseIP(f.Data[l3:], false)
	if !ok {
		t.Fatal("superframe is malformed")
	}
	l4 := l3 + orig.HdrLen
	hdrLen := l4 + wire.UDPLen
	var ot wire.TCP
	if orig.Proto == wire.ProtoTCP {
		ot, _ = wire.ParseTCP(f.Data[l4:])
		hdrLen = l4 + ot.HdrLen
	}
	var payload []byte
	for i, d := range segs {
		last := i == len(segs)-1
		p, off := checkWhole(t, d)
		if off != l3 || p.HdrLen != orig.HdrLen || !bytes.Equal(d[:l3], f.Data[:l3]) {
			t.Fatalf("segment %d: headers differ", i)
		}
		n := len(d) - hdrLen
		if last && (n < 1 || n > int(f.Hdr.GSOSize)) || !last && n != int(f.Hdr.GSOSize) {
			t.Fatalf("segment %d of %d: %d bytes", i, len(segs), n)
		}
		want := orig
		want.Len = p.Len
		if p.Version == 4 {
			want.FragID = uint32(uint16(orig.FragID) + uint16(i))
		}
		if p != want {
			t.Fatalf("segment %d: %+v, want %+v", i, p, want)
		}
		if orig.Proto == wire.ProtoTCP {
			s, _ := wire.ParseTCP(d[l4:])
			want := ot
			want.Seq += uint32(i * int(f.Hdr.GSOSize))
			want.Checksum = s.Checksum
			if i > 0 {
				want.Flags &^= wire.TCPCwr
			}
			if !last {
				want.Flags &^= wire.TCPFin | wire.TCPPsh
			}
			if s != want {
				t.Fatalf("segment %d: %+v, want %+v", i, s, want)
			}
			if !bytes.Equal(d[l4+wire.TCPLen:hdrLen], f.Data[l4+wire.TCPLen:hdrLen]) {
				t.Fatalf("segment %d: options differ", i)
			}
		} else if !bytes.Equal(d[l4:l4+4], f.Data[l4:l4+4]) {
			t.Fatalf("segment %d: ports differ", i)
		}
		if p.Version == 4 && !bytes.Equal(d[l3+20:l4], f.Data[l3+20:l4]) || p.Version == 6 && !bytes.Equal(d[l3+6:l4], f.Data[l3+6:l4]) {
			t.Fatalf("segment %d: IP options differ", i)
		}
		payload = append(payload, d[hdrLen:]...)
	}
	if !bytes.Equal(payload, f.Data[hdrLen:]) {
		t.Fatal("payload differs")
	}
}
