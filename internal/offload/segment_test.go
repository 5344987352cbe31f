package offload

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

func TestSegment(t *testing.T) {
	const ack = wire.TCPAck
	for name, s := range map[string]shape{
		"TCP4":                     {payload: 65483, size: 1448, tcpOpts: 12, flags: ack},
		"TCP4 exact":               {payload: 4344, size: 1448, flags: ack | wire.TCPPsh},
		"TCP4 one over":            {payload: 1449, size: 1448, flags: ack | wire.TCPFin | wire.TCPPsh},
		"TCP4 odd":                 {payload: 3001, size: 777, tcpOpts: 4, flags: ack},
		"TCP4 CWR":                 {payload: 5000, size: 1448, flags: ack | wire.TCPCwr | wire.TCPEce | wire.TCPPsh},
		"TCP4 tagged":              {payload: 5000, size: 1444, vlan: true, flags: ack},
		"TCP4 IP options":          {payload: 5000, size: 1400, ipOpts: 40, tcpOpts: 40, flags: ack},
		"TCP4 sequence wraps":      {payload: 5000, size: 1448, seq: 0xffffff00, flags: ack},
		"TCP4 ID wraps":            {payload: 5000, size: 1000, id: 0xfffe, flags: ack},
		"TCP4 small segments":      {payload: 3000, size: 8, flags: ack},
		"TCP6":                     {v6: true, payload: 65000, size: 1428, tcpOpts: 12, flags: ack | wire.TCPPsh},
		"TCP6 extension":           {v6: true, payload: 9999, size: 1420, ipOpts: 24, flags: ack},
		"TCP6 tagged":              {v6: true, payload: 9999, size: 1420, vlan: true, flags: ack | wire.TCPCwr},
		"UDP4":                     {udp: true, payload: 14000, size: 1400},
		"UDP4 short last":          {udp: true, payload: 14001, size: 1400, id: 0xffff},
		"UDP4 tagged, options":     {udp: true, vlan: true, ipOpts: 8, payload: 5000, size: 1401},
		"UDP6":                     {udp: true, v6: true, payload: 65000, size: 1452},
		"UDP6 extension":           {udp: true, v6: true, payload: 5000, size: 1200, ipOpts: 8},
		"UDP4 datagrams of a byte": {udp: true, payload: 128, size: 1},
	} {
		f := super(s)
		before := bytes.Clone(f.Data)
		h := f.Hdr
		if !h.Validate(f.Data) {
			t.Fatalf("%s: superframe is refused at entry: %+v", name, f.Hdr)
		}
		segs := cut(t, &f)
		if want := (s.payload + s.size - 1) / s.size; len(segs) != want {
			t.Errorf("%s: %d segments, want %d", name, len(segs), want)
		}
		checkSegments(t, &f, segs)
		if !bytes.Equal(before, f.Data) {
			t.Errorf("%s: the frame was written to", name)
		}
	}
}

// The payload must be referenced and the head must be all that is written.
func TestSegmentGathers(t *testing.T) {
	f := super(shape{payload: 5000, size: 1448, tcpOpts: 12, flags: wire.TCPAck})
	var s Segmenter
	n, _ := s.Reset(&f)
	if s.HeadLen() != 66 || s.MaxLen() != 66+1448 {
		t.Errorf("head %d, longest %d", s.HeadLen(), s.MaxLen())
	}
	buf := bytes.Repeat([]byte{0xee}, 200)
	off := s.HeadLen()
	for range n {
		payload := s.Next(buf[50:])
		if &payload[0] != &f.Data[off] {
			t.Fatal("payload is a copy")
		}
		off += len(payload)
	}
	if untouched := bytes.Repeat([]byte{0xee}, 84); !bytes.Equal(buf[:50], untouched[:50]) || !bytes.Equal(buf[116:], untouched) {
		t.Error("more than the head was written")
	}
}

