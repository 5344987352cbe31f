package offload

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// frames makes finished frames of whole segments.
func frames(segs ...[]byte) []frame.Frame {
	fs := make([]frame.Frame, len(segs))
	for i := range segs {
		fs[i].Data = segs[i]
	}
	return fs
}

// join is what a writev of frame i of the result would send.
func join(c *Coalescer, i int) frame.Frame {
	h, vec := c.Gather(i, nil)
	return frame.Frame{Hdr: h, Data: bytes.Join(vec, nil)}
}

// checkIdentity coalesces fs, cuts every result again and demands the same frames back, flow by flow in the same order. It returns
// the number of frames of the result.
func checkIdentity(t testing.TB, c *Coalescer, fs []frame.Frame, caps frame.Caps) int {
	t.Helper()
	before := make([][]byte, len(fs))
	for i := range fs {
		before[i] = bytes.Clone(fs[i].Data)
	}
	n := c.Coalesce(fs, caps)
	seen := make([]bool, len(fs))
	last := map[string]int{} // per flow, the last frame given back
	for i := range n {
		first, count := c.Run(i)
		g := join(c, i)
		if h := g.Hdr; count > 1 && (!h.Validate(g.Data) || h != g.Hdr || !g.Superframe() || !caps.Takes(g.Hdr)) {
			t.Fatalf("frame %d of %d joined: header %+v is not one of a superframe", i, count, g.Hdr)
		}
		j := first
		got := [][]byte{g.Data}
		if count > 1 {
			got = cut(t, &g)
		} else if g.Hdr != fs[first].Hdr || len(g.Data) > 0 && &g.Data[0] == &fs[first].Data[0] {
			t.Fatalf("frame %d is not the one that came", i)
		}
		if len(got) != count {
			t.Fatalf("frame %d: %d segments become %d", i, count, len(got))
		}
		for k, d := range got {
			if k > 0 {
				j = int(c.items[j].next)
			}
			if seen[j] {
				t.Fatalf("frame %d comes back twice", j)
			}
			seen[j] = true
			want := fs[j].Data
			if count > 1 {
				want = finished(t, &fs[j])
			}
			if !sameFrame(d, want) {
				t.Fatalf("frame %d comes back as\n%x, was\n%x", j, d, want)
			}
			key := flowOf(fs[j].Data)
			if prev, ok := last[key]; ok && prev > j {
				t.Fatalf("frame %d overtakes frame %d of its flow", prev, j)
			}
			last[key] = j
		}
	}
	for i := range fs {
		if !seen[i] {
			t.Fatalf("frame %d is lost", i)
		}
		if !bytes.Equal(before[i], fs[i].Data) {
			t.Fatalf("frame %d was written to", i)
		}
	}
	return n
}

// finished is the finished frame without Ethernet padding.
func finished(t testing.TB, f *frame.Frame) []byte {
	head, rest, ok := Finish(f, nil)
	if !ok {
		t.Fatal("a joined frame cannot be finished")
	}
	d := append(bytes.Clone(head), rest...)
	_, l3, _ := wire.Payload(d)
	p, _ := wire.ParseIP(d[l3:], false)
	return d[:l3+p.Len]
}

// sameFrame compares but for the identification of IPv4 packets with DF, and the two forms of zero in checksums.
func sameFrame(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	return bytes.Equal(canon(a), canon(b))
}

func canon(d []byte) []byte {
	d = bytes.Clone(d)
	et, l3, ok := wire.Payload(d)
	if !ok {
		return d
	}
	p, ok := wire.ParseIP(d[l3:], false)
	if !ok {
		return d
	}
	if et == wire.EtherTypeIPv4 {
		if p.DontFragment {
			d[l3+4], d[l3+5] = 0, 0
		}
		d[l3+10], d[l3+11] = 0, 0
	}
	if p.Proto == wire.ProtoTCP {
		if f := d[l3+p.HdrLen+wire.TCPChecksumOff:]; f[0] == 0 && f[1] == 0 {
			f[0], f[1] = 0xff, 0xff
		}
	}
	return d
}

