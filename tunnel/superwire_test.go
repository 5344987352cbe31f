package tunnel

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/secure"
	"patchbay/tunnel/superframe"
	"patchbay/tunnel/udp"
)

// Two nodes and the patchbay wire between them, as TestKernelPeer does it with a kernel:
//
//	[c1] ── switch ── VTEP [a] ── underlay ── [b] VTEP ── switch ── [c2]
func TestSuperWire(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		remote string
		mtu    int
		inner  int
	}{{"10.9.0.2", 1500, 1434}, {"10.9.0.2", 9000, 8934}, {"fd09::2", 1500, 1414}, {"fd09::2", 9000, 8914}} {
		t.Run(fmt.Sprintf("%s MTU %d", c.remote, c.mtu), func(t *testing.T) {
			a, b := underlay(t, c.mtu)
			there := netip.MustParseAddr(c.remote)
			ping(t, a, c.remote)
			na, nb := newNetwork(newVTEP(t, a, Config{}), 42), newNetwork(newVTEP(t, b, Config{}), 42)
			pa := na.peer(t, PeerConfig{Remote: netip.AddrPortFrom(there, 0), Wire: WirePatchbay})
			pb := nb.peer(t, PeerConfig{Remote: netip.AddrPortFrom(there.Prev(), 0), Wire: WirePatchbay})
			if mtu, err := pa.MTU(); mtu != c.inner || err != nil {
				t.Fatalf("inner MTU %d, %v", mtu, err)
			}
			c1, c2 := na.container(t, 1, c.inner, "10.1.0.1/24", "fd01::1/64"), nb.container(t, 2, c.inner, "10.1.0.2/24", "fd01::2/64")
			for _, ip := range []struct {
				to   string
				head int
			}{{"10.1.0.2", 28}, {"fd01::2", 48}} {
				ping(t, c1, ip.to)
				ping(t, c1, ip.to, "-M", "do", "-s", fmt.Sprint(c.inner-ip.head))
			}
			transfer(t, c1, c2, "10.1.0.2", 16<<20)
			transfer(t, c2, c1, "10.1.0.1", 16<<20)
			transfer(t, c1, c2, "fd01::2", 16<<20)
			transfer(t, c2, c1, "fd01::1", 4<<20)
			s := pa.Stats()
			// 64 kB a frame, where 50 segments would be 50 frames.
			if frames := s.RxFrames + s.TxFrames; frames > 20000 || s.Mode != "superframes" || s.Cut != udp.CutOn {
				t.Errorf("%d frames, %+v", frames, s)
			}
			// A message, its headers included, fits one send (GSOMaxSize); a few go with others.
			if s.Sent.Messages > s.TxFrames+s.TxFrames/20+20 {
				t.Errorf("%d frames took %d sends", s.TxFrames, s.Sent.Messages)
			}
			broadcast(t, c1, c2)
			udpSuperframes(t, c1, c2, "10.1.0.2", c.inner-28)
			udpSuperframes(t, c2, c1, "fd01::1", c.inner-48)
			clean(t, []*frame.DropCounters{pa.Drops(), pb.Drops(), na.v.Drops(), nb.v.Drops()}, a, b, c1, c2)
		})
	}
}

