package tunnel

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

var (
	in4, out4 = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2")
	in6, out6 = netip.MustParseAddr("fd01::1"), netip.MustParseAddr("fd01::2")
)

// packet is a frame with n bytes of transport header and payload of a protocol, with TOS tos; its checksum is that of a finished packet.
func packet(v6 bool, proto, tos uint8, n int) []byte {
	hdr, et := wire.IPv4Len, wire.EtherTypeIPv4
	src, dst := in4, out4
	if v6 {
		hdr, et, src, dst = wire.IPv6Len, wire.EtherTypeIPv6, in6, out6
	}
	b := make([]byte, wire.EthernetLen+hdr+n)
	wire.PutEthernet(b, wire.MAC{2, 0, 0, 0, 0, 2}, wire.MAC{2, 0, 0, 0, 0, 1}, et)
	l4 := b[wire.EthernetLen+hdr:]
	for i := range l4 {
		l4[i] = byte(i*5 + n)
	}
	if v6 {
		wire.PutIPv6(b[wire.EthernetLen:], src, dst, proto, tos, 64, n)
	} else {
		wire.PutIPv4(b[wire.EthernetLen:], src, dst, proto, tos, 64, hdr+n, 9, false)
	}
	if proto == wire.ProtoUDP {
		wire.PutUDP(l4, 1000, 2000, n-wire.UDPLen)
	} else {
		wire.PutTCP(l4, wire.TCP{SrcPort: 1000, DstPort: 2000, Seq: 5, Ack: 6, Flags: wire.TCPAck, Window: 7})
	}
	wire.PutL4Checksum(l4, src, dst, proto)
	return b
}

// partial leaves the checksum of a packet undone, as a device that offers to do it gets it.
func partial(b []byte, v6 bool) []byte {
	hdr, src, dst := wire.IPv4Len, in4, out4
	if v6 {
		hdr, src, dst = wire.IPv6Len, in6, out6
	}
	l4 := b[wire.EthernetLen+hdr:]
	proto := b[wire.EthernetLen+9]
	if v6 {
		proto = b[wire.EthernetLen+6]
	}
	wire.PutPartialL4(l4, src, dst, proto, len(l4))
	return b
}

// wrap puts a VXLAN header in front.
func wrap(vni uint32, f []byte) []byte {
	b := make([]byte, vxlan.HeaderLen, vxlan.HeaderLen+len(f))
	vxlan.Put(b, vni)
	return append(b, f...)
}

// rig is a VTEP whose datagrams come from the test, without a namespace: Receive is called directly.
type rig struct{ *VTEP }

func newRig(t testing.TB) rig {
	t.Helper()
	s, err := udp.Listen(udp.Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), NoCut: true})
	if err != nil {
		t.Fatal(err)
	}
	v := &VTEP{cfg: Config{Now: time.Now, Log: quiet}, sock: s, drops: new(frame.DropCounters), start: time.Now()}
	v.peers.Store(&peerSet{})
	t.Cleanup(func() { v.Close() })
	return rig{v}
}

func (r rig) peer(t testing.TB, vni uint32, remote string) (*Peer, *collector) {
	t.Helper()
	p := addPeer(t, r.VTEP, PeerConfig{VNI: vni, Remote: netip.MustParseAddrPort(remote)})
	c := &collector{}
	p.Attach(c)
	return p, c
}

func (r rig) receive(from string, tos uint8, ds ...[]byte) {
	var ts []udp.Train
	for _, d := range ds {
		ts = append(ts, udp.Train{Data: d, Size: len(d), From: netip.MustParseAddrPort(from), TOS: tos})
	}
	(*handler)(r.VTEP).Receive(ts)
}