func flowOf(d []byte) string {
	et, l3, ok := wire.Payload(d)
	if !ok {
		return ""
	}
	p, ok := wire.ParseIP(d[l3:], false)
	if !ok || p.IsFragment() || p.Len < p.HdrLen+4 {
		return fmt.Sprint(et)
	}
	return fmt.Sprintf("%v %v %d %x", p.Src, p.Dst, p.Proto, d[l3+p.HdrLen:l3+p.HdrLen+4])
}

func TestCoalesceIsTheInverseOfSegment(t *testing.T) {
	const ack = wire.TCPAck
	var c Coalescer
	for name, s := range map[string]shape{
		"TCP4":        {payload: 65160, size: 1448, tcpOpts: 12, flags: ack},
		"TCP4 PSH":    {payload: 5000, size: 1448, tcpOpts: 12, flags: ack | wire.TCPPsh, id: 0xfffe},
		"TCP4 FIN":    {payload: 5000, size: 1448, flags: ack | wire.TCPPsh | wire.TCPFin, seq: 0xfffff000},
		"TCP4 CWR":    {payload: 5000, size: 1448, flags: ack | wire.TCPCwr},
		"TCP4 ECE":    {payload: 5000, size: 1448, flags: ack | wire.TCPEce},
		"TCP4 tagged": {payload: 5000, size: 1001, vlan: true, flags: ack},
		"TCP4 short":  {payload: 17, size: 8, flags: ack},
		"TCP6":        {v6: true, payload: 64260, size: 1428, tcpOpts: 12, flags: ack | wire.TCPPsh},
		"TCP6 tagged": {v6: true, payload: 5000, size: 1428, tcpOpts: 40, vlan: true, flags: ack},
		"UDP4":        {udp: true, payload: 64000, size: 1000},
		"UDP4 short":  {udp: true, payload: 5001, size: 1000},
		"UDP6":        {udp: true, v6: true, payload: 64, size: 1},
	} {
		f := super(s)
		segs := cut(t, &f)
		fs := frames(segs...)
		if n := checkIdentity(t, &c, fs, frame.CapAll); n != 1 {
			t.Fatalf("%s: %d segments become %d frames", name, len(segs), n)
		}
		// What comes out is the very superframe that was cut.
		got := join(&c, 0)
		if !bytes.Equal(got.Data, f.Data) {
			t.Errorf("%s: superframe is\n%x, was\n%x", name, got.Data[:100], f.Data[:100])
		}
		want := f.Hdr
		if !want.Validate(f.Data) || got.Hdr != want {
			t.Errorf("%s: header %+v, was %+v", name, got.Hdr, want)
		}
		// A port that cannot take it gets the frames as they are.
		need := frame.CapUSO
		if !s.udp {
			need = frame.CapTSO4
			if s.v6 {
				need = frame.CapTSO6
			}
		}
		for _, caps := range []frame.Caps{0, frame.CapAll &^ need, frame.CapAll &^ frame.CapCsum} {
			if n := checkIdentity(t, &c, fs, caps); n != len(fs) {
				t.Errorf("%s: %d frames become %d for capabilities %05b", name, len(fs), n, caps)
			}
		}
	}
}

