package stack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// cut makes fragments of a frame with an IP packet, each with at most size bytes of payload.
func cut(d []byte, id uint32, size int) (out [][]byte) {
	ip, ok := wire.ParseIP(d[wire.EthernetLen:], false)
	if !ok {
		panic("no packet")
	}
	payload := d[wire.EthernetLen+ip.HdrLen:]
	for off := 0; off < len(payload); off += size {
		out = append(out, piece(d, id, off, payload[off:min(off+size, len(payload))], off+size < len(payload)))
	}
	return out
}

// piece is one fragment of d.
func piece(d []byte, id uint32, off int, payload []byte, more bool) []byte {
	f := slices.Clone(d[:wire.EthernetLen])
	if d[wire.EthernetLen]>>4 == 4 {
		h := slices.Clone(d[wire.EthernetLen : wire.EthernetLen+wire.IPv4Len])
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
		binary.BigEndian.PutUint16(h[4:], uint16(id))
		v := uint16(off / 8)
		if more {
			v |= 0x2000
		}
		binary.BigEndian.PutUint16(h[6:], v)
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], ^wire.Fold(wire.Sum(h, 0)))
		return append(append(f, h...), payload...)
	}
	h := slices.Clone(d[wire.EthernetLen : wire.EthernetLen+wire.IPv6Len])
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(payload)))
	e := make([]byte, 8)
	e[0], h[6] = h[6], 44
	v := uint16(off)
	if more {
		v |= 1
	}
	binary.BigEndian.PutUint16(e[2:], v)
	binary.BigEndian.PutUint32(e[4:], id)
	return append(append(append(f, h...), e...), payload...)
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func TestReassembly(t *testing.T) {
	for _, addr := range [][2]netip.Addr{{con4, far4}, {con6, far6}} {
		for _, n := range []int{100, 3000, 20000, 65507 - 40} {
			cfg := testConfig()
			h := &packets{}
			cfg.Handlers.UDP = h
			g, _ := byHand(t, cfg)
			body := pattern(n)
			whole := ipPacket(addr[0], addr[1], wire.ProtoUDP, 64, udp(7, 9, body))
			for i, order := range []string{"forward", "backward", "shuffled", "twice"} {
				h.calls = nil
				fs := cut(whole, uint32(i+1), max(64, 1480/8*8))
				switch order {
				case "backward":
					slices.Reverse(fs)
				case "shuffled":
					rand.New(rand.NewPCG(1, 2)).Shuffle(len(fs), func(i, j int) { fs[i], fs[j] = fs[j], fs[i] })
				case "twice":
					fs = slices.Concat(fs[:len(fs)-1], fs)
				}
				send(g, fs...)
				ps := h.all()
				if len(ps) != 1 || !bytes.Equal(ps[0].L4()[8:], body) || ps[0].IP.IsFragment() || ps[0].IP.Src != addr[0] {
					t.Fatalf("%v %d bytes %s: %d packets; drops %v", addr[0], n, order, len(ps), drops(g))
				}
				if len(fs) > 1 && !bytes.Equal(ps[0].Frame.Data[wire.EthernetLen+ps[0].IP.HdrLen:], whole[wire.EthernetLen+ps[0].IP.HdrLen:]) {
					t.Fatalf("%v %d %s headers differ:\n% x\n% x", addr, n, order, ps[0].Frame.Data[:62], whole[:62])
				}
			}
			if g.frags.used != 0 || len(g.frags.m) != 0 || len(g.frags.bySrc) != 0 {
				t.Fatalf("left: %d bytes, %d packets, %d sources", g.frags.used, len(g.frags.m), len(g.frags.bySrc))
			}
		}
	}
}

// TestFragmentOverlap: RFC 5722 wants the whole datagram gone, with what comes after.
func TestFragmentOverlap(t *testing.T) {
	for _, addr := range [][2]netip.Addr{{con4, far4}, {con6, far6}} {
		body := pattern(400)
		whole := ipPacket(addr[0], addr[1], wire.ProtoUDP, 64, udp(7, 9, body))
		l4 := whole[len(whole)-408:]
		forged := slices.Clone(l4[64:128])
		forged[0] ^= 1
		for name, fs := range map[string][][]byte{
			"partial":    {piece(whole, 1, 0, l4[:80], true), piece(whole, 1, 64, l4[64:160], true), piece(whole, 1, 80, l4[80:], false)},
			"inside":     {piece(whole, 1, 0, l4[:160], true), piece(whole, 1, 64, forged, true), piece(whole, 1, 160, l4[160:], false)},
			"around":     {piece(whole, 1, 64, l4[64:80], true), piece(whole, 1, 0, l4[:160], true), piece(whole, 1, 160, l4[160:], false)},
			"past end":   {piece(whole, 1, 160, l4[160:], false), piece(whole, 1, 0, l4[:160], true)[:0], piece(whole, 1, 400, l4[:16], true), piece(whole, 1, 0, l4[:160], true)},
			"two ends":   {piece(whole, 1, 160, l4[160:], false), piece(whole, 1, 160, l4[160:176], false), piece(whole, 1, 0, l4[:160], true)},
			"odd length": {piece(whole, 1, 0, l4[:161], true), piece(whole, 1, 160, l4[160:], false)},
			"too long":   {piece(whole, 1, 65528, l4[:160], false), piece(whole, 1, 0, l4[:160], true)},
		} {
			cfg := testConfig()
			h := &packets{}
			cfg.Handlers.UDP = h
			g, _ := byHand(t, cfg)
			send(g, fs...)
			if len(h.calls) != 0 {
				t.Errorf("%v %s: delivered", addr[0], name)
			}
			if g.Drops().Get(frame.DropMalformed) == 0 {
				t.Errorf("%v %s: not counted", addr[0], name)
			}
		}
	}
}