// Who a datagram is from, and what becomes of one that is from nobody.
func TestClassify(t *testing.T) {
	r := newRig(t)
	p1, c1 := r.peer(t, 1, "192.0.2.1:4789")
	p2, c2 := r.peer(t, 2, "192.0.2.1:4789")
	_, c3 := r.peer(t, 2, "192.0.2.2:4789")
	// Two of one network at one address.
	_, c4 := r.peer(t, 3, "192.0.2.1:4789")
	_, c5 := r.peer(t, 3, "192.0.2.1:4790")
	f := packet(false, wire.ProtoUDP, 0, 100)
	r.receive("192.0.2.1:50000", 0, wrap(1, f), wrap(2, f), wrap(2, f), wrap(1, f), wrap(1, f))
	r.receive("192.0.2.2:50000", 0, wrap(2, f))
	r.receive("192.0.2.1:4789", 0, wrap(3, f))
	r.receive("192.0.2.1:4790", 0, wrap(3, f), wrap(3, f))
	for i, c := range []*collector{c1, c2, c3, c4, c5} {
		if want := []int{3, 2, 1, 1, 2}[i]; c.len() != want {
			t.Errorf("peer %d got %d frames, want %d", i+1, c.len(), want)
		}
	}
	if n := r.Drops().Total(); n != 0 {
		t.Errorf("%d drops", n)
	}
	bad := wrap(1, f)
	bad[0] |= 0x80
	for _, c := range []struct {
		name, from string
		d          []byte
		want       frame.Drop
	}{
		{"other network", "192.0.2.1:4789", wrap(9, f), frame.DropUnknownVNI},
		{"other host", "192.0.2.9:4789", wrap(1, f), frame.DropUnknownPeer},
		{"peer of another network", "192.0.2.2:4789", wrap(1, f), frame.DropUnknownPeer},
		{"neither of two ports", "192.0.2.1:5000", wrap(3, f), frame.DropUnknownPeer},
		{"reserved bits", "192.0.2.1:4789", bad, frame.DropTunnelHeader},
		{"empty", "192.0.2.1:4789", nil, frame.DropTunnelHeader},
		{"short", "192.0.2.1:4789", wrap(1, f)[:7], frame.DropTunnelHeader},
		{"no frame", "192.0.2.1:4789", wrap(1, nil), frame.DropMalformed},
		{"short frame", "192.0.2.1:4789", wrap(1, f[:13]), frame.DropMalformed},
	} {
		before, all := r.Drops().Get(c.want), r.Drops().Total()
		r.receive(c.from, 0, c.d)
		if r.Drops().Get(c.want) != before+1 || r.Drops().Total() != all+1 {
			t.Errorf("%s: not counted as %v", c.name, c.want)
		}
	}
	st := p1.Stats()
	if st.RxFrames != 3 || st.RxBytes != uint64(3*len(f)) || st.Heard.IsZero() {
		t.Errorf("%+v", st)
	}
	// A peer that is gone is unknown; another of its network is not.
	p2.Close()
	p2.Close()
	r.receive("192.0.2.1:4789", 0, wrap(2, f))
	r.receive("192.0.2.2:4789", 0, wrap(2, f))
	if c2.len() != 2 || c3.len() != 2 {
		t.Errorf("after Close: %d and %d frames", c2.len(), c3.len())
	}
	// Without a sink, frames are dropped.
	p := addPeer(t, r.VTEP, PeerConfig{VNI: 6, Remote: netip.MustParseAddrPort("192.0.2.6:4789")})
	r.receive("192.0.2.6:4789", 0, wrap(6, f))
	if p.Drops().Get(frame.DropPortDown) != 1 {
		t.Error("a frame for a peer without a sink is not counted")
	}
}