// Each rule, broken once in the middle of a run of six segments: the number of frames that come out tells whether it was seen.
func TestCoalesceStops(t *testing.T) {
	tcp := shape{payload: 6000, size: 1000, tcpOpts: 12, flags: wire.TCPAck}
	udp := shape{payload: 6000, size: 1000, udp: true}
	resum := func(f *frame.Frame) { // keeps a changed packet intact
		mend(f)
		_, l3, _ := wire.Payload(f.Data)
		p, ok := wire.ParseIP(f.Data[l3:], false)
		if !ok {
			t.Fatal("edited to a malformed packet")
		}
		wire.PutL4Checksum(f.Data[l3+p.HdrLen:], p.Src, p.Dst, p.Proto)
	}
	for _, c := range []struct {
		name string
		s    shape
		edit func(f *frame.Frame) // of the third segment
		keep bool                 // leave checksums as edit left them
		want int
	}{
		{"nothing", tcp, func(f *frame.Frame) {}, false, 1},
		{"nothing, UDP", udp, func(f *frame.Frame) {}, false, 1},
		{"destination MAC", tcp, func(f *frame.Frame) { f.Data[5] ^= 1 }, false, 3},
		{"source MAC", tcp, func(f *frame.Frame) { f.Data[11] ^= 1 }, false, 3},
		{"TOS", tcp, func(f *frame.Frame) { f.Data[15] ^= 1 }, false, 3},
		{"identification", tcp, func(f *frame.Frame) { f.Data[19] += 7 }, false, 3},
		{"DF", tcp, func(f *frame.Frame) { f.Data[20] ^= 0x40 }, false, 3},
		{"TTL", tcp, func(f *frame.Frame) { f.Data[22]-- }, false, 3},
		{"source", tcp, func(f *frame.Frame) { f.Data[29] ^= 1 }, false, 3}, // another flow, in whose absence the run has a hole
		{"source port", tcp, func(f *frame.Frame) { f.Data[35] ^= 1 }, false, 3},
		{"sequence number", tcp, func(f *frame.Frame) { f.Data[41]++ }, false, 3},
		{"acknowledgment", tcp, func(f *frame.Frame) { f.Data[45]++ }, false, 3},
		{"reserved bit", tcp, func(f *frame.Frame) { f.Data[46] ^= 1 }, false, 3},
		{"PSH ends a run", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPPsh }, false, 2},
		{"FIN ends a run", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPFin }, false, 2},
		{"CWR begins a run", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPCwr }, false, 2},
		{"ECE", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPEce }, false, 3},
		{"URG", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPUrg }, false, 3},
		{"SYN", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPSyn }, false, 3},
		{"RST", tcp, func(f *frame.Frame) { f.Data[47] |= wire.TCPRst }, false, 3},
		{"no ACK", tcp, func(f *frame.Frame) { f.Data[47] &^= wire.TCPAck }, false, 3},
		{"window", tcp, func(f *frame.Frame) { f.Data[49]++ }, false, 3},
		{"urgent pointer", tcp, func(f *frame.Frame) { f.Data[53]++ }, false, 3},
		{"option", tcp, func(f *frame.Frame) { f.Data[60]++ }, false, 3},
		{"shorter", tcp, func(f *frame.Frame) { f.Data = f.Data[:len(f.Data)-1] }, false, 2},
		{"empty", tcp, func(f *frame.Frame) { f.Data = f.Data[:66] }, false, 3},
		{"longer", tcp, func(f *frame.Frame) { f.Data = append(bytes.Clone(f.Data), 0) }, false, 3},
		{"TCP checksum", tcp, func(f *frame.Frame) { f.Data[50] ^= 1 }, true, 3},
		{"payload", tcp, func(f *frame.Frame) { f.Data[500] ^= 1 }, true, 3},
		{"IP checksum", tcp, func(f *frame.Frame) { f.Data[24] ^= 1 }, true, 3},
		{"fragment", tcp, func(f *frame.Frame) { f.Data[20] = 0x20 }, false, 3},
		{"IP options", tcp, func(f *frame.Frame) {
			d := append(bytes.Clone(f.Data[:34]), 1, 1, 1, 1)
			d[14] = 0x46
			f.Data = append(d, f.Data[34:]...)
		}, false, 3},
		{"no IP", tcp, func(f *frame.Frame) { f.Data[12] = 0x88 }, true, 3},
		{"cut frame", tcp, func(f *frame.Frame) { f.Data = f.Data[:13] }, true, 3},
		{"superframe", tcp, func(f *frame.Frame) {
			f.Hdr = wire.VirtioNetHdr{Flags: 1, GSOType: wire.GSOTCPv4, GSOSize: 500, HdrLen: 66, CsumStart: 34, CsumOffset: 16}
		}, true, 3},
		{"tunnel's inner checksum", tcp, func(f *frame.Frame) {
			f.Hdr = wire.VirtioNetHdr{Flags: 1, CsumStart: 100, CsumOffset: 16}
		}, true, 3},
		{"UDP destination port", udp, func(f *frame.Frame) { f.Data[37] ^= 1 }, false, 3},
		{"UDP without checksum", udp, func(f *frame.Frame) { f.Data[40], f.Data[41] = 0, 0 }, true, 3},
		{"UDP checksum", udp, func(f *frame.Frame) { f.Data[40] ^= 1 }, true, 3},
		{"UDP length", udp, func(f *frame.Frame) { f.Data[39]-- }, true, 3},
		{"empty datagram", udp, func(f *frame.Frame) { f.Data = f.Data[:42] }, false, 3},
		{"short datagram", udp, func(f *frame.Frame) { f.Data = f.Data[:43] }, false, 2},
		// A checksum still to be finished, or known to be right, needs no verification.
		{"unfinished", tcp, func(f *frame.Frame) {
			f.Hdr = wire.VirtioNetHdr{Flags: 1, CsumStart: 34, CsumOffset: 16}
			mend(f)
		}, true, 1},
		{"verified", tcp, func(f *frame.Frame) { f.Hdr.Flags = wire.VirtioDataValid }, true, 1},
		{"padded", tcp, func(f *frame.Frame) { f.Data = append(bytes.Clone(f.Data), 0, 0, 0) }, true, 1},
	} {
		f := super(c.s)
		fs := frames(cut(t, &f)...)
		c.edit(&fs[2])
		if !c.keep {
			resum(&fs[2])
		}
		var co Coalescer
		if c.name == "cut frame" { // cannot be compared as a packet
			if n := co.Coalesce(fs, frame.CapAll); n != c.want {
				t.Errorf("%s: %d frames, want %d", c.name, n, c.want)
			}
			continue
		}
		if n := checkIdentity(t, &co, fs, frame.CapAll); n != c.want {
			t.Errorf("%s: %d frames, want %d", c.name, n, c.want)
		}
	}
}