func TestFragmentLimits(t *testing.T) {
	cfg := testConfig()
	h := &packets{}
	cfg.Handlers.UDP = h
	cfg.Reassembly = ReassemblyConfig{MaxBytes: 64 << 10, MaxBytesPerSource: 32 << 10}
	g, _ := byHand(t, cfg)
	first := func(src netip.Addr, id uint32) []byte {
		return cut(ipPacket(src, far4, wire.ProtoUDP, 64, udp(7, 9, make([]byte, 3000))), id, 1480)[0]
	}
	for i := range 1000 {
		send(g, first(con4, uint32(i)))
	}
	if g.frags.used > 32<<10 || g.Drops().Get(frame.DropFragLimit) < 900 {
		t.Fatalf("one source holds %d bytes; drops %v", g.frags.used, drops(g))
	}
	// Another container's fragments still fit.
	other := netip.MustParseAddr("10.88.0.3")
	send(g, cut(ipPacket(other, far4, wire.ProtoUDP, 64, udp(7, 9, make([]byte, 3000))), 5, 1480)...)
	if len(h.all()) != 1 {
		t.Fatalf("another source's packet was not made whole; drops %v", drops(g))
	}
	for i := range 200 {
		send(g, first(netip.AddrFrom4([4]byte{10, 88, 1, byte(i)}), 1))
	}
	if g.frags.used > 64<<10 {
		t.Fatalf("all hold %d bytes", g.frags.used)
	}
}

func TestFragmentTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reassembly{}
		d := new(frame.DropCounters)
		r.init(ReassemblyConfig{MaxBytes: 1 << 20, MaxBytesPerSource: 1 << 20, Timeout: 30 * time.Second}, d)
		f := cut(ipPacket(con4, far4, wire.ProtoUDP, 64, udp(7, 9, make([]byte, 3000))), 5, 1480)[1]
		ip, _ := wire.ParseIP(f[wire.EthernetLen:], false)
		r.add(f, wire.EthernetLen, &ip)
		time.Sleep(29 * time.Second)
		r.expire(time.Now())
		if len(r.m) != 1 {
			t.Fatal("gone too early")
		}
		time.Sleep(time.Second)
		r.expire(time.Now())
		if len(r.m) != 0 || r.used != 0 || d.Get(frame.DropFragTimeout) != 1 {
			t.Fatalf("%d left, %d bytes, %d counted", len(r.m), r.used, d.Get(frame.DropFragTimeout))
		}
	})
}

// TestSendFragments: what Send cuts, reassembly joins again.
func TestSendFragments(t *testing.T) {
	g, r := byHand(t, testConfig())
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	for _, addr := range [][2]netip.Addr{{far4, con4}, {far6, con6}} {
		for _, partial := range []bool{false, true} {
			body := pattern(9001)
			d := ipPacket(addr[0], addr[1], wire.ProtoUDP, 64, udp(53, 99, body))
			want := slices.Clone(d[wire.EthernetLen:])
			f := frame.Frame{Data: d}
			ip, _ := wire.ParseIP(d[wire.EthernetLen:], false)
			if partial {
				l4 := d[wire.EthernetLen+ip.HdrLen:]
				binary.BigEndian.PutUint16(l4[6:], wire.Fold(wire.PseudoSum(ip.Src, ip.Dst, wire.ProtoUDP, len(l4))))
				f.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, CsumStart: uint16(wire.EthernetLen + ip.HdrLen), CsumOffset: 6}
			}
			g.Send([]frame.Frame{f})
			fs := r.take()
			if len(fs) != 7 {
				t.Fatalf("%d fragments; drops %v", len(fs), drops(g))
			}
			var re reassembly
			re.init(ReassemblyConfig{MaxBytes: 1 << 20, MaxBytesPerSource: 1 << 20, Timeout: time.Second}, new(frame.DropCounters))
			var whole []byte
			for _, f := range fs {
				if len(f.Data) > wire.EthernetLen+1500 || wire.Dst(f.Data) != conMAC || f.Hdr != (wire.VirtioNetHdr{}) {
					t.Fatalf("fragment of %d bytes to %v", len(f.Data), wire.Dst(f.Data))
				}
				ip, ok := wire.ParseIP(f.Data[wire.EthernetLen:], false)
				if !ok || !ip.IsFragment() {
					t.Fatal("not a fragment")
				}
				whole = re.add(f.Data, wire.EthernetLen, &ip)
			}
			if addr[0].Is4() { // the identification is ours
				copy(whole[wire.EthernetLen+4:], want[4:6])
				copy(whole[wire.EthernetLen+10:], want[10:12])
			}
			if whole == nil || !bytes.Equal(whole[wire.EthernetLen:], want) {
				t.Fatalf("%v: the pieces do not make the packet", addr[0])
			}
		}
	}
}
