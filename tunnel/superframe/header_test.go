package superframe

import (
	"bytes"
	"encoding/binary"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// datagram is a fragment with n bytes of the message.
func datagram(h Header, n int) []byte {
	b := make([]byte, HeaderLen+n)
	h.Put(b)
	for i := range n {
		b[HeaderLen+i] = byte(i + int(h.Index)*n)
	}
	return b
}

func TestHeader(t *testing.T) {
	b := datagram(Header{Sealed: true, Index: 2, Last: 3, Channel: 0x01020304, Seq: 0x1112131415161718, Total: 350}, 100)
	if want := "\xc1\x01\x02\x03\x01\x02\x03\x04\x11\x12\x13\x14\x15\x16\x17\x18\x00\x00\x01\x5e"; string(b[:HeaderLen]) != want {
		t.Errorf("% x", b[:HeaderLen])
	}
	h, _, ok := Parse(b)
	if !ok || h != (Header{Sealed: true, Index: 2, Last: 3, Channel: 0x01020304, Seq: 0x1112131415161718, Total: 350, step: 100}) {
		t.Errorf("%+v, %v", h, ok)
	}
	other := h
	other.Index, other.Last = 0, 9
	if aad := h.AppendAAD(nil); len(aad) != AADLen || string(aad) != string(b[:2])+string(b[4:HeaderLen]) || !bytes.Equal(aad, other.AppendAAD(nil)) {
		t.Errorf("% x", aad)
	}
}

func TestParse(t *testing.T) {
	edit := func(n int, h Header, at int, v byte) []byte {
		b := datagram(h, n)
		b[at] = v
		return b
	}
	for _, c := range []struct {
		name string
		d    []byte
		ok   bool
	}{
		{"alone", datagram(Header{Total: 100}, 100), true},
		{"shortest", datagram(Header{Total: 4}, 4), true},
		{"longest", datagram(Header{Last: 1, Total: MaxMessage}, 60000), true},
		{"longest sealed", datagram(Header{Sealed: true, Last: 1, Total: MaxMessage + SealRoom}, 60000), true},
		{"first of three", datagram(Header{Last: 2, Total: 201}, 100), true},
		{"first of three, full", datagram(Header{Last: 2, Total: 300}, 100), true},
		{"last of three", datagram(Header{Index: 2, Last: 2, Total: 201}, 1), true},
		{"last of three, full", datagram(Header{Index: 2, Last: 2, Total: 300}, 100), true},
		{"last of 256", datagram(Header{Index: 255, Last: 255, Total: 65280 + 7}, 7), true},

		{"nothing", nil, false},
		{"no payload", datagram(Header{Total: 4}, 0), false},
		{"another type", edit(100, Header{Total: 100}, 0, 0xc2), false},
		{"a flag", edit(100, Header{Total: 100}, 1, 2), false},
		{"the highest flag", edit(100, Header{Total: 100}, 1, 0x81), false},
		{"index behind last", datagram(Header{Index: 3, Last: 2, Total: 300}, 100), false},
		{"total 0", datagram(Header{Total: 0}, 100), false},
		{"total too short for a record", datagram(Header{Total: 3}, 3), false},
		{"total too long", datagram(Header{Last: 1, Total: MaxMessage + 1}, 60000), false},
		{"total far too long", datagram(Header{Last: 255, Total: 1<<32 - 1}, 60000), false},
		{"sealed total too long", datagram(Header{Sealed: true, Last: 1, Total: MaxMessage + SealRoom + 1}, 60000), false},
		{"alone, too short", datagram(Header{Total: 100}, 99), false},
		{"alone, too long", datagram(Header{Total: 100}, 101), false},
		{"first that leaves nothing for the last", datagram(Header{Last: 2, Total: 200}, 100), false},
		{"first that leaves too much", datagram(Header{Last: 2, Total: 301}, 100), false},
		{"last of uneven parts", datagram(Header{Index: 2, Last: 2, Total: 202}, 1), false},
		{"last longer than the others", datagram(Header{Index: 2, Last: 2, Total: 300}, 102), false},
		{"last as long as all", datagram(Header{Index: 2, Last: 2, Total: 300}, 300), false},
		{"last longer than all", datagram(Header{Index: 2, Last: 2, Total: 300}, 302), false},
	} {
		if h, why, ok := Parse(c.d); ok != c.ok || !ok && why != frame.DropTunnelHeader {
			t.Errorf("%s: %+v, %v, %v", c.name, h, why, ok)
		}
	}
	for n := range HeaderLen + 1 {
		if _, _, ok := Parse(datagram(Header{Total: 100}, 100)[:n]); ok {
			t.Errorf("%d bytes are taken", n)
		}
	}
}

func record(kind uint8, body ...byte) []byte {
	b := make([]byte, RecordLen)
	PutRecord(b, kind, len(body))
	return append(b, body...)
}

func TestRecords(t *testing.T) {
	msg := append(append(record(1, 'a', 'b'), record(200)...), record(3, 'c')...)
	r, ok := ParseRecords(msg)
	var got []byte
	for ok && r.Next() {
		got = append(append(got, r.Kind), r.Body...)
	}
	if !ok || string(got) != "\x01ab\xc8\x03c" {
		t.Errorf("%q, %v", got, ok)
	}
	for n := range len(msg) {
		if _, ok := ParseRecords(msg[:n]); ok != (n == 6 || n == 10) {
			t.Errorf("%d bytes: %v", n, ok)
		}
	}
	if _, ok := ParseRecords(record(1, make([]byte, 70000)...)); !ok {
		t.Error("a long record is refused")
	}
}

func TestRecordFrames(t *testing.T) {
	hdr := func(h wire.VirtioNetHdr, data []byte) []byte {
		b := make([]byte, wire.VirtioNetHdrLen)
		h.Encode(b)
		return append(b, data...)
	}
	super := tcpFrame(5000, 1000, 0)
	for _, c := range []struct {
		name string
		kind uint8
		body []byte
		why  frame.Drop
		ok   bool
	}{
		{"frame", KindFrame, plain(60, 0).Data, 0, true},
		{"shortest frame", KindFrame, plain(14, 0).Data, 0, true},
		{"superframe", KindUnfinished, hdr(super.Hdr, super.Data), 0, true},
		{"nothing to finish", KindUnfinished, hdr(wire.VirtioNetHdr{}, super.Data), 0, true},
		{"no frame", KindFrame, nil, frame.DropMalformed, false},
		{"short frame", KindFrame, plain(14, 0).Data[:13], frame.DropMalformed, false},
		{"long frame", KindFrame, plain(wire.MaxFrame+1, 0).Data, frame.DropMalformed, false},
		{"short header", KindUnfinished, make([]byte, wire.VirtioNetHdrLen-1), frame.DropMalformed, false},
		{"no frame behind the header", KindUnfinished, make([]byte, wire.VirtioNetHdrLen+13), frame.DropMalformed, false},
		{"header that contradicts", KindUnfinished, hdr(super.Hdr, super.Data[:40]), frame.DropBadHdr, false},
		{"unknown flags", KindUnfinished, hdr(wire.VirtioNetHdr{Flags: 0x40}, super.Data), frame.DropBadHdr, false},
	} {
		r, ok := ParseRecords(record(c.kind, c.body...))
		if !ok || !r.Next() {
			t.Fatalf("%s: no record", c.name)
		}
		f, why, ok := r.Frame()
		if ok != c.ok || why != c.why || ok && !bytes.HasSuffix(c.body, f.Data) {
			t.Errorf("%s: %v, %v", c.name, why, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(datagram(Header{Last: 2, Total: 201}, 100))
	f.Add(datagram(Header{Index: 2, Last: 2, Total: 201, Sealed: true}, 1))
	f.Add(datagram(Header{Total: 100}, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, why, ok := Parse(b)
		if !ok {
			if why != frame.DropTunnelHeader {
				t.Errorf("dropped for %v", why)
			}
			return
		}
		x := make([]byte, HeaderLen)
		if h.Put(x); !bytes.Equal(x, b[:HeaderLen]) {
			t.Errorf("% x became % x", b[:HeaderLen], x)
		}
		// Every part lies within the message, and the last one ends it.
		n, at := len(b)-HeaderLen, int(h.Index)*h.step
		if at+n > int(h.Total) || (h.Index == h.Last) != (at+n == int(h.Total)) || n > h.step {
			t.Errorf("%+v, %d bytes", h, n)
		}
	})
}

func FuzzRecords(f *testing.F) {
	f.Add(append(record(1, plain(60, 1).Data...), record(9)...))
	super := tcpFrame(3000, 1000, 0)
	h := make([]byte, wire.VirtioNetHdrLen)
	super.Hdr.Encode(h)
	f.Add(record(2, append(h, super.Data...)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := ParseRecords(b)
		if !ok {
			return
		}
		var out []byte
		for r.Next() {
			out = append(out, r.Kind)
			out = append(out, binary.BigEndian.AppendUint32(nil, uint32(len(r.Body)))[1:]...)
			out = append(out, r.Body...)
			if f, _, ok := r.Frame(); ok {
				// What is taken goes on to a TAP: its header must be canonical.
				h := f.Hdr
				if !h.Validate(f.Data) || h != f.Hdr {
					t.Errorf("%+v became %+v", f.Hdr, h)
				}
			}
		}
		if !bytes.Equal(out, b) {
			t.Error("the records are not the message")
		}
	})
}