// Each datagram of a train is looked at: several networks may share one.
func TestTrainOfSeveralNetworks(t *testing.T) {
	r := newRig(t)
	var cs []*collector
	for vni := range uint32(3) {
		_, c := r.peer(t, vni, "192.0.2.1:4789")
		cs = append(cs, c)
	}
	f := packet(true, wire.ProtoTCP, 0, 100)
	var train []byte
	for i := range 600 {
		train = append(train, wrap(uint32(i%3), f)...)
	}
	last := wrap(1, f[:60])
	train = append(train, last...)
	(*handler)(r.VTEP).Receive([]udp.Train{{Data: train, Size: len(wrap(0, f)), From: netip.MustParseAddrPort("192.0.2.1:1")}})
	for i, c := range cs {
		if want := []int{200, 201, 200}[i]; c.len() != want {
			t.Errorf("network %d got %d frames, want %d", i, c.len(), want)
		}
	}
	if n := len(cs[1].fs[200].Data); n != 60 {
		t.Errorf("the last one has %d bytes", n)
	}
	if r.Drops().Total() != 0 {
		t.Error("drops")
	}
}

func TestPeerErrors(t *testing.T) {
	r := newRig(t)
	p, _ := r.peer(t, 1, "192.0.2.1:4789")
	q, _ := r.peer(t, 1, "192.0.2.2:4789")
	add := func(vni uint32, remote netip.AddrPort) error {
		_, err := r.AddPeer(PeerConfig{VNI: vni, Remote: remote})
		return err
	}
	for _, c := range []struct {
		err  error
		is   error
		want string
	}{
		{add(1, netip.MustParseAddrPort("192.0.2.1:4789")), ErrTaken, "remove it first"},
		{add(1, netip.MustParseAddrPort("192.0.2.1:0")), ErrTaken, "remove it first"},
		{add(vxlan.MaxVNI+1, netip.MustParseAddrPort("192.0.2.1:4789")), nil, "16777215"},
		{add(1, netip.MustParseAddrPort("[2001:db8::1]:4789")), nil, "no IPv6"},
		{add(1, r.LocalAddr()), nil, "own end"},
		{p.SetRemote(netip.MustParseAddrPort("192.0.2.2:4789")), ErrTaken, "192.0.2.2"},
		{p.SetRemote(netip.MustParseAddrPort("239.0.0.1:4789")), nil, "unicast"},
		{p.SetRemote(netip.MustParseAddrPort("192.0.2.1:4789")), nil, ""},
	} {
		switch {
		case c.want == "" && c.err != nil, c.want != "" && (c.err == nil || !strings.Contains(c.err.Error(), c.want)), c.is != nil && !errors.Is(c.err, c.is):
			t.Errorf("want %q: %v", c.want, c.err)
		}
	}
	q.Close()
	if err := q.SetRemote(netip.MustParseAddrPort("192.0.2.7:4789")); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed peer moves: %v", err)
	}
	if err := p.SetRemote(netip.MustParseAddrPort("192.0.2.2:4789")); err != nil {
		t.Error(err)
	}
	f := packet(false, wire.ProtoUDP, 0, 100)
	r.receive("192.0.2.1:4789", 0, wrap(1, f))
	r.receive("192.0.2.2:4789", 0, wrap(1, f))
	if st := p.Stats(); st.RxFrames != 1 || r.Drops().Get(frame.DropUnknownPeer) != 1 {
		t.Errorf("after it has moved: %d frames, %d from its old address dropped", st.RxFrames, r.Drops().Get(frame.DropUnknownPeer))
	}
}

