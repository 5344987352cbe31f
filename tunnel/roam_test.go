package tunnel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/superframe"
)

// A peer whose address changes is followed when what comes from there opens, and not before; when it is gone from there, it is looked for where it was said to be.
func TestSealedPeerRoams(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	sa, sb := sealPair(t)
	na := newNetwork(newVTEP(t, a, Config{}), 42)
	home, away := netip.MustParseAddrPort("10.9.0.2:4789"), netip.MustParseAddrPort("10.9.0.77:4789")
	pa := na.peer(t, PeerConfig{Remote: home, Wire: WirePatchbay, Seal: sa})
	nb := newNetwork(newVTEP(t, b, Config{}), 42)
	pb := nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay, Seal: sb})
	testbed.Eventually(t, tardy+10*time.Second, isSealed(pa, pb))
	c1, c2 := na.container(t, 1, 1418, "10.1.0.1/24"), nb.container(t, 2, 1418, "10.1.0.2/24")
	ping(t, c1, "10.1.0.2")

	// Somebody elsewhere who knows all but the keys.
	testbed.AddAddrs(t, b, "eth0", netip.MustParsePrefix("10.9.0.66/24"))
	forger, err := b.ListenPacket("udp4", "10.9.0.66:5555")
	if err != nil {
		t.Fatal(err)
	}
	defer forger.Close()
	for i := range uint64(20) {
		d := messageOf(pa.seal.link.Stats().Session, 1<<40+i, recordOf(superframe.KindFrame, packet(false, wire.ProtoUDP, 0, 200)))
		d[1] = 1
		if _, err := forger.WriteTo(d, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.9.0.1:4789"))); err != nil {
			t.Fatal(err)
		}
	}
	testbed.Eventually(t, tardy, func() bool { return pa.Drops().Get(frame.DropUnauthentic) == 20 })
	time.Sleep(50 * time.Millisecond)
	if pa.Remote() != home || !isSealed(pa, pb)() {
		t.Errorf("forged datagrams have moved it to %v", pa.Remote())
	}

	run(t, b, "ip", "addr", "flush", "dev", "eth0", "scope", "global")
	testbed.AddAddrs(t, b, "eth0", netip.MustParsePrefix("10.9.0.77/24"))
	testbed.Eventually(t, tardy+10*time.Second, func() bool { return pa.Remote() == away })
	ping(t, c1, "10.1.0.2")
	transfer(t, c1, c2, "10.1.0.2", 1<<20)
	if n := pa.seal.link.Stats().Handshakes; n > 2 {
		t.Errorf("it took %d handshakes", n)
	}

	// Gone, and back as another process at its old address.
	nb.v.Close()
	run(t, b, "ip", "addr", "flush", "dev", "eth0", "scope", "global")
	testbed.AddAddrs(t, b, "eth0", netip.MustParsePrefix("10.9.0.2/24"))
	nb = newNetwork(newVTEP(t, b, Config{}), 42)
	sb.Identity = sharedKey(t, testKey)
	pb = nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay, Seal: sb})
	began := time.Now()
	testbed.Eventually(t, tardy+20*time.Second, func() bool { return isSealed(pa, pb)() && pa.Remote() == home })
	t.Logf("back after %v", time.Since(began).Round(10*time.Millisecond))
}

// New keys every few seconds, and every few hundred MiB, cost no frame. A session ends at twice its age and at four times its bytes, which has to last for a handshake that loses a flight or two to the traffic: 250 ms
// for the first, twice as much for the next.
func TestRekeyLosesNothing(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	sa, sb := sealPair(t)
	sa.RekeyAfter, sb.RekeyBytes = 3*time.Second, 256<<20
	na, nb := newNetwork(newVTEP(t, a, Config{}), 42), newNetwork(newVTEP(t, b, Config{}), 42)
	pa := na.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: WirePatchbay, Seal: sa})
	pb := nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay, Seal: sb})
	testbed.Eventually(t, tardy+10*time.Second, isSealed(pa, pb))
	c1, c2 := na.container(t, 1, 1418, "10.1.0.1/24"), nb.container(t, 2, 1418, "10.1.0.2/24")
	ping(t, c1, "10.1.0.2")
	for began := time.Now(); time.Since(began) < 7*time.Second; {
		transfer(t, c1, c2, "10.1.0.2", 16<<20)
		transfer(t, c2, c1, "10.1.0.1", 16<<20)
	}
	if n := pa.seal.link.Stats().Handshakes + pb.seal.link.Stats().Handshakes; n < 6 { // two each
		t.Errorf("%d ends of handshakes in seven seconds", n)
	}
	clean(t, []*frame.DropCounters{pa.Drops(), pb.Drops(), na.v.Drops(), nb.v.Drops()}, a, b, c1, c2)
}