// broadcast sends some from one container, and expects each once at the other.
func broadcast(t *testing.T, from, to *testbed.NS) {
	t.Helper()
	heard := listenFor(t, to, netip.Addr{})
	pc, err := from.ListenPacket("udp4", "10.1.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	const times = 50
	for k := range times {
		if _, err := pc.(*net.UDPConn).WriteToUDPAddrPort(fmt.Appendf(nil, "broadcast %d", k), netip.MustParseAddrPort("10.1.0.255:7777")); err != nil {
			t.Fatal(err)
		}
	}
	testbed.Eventually(t, 10*time.Second, func() bool {
		for k := range times {
			if heard.get(fmt.Sprintf("broadcast %d", k)) != 1 {
				return false
			}
		}
		return true
	})
}

// udpSuperframes has a program send datagrams that its kernel would cut, and compares them.
func udpSuperframes(t *testing.T, from, to *testbed.NS, addr string, size int) {
	t.Helper()
	pc, err := to.ListenPacket("udp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	var s *udp.Socket
	from.Do(func() { s, err = udp.Listen(udp.Config{}) })
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	path, err := s.NewPath(pc.LocalAddr().(*net.UDPAddr).AddrPort(), udp.PathConfig{})
	if err != nil {
		t.Fatal(err)
	}
	var drops frame.DropCounters
	batch, _ := s.Batch(&drops)
	n := min(60000/size, 30)
	for i := range n {
		batch.Add(path, 0, 0, i, batch.Head(0), bytes.Repeat([]byte{byte(i)}, size))
	}
	if lost := batch.Send(); lost != 0 {
		t.Fatalf("%d lost", lost)
	}
	batch.Release()
	buf := make([]byte, 10000)
	for i := range n {
		pc.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, _, err := pc.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:n], bytes.Repeat([]byte{byte(i)}, size)) {
			t.Fatalf("%s: datagram %d: %d bytes, %v", addr, i, n, err)
		}
	}
}

// Whatever wire each end sends on, the other takes it.
func TestWiresMix(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	na, nb := newNetwork(newVTEP(t, a, Config{}), 42), newNetwork(newVTEP(t, b, Config{}), 42)
	pa := na.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: WirePatchbay})
	pb := nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WireVXLAN})
	c1, c2 := na.container(t, 1, 1434, "10.1.0.1/24"), nb.container(t, 2, 1434, "10.1.0.2/24")
	ping(t, c1, "10.1.0.2")
	transfer(t, c1, c2, "10.1.0.2", 4<<20)
	transfer(t, c2, c1, "10.1.0.1", 4<<20)
	testbed.Eventually(t, 10*time.Second, func() bool { return pa.Stats().State == PeerUp && pb.Stats().State == PeerUp })
	clean(t, []*frame.DropCounters{pa.Drops(), pb.Drops(), na.v.Drops(), nb.v.Drops()}, a, b, c1, c2)
}

// The peer is a switch port like any other on this wire too, in both modes.
func TestSuperConformance(t *testing.T) {
	for _, c := range []struct {
		name, remote string
		cfg          Config
		segments     bool
	}{
		{"superframes", "10.9.0.2:4789", Config{}, false},
		{"IPv6", "[fd09::2]:4789", Config{}, false},
		{"segments", "10.9.0.2:4789", Config{}, true},
		{"one by one", "10.9.0.2:4789", Config{NoCut: true, NoJoin: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			porttest.Run(t, func(t *testing.T) *porttest.Harness {
				a, b := underlay(t, 1600)
				remote := netip.MustParseAddrPort(c.remote)
				ping(t, a, remote.Addr().String())
				va, vb := newVTEP(t, a, c.cfg), newVTEP(t, b, c.cfg)
				p := addPeer(t, va, PeerConfig{VNI: 5, Remote: remote, Wire: WirePatchbay})
				p.wire.(*superWire).adapt.inSegments.Store(c.segments)
				q := make(queue, 1024)
				addPeer(t, vb, PeerConfig{VNI: 5, Remote: netip.AddrPortFrom(remote.Addr().Prev(), 0), Wire: WirePatchbay}).Attach(q)
				return &porttest.Harness{Port: p, Read: q.read, Close: p.Close, Drops: p.Drops().Total, AllocFree: true}
			})
		})
	}
}

// superPair is two hosts on an underlay whose networks are peers on the superframe wire; got has what comes to b's.
func superPair(t *testing.T) (a, b *testbed.NS, p *Peer, got *collector) {
	t.Helper()
	a, b = underlay(t, 1500)
	ping(t, a, "10.9.0.2")
	p = addPeer(t, newVTEP(t, a, Config{}), PeerConfig{VNI: 1, Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: WirePatchbay})
	got = &collector{}
	addPeer(t, newVTEP(t, b, Config{}), PeerConfig{VNI: 1, Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay}).Attach(got)
	return a, b, p, got
}

