package superframe

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/wire"
)

var addrA, addrB = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2")

// tcpFrame is a frame with n bytes of TCP payload whose checksum is to be finished; above size bytes it is a superframe.
func tcpFrame(n, size int, salt byte) frame.Frame {
	const l4 = wire.EthernetLen + wire.IPv4Len
	d := make([]byte, l4+wire.TCPLen+n)
	wire.PutEthernet(d, wire.MAC{2, 0, 0, 0, 0, 2}, wire.MAC{2, 0, 0, 0, 0, 1}, wire.EtherTypeIPv4)
	wire.PutIPv4(d[wire.EthernetLen:], addrA, addrB, wire.ProtoTCP, 0, 64, len(d)-wire.EthernetLen, 7, true)
	for i := range n {
		d[l4+wire.TCPLen+i] = byte(i*7+i>>8) + salt
	}
	wire.PutTCP(d[l4:], wire.TCP{SrcPort: 1000, DstPort: 2000, Seq: 5, Ack: 6, Flags: wire.TCPAck, Window: 7})
	wire.PutPartialL4(d[l4:], addrA, addrB, wire.ProtoTCP, len(d)-l4)
	f := frame.Frame{Data: d, Hdr: wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: l4, CsumOffset: wire.TCPChecksumOff}}
	if n > size {
		f.Hdr.GSOType, f.Hdr.GSOSize, f.Hdr.HdrLen = wire.GSOTCPv4, uint16(size), l4+wire.TCPLen
	}
	return f
}

// plain is a finished frame of n bytes.
func plain(n int, salt byte) frame.Frame {
	d := make([]byte, n)
	wire.PutEthernet(d, wire.MAC{2, 0, 0, 0, 0, 2}, wire.MAC{2, 0, 0, 0, 0, 1}, 0x88b6)
	for i := wire.EthernetLen; i < n; i++ {
		d[i] = byte(i*3+i>>8) + salt
	}
	return frame.Frame{Data: d}
}

// randomFrames is a Transmit's worth of frames of all sorts.
func randomFrames(rng *rand.Rand) (fs []frame.Frame) {
	for range 1 + rng.IntN(12) {
		salt := byte(rng.Uint32())
		switch rng.IntN(6) {
		case 0:
			fs = append(fs, tcpFrame(1400+rng.IntN(60000), 1000+rng.IntN(400), salt))
		case 1:
			fs = append(fs, tcpFrame(rng.IntN(1500), 65000, salt))
		case 2:
			fs = append(fs, plain(1300+rng.IntN(300), salt))
		case 3:
			fs = append(fs, plain(1500+rng.IntN(20000), salt))
		default:
			fs = append(fs, plain(wire.EthernetLen+rng.IntN(200), salt))
		}
	}
	return fs
}

// pack makes the datagrams of fs, and says how many messages they are.
func pack(t testing.TB, fs []frame.Frame, room int, seq *uint64) (ds [][]byte, messages int) {
	t.Helper()
	var p Packer
	var c Cutter
	seen := 0
	for p.Reset(fs, room); p.Next(); messages++ {
		first, n := p.Frames()
		if first != seen || n < 1 {
			t.Fatalf("frames %d to %d after %d", first, first+n, seen)
		}
		seen += n
		h := Header{Channel: 42, Seq: *seq, Total: uint32(p.Len())}
		*seq++
		parts := 0
		for c.Begin(h, p.Front(), p.Body(), room); c.More(); parts++ {
			head := make([]byte, c.HeadLen())
			if c.First() {
				p.Put(head[HeaderLen:])
			}
			payload := c.Next(head)
			ds = append(ds, append(head, payload...))
			if len(head)+len(payload) > HeaderLen+room {
				t.Fatalf("a datagram of %d bytes, room %d", len(head)+len(payload), room)
			}
		}
		if n > 1 && parts > 1 {
			t.Fatalf("%d frames share %d datagrams", n, parts)
		}
		flat := p.Append(nil)
		if len(flat) != p.Len() || parts == 1 && !bytes.Equal(flat, ds[len(ds)-1][HeaderLen:]) {
			t.Fatal("Append differs from what is sent")
		}
	}
	if seen != len(fs) {
		t.Fatalf("%d of %d frames", seen, len(fs))
	}
	return ds, messages
}