func TestPlainFrames(t *testing.T) {
	// A finished frame is its own only segment.
	f := super(shape{payload: 500, size: 500, flags: wire.TCPAck})
	f.Hdr = wire.VirtioNetHdr{}
	if segs := cut(t, &f); len(segs) != 1 || !bytes.Equal(segs[0], f.Data) {
		t.Error("a finished frame does not stay as it is")
	}
	if head, rest, ok := Finish(&f, nil); !ok || len(head) != 0 || &rest[0] != &f.Data[0] {
		t.Error("Finish does not leave a finished frame as it is")
	}
	for name, s := range map[string]shape{
		"TCP4":           {payload: 501, flags: wire.TCPAck},
		"TCP6 tagged":    {v6: true, vlan: true, payload: 1, flags: wire.TCPAck, tcpOpts: 12},
		"UDP4":           {udp: true, payload: 33},
		"UDP6 extension": {udp: true, v6: true, payload: 1000, ipOpts: 16},
		"empty UDP":      {udp: true, payload: 0},
	} {
		f := super(s)
		f.Hdr.GSOType, f.Hdr.GSOSize = 0, 0
		if !f.Hdr.Validate(f.Data) {
			t.Fatalf("%s: refused at entry", name)
		}
		before := bytes.Clone(f.Data)
		segs := cut(t, &f)
		checkWhole(t, segs[0])
		scratch := make([]byte, 0, wire.MaxHeaders)
		head, rest, ok := Finish(&f, scratch)
		if !ok || !bytes.Equal(append(bytes.Clone(head), rest...), segs[0]) {
			t.Errorf("%s: Finish and Segmenter disagree", name)
		}
		if !bytes.Equal(before, f.Data) {
			t.Errorf("%s: the frame was written to", name)
		}
	}
	super := super(shape{payload: 5000, size: 1000, flags: wire.TCPAck})
	if _, _, ok := Finish(&super, nil); ok {
		t.Error("Finish takes a superframe")
	}
	f = frame.Frame{Hdr: wire.VirtioNetHdr{Flags: 1, CsumStart: 65535, CsumOffset: 65535}, Data: make([]byte, 60)}
	if _, _, ok := Finish(&f, nil); ok {
		t.Error("Finish takes an offset outside the frame")
	}
	var s Segmenter
	if n, ok := s.Reset(&f); ok || n != 0 {
		t.Error("Segmenter takes an offset outside the frame")
	}
}

// A checksum that comes out as zero is sent as all ones, or a UDP receiver would take it for none.
func TestZeroChecksum(t *testing.T) {
	f := super(shape{udp: true, payload: 8, size: 4})
	for i := range 2 {
		// Choose the second half of each datagram so that its sum is all ones.
		p := f.Data[42+4*i:]
		binary.BigEndian.PutUint16(p[2:], 0)
		segs := cut(t, &f)
		binary.BigEndian.PutUint16(p[2:], binary.BigEndian.Uint16(segs[i][40:]))
	}
	for i, d := range cut(t, &f) {
		if d[40] != 0xff || d[41] != 0xff {
			t.Errorf("datagram %d has checksum %x", i, d[40:42])
		}
		checkWhole(t, d)
	}
}

func TestSegmentRefuses(t *testing.T) {
	good := super(shape{payload: 5000, size: 1448, flags: wire.TCPAck})
	for name, edit := range map[string]func(f *frame.Frame){
		"finished":      func(f *frame.Frame) { f.Hdr.Flags = 0 },
		"size zero":     func(f *frame.Frame) { f.Hdr.GSOSize = 0 },
		"UFO":           func(f *frame.Frame) { f.Hdr.GSOType = wire.GSOUDP },
		"other version": func(f *frame.Frame) { f.Hdr.GSOType = wire.GSOTCPv6 },
		"start":         func(f *frame.Frame) { f.Hdr.CsumStart++ },
		"start in IP":   func(f *frame.Frame) { f.Hdr.CsumStart = 20 },
		"start outside": func(f *frame.Frame) { f.Hdr.CsumStart = 65535 },
		"EtherType":     func(f *frame.Frame) { f.Data[12] = 0x86 },
		"IP version":    func(f *frame.Frame) { f.Data[14] = 0x65 },
		"data offset":   func(f *frame.Frame) { f.Data[34+12] = 0x40 },
		"cut":           func(f *frame.Frame) { f.Data = f.Data[:50] },
		"only Ethernet": func(f *frame.Frame) { f.Data = f.Data[:14] },
		"start in Ethernet of only Ethernet": func(f *frame.Frame) {
			f.Data, f.Hdr.CsumStart = f.Data[:wire.EthernetLen], 6
		},
		"nothing at all": func(f *frame.Frame) { f.Data = nil },
	} {
		f := frame.Frame{Hdr: good.Hdr, Data: bytes.Clone(good.Data)}
		edit(&f)
		var s Segmenter
		if n, ok := s.Reset(&f); ok || n != 0 {
			t.Errorf("%s: %d segments", name, n)
		}
	}
}