// Small frames share datagrams, on the way of a real Transmit.
func TestSmallFramesShare(t *testing.T) {
	testbed.Leaks(t)
	a, _, p, got := superPair(t)
	var fs []frame.Frame
	for range 100 {
		fs = append(fs, frame.Frame{Data: packet(false, wire.ProtoUDP, 0, 72)})
	}
	before := p.Stats().Sent.Datagrams
	if n := p.Transmit(fs); n != len(fs) {
		t.Fatalf("took %d", n)
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return got.len() == len(fs) })
	// 110 bytes with the record's head, 13 in 1452; probes may be among them.
	if n := p.Stats().Sent.Datagrams - before; n < 8 || n > 16 {
		t.Errorf("%d frames in %d datagrams", len(fs), n)
	}
	for i := range got.fs {
		if !bytes.Equal(got.fs[i].Data, fs[i].Data) {
			t.Fatalf("frame %d differs", i)
		}
	}
	// Frames of one datagram that cannot be sent are each lost.
	run(t, a, "ip", "link", "set", "eth0", "down")
	if n := p.Transmit(fs); n != 0 || p.Drops().Get(frame.DropUnderlay) != uint64(len(fs)) {
		t.Errorf("took %d without an underlay, counted %d", n, p.Drops().Get(frame.DropUnderlay))
	}
}

// Parts of messages follow the path's MTU when it falls.
func TestFragmentsFollowMTU(t *testing.T) {
	testbed.Leaks(t)
	a, b, p, got := superPair(t)
	super := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 30000), false)}
	super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1100, CsumStart: 34, CsumOffset: 16}
	for _, mtu := range []int{1500, 1400, 1300} {
		for _, ns := range []*testbed.NS{a, b} {
			run(t, ns, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(mtu))
		}
		// What is sent before somebody has asked, at most once a second, gets lost: no more than one here, since more are a reason to leave superframes.
		p.Transmit([]frame.Frame{super})
		testbed.Eventually(t, 5*time.Second, func() bool { return p.Stats().MTU <= mtu-66 })
		testbed.Eventually(t, 5*time.Second, func() bool { return p.Transmit([]frame.Frame{super}) == 1 })
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return got.len() >= 3 })
	got.mu.Lock()
	defer got.mu.Unlock()
	for i := range got.fs {
		if !bytes.Equal(got.fs[i].Data, super.Data) || got.fs[i].Hdr.GSOSize != 1100 {
			t.Errorf("superframe %d differs: %+v, %d bytes", i, got.fs[i].Hdr, len(got.fs[i].Data))
		}
	}
}

// messageOf makes one datagram of records.
func messageOf(vni uint32, seq uint64, records ...[]byte) []byte {
	msg := bytes.Join(records, nil)
	b := make([]byte, superframe.HeaderLen)
	(&superframe.Header{Channel: vni, Seq: seq, Total: uint32(len(msg))}).Put(b)
	return append(b, msg...)
}

func recordOf(kind uint8, body []byte) []byte {
	b := make([]byte, superframe.RecordLen)
	superframe.PutRecord(b, kind, len(body))
	return append(b, body...)
}

