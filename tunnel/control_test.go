package tunnel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
	"patchbay/tunnel/udp"
	"patchbay/tunnel/vxlan"
)

func TestControlRoundTrip(t *testing.T) {
	in := control{kind: controlReply, flags: flagCutLost | flagBack, seq: 7, time: -3, instance: 1 << 63, sent: 2, received: 3, lost: 4, reordered: 5, size: 1472}
	b := bytes.Repeat([]byte{0xff}, controlLen+9)
	in.put(b)
	var out control
	if !out.parse(b) || out != in {
		t.Errorf("%+v became %+v", in, out)
	}
	for name, edit := range map[string]func(b []byte) []byte{
		"version":   func(b []byte) []byte { b[0] = 2; return b },
		"kind":      func(b []byte) []byte { b[1] = 3; return b },
		"kind 0":    func(b []byte) []byte { b[1] = 0; return b },
		"too short": func(b []byte) []byte { return b[:controlLen-1] },
		"nothing":   func([]byte) []byte { return nil },
	} {
		if out.parse(edit(bytes.Clone(b))) {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzControl(f *testing.F) {
	b := make([]byte, controlLen)
	(&control{kind: controlProbe, seq: 1}).put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var c, again control
		if !c.parse(b) {
			return
		}
		out := make([]byte, controlLen)
		c.put(out)
		if !again.parse(out) || again != c {
			t.Errorf("%+v became %+v", c, again)
		}
	})
}

// syn is a frame with a TCP SYN that has options and a right checksum, or one that is still partial.
func syn(v6, partialSum bool, opts ...byte) []byte {
	for len(opts)%4 != 0 {
		opts = append(opts, 1)
	}
	data := packet(v6, wire.ProtoTCP, 0, wire.TCPLen+len(opts))
	tcp := data[l4Of(v6):]
	tcp[12], tcp[13] = uint8(len(tcp)/4)<<4, wire.TCPSyn
	copy(tcp[wire.TCPLen:], opts)
	binary.BigEndian.PutUint16(tcp[wire.TCPChecksumOff:], 0)
	if partialSum {
		return partial(data, v6)
	}
	binary.BigEndian.PutUint16(tcp[wire.TCPChecksumOff:], ^wire.Fold(wire.Sum(tcp, pseudo(data, v6, len(tcp)))))
	return data
}

func l4Of(v6 bool) int {
	if v6 {
		return wire.EthernetLen + wire.IPv6Len
	}
	return wire.EthernetLen + wire.IPv4Len
}

// pseudo is the sum of the pseudo-header.
func pseudo(data []byte, v6 bool, n int) uint64 {
	ip := data[wire.EthernetLen:]
	if v6 {
		return wire.Sum(ip[8:40], uint64(n)+uint64(wire.ProtoTCP))
	}
	return wire.Sum(ip[12:20], uint64(n)+uint64(wire.ProtoTCP))
}

func TestClampMSS(t *testing.T) {
	mss := func(v uint16) []byte { return binary.BigEndian.AppendUint16([]byte{2, 4}, v) }
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct {
			name string
			opts []byte
			want uint16 // of MTU 1000; 0: the frame stays as it was
		}{
			{"lowered", mss(1460), 0xffff},
			{"at an odd offset", append([]byte{1}, mss(1460)...), 0xffff},
			{"behind others", append([]byte{3, 3, 7, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0}, mss(1459)...), 0xffff},
			{"never raised", mss(500), 0},
			{"none", nil, 0},
			{"behind the end", append([]byte{0}, mss(1460)...), 0},
			{"an option too long", []byte{3, 40, 0, 0, 2, 4, 5, 0xb4}, 0},
			{"an option without an end", []byte{3, 0, 2, 4}, 0},
		} {
			for _, partial := range []bool{false, true} {
				data := syn(v6, partial, c.opts...)
				was := bytes.Clone(data)
				clampMSS(data, 1000, partial)
				if c.want == 0 {
					if !bytes.Equal(data, was) {
						t.Errorf("%s, IPv6 %v: changed", c.name, v6)
					}
					continue
				}
				got, _, _ := wire.TCPMSS(data[l4Of(v6):])
				if want := uint16(1000 - l4Of(v6) + wire.EthernetLen - wire.TCPLen); got != want {
					t.Errorf("%s, IPv6 %v: MSS %d, want %d", c.name, v6, got, want)
				}
				sum := wire.Fold(wire.Sum(data[l4Of(v6):], pseudo(data, v6, len(data)-l4Of(v6))))
				if !partial && sum != 0xffff {
					t.Errorf("%s, IPv6 %v: the checksum is wrong", c.name, v6)
				}
				field := l4Of(v6) + wire.TCPChecksumOff
				if partial && !bytes.Equal(data[field:field+2], was[field:field+2]) {
					t.Errorf("%s, IPv6 %v: a partial checksum was changed", c.name, v6)
				}
			}
		}
	}
	ack := syn(false, false, mss(1460)...)
	ack[l4Of(false)+13] = wire.TCPAck
	was := bytes.Clone(ack)
	if clampMSS(ack, 1000, false); !bytes.Equal(ack, was) {
		t.Error("a segment that opens nothing was changed")
	}
}