// finish is what a frame is once nothing is left to be done to it, but for superframes.
func finish(f frame.Frame) frame.Frame {
	if f.Superframe() {
		return f
	}
	head, rest, _ := offload.Finish(&f, nil)
	return frame.Frame{Data: slices.Concat(head, rest)}
}

// unpack makes frames of a message.
func unpack(t testing.TB, msg []byte) (fs []frame.Frame) {
	t.Helper()
	rs, ok := ParseRecords(msg)
	if !ok {
		t.Fatal("records do not add up")
	}
	for rs.Next() {
		f, why, ok := rs.Frame()
		if !ok {
			t.Fatalf("kind %d, %d bytes: %v", rs.Kind, len(rs.Body), why)
		}
		fs = append(fs, frame.Frame{Hdr: f.Hdr, Data: bytes.Clone(f.Data)})
	}
	return fs
}

func same(a, b frame.Frame) bool {
	a, b = finish(a), finish(b)
	return a.Hdr == b.Hdr && bytes.Equal(a.Data, b.Data)
}

// trains joins datagrams as UDP_GRO would: some of one length, and a shorter one.
func trains(rng *rand.Rand, ds [][]byte) (ts [][]byte, sizes []int) {
	for len(ds) > 0 {
		size, n := len(ds[0]), 1
		t := bytes.Clone(ds[0])
		for most := 1 + rng.IntN(64); n < most && n < len(ds) && len(ds[n]) <= size && len(t)+len(ds[n]) <= 65507; {
			t = append(t, ds[n]...)
			n++
			if len(ds[n-1]) < size {
				break
			}
		}
		ts, sizes = append(ts, t), append(sizes, size)
		ds = ds[n:]
	}
	return ts, sizes
}

// feed gives a train to r and what becomes whole to got.
func feed(t testing.TB, r *Reassembler, train []byte, size int, now int64, got func(m *Message)) {
	t.Helper()
	for len(train) > 0 {
		h, why, ok := Parse(train[:min(size, len(train))])
		if !ok {
			t.Fatalf("refused for %v", why)
		}
		m, used := r.Add(&h, train, size, 0, now)
		if m != nil && r.Accept(m.Header.Seq) {
			got(m)
		}
		train = train[used:]
	}
}

// Random frames, packed for random paths, come out as they went in, whatever trains the kernel makes of the datagrams.
func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var drops frame.DropCounters
		r := NewReassembler(Config{Drops: &drops})
		seq := rng.Uint64()
		room := []int{MinRoom, 1208, 1432, 1452, 8932, 65000}[rng.IntN(6)]
		var want, got []frame.Frame
		for range 3 {
			fs := randomFrames(rng)
			want = append(want, fs...)
			ds, messages := pack(t, fs, room, &seq)
			ts, sizes := trains(rng, ds)
			for i, train := range ts {
				feed(t, r, train, sizes[i], 0, func(m *Message) { messages--; got = append(got, unpack(t, m.Data)...) })
			}
			if messages != 0 {
				t.Fatalf("%d messages are missing", messages)
			}
			r.Release()
		}
		if !slices.EqualFunc(want, got, same) {
			t.Fatalf("room %d: %d frames became %d, or others", room, len(want), len(got))
		}
		if n, bytes := r.Held(); n != 0 || bytes != 0 || drops.Total() != 0 || r.Stats().Lost != 0 || r.Stats().Reordered != 0 {
			t.Fatalf("%d messages, %d bytes held, %d drops, %+v", n, bytes, drops.Total(), r.Stats())
		}
	}
}