// What comes, in whatever wire, and what is wrong with it.
func TestSuperReceive(t *testing.T) {
	r := newRig(t)
	p, c := r.peer(t, 1, "192.0.2.1:4789")
	f := packet(false, wire.ProtoUDP, 0, 100)
	good := recordOf(superframe.KindFrame, f)
	seq := uint64(1000)
	next := func() uint64 { seq++; return seq }
	sealed, flag := messageOf(1, next(), good), messageOf(1, next(), good)
	sealed[1], flag[1] = 1, 2
	r.receive("192.0.2.1:50000", 0, messageOf(1, next(), good, good), wrap(1, f), messageOf(1, next(), good))
	if c.len() != 4 || r.Drops().Total() != 0 || p.Drops().Total() != 0 {
		t.Fatalf("%d frames", c.len())
	}
	for _, x := range []struct {
		name  string
		d     []byte
		drops *frame.DropCounters
		why   frame.Drop
		n     int // frames that come through all the same
	}{
		{"other network", messageOf(9, next(), good), r.Drops(), frame.DropUnknownVNI, 0},
		{"sealed", sealed, r.Drops(), frame.DropNoSession, 0},
		{"unknown flag", flag, r.Drops(), frame.DropTunnelHeader, 0},
		{"header alone", messageOf(1, next(), good)[:superframe.HeaderLen], r.Drops(), frame.DropTunnelHeader, 0},
		{"cut short", messageOf(1, next(), good)[:60], r.Drops(), frame.DropTunnelHeader, 0},
		{"the type alone", []byte{superframe.Type}, r.Drops(), frame.DropTunnelHeader, 0},
		{"the same again", messageOf(1, seq, good), p.Drops(), frame.DropDuplicate, 0},
		{"records that do not add up", messageOf(1, next(), good, []byte{1, 0, 0, 9}), p.Drops(), frame.DropMalformed, 0},
		{"unknown record", messageOf(1, next(), recordOf(77, f), good), p.Drops(), frame.DropUnknownRecord, 1},
		{"short frame", messageOf(1, next(), recordOf(1, f[:13]), good), p.Drops(), frame.DropMalformed, 1},
		{"bad virtio header", messageOf(1, next(), recordOf(2, append([]byte("\x40\x09aaaaaaaa"), f...)), good), p.Drops(), frame.DropBadHdr, 1},
		{"no control message", messageOf(1, next(), recordOf(3, f), good), p.Drops(), frame.DropMalformed, 1},
	} {
		if x.name == "the same again" { // the one before this one was refused; make it known first
			r.receive("192.0.2.1:50000", 0, x.d)
		}
		before, all, had := x.drops.Get(x.why), r.Drops().Total()+p.Drops().Total(), c.len()
		r.receive("192.0.2.1:50000", 0, x.d)
		if x.drops.Get(x.why) != before+1 || r.Drops().Total()+p.Drops().Total() != all+1 || c.len() != had+x.n {
			t.Errorf("%s: not counted as %v, or %d frames and not %d", x.name, x.why, c.len()-had, x.n)
		}
	}
	// Congestion marked on one part of a message is on its frame.
	big := packet(false, wire.ProtoTCP, uint8(ecnECT0), 3000)
	msg := recordOf(superframe.KindFrame, big)
	h := superframe.Header{Channel: 1, Seq: next(), Total: uint32(len(msg))}
	var cut superframe.Cutter
	var ts []udp.Train
	for cut.Begin(h, 0, msg, 1000); cut.More(); {
		d := make([]byte, cut.HeadLen())
		payload := cut.Next(d)
		d = append(d, payload...)
		ts = append(ts, udp.Train{Data: d, Size: len(d), From: netip.MustParseAddrPort("192.0.2.1:1"), TOS: uint8(ecnECT0)})
	}
	ts[1].TOS = uint8(ecnCE)
	had := c.len()
	(*handler)(r.VTEP).Receive(ts)
	if c.len() != had+1 || innerECN(c.fs[had].Data) != ecnCE {
		t.Error("congestion was marked and is not")
	}
	if s := p.Stats(); s.Reordered != 0 || s.RxFrames != uint64(c.len()) {
		t.Errorf("%+v", s)
	}
}