func TestCoalesceLimits(t *testing.T) {
	var c Coalescer
	// One byte more than an IP packet can be.
	f := super(shape{payload: 60000, size: 1000, flags: wire.TCPAck})
	g := super(shape{payload: 6000, size: 1000, flags: wire.TCPAck, seq: 60000, id: 60})
	if n := checkIdentity(t, &c, frames(append(cut(t, &f), cut(t, &g)...)...), frame.CapAll); n != 2 {
		t.Errorf("66000 bytes become %d frames", n)
	}
	if _, first := c.Run(0); first != 65 {
		t.Errorf("the first has %d segments, want 65", first)
	}
	f = super(shape{payload: 300 * 10, size: 10, flags: wire.TCPAck})
	if n := checkIdentity(t, &c, frames(cut(t, &f)...), frame.CapAll); n != 2 {
		t.Errorf("300 segments become %d frames", n)
	}
	f = super(shape{payload: 100, size: 1, udp: true})
	if n := checkIdentity(t, &c, frames(cut(t, &f)...), frame.CapAll); n != 2 {
		t.Errorf("100 datagrams become %d frames", n)
	}
	f = super(shape{payload: 5000, size: 1000, flags: wire.TCPAck | wire.TCPCwr})
	if n := checkIdentity(t, &c, frames(cut(t, &f)...), frame.CapAll&^frame.CapECN); n != 2 {
		t.Errorf("a port without ECN gets %d frames, want the one with CWR and the rest", n)
	}
	// A sender that numbers all its packets 0 and sets DF (RFC 6864) is merged; one that may be fragmented is not.
	for df, want := range map[bool]int{true: 1, false: 5} {
		f = super(shape{payload: 5000, size: 1000, flags: wire.TCPAck})
		fs := frames(cut(t, &f)...)
		for i := range fs {
			ip := fs[i].Data[14:34]
			clear(ip[4:8])
			if df {
				ip[6] = 0x40
			}
			mend(&fs[i])
			wire.PutL4Checksum(fs[i].Data[34:], a4, b4, wire.ProtoTCP)
		}
		if n := checkIdentity(t, &c, fs, frame.CapAll); n != want {
			t.Errorf("constant identification, DF %v: %d frames, want %d", df, n, want)
		}
	}
	if n := c.Coalesce(nil, frame.CapAll); n != 0 {
		t.Errorf("no frames become %d", n)
	}
}