// The table of RFC 6040 §4.2, for both IP versions, with and without a tag; checksums stay right.
func TestECN(t *testing.T) {
	const drop = 9
	// want[inner][outer]
	want := [4][4]uint8{
		ecnNone: {ecnNone: 0, ecnECT1: 0, ecnECT0: 0, ecnCE: drop},
		ecnECT1: {ecnNone: 1, ecnECT1: 1, ecnECT0: 1, ecnCE: 3},
		ecnECT0: {ecnNone: 2, ecnECT1: 1, ecnECT0: 2, ecnCE: 3},
		ecnCE:   {ecnNone: 3, ecnECT1: 3, ecnECT0: 3, ecnCE: 3},
	}
	r := newRig(t)
	p, c := r.peer(t, 1, "192.0.2.1:4789")
	drops := uint64(0)
	for inner := range uint8(4) {
		for outer := range uint8(4) {
			for _, v6 := range []bool{false, true} {
				for _, tagged := range []bool{false, true} {
					f := packet(v6, wire.ProtoUDP, 0xa8|inner, 100)
					if tagged {
						f = append(append(append([]byte{}, f[:12]...), 0x81, 0, 0, 5), f[12:]...)
					}
					if got := innerECN(f); got != udp.ECN(inner) {
						t.Errorf("the frame is sent with ECN %d, want %d", got, inner)
					}
					c.fs = nil
					r.receive("192.0.2.1:4789", 0x14|outer, wrap(1, f))
					if want[inner][outer] == drop {
						if drops++; c.len() != 0 || p.Drops().Get(frame.DropECN) != drops {
							t.Errorf("inner %d, outer %d, IPv6 %v: not dropped", inner, outer, v6)
						}
						continue
					}
					if c.len() != 1 {
						t.Fatalf("inner %d, outer %d, IPv6 %v: dropped", inner, outer, v6)
					}
					_, off, _ := wire.Payload(c.fs[0].Data)
					ip, ok := wire.ParseIP(c.fs[0].Data[off:], false) // verifies the checksum
					if !ok || ip.TOS != 0xa8|want[inner][outer] {
						t.Errorf("inner %d, outer %d, IPv6 %v, tagged %v: TOS %#x, checksum %v", inner, outer, v6, tagged, ip.TOS, ok)
					}
				}
			}
		}
	}
	arp := make([]byte, 60)
	wire.PutEthernet(arp, wire.Broadcast, wire.MAC{2, 0, 0, 0, 0, 1}, wire.EtherTypeARP)
	c.fs = nil
	r.receive("192.0.2.1:4789", 3, wrap(1, arp), wrap(1, arp[:14]))
	if c.len() != 2 {
		t.Error("what is not IP does not pass congestion")
	}
}

// What a kernel has left undone is told from what is finished.
func TestUnfinished(t *testing.T) {
	const mtu = 1450
	for _, v6 := range []bool{false, true} {
		hdr, gsoTCP := 34, wire.GSOTCPv4
		if v6 {
			hdr, gsoTCP = 54, wire.GSOTCPv6
		}
		for _, c := range []struct {
			name  string
			proto uint8
			n     int
			size  int
			want  wire.VirtioNetHdr
		}{
			{"TCP", wire.ProtoTCP, 100, 0, wire.VirtioNetHdr{Flags: 1, CsumStart: uint16(hdr), CsumOffset: 16}},
			{"UDP", wire.ProtoUDP, 100, 0, wire.VirtioNetHdr{Flags: 1, CsumStart: uint16(hdr), CsumOffset: 6}},
			{"TCP superframe", wire.ProtoTCP, 30000, 0, wire.VirtioNetHdr{Flags: 1, GSOType: gsoTCP, GSOSize: uint16(mtu - hdr + 14 - 20), CsumStart: uint16(hdr), CsumOffset: 16}},
			{"UDP superframe", wire.ProtoUDP, 30000, 1000, wire.VirtioNetHdr{Flags: 1, GSOType: wire.GSOUDPL4, GSOSize: 1000, CsumStart: uint16(hdr), CsumOffset: 6}},
		} {
			f := packet(v6, c.proto, 0, c.n)
			if h := unfinished(f, mtu, c.size); h != (wire.VirtioNetHdr{}) {
				t.Errorf("%s, IPv6 %v, finished: %+v", c.name, v6, h)
			}
			f = partial(f, v6)
			h := unfinished(f, mtu, c.size)
			if h != c.want {
				t.Errorf("%s, IPv6 %v: %+v, want %+v", c.name, v6, h, c.want)
			}
			if !h.Validate(f) {
				t.Errorf("%s, IPv6 %v: %+v is refused", c.name, v6, h)
			}
			if c.size > 0 != uncut(wrap(1, f)) && c.proto == wire.ProtoUDP && c.n > 100 {
				t.Errorf("%s, IPv6 %v: uncut: %v", c.name, v6, uncut(wrap(1, f)))
			}
		}
	}
	two := append(wrap(1, packet(false, wire.ProtoUDP, 0, 100)), wrap(1, packet(false, wire.ProtoUDP, 0, 100))...)
	if uncut(two) {
		t.Error("a train of two is taken for one datagram")
	}
}