// A train may hold messages of both wires and of several networks, whole and in parts.
func TestSuperTrains(t *testing.T) {
	r := newRig(t)
	_, c1 := r.peer(t, 1, "192.0.2.1:4789")
	_, c2 := r.peer(t, 2, "192.0.2.1:4789")
	big := packet(true, wire.ProtoTCP, 0, 4000)
	msg := recordOf(superframe.KindFrame, big)
	const room = 1000
	var train []byte
	add := func(vni uint32, seq uint64) {
		var cut superframe.Cutter
		for cut.Begin(superframe.Header{Channel: vni, Seq: seq, Total: uint32(len(msg))}, 0, msg, room); cut.More(); {
			d := make([]byte, cut.HeadLen())
			payload := cut.Next(d)
			d = append(d, payload...)
			if len(train)%(room+superframe.HeaderLen) != 0 {
				t.Fatal("a short datagram within the train")
			}
			train = append(train, d...)
		}
	}
	msg = msg[:len(msg):len(msg)]
	for (len(msg))%room != 0 { // fill up with an empty record, so that the last part is as long as the others
		pad := room - len(msg)%room
		if pad < superframe.RecordLen {
			pad += room
		}
		msg = append(msg, recordOf(99, make([]byte, pad-superframe.RecordLen))...)
	}
	add(1, 5)
	add(2, 5)
	v := wrap(1, packet(false, wire.ProtoUDP, 0, room+superframe.HeaderLen-8-34))
	train = append(train, v...)
	add(1, 6)
	(*handler)(r.VTEP).Receive([]udp.Train{{Data: train, Size: room + superframe.HeaderLen, From: netip.MustParseAddrPort("192.0.2.1:1")}})
	if c1.len() != 3 || c2.len() != 1 || r.Drops().Total() != 0 {
		t.Errorf("%d and %d frames, %d drops", c1.len(), c2.len(), r.Drops().Total())
	}
	for _, f := range []frame.Frame{c1.fs[0], c1.fs[2], c2.fs[0]} {
		if !bytes.Equal(f.Data, big) {
			t.Error("a frame differs")
		}
	}
}

// superTrain is a train with a superframe of 60 kB from network vni, as UDP_GRO hands it over.
func superTrain(vni uint32, seq uint64) (train []byte, size int) {
	f := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 60000), false)}
	f.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1380, CsumStart: 34, CsumOffset: 16, HdrLen: 54}
	var pack superframe.Packer
	var cut superframe.Cutter
	const room = 1452
	pack.Reset([]frame.Frame{f}, room)
	pack.Next()
	for cut.Begin(superframe.Header{Channel: vni, Seq: seq, Total: uint32(pack.Len())}, pack.Front(), pack.Body(), room); cut.More(); {
		head := make([]byte, cut.HeadLen())
		if cut.First() {
			pack.Put(head[superframe.HeaderLen:])
		}
		payload := cut.Next(head)
		train = append(append(train, head...), payload...)
	}
	return train, superframe.HeaderLen + room
}

func TestSuperReceiveAllocates(t *testing.T) {
	r := newRig(t)
	p, _ := r.peer(t, 1, "192.0.2.1:4789")
	p.Attach(sinkFunc(func([]frame.Frame) {}))
	whole, size := superTrain(1, 0)
	from := netip.MustParseAddrPort("192.0.2.1:4789")
	work := make([]byte, len(whole))
	var ts []udp.Train
	seq := uint64(0)
	receive := func() {
		copy(work, whole)
		for i := 0; i < len(work); i += size {
			binary.BigEndian.PutUint64(work[i+8:], seq+1)
		}
		ts = append(ts[:0], udp.Train{Data: work, Size: size, From: from})
		(*handler)(r.VTEP).Receive(ts)
		// And once more, in two trains.
		copy(work, whole)
		for i := 0; i < len(work); i += size {
			binary.BigEndian.PutUint64(work[i+8:], seq+2)
		}
		ts = append(ts[:0], udp.Train{Data: work[:10*size], Size: size, From: from}, udp.Train{Data: work[10*size:], Size: size, From: from})
		(*handler)(r.VTEP).Receive(ts)
		seq += 2
	}
	receive()
	if n := testing.AllocsPerRun(100, receive); n != 0 {
		t.Errorf("%v allocations for two superframes", n)
	}
	if s := p.Stats(); s.RxFrames != seq || p.Drops().Total() != 0 {
		t.Errorf("%d superframes of %d, %d drops", s.RxFrames, seq, p.Drops().Total())
	}
}