// Interleaved flows come out one superframe each; with more flows than are followed, nothing is lost or overtaken.
func TestCoalesceFlows(t *testing.T) {
	var c Coalescer
	for _, flows := range []int{2, openRuns, openRuns + 1, 3 * openRuns} {
		var segs [][][]byte
		for i := range flows {
			f := super(shape{payload: 4000, size: 1000, flags: wire.TCPAck, ports: uint16(i), v6: i%2 == 1, udp: i%3 == 2})
			segs = append(segs, cut(t, &f))
		}
		var fs []frame.Frame
		for k := range 4 {
			for i := range flows {
				fs = append(fs, frames(segs[i][k])...)
			}
		}
		n := checkIdentity(t, &c, fs, frame.CapAll)
		if flows <= openRuns && n != flows {
			t.Errorf("%d flows become %d frames", flows, n)
		}
	}
}

// Random batches: drops, swaps, damage, pure ACKs and foreign frames among several flows.
func TestCoalesceRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	var c Coalescer
	merged := 0
	for range 2000 {
		fs := randomBatch(t, rng)
		n := checkIdentity(t, &c, fs, frame.Caps(rng.Uint32())&frame.CapAll|frame.CapCsum)
		merged += len(fs) - n
	}
	if merged < 2000 {
		t.Errorf("only %d frames were merged: the test does not test", merged)
	}
}

func randomBatch(t testing.TB, rng *rand.Rand) []frame.Frame {
	var queues [][]frame.Frame
	for i := range 1 + rng.IntN(12) {
		size := 1 + rng.IntN(40)
		s := shape{
			v6: rng.IntN(2) == 0, udp: rng.IntN(3) == 0, vlan: rng.IntN(4) == 0, size: size, payload: 1 + rng.IntN(10*size),
			tcpOpts: 4 * rng.IntN(11), flags: wire.TCPAck, seq: rng.Uint32(), id: uint16(rng.Uint32()), ports: uint16(i),
		}
		if rng.IntN(2) == 0 {
			s.flags |= uint8(rng.Uint32()) &^ (wire.TCPSyn | wire.TCPRst)
		}
		f := super(s)
		q := frames(cut(t, &f)...)
		for range rng.IntN(3) {
			k := rng.IntN(len(q))
			switch rng.IntN(5) {
			case 0:
				q = append(q[:k:k], q[k+1:]...)
			case 1:
				l := rng.IntN(len(q))
				q[k], q[l] = q[l], q[k]
			case 2:
				q[k].Data = bytes.Clone(q[k].Data)
				q[k].Data[14+rng.IntN(len(q[k].Data)-14)] ^= 1 << rng.IntN(8)
			case 3: // a segment without payload
				one := super(shape{v6: s.v6, udp: s.udp, vlan: s.vlan, tcpOpts: s.tcpOpts, flags: wire.TCPAck, seq: s.seq, ports: s.ports, size: 1})
				one.Hdr = wire.VirtioNetHdr{}
				mend(&one)
				q = append(q[:k:k], append([]frame.Frame{one}, q[k:]...)...)
			case 4: // a superframe
				q = append(q[:k:k], append([]frame.Frame{f}, q[k:]...)...)
			}
			if len(q) == 0 {
				break
			}
		}
		queues = append(queues, q)
	}
	var fs []frame.Frame
	for len(queues) > 0 && len(fs) < 64 {
		i := rng.IntN(len(queues))
		n := min(len(queues[i]), 1+rng.IntN(4))
		fs = append(fs, queues[i][:n]...)
		if queues[i] = queues[i][n:]; len(queues[i]) == 0 {
			queues = append(queues[:i], queues[i+1:]...)
		}
	}
	return fs
}