func FuzzClampMSS(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		f.Add(syn(v6, false, 2, 4, 5, 0xb4), 1000, false)
		f.Add(syn(v6, true, 1, 2, 4, 5, 0xb4), 1400, true)
	}
	f.Fuzz(func(t *testing.T, data []byte, mtu int, partial bool) {
		was := bytes.Clone(data)
		clampMSS(data, mtu, partial)
		l4, _, ok := synTCP(was)
		if !ok {
			if !bytes.Equal(was, data) {
				t.Error("what is no SYN was changed")
			}
			return
		}
		before, _, had := wire.TCPMSS(was[l4:])
		after, _, has := wire.TCPMSS(data[l4:])
		if had != has || after > before {
			t.Errorf("MSS %d became %d", before, after)
		}
		if !partial { // the sum over the segment is what it was
			a, b := wire.Fold(wire.Sum(was[l4:], 0)), wire.Fold(wire.Sum(data[l4:], 0))
			if a != b && a+b != 0xffff {
				t.Errorf("the sum was %#x and is %#x", a, b)
			}
		}
	})
}

// controlDatagram is a control message as it comes on the VXLAN wire, padded to size bytes.
func controlDatagram(vni uint32, c control, size int) []byte {
	d := make([]byte, max(size, vxlan.HeaderLen+wire.EthernetLen+controlLen))
	vxlan.Put(d, vni)
	wire.PutEthernet(d[vxlan.HeaderLen:], controlMAC, controlSource(c.instance), controlEtherType)
	c.put(d[vxlan.HeaderLen+wire.EthernetLen:])
	return d
}