// Whatever comes to the port, in whatever train, is a frame that may go to a TAP, or is counted.
func FuzzReceiveTrain(f *testing.F) {
	r := newRig(f)
	p := addPeer(f, r.VTEP, PeerConfig{VNI: 1, Remote: netip.MustParseAddrPort("127.0.0.9:9"), Wire: WirePatchbay})
	var got []frame.Frame
	p.Attach(sinkFunc(func(fs []frame.Frame) { got = append(got, fs...) }))
	// Nothing that is made up opens.
	const session = 0x01020304
	keys := append(bytes.Repeat([]byte{7}, 88), 1, 2, 3, 4)
	seal := &Seal{Identity: sharedKey(f, testKey), Network: "blue", Host: "b"}
	blank, err := secure.NewLink(secure.LinkConfig{Identity: seal.Identity, Network: seal.Network, VNI: 2, Host: seal.Host, Send: func([]byte) error { return nil }})
	if err != nil {
		f.Fatal(err)
	}
	exported, err := blank.Export()
	if err != nil {
		f.Fatal(err)
	}
	var e map[string]any
	if err := json.Unmarshal(exported, &e); err != nil {
		f.Fatal(err)
	}
	e["Current"], e["Sessions"] = session, []any{map[string]any{"Keys": keys, "Confirmed": true}}
	if seal.Sessions, err = json.Marshal(e); err != nil {
		f.Fatal(err)
	}
	sealed := addPeer(f, r.VTEP, PeerConfig{VNI: 2, Remote: netip.MustParseAddrPort("127.0.0.9:9"), Seal: seal})
	if !sealed.Stats().Sealed {
		f.Fatal("there is no session")
	}
	sealed.Attach(sinkFunc(func(fs []frame.Frame) { panic("a frame that was not sealed has been taken") }))
	train, size := superTrain(1, 5)
	f.Add(train[:3*size], uint16(size), uint8(0))
	small := recordOf(superframe.KindFrame, packet(true, wire.ProtoUDP, 0, 100))
	f.Add(messageOf(1, 9, small, small, recordOf(superframe.KindControl, make([]byte, controlLen))), uint16(2000), uint8(3))
	f.Add(append(wrap(1, packet(false, wire.ProtoTCP, 2, 300)), messageOf(1, 9, small)...), uint16(342), uint8(1))
	forged := messageOf(session, 3, small, make([]byte, secure.Overhead))
	forged[1] = 1
	f.Add(forged, uint16(len(forged)), uint8(0))
	f.Add(append([]byte{secure.HandshakeType, 0, 0, 0, 0, 0, 0, 2}, make([]byte, 60)...), uint16(68), uint8(0))
	f.Add(wrap(2, packet(false, wire.ProtoTCP, 2, 300)), uint16(342), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, size uint16, tos uint8) {
		got = got[:0]
		data := bytes.Clone(b)
		(*handler)(r.VTEP).Receive([]udp.Train{{Data: data, Size: max(min(int(size), len(data)), 1), From: netip.MustParseAddrPort("127.0.0.9:9"), TOS: tos}})
		for _, x := range got {
			h := x.Hdr
			if len(x.Data) < wire.EthernetLen || len(x.Data) > wire.MaxFrame || !h.Validate(x.Data) || h != x.Hdr {
				t.Errorf("a frame of %d bytes with %+v", len(x.Data), x.Hdr)
			}
		}
	})
}

// More small datagrams than anybody can take: nothing breaks, what is lost has a name, and afterwards everything is as before.
func TestSuperFlood(t *testing.T) {
	testbed.Leaks(t)
	e := ownEnds(t, Config{}, WirePatchbay)
	ping(t, e.a, "10.1.0.2")
	s := runIperf(t, e.a, e.b, "10.1.0.2", "-u", "-b", "0", "-l", "64", "-t", "1", "-P", "2").End.Sum
	if s.Packets == 0 || s.LostPackets == s.Packets {
		t.Errorf("%d of %d datagrams lost", s.LostPackets, s.Packets)
	}
	t.Logf("%d of %d datagrams lost", s.LostPackets, s.Packets)
	ping(t, e.a, "10.1.0.2")
	transfer(t, e.b, e.a, "10.1.0.1", 4<<20)
}