func TestSegmentDoesNotAllocate(t *testing.T) {
	f := super(shape{payload: 65000, size: 1448, tcpOpts: 12, flags: wire.TCPAck})
	plain := super(shape{payload: 1000, flags: wire.TCPAck})
	plain.Hdr.GSOType = 0
	scratch := make([]byte, wire.MaxHeaders)
	buf := make([]byte, 0, 70000)
	var s Segmenter
	if n := testing.AllocsPerRun(50, func() {
		for _, f := range []*frame.Frame{&f, &plain} {
			n, _ := s.Reset(f)
			for range n {
				s.Next(scratch)
			}
			n, _ = s.Reset(f)
			buf = buf[:0]
			for range n {
				buf = s.Append(buf[:0])
			}
		}
		Finish(&plain, scratch)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzSegment(f *testing.F) {
	seed := func(s shape) {
		fr := super(s)
		b := make([]byte, wire.VirtioNetHdrLen)
		fr.Hdr.Encode(b)
		f.Add(append(b, fr.Data...))
	}
	seed(shape{payload: 300, size: 100, tcpOpts: 12, flags: wire.TCPAck | wire.TCPPsh})
	seed(shape{payload: 300, size: 99, v6: true, vlan: true, ipOpts: 8, flags: wire.TCPAck | wire.TCPCwr})
	seed(shape{payload: 300, size: 101, udp: true, ipOpts: 8})
	seed(shape{payload: 30, size: 10, udp: true, v6: true})
	seed(shape{payload: 30, size: 30})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < wire.VirtioNetHdrLen {
			return
		}
		fr := frame.Frame{Data: b[wire.VirtioNetHdrLen:]}
		fr.Hdr.Decode(b)
		// Without validation: anything but a panic.
		var s Segmenter
		if n, ok := s.Reset(&fr); ok {
			if n < 1 {
				t.Fatalf("%d segments", n)
			}
			head := make([]byte, s.HeadLen())
			for range min(n, 200) {
				s.Next(head)
			}
		}
		Finish(&fr, nil)
		// Mended, so that random bytes get through the entry check, and validated: the segments are right.
		fr.Data = bytes.Clone(fr.Data)
		mend(&fr)
		if !fr.Hdr.Validate(fr.Data) {
			return
		}
		segs := cut(t, &fr)
		if fr.Superframe() {
			checkSegments(t, &fr, segs)
		} else if len(segs) != 1 {
			t.Fatalf("%d segments of a plain frame", len(segs))
		}
	})
}

// mend makes lengths and checksums of a frame agree with what its headers claim, without changing their kind.
func mend(f *frame.Frame) {
	et, l3, ok := wire.Payload(f.Data)
	if !ok {
		return
	}
	d := f.Data
	n := len(d) - l3
	switch {
	case et == wire.EtherTypeIPv4 && n >= wire.IPv4Len && n <= 65535:
		binary.BigEndian.PutUint16(d[l3+2:], uint16(n))
		h := d[l3 : l3+min(n, int(d[l3]&15)*4)]
		if len(h) >= wire.IPv4Len {
			h[10], h[11] = 0, 0
			binary.BigEndian.PutUint16(h[10:], ^wire.Fold(wire.Sum(h, 0)))
		}
	case et == wire.EtherTypeIPv6 && n >= wire.IPv6Len && n <= 65535+wire.IPv6Len:
		binary.BigEndian.PutUint16(d[l3+4:], uint16(n-wire.IPv6Len))
	default:
		return
	}
	p, ok := wire.ParseIP(d[l3:], false)
	if !ok {
		return
	}
	l4 := d[l3+p.HdrLen:]
	if p.Proto == wire.ProtoUDP && len(l4) >= wire.UDPLen {
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	}
	if p.Proto == wire.ProtoTCP || p.Proto == wire.ProtoUDP {
		wire.PutPartialL4(l4, p.Src, p.Dst, p.Proto, len(l4))
	}
}

func BenchmarkSegment(b *testing.B) {
	for _, s := range []shape{
		{payload: 65160, size: 1448, tcpOpts: 12, flags: wire.TCPAck},
		{v6: true, payload: 64260, size: 1428, tcpOpts: 12, flags: wire.TCPAck},
		{udp: true, payload: 64 * 1000, size: 1000},
	} {
		f := super(s)
		name := fmt.Sprintf("v6=%v,udp=%v", s.v6, s.udp)
		scratch := make([]byte, wire.MaxHeaders)
		b.Run(name, func(b *testing.B) {
			var sg Segmenter
			b.SetBytes(int64(len(f.Data)))
			b.ReportAllocs()
			for b.Loop() {
				n, _ := sg.Reset(&f)
				for range n {
					sg.Next(scratch)
				}
			}
		})
		b.Run(name+"/append", func(b *testing.B) {
			var sg Segmenter
			buf := make([]byte, 0, 100000)
			b.SetBytes(int64(len(f.Data)))
			b.ReportAllocs()
			for b.Loop() {
				n, _ := sg.Reset(&f)
				buf = buf[:0]
				for range n {
					buf = sg.Append(buf)
				}
			}
		})
	}
}
