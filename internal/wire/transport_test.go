package wire

import (
	"bytes"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestTCP(t *testing.T) {
	in := TCP{SrcPort: 1, DstPort: 0xfffe, Seq: 0x01020304, Ack: 0xa0b0c0d0, HdrLen: 20, Flags: TCPSyn | TCPCwr, Window: 0x8001, Urgent: 7}
	b := make([]byte, 24)
	PutTCP(b, in)
	if out, ok := ParseTCP(b); !ok || out != in {
		t.Errorf("got %+v, %v, want %+v", out, ok, in)
	}
	b[12] = 6 << 4
	if out, ok := ParseTCP(b); !ok || out.HdrLen != 24 {
		t.Errorf("with options: %+v, %v", out, ok)
	}
	for name, b := range map[string][]byte{
		"cut":           b[:19],
		"offset 4":      append(append(bytes.Clone(b[:12]), 4<<4), b[13:]...),
		"offset beyond": append(append(bytes.Clone(b[:12]), 7<<4), b[13:]...),
	} {
		if out, ok := ParseTCP(b); ok {
			t.Errorf("%s: taken as %+v", name, out)
		}
	}
}

func TestTCPMSS(t *testing.T) {
	for name, c := range map[string]struct {
		opts []byte
		mss  uint16
		off  int
		ok   bool
	}{
		"first":     {[]byte{2, 4, 5, 0xb4}, 1460, 22, true},
		"behind":    {[]byte{1, 3, 3, 7, 2, 4, 5, 0xb4}, 1460, 26, true},
		"none":      {[]byte{1, 1, 1, 1}, 0, 0, false},
		"end first": {[]byte{0, 2, 4, 5, 0xb4, 0, 0, 0}, 0, 0, false},
		"length 3":  {[]byte{2, 3, 5, 1}, 0, 0, false},
		"length 0":  {[]byte{3, 0, 2, 4}, 0, 0, false},
		"length 1":  {[]byte{3, 1, 2, 4}, 0, 0, false},
		"cut":       {[]byte{1, 1, 2, 4}, 0, 0, false},
		"kind only": {[]byte{1, 1, 1, 2}, 0, 0, false},
	} {
		b := append(make([]byte, 20), c.opts...)
		b[12] = uint8(len(b)/4) << 4
		b = append(b, 2, 4, 0xff, 0xff) // payload that looks like the option
		if mss, off, ok := TCPMSS(b); mss != c.mss || off != c.off || ok != c.ok {
			t.Errorf("%s: %d at %d, %v", name, mss, off, ok)
		}
	}
}

func TestUDP(t *testing.T) {
	b := make([]byte, 12)
	PutUDP(b, 53, 0xfffe, 3)
	if u, ok := ParseUDP(b); !ok || u != (UDP{SrcPort: 53, DstPort: 0xfffe, Len: 11}) {
		t.Errorf("got %+v, %v", u, ok)
	}
	for _, n := range []uint8{0, 7, 13} {
		b[5] = n
		if u, ok := ParseUDP(b); ok {
			t.Errorf("length %d: taken as %+v", n, u)
		}
	}
	if _, ok := ParseUDP(b[:7]); ok {
		t.Error("7 bytes are taken")
	}
}

func FuzzTCP(f *testing.F) {
	f.Add(make([]byte, 20))
	f.Add([]byte("\x00\x50\x80\x00\x01\x02\x03\x04\x05\x06\x07\x08\x70\x12\xff\xff\x00\x00\x00\x00\x01\x03\x03\x07\x02\x04\x05\xb4"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := ParseTCP(b)
		mss, off, found := TCPMSS(b)
		h := header.TCP(b)
		valid := len(b) >= 20 && h.DataOffset() >= 20 && int(h.DataOffset()) <= len(b)
		if ok != valid {
			t.Fatalf("we say %v, gVisor %v", ok, valid)
		}
		if !ok {
			if found {
				t.Fatal("option in a header that is none")
			}
			return
		}
		if p.SrcPort != h.SourcePort() || p.DstPort != h.DestinationPort() || p.Seq != h.SequenceNumber() || p.Ack != h.AckNumber() ||
			p.Flags&0x3f != uint8(h.Flags())&0x3f || p.Window != h.WindowSize() || p.Checksum != h.Checksum() || p.Urgent != h.UrgentPointer() {
			t.Fatalf("gVisor disagrees with %+v", p)
		}
		if found && off+2 > p.HdrLen {
			t.Fatalf("MSS %d at %d, behind the header", mss, off)
		}
		// gVisor also gives up at other options of a wrong length, and takes the last MSS where we take the first.
		if syn := header.ParseSynOptions(b[20:p.HdrLen], true); syn.MSS != header.TCPDefaultMSS {
			if !found {
				t.Fatalf("gVisor reads MSS %d, we none", syn.MSS)
			}
			if bytes.Count(b[20:p.HdrLen], []byte{2, 4}) == 1 && syn.MSS != max(mss, header.TCPMinimumSendMSS) {
				t.Fatalf("gVisor reads MSS %d, we %d", syn.MSS, mss)
			}
		}
	})
}

func FuzzUDP(f *testing.F) {
	f.Add([]byte("\x00\x35\x80\x00\x00\x09\x00\x00x"))
	f.Add(make([]byte, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, ok := ParseUDP(b)
		if len(b) < 8 {
			if ok {
				t.Fatal("a cut header is taken")
			}
			return
		}
		h := header.UDP(b)
		if want := h.Length() >= 8 && int(h.Length()) <= len(b); ok != want {
			t.Fatalf("we say %v, gVisor's length is %d of %d", ok, h.Length(), len(b))
		}
		if ok && (u.SrcPort != h.SourcePort() || u.DstPort != h.DestinationPort() || u.Len != int(h.Length()) || u.Checksum != h.Checksum()) {
			t.Fatalf("gVisor disagrees with %+v", u)
		}
		for _, p := range []IP{{Src: a4, Dst: b4, Version: 4, Proto: ProtoUDP}, {Src: a6, Dst: b6, Version: 6, Proto: ProtoUDP}} {
			VerifyL4(&p, b)
		}
	})
}