// Another process goes on with the sessions of one that ends: without a handshake, and the far end takes no number twice.
func TestSealedTakeover(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	sa, sb := sealPair(t)
	far := newVTEP(t, b, Config{})
	q := addPeer(t, far, PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay, Seal: sb})
	var got collector
	q.Attach(&got)
	start := func(cfg Config, s *Seal) (v *VTEP, p *Peer, end func()) {
		t.Helper()
		cfg.Log = quiet
		var err error
		a.Do(func() { v, err = Listen(cfg) })
		if err != nil {
			t.Fatal(err)
		}
		p = addPeer(t, v, PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: WirePatchbay, Seal: s})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- v.Run(ctx) }()
		return v, p, func() {
			cancel()
			if err := <-done; err != nil && !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		}
	}
	old, p, end := start(Config{}, sa)
	defer old.Close()
	testbed.Eventually(t, tardy+10*time.Second, isSealed(p, q))
	if _, err := p.ExportSessions(); err == nil {
		t.Error("sessions are handed over while the VTEP runs")
	}
	f := []frame.Frame{{Data: packet(false, wire.ProtoUDP, 0, 100)}}
	if p.Transmit(f) != 1 {
		t.Error("not sent")
	}
	testbed.Eventually(t, tardy, func() bool { return got.len() == 1 })
	before := q.seal.link.Stats()
	end()
	fds, err := old.Export()
	if err != nil {
		t.Fatal(err)
	}
	sessions, err := p.ExportSessions()
	if err != nil || len(sessions) == 0 {
		t.Fatalf("%d bytes of sessions, %v", len(sessions), err)
	}
	if p.Transmit(f) != 0 || p.Drops().Get(frame.DropNoSession) != 1 {
		t.Error("the one that has handed over goes on sealing")
	}
	old.Close()
	next := &Seal{Identity: sharedKey(t, testKey), Network: sa.Network, Host: sa.Host, Sessions: sessions}
	v, p, end := start(Config{FDs: fds}, next)
	defer func() { v.Close(); end() }()
	if p.Transmit(f) != 1 {
		t.Error("the successor has to wait for keys")
	}
	testbed.Eventually(t, tardy, func() bool { return got.len() == 2 })
	testbed.Eventually(t, tardy, isSealed(p, q))
	if s := q.seal.link.Stats(); s.Handshakes != before.Handshakes || s.Session != before.Session {
		t.Errorf("the far end has made new keys: %+v and %+v", before, s)
	}
	if n := q.Drops().Total() + far.Drops().Total() + p.Drops().Total() + v.Drops().Total(); n > 2 { // see clean
		t.Errorf("%d drops", n)
	}
	// Sessions that are of no use cost a handshake.
	end()
	if fds, err = v.Export(); err != nil {
		t.Fatal(err)
	}
	v.Close()
	v, p, end = start(Config{FDs: fds}, &Seal{Identity: sharedKey(t, testKey), Network: sa.Network, Host: sa.Host, Sessions: []byte(`{"Version":99}`)})
	testbed.Eventually(t, tardy+10*time.Second, isSealed(p, q))
}

// Sealing and opening allocate nothing.
func TestSealAllocates(t *testing.T) {
	a, b := underlay(t, 1500)
	sa, sb := sealPair(t)
	va, vb := newVTEP(t, a, Config{}), newVTEP(t, b, Config{})
	pa := addPeer(t, va, PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: WirePatchbay, Seal: sa})
	pb := addPeer(t, vb, PeerConfig{VNI: 42, Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: WirePatchbay, Seal: sb})
	pb.Attach(sinkFunc(func([]frame.Frame) {}))
	testbed.Eventually(t, tardy+10*time.Second, isSealed(pa, pb))
	super := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 60000), false)}
	super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: 1100, CsumStart: 34, CsumOffset: 16}
	small := frame.Frame{Data: packet(false, wire.ProtoUDP, 0, 100)}
	fs := []frame.Frame{super, small, small, super}
	sent := uint64(0)
	send := func() {
		if pa.Transmit(fs) != 4 {
			t.Fatal("not sent")
		}
		sent += 4
		for deadline := time.Now().Add(tardy); pb.rx.frames.Load() < sent && time.Now().Before(deadline); {
			time.Sleep(20 * time.Microsecond)
		}
	}
	for range 20 {
		send()
	}
	// Of both ends, with what probes and the runtime take now and then.
	if n := testing.AllocsPerRun(500, send); n >= 1 && !raceEnabled {
		t.Errorf("%v allocations for four frames there", n)
	}
	if n := pb.Drops().Total(); n != 0 {
		t.Errorf("%d drops", n)
	}
}