// FuzzCoalesce reads a batch from bytes: two of length, two of flags, then a frame, each mended so that it can merge.
func FuzzCoalesce(f *testing.F) {
	for _, s := range []shape{
		{payload: 60, size: 20, flags: wire.TCPAck}, {payload: 60, size: 20, udp: true}, {payload: 60, size: 20, v6: true, tcpOpts: 12, flags: wire.TCPAck},
	} {
		super := super(s)
		var b []byte
		for _, d := range cut(f, &super) {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(d))), 0, 0)
			b = append(b, d...)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var fs []frame.Frame
		for len(b) >= 4 && len(fs) < 40 {
			n, flags := int(binary.BigEndian.Uint16(b)), b[3]
			n = min(n, len(b)-4)
			fr := frame.Frame{Data: b[4 : 4+n : 4+n]}
			b = b[4+n:]
			if flags&1 == 0 {
				fr.Data = bytes.Clone(fr.Data)
				mend(&fr)
				if et, l3, ok := wire.Payload(fr.Data); ok && (et == wire.EtherTypeIPv4 || et == wire.EtherTypeIPv6) {
					if p, ok := wire.ParseIP(fr.Data[l3:], false); ok {
						if off, known := wire.ChecksumOff(p.Proto); known && flags&2 != 0 {
							fr.Hdr = wire.VirtioNetHdr{Flags: 1, CsumStart: uint16(l3 + p.HdrLen), CsumOffset: uint16(off)}
						} else if known {
							wire.PutL4Checksum(fr.Data[l3+p.HdrLen:], p.Src, p.Dst, p.Proto)
						}
					}
				}
			}
			if fr.Hdr.Validate(fr.Data) {
				fs = append(fs, fr)
			}
		}
		var c Coalescer
		checkIdentity(t, &c, fs, frame.CapAll)
	})
}

func TestCoalesceDoesNotAllocate(t *testing.T) {
	f := super(shape{payload: 40000, size: 1448, tcpOpts: 12, flags: wire.TCPAck})
	g := super(shape{payload: 20000, size: 1000, udp: true})
	fs := frames(append(cut(t, &f), cut(t, &g)...)...)
	vec := make([][]byte, 0, 100)
	var c Coalescer
	if n := testing.AllocsPerRun(50, func() {
		for i := range c.Coalesce(fs, frame.CapAll) {
			_, vec = c.Gather(i, vec[:0])
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCoalesce(b *testing.B) {
	f := super(shape{payload: 45 * 1448, size: 1448, tcpOpts: 12, flags: wire.TCPAck})
	run := frames(cut(b, &f)...)
	verified := append([]frame.Frame(nil), run...)
	for i := range verified {
		verified[i].Hdr.Flags = wire.VirtioDataValid
	}
	var foreign [][]byte
	for i := range 45 {
		g := super(shape{payload: 1000, size: 2000, udp: true, ports: uint16(i)})
		g.Hdr.GSOType = 0
		foreign = append(foreign, cut(b, &g)...)
	}
	for _, c := range []struct {
		name string
		fs   []frame.Frame
	}{{"run", run}, {"verified", verified}, {"strangers", frames(foreign...)}} {
		b.Run(c.name, func(b *testing.B) {
			var co Coalescer
			vec := make([][]byte, 0, 100)
			n := 0
			for i := range c.fs {
				n += len(c.fs[i].Data)
			}
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				for i := range co.Coalesce(c.fs, frame.CapAll) {
					_, vec = co.Gather(i, vec[:0])
				}
			}
		})
	}
}