// Small frames share datagrams, one that is alone is not copied, and a checksum is left to be finished where its header has room.
func TestPacker(t *testing.T) {
	const room = 1452
	full := room - RecordLen
	tcp := tcpFrame(full-54-wire.VirtioNetHdrLen, 65000, 1) // just fits unfinished
	longer := tcpFrame(full-54, 65000, 1)                   // just fits finished
	too := tcpFrame(full-53, 65000, 1)
	super := tcpFrame(40000, 1400, 1)
	small, big := plain(60, 1), plain(1000, 1)
	for _, c := range []struct {
		name   string
		fs     []frame.Frame
		frames []int // of each message
		front  []int
	}{
		{"nothing", nil, nil, nil},
		{"one", []frame.Frame{small}, []int{1}, []int{4}},
		{"small ones", slices.Repeat([]frame.Frame{small}, 30), []int{22, 8}, []int{22 * 64, 8 * 64}},
		{"a big one last", []frame.Frame{small, big}, []int{2}, []int{68}},
		{"a big one first", []frame.Frame{big, small}, []int{2}, []int{1068}},
		{"full", []frame.Frame{plain(full, 1), plain(full, 1)}, []int{1, 1}, []int{4, 4}},
		{"longer than a datagram", []frame.Frame{plain(full+1, 1), small, small}, []int{1, 2}, []int{4, 128}},
		{"a superframe between", []frame.Frame{small, super, small}, []int{1, 1, 1}, []int{4, 14, 4}},
		{"unfinished", []frame.Frame{tcp}, []int{1}, []int{14}},
		{"finished to fit", []frame.Frame{longer}, []int{1}, []int{4 + 52}},
		{"two datagrams anyhow", []frame.Frame{too}, []int{1}, []int{4 + 52}},
		{"unfinished small ones", slices.Repeat([]frame.Frame{tcpFrame(0, 65000, 1)}, 30), []int{21, 9}, []int{21 * 68, 9 * 68}},
	} {
		var p Packer
		var frames, front []int
		for p.Reset(c.fs, room); p.Next(); {
			_, n := p.Frames()
			frames, front = append(frames, n), append(front, p.Front())
			if p.Front() > room {
				t.Errorf("%s: a front of %d bytes", c.name, p.Front())
			}
		}
		if !slices.Equal(frames, c.frames) || !slices.Equal(front, c.front) {
			t.Errorf("%s: %v frames with fronts %v, want %v, %v", c.name, frames, front, c.frames, c.front)
		}
		if p.Next() {
			t.Errorf("%s: another one", c.name)
		}
	}
}

// Whatever Packer is given, the fragments fit, also where the bytes up to a checksum field do not.
func TestPackerLongHeaders(t *testing.T) {
	f := plain(900, 1)
	binary.BigEndian.PutUint16(f.Data[12:], 0x9100)
	f.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: 400, CsumOffset: 50}
	seq := uint64(0)
	ds, _ := pack(t, []frame.Frame{f}, MinRoom, &seq)
	r := NewReassembler(Config{})
	var got []frame.Frame
	for _, d := range ds {
		feed(t, r, d, len(d), 0, func(m *Message) { got = append(got, unpack(t, m.Data)...) })
	}
	if len(got) != 1 || !same(got[0], f) {
		t.Errorf("%d frames", len(got))
	}
}

func TestPackAllocates(t *testing.T) {
	fs := []frame.Frame{tcpFrame(60000, 1400, 1), plain(60, 1), plain(70, 1), tcpFrame(1000, 65000, 1), tcpFrame(30000, 1400, 2)}
	var p Packer
	var c Cutter
	scratch := make([]byte, 2000)
	if n := testing.AllocsPerRun(100, func() {
		for p.Reset(fs, 1452); p.Next(); {
			h := Header{Total: uint32(p.Len())}
			for c.Begin(h, p.Front(), p.Body(), 1452); c.More(); {
				head := scratch[:c.HeadLen()]
				if c.First() {
					p.Put(head[HeaderLen:])
				}
				c.Next(head)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
