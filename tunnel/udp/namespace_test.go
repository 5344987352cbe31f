package udp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"patchbay/frame"
	"patchbay/internal/mmsg"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// unsafeControl is the control messages of a message to be sent.
func unsafeControl(m *mmsg.Msg) []byte {
	if m.Hdr.Control == nil {
		return nil
	}
	return unsafe.Slice(m.Hdr.Control, m.Hdr.Controllen)
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func run(t testing.TB, ns *testbed.NS, args ...string) {
	t.Helper()
	cmd := ns.Command(testbed.Tool(t, args[0]), args[1:]...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// mtus collects what OnMTU says.
type mtus struct{ last, calls atomic.Int64 }

func (m *mtus) set(n int) { m.last.Store(int64(n)); m.calls.Add(1) }

// What the link cannot carry is refused at once, cut or not, and leaves cutting alone:
//
//	[a] eth0 ── MTU 1500 ── eth0 [b]
func TestTooBigForTheLink(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	testbed.AddAddrs(t, a, "eth0", prefix("10.0.0.1/24"), prefix("fd00::1/64"))
	testbed.AddAddrs(t, b, "eth0", prefix("10.0.0.2/24"), prefix("fd00::2/64"))
	rx, tx := listen(t, b, at("[::]:4789")), listen(t, a, at("[::]:4789"))
	in := receive(t, rx)
	for i, to := range []string{"10.0.0.2:4789", "[fd00::2]:4789"} {
		var m mtus
		p := newPath(t, tx, netip.MustParseAddrPort(to), PathConfig{OnMTU: m.set})
		fits := p.Fits(1500)
		var drops frame.DropCounters
		_, lost := send(t, p, &drops, 0, 0, 3000, 3000, 3000, fits, fits, fits+1)
		if lost != 4 || drops.Get(frame.DropTooBig) != 4 || drops.Total() != 4 {
			t.Errorf("%s: %d lost, %d too big, %d in all", to, lost, drops.Get(frame.DropTooBig), drops.Total())
		}
		for _, d := range in.wait(t, 2*(i+1)) {
			if len(d) != p.Fits(1500) && len(d) != 1500-28 {
				t.Errorf("%s: %d bytes arrived", to, len(d))
			}
		}
		if p.Cut() != CutOn {
			t.Errorf("%s: cut: %v", to, p.Cut())
		}
		if m.last.Load() != 1500 || m.calls.Load() != 1 {
			t.Errorf("%s: OnMTU was called %d times, last with %d", to, m.calls.Load(), m.last.Load())
		}
		if n, err := p.MTU(); n != 1500 || err != nil {
			t.Errorf("%s: MTU %d, %v", to, n, err)
		}
	}
	// A larger link is noticed by asking.
	run(t, a, "ip", "link", "set", "eth0", "mtu", "9000")
	run(t, b, "ip", "link", "set", "eth0", "mtu", "9000")
	p := newPath(t, tx, netip.MustParseAddrPort("10.0.0.2:4789"), PathConfig{})
	if n, err := p.MTU(); n != 9000 || err != nil {
		t.Errorf("MTU %d, %v", n, err)
	}
	var drops frame.DropCounters
	send(t, p, &drops, 0, 0, repeat(8972, 7)...)
	in.wait(t, 11)
	noDrops(t, &drops)
}

// Over a device that completes no checksums the kernel cuts in software, or (before Linux 6.11) refuses to; everything arrives either way.
func TestDeviceWithoutChecksums(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	testbed.AddAddrs(t, a, "eth0", prefix("10.0.0.1/24"), prefix("fd00::1/64"))
	testbed.AddAddrs(t, b, "eth0", prefix("10.0.0.2/24"), prefix("fd00::2/64"))
	run(t, a, "ethtool", "-K", "eth0", "tx", "off")
	rx, tx := listen(t, b, at("[::]:4789")), listen(t, a, at("[::]:4789"))
	in := receive(t, rx)
	for i, to := range []string{"10.0.0.2", "fd00::2"} {
		run(t, a, "ping", "-c", "1", to) // while a neighbour is unknown, the kernel keeps but a few datagrams for it
		p := newPath(t, tx, netip.AddrPortFrom(netip.MustParseAddr(to), 4789), PathConfig{})
		var drops frame.DropCounters
		sent, _ := send(t, p, &drops, 0, 0, append(repeat(1400, 40), 77)...)
		same(t, in.wait(t, 41*(i+1))[41*i:], sent)
		noDrops(t, &drops)
		if c := p.Cut(); c != CutOn && c != CutRefused {
			t.Errorf("cut: %v", c)
		}
	}
	if st := rx.Stats(); st.Missed != 0 {
		t.Errorf("%d datagrams had a wrong checksum", st.Missed)
	}
}

// A router with a smaller link behind it says so by ICMP; the kernel believes it, and so do we:
//
//	[a] eth0 ── 1500 ── ra [r] rb ── 1300 ── eth0 [b]
func TestTooBigForThePath(t *testing.T) {
	testbed.Leaks(t)
	a, r, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "r"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", r, "ra")
	testbed.Veth(t, b, "eth0", r, "rb")
	run(t, b, "ip", "link", "set", "eth0", "mtu", "1300")
	run(t, r, "ip", "link", "set", "rb", "mtu", "1300")
	testbed.AddAddrs(t, a, "eth0", prefix("10.0.0.2/24"), prefix("fd00::2/64"))
	testbed.AddAddrs(t, r, "ra", prefix("10.0.0.1/24"), prefix("fd00::1/64"))
	testbed.AddAddrs(t, r, "rb", prefix("10.0.1.1/24"), prefix("fd00:1::1/64"))
	testbed.AddAddrs(t, b, "eth0", prefix("10.0.1.2/24"), prefix("fd00:1::2/64"))
	for _, ns := range []*testbed.NS{a, b} {
		gw := map[bool][2]string{true: {"10.0.0.1", "fd00::1"}, false: {"10.0.1.1", "fd00:1::1"}}[ns == a]
		testbed.DefaultVia(t, ns, netip.MustParseAddr(gw[0]))
		testbed.DefaultVia(t, ns, netip.MustParseAddr(gw[1]))
	}
	testbed.Sysctl(t, r, "net/ipv4/ip_forward", "1")
	testbed.Sysctl(t, r, "net/ipv6/conf/all/forwarding", "1")
	rx, tx := listen(t, b, at("[::]:4789")), listen(t, a, at("[::]:4789"))
	in := receive(t, rx)
	for i, to := range []string{"10.0.1.2:4789", "[fd00:1::2]:4789"} {
		var m mtus
		p := newPath(t, tx, netip.MustParseAddrPort(to), PathConfig{OnMTU: m.set})
		if n, err := p.MTU(); n != 1500 || err != nil {
			t.Fatalf("%s: MTU %d, %v before anything was sent", to, n, err)
		}
		var drops frame.DropCounters
		testbed.Eventually(t, 10*time.Second, func() bool {
			send(t, p, &drops, 0, 0, repeat(p.Fits(1500), 4)...)
			return m.calls.Load() > 0
		})
		if m.last.Load() != 1300 {
			t.Errorf("%s: OnMTU says %d", to, m.last.Load())
		}
		send(t, p, &drops, 0, 0, p.Fits(1300), p.Fits(1300))
		for _, d := range in.wait(t, 2*(i+1))[2*i:] {
			if len(d) != p.Fits(1300) {
				t.Errorf("%s: %d bytes arrived", to, len(d))
			}
		}
	}
}

func TestNoRoute(t *testing.T) {
	a := testbed.NewNS(t, "a")
	tx := listen(t, a, at("0.0.0.0:4789"))
	p := newPath(t, tx, netip.MustParseAddrPort("192.0.2.1:4789"), PathConfig{})
	var drops frame.DropCounters
	if _, lost := send(t, p, &drops, 0, 0, repeat(1000, 100)...); lost != 100 || drops.Get(frame.DropUnderlay) != 100 {
		t.Errorf("%d lost, %d for want of a route", lost, drops.Get(frame.DropUnderlay))
	}
	if _, err := p.MTU(); err == nil {
		t.Error("there is an MTU without a route")
	}
}

// The outer header on the wire: DF, TTL 64, a checksum, and the length of each datagram.
func TestOuterHeader(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	testbed.AddAddrs(t, a, "eth0", prefix("10.0.0.1/24"), prefix("fd00::1/64"))
	testbed.AddAddrs(t, b, "eth0", prefix("10.0.0.2/24"), prefix("fd00::2/64"))
	testbed.Sysctl(t, a, "net/ipv4/ip_default_ttl", "33")
	read := porttest.PacketReader(t, b, "eth0")
	tx := listen(t, a, at("[::]:4789"))
	for _, to := range []string{"10.0.0.2", "fd00::2"} {
		dst := netip.MustParseAddr(to)
		p := newPath(t, tx, netip.AddrPortFrom(dst, 4789), PathConfig{})
		var drops frame.DropCounters
		seen := 0
		testbed.Eventually(t, 10*time.Second, func() bool {
			send(t, p, &drops, 0, 1, 1000)
			for _, f := range read(50 * time.Millisecond) {
				et, off, ok := wire.Payload(f.Data)
				if !ok || et != wire.EtherTypeIPv4 && et != wire.EtherTypeIPv6 {
					continue
				}
				ip, ok := wire.ParseIP(f.Data[off:], false)
				if !ok || ip.Proto != wire.ProtoUDP || ip.Dst != dst {
					continue
				}
				seen++
				df := ip.Version == 6 || f.Data[off+6]&0x40 != 0
				l4 := f.Data[off+ip.HdrLen : off+ip.Len]
				u, ok := wire.ParseUDP(l4)
				if !ok || u.DstPort != 4789 || u.SrcPort != 4789 || u.Len != 1008 || binary.BigEndian.Uint16(l4[6:]) == 0 {
					t.Errorf("%s: %+v", to, u)
				}
				ttl, tos := f.Data[off+8], f.Data[off+1]
				if ip.Version == 6 {
					ttl, tos = f.Data[off+7], f.Data[off]<<4|f.Data[off+1]>>4
				}
				if ttl != 64 || !df || tos != 1 {
					t.Errorf("%s: TTL %d, DF %v, TOS %#x", to, ttl, df, tos)
				}
			}
			return seen > 0
		})
	}
}

// A member of a group hears what is sent to it, over both IP versions; others do not.
func TestJoin(t *testing.T) {
	testbed.Leaks(t)
	a, b := testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	testbed.AddAddrs(t, a, "eth0", prefix("10.0.0.1/24"), prefix("fd00::1/64"))
	testbed.AddAddrs(t, b, "eth0", prefix("10.0.0.2/24"), prefix("fd00::2/64"))
	rx := listen(t, b, at("[::]:4789"))
	in := receive(t, rx)
	index := 0
	b.Do(func() {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		index = l.Index
	})
	run(t, a, "ip", "route", "add", "239.0.0.0/8", "dev", "eth0")
	for i, group := range []string{"239.1.2.3", "ff05::123"} {
		g := netip.MustParseAddr(group)
		if err := rx.Join(g, index); err != nil {
			t.Fatal(err)
		}
		c, err := a.ListenPacket("udp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		testbed.Eventually(t, 10*time.Second, func() bool {
			// Where nobody is known to listen yet, IPv6 may lose the first.
			if _, err := c.(*net.UDPConn).WriteToUDPAddrPort([]byte("to the group"), netip.AddrPortFrom(g, 4789)); err != nil {
				t.Fatal(err)
			}
			return testbed.Wait(100*time.Millisecond, func() bool { return in.n.Load() > int64(i) })
		})
	}
	if err := rx.Join(netip.MustParseAddr("10.0.0.2"), index); err == nil {
		t.Error("joined a unicast address")
	}
	if err := listen(t, b, at("10.0.0.2:4790")).Join(netip.MustParseAddr("239.1.2.3"), index); err == nil {
		t.Error("a bound socket joined, and will hear nothing")
	}
}