// controlRig is a peer whose datagrams the test makes; nobody receives what goes to it.
func controlRig(t testing.TB, cfg PeerConfig) (p *Peer, receive func(d []byte)) {
	t.Helper()
	a, _ := underlay(t, 1500)
	var v *VTEP
	var err error
	a.Do(func() { v, err = Listen(Config{Log: quiet}) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	cfg.VNI, cfg.Remote = 9, netip.MustParseAddrPort("10.9.0.2:4789")
	p = addPeer(t, v, cfg)
	ts := make([]udp.Train, 1)
	return p, func(d []byte) {
		ts[0] = udp.Train{Data: d, Size: len(d), From: p.Remote()}
		(*handler)(v).Receive(ts)
	}
}

// What is a control frame goes no further, whatever is in it, and takes no allocation.
func TestControlGoesNoFurther(t *testing.T) {
	p, receive := controlRig(t, PeerConfig{})
	var got collector
	p.Attach(&got)
	whole := controlDatagram(9, control{kind: controlProbe, seq: 1, instance: 5}, 200)
	receive(whole)
	if s := p.Stats(); s.Sent.Datagrams != 1 || p.Drops().Total() != 0 {
		t.Errorf("a probe: %+v, %d drops", s, p.Drops().Total())
	}
	for n := vxlan.HeaderLen + wire.EthernetLen; n < vxlan.HeaderLen+wire.EthernetLen+controlLen; n += 7 {
		before := p.Drops().Get(frame.DropMalformed)
		receive(whole[:n])
		if p.Drops().Get(frame.DropMalformed) != before+1 {
			t.Errorf("a control frame of %d bytes is not malformed", n)
		}
	}
	receive(controlDatagram(9, control{kind: controlReply, seq: 77, time: 1, instance: 5}, 0))
	if p.Drops().Get(frame.DropNoFlow) != 1 {
		t.Error("an answer to no question is not counted")
	}
	if s := p.Stats(); got.len() != 0 || s.RxFrames != 0 || s.State != PeerNew {
		t.Errorf("%d frames went on; %+v", got.len(), s)
	}
	if n := testing.AllocsPerRun(100, func() { receive(whole) }); n != 0 {
		t.Errorf("%v allocations for a probe and its answer", n)
	}
	if p.Drops().Get(frame.DropServiceLimit) == 0 || p.Stats().Sent.Datagrams > 2*repliesPerS+1 {
		t.Errorf("a flood of probes is answered: %+v", p.Stats().Sent)
	}
	// One to the same address that is none is the switch's affair.
	other := bytes.Clone(whole)
	other[vxlan.HeaderLen+13]++
	if receive(other); got.len() != 1 {
		t.Error("LLDP does not get to the switch, which drops and counts it")
	}
}

// A container cannot speak in its host's name: the switch hands on nothing that is addressed as control frames are.
func TestContainersSendNoControl(t *testing.T) {
	p, _ := controlRig(t, PeerConfig{})
	n := newNetwork(p.v, 9)
	if _, err := n.sw.AddPort(p, vswitch.PortConfig{Name: "peer", Group: 1}); err != nil {
		t.Fatal(err)
	}
	id, err := n.sw.AddPort(nowhere{}, vswitch.PortConfig{Name: "container"})
	if err != nil {
		t.Fatal(err)
	}
	in := n.sw.Ingress(id)
	in.Forward([]frame.Frame{{Data: controlDatagram(9, control{kind: controlProbe}, 0)[vxlan.HeaderLen:]}})
	if s := p.Stats(); s.TxFrames != 0 || s.Sent.Datagrams != 0 {
		t.Errorf("it was sent: %+v", s)
	}
	in.Forward([]frame.Frame{{Data: packet(false, wire.ProtoUDP, 0, 100)}})
	if p.Stats().TxFrames != 1 {
		t.Error("nor is anything else")
	}
}

// nowhere is a port that takes everything.
type nowhere struct{}

func (nowhere) Transmit(fs []frame.Frame) int { return len(fs) }
func (nowhere) Caps() frame.Caps              { return 0 }

// Whoever can forge the peer's address but does not see what is sent to it cannot make it look as if it were up, or had started anew.
func TestForgedControl(t *testing.T) {
	var heard states
	p, receive := controlRig(t, PeerConfig{OnState: heard.hear})
	p.tick()
	p.live.mu.Lock()
	seq, asked := p.live.seq, p.live.asked
	p.live.mu.Unlock()
	right := control{kind: controlReply, seq: seq, time: asked, instance: 5, size: 114}
	wrong := right
	wrong.time++
	if receive(controlDatagram(9, wrong, 0)); p.Stats().State != PeerNew {
		t.Error("a guess is believed")
	}
	if receive(controlDatagram(9, right, 0)); p.Stats().State != PeerUp {
		t.Error("the answer is not believed")
	}
	heard.take()
	for i := range 20 {
		receive(controlDatagram(9, control{kind: controlProbe, instance: uint64(100 + i)}, 0))
	}
	if got := heard.take(); len(got) != 0 {
		t.Errorf("probes in the peer's name: %v", got)
	}
	p.live.mu.Lock()
	if d := time.Duration(p.live.next - p.live.asked); d < probeEarly {
		t.Errorf("each forged probe is worth another after %v", d)
	}
	p.live.mu.Unlock()
}