// Close of a peer waits for its sink, and nothing comes afterwards.
func TestPeerCloseWaitsForTheSink(t *testing.T) {
	r := newRig(t)
	p, _ := r.peer(t, 1, "192.0.2.1:4789")
	inside, leave := make(chan bool), make(chan bool)
	p.Attach(sinkFunc(func([]frame.Frame) { inside <- true; <-leave }))
	f := packet(false, wire.ProtoUDP, 0, 100)
	var wg sync.WaitGroup
	wg.Go(func() { r.receive("192.0.2.1:4789", 0, wrap(1, f)) })
	<-inside
	closed := make(chan bool)
	wg.Go(func() { p.Close(); close(closed) })
	testbed.Eventually(t, 5*time.Second, p.closed.Load)
	select {
	case <-closed:
		t.Error("Close has returned while the sink was busy")
	case <-time.After(20 * time.Millisecond):
	}
	leave <- true
	<-closed
	r.receive("192.0.2.1:4789", 0, wrap(1, f)) // would block in the sink
	wg.Wait()
}

type sinkFunc func(fs []frame.Frame)

func (f sinkFunc) Forward(fs []frame.Frame) { f(fs) }

// FuzzReceive: whatever comes, nothing panics, and each datagram is a frame or a drop.
func FuzzReceive(f *testing.F) {
	add := func(size int, tos uint8, ds ...[]byte) {
		var b []byte
		for _, d := range ds {
			b = append(b, d...)
		}
		f.Add(b, uint16(size), tos)
	}
	u, v := packet(false, wire.ProtoUDP, 2, 60), packet(true, wire.ProtoTCP, 0, 60)
	add(0, 0, wrap(1, u))
	add(0, 3, wrap(2, v))
	add(len(u)+8, 3, wrap(1, u), wrap(2, u), wrap(3, u), wrap(1, u[:30]))
	add(0, 1, wrap(1, partial(packet(false, wire.ProtoTCP, 0, 3000), false)))
	add(500, 0, wrap(1, partial(packet(true, wire.ProtoUDP, 0, 3000), true)))
	add(0, 0)
	r := newRig(f)
	var ps []*Peer
	var frames int
	for vni := range uint32(3) {
		p := addPeer(f, r.VTEP, PeerConfig{VNI: vni, Remote: netip.MustParseAddrPort("192.0.2.1:4789")})
		p.Attach(sinkFunc(func(fs []frame.Frame) {
			for i := range fs {
				h := fs[i].Hdr
				if !h.Validate(fs[i].Data) || h != fs[i].Hdr {
					panic("a frame that is not valid goes in")
				}
			}
			frames += len(fs)
		}))
		ps = append(ps, p)
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint16, tos uint8) {
		tr := udp.Train{Data: data, Size: len(data), From: netip.MustParseAddrPort("192.0.2.1:9"), TOS: tos}
		if n := int(size); n > 0 && n < len(data) {
			tr.Size = n
		}
		want := 1
		if tr.Size > 0 && !(tr.Size < len(data) && uncut(data)) {
			want = (len(data) + tr.Size - 1) / tr.Size
		}
		drops := func() (n int) {
			n = int(r.Drops().Total())
			for _, p := range ps {
				n += int(p.Drops().Total())
			}
			return n
		}
		before := frames + drops()
		(*handler)(r.VTEP).Receive([]udp.Train{tr})
		if got := frames + drops() - before; got != want {
			t.Errorf("%d datagrams became %d frames and drops", want, got)
		}
	})
}
