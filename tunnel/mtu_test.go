package tunnel

import (
	"bytes"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// A router on the way has a link with a smaller MTU, and its ICMP messages go nowhere:
//
//	[a] 10.9.1.1 ── 1500 ── 10.9.1.2 [r] 10.9.2.1 ── 1400 ── 10.9.2.2 [b]
func TestBlackHole(t *testing.T) {
	testbed.Leaks(t)
	a, r, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "r"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", r, "ra")
	testbed.Veth(t, b, "eth0", r, "rb")
	addr := func(ns *testbed.NS, dev, p string) { testbed.AddAddrs(t, ns, dev, netip.MustParsePrefix(p)) }
	addr(a, "eth0", "10.9.1.1/24")
	addr(r, "ra", "10.9.1.2/24")
	addr(r, "rb", "10.9.2.1/24")
	addr(b, "eth0", "10.9.2.2/24")
	run(t, a, "ip", "route", "add", "default", "via", "10.9.1.2")
	run(t, b, "ip", "route", "add", "default", "via", "10.9.2.1")
	run(t, r, "ip", "link", "set", "rb", "mtu", "1400")
	run(t, b, "ip", "link", "set", "eth0", "mtu", "1400")
	run(t, r, "nft", "table ip f { chain o { type filter hook output priority 0; ip protocol icmp drop; }; }")
	var err error
	r.Do(func() { err = os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
	if err != nil {
		t.Fatal(err)
	}
	na, nb := newNetwork(newVTEP(t, a, Config{}), 9), newNetwork(newVTEP(t, b, Config{}), 9)
	var told, big atomic.Int64
	p := na.peer(t, PeerConfig{
		Remote: netip.MustParseAddrPort("10.9.2.2:4789"), OnMTU: func(mtu int) { told.Store(int64(mtu)) },
		OnTooBig: func(_ []byte, mtu int) { big.Store(int64(mtu)) },
	})
	nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.1.1:4789")})
	c1, c2 := na.container(t, 1, 1450, "10.1.0.1/24"), nb.container(t, 2, 1450, "10.1.0.2/24")
	testbed.Eventually(t, tardy+probeShy, func() bool { return p.Stats().State == PeerUp })
	testbed.Eventually(t, 4*tardy, func() bool { m := p.Stats().MTU; return m <= 1350 && m > 1350-2*searchGrain })
	testbed.Eventually(t, tardy, func() bool { return told.Load() == int64(p.Stats().MTU) })
	if n, err := p.MTU(); err != nil || n != p.Stats().MTU {
		t.Errorf("MTU %d, %v; Stats say %d", n, err, p.Stats().MTU)
	}
	// Connections opened now fit, both ways.
	transfer(t, c1, c2, "10.1.0.2", 1<<20)
	transfer(t, c2, c1, "10.1.0.1", 1<<20)
	if out, err := c1.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "1", "-M", "do", "-s", "1400", "10.1.0.2").CombinedOutput(); err == nil {
		t.Errorf("a packet longer than the path passes: %s", out)
	}
	if big.Load() != told.Load() || p.Drops().Get(frame.DropTooBig) == 0 {
		t.Errorf("told %d of a frame that is too big, want %d; %d drops", big.Load(), told.Load(), p.Drops().Get(frame.DropTooBig))
	}
}

// Who is told of frames that are too big: each is one drop, and no more of them are shown than can be answered.
func TestOnTooBig(t *testing.T) {
	for _, w := range []Wire{WireVXLAN, WirePatchbay} {
		a, _ := underlay(t, 1500)
		var now atomic.Int64 // seconds
		v := newVTEP(t, a, Config{Now: func() time.Time { return time.Unix(now.Load(), 0) }})
		var got [][]byte
		var mtus []int
		p := addPeer(t, v, PeerConfig{VNI: 1, Wire: w, Remote: netip.MustParseAddrPort("10.9.0.2:4789"), OnTooBig: func(f []byte, mtu int) {
			got, mtus = append(got, bytes.Clone(f)), append(mtus, mtu)
		}})
		mtu := p.Stats().MTU
		super := frame.Frame{Data: partial(packet(true, wire.ProtoTCP, 0, 30000), true)}
		super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv6, GSOSize: uint16(mtu - 60 + 1), CsumStart: 54, CsumOffset: 16}
		for _, f := range []frame.Frame{super, {Data: packet(false, wire.ProtoUDP, 0, mtu)}, {Data: packet(true, wire.ProtoUDP, 0, mtu)}} {
			got, mtus = nil, nil
			before := p.Drops().Get(frame.DropTooBig)
			if n := p.Transmit([]frame.Frame{f}); n != 0 || p.Drops().Get(frame.DropTooBig) != before+1 {
				t.Errorf("%v: took %d, %d drops", w, n, p.Drops().Get(frame.DropTooBig)-before)
			}
			if len(got) != 1 || !bytes.Equal(got[0], f.Data) || mtus[0] != mtu {
				t.Errorf("%v: told of %d frames, MTU %v, want %d", w, len(got), mtus, mtu)
			}
		}
		now.Add(1)
		got = nil
		many := make([]frame.Frame, 3*tooBigPerS)
		for i := range many {
			many[i].Data = packet(false, wire.ProtoUDP, 0, mtu)
		}
		if p.Transmit(many); len(got) != tooBigPerS || p.Drops().Get(frame.DropTooBig) != uint64(3+len(many)) {
			t.Errorf("%v: told of %d frames of %d, %d drops", w, len(got), len(many), p.Drops().Get(frame.DropTooBig))
		}
		now.Add(1)
		if p.Transmit(many[:1]); len(got) != tooBigPerS+1 {
			t.Errorf("%v: nobody is told a second later", w)
		}
	}
}

// Containers whose interfaces promise far more than the tunnel carries open connections that fit, in both directions, also where one end is a kernel's.
func TestClampAcross(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		wire   Wire
		kernel bool
	}{{WireVXLAN, false}, {WirePatchbay, false}, {WireVXLAN, true}} {
		a, b := underlay(t, 1500)
		na := newNetwork(newVTEP(t, a, Config{}), 9)
		p := na.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789"), Wire: c.wire})
		c1 := na.container(t, 1, 4000, "10.1.0.1/24", "fd01::1/64")
		c2 := b
		if c.kernel {
			kernelVXLAN(t, b, 9, []string{"local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789", "udpcsum"}, "10.1.0.2/24", "fd01::2/64")
			run(t, b, "ip", "link", "set", "vx0", "mtu", "4000")
		} else {
			nb := newNetwork(newVTEP(t, b, Config{}), 9)
			nb.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.1:4789"), Wire: c.wire})
			c2 = nb.container(t, 2, 4000, "10.1.0.2/24", "fd01::2/64")
		}
		for _, to := range []string{"10.1.0.2", "fd01::2"} {
			transfer(t, c1, c2, to, 1<<20)
		}
		for _, to := range []string{"10.1.0.1", "fd01::1"} {
			transfer(t, c2, c1, to, 1<<20)
		}
		if n := p.Drops().Get(frame.DropTooBig); n != 0 {
			t.Errorf("%+v: %d frames were too big", c, n)
		}
		if bad := counters(t, c1); bad != "" {
			t.Errorf("%+v: the kernel counts:\n%s", c, bad)
		}
	}
}
