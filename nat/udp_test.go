package nat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/stack"
)

func TestUDPEcho(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := echoUDP(t, b.out.NS, out)
		k := bindUDP(t, b.c, c, 0)
		for _, n := range []int{0, 1, 2, 1200, 1452} {
			ask(t, k, s.addr(), pattern(n))
		}
		if s.peer().Addr() != host {
			t.Errorf("the server saw %v, want the host's %v", s.peer(), host)
		}
		// A port that the host gives to anyone stays what it was; another does not take a port of the host's services.
		if lo, hi := ephemeralPorts(); addrOf(k).Port() >= lo && addrOf(k).Port() <= hi && s.peer().Port() != addrOf(k).Port() {
			t.Errorf("port %d became %d", addrOf(k).Port(), s.peer().Port())
		}
		low := bindUDP(t, b.c, c, 5353)
		ask(t, low, s.addr(), []byte("low"))
		if p := s.peer().Port(); p == 5353 || p < 1024 {
			t.Errorf("port 5353 of the container took port %d of the host", p)
		}
	})
}

// RFC 4787 REQ-1: one container endpoint looks the same to everybody.
func TestUDPMappingIsEndpointIndependent(t *testing.T) {
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s1, s2 := echoUDP(t, b.out.NS, out), echoUDP(t, b.out.NS, out)
		k := bindUDP(t, b.c, c, 0)
		ask(t, k, s1.addr(), []byte("one"))
		ask(t, k, s2.addr(), []byte("two"))
		if s1.peer() != s2.peer() {
			t.Errorf("one server saw %v, the other %v", s1.peer(), s2.peer())
		}
		other := bindUDP(t, b.c, c, 0)
		ask(t, other, s1.addr(), []byte("three"))
		if s1.peer() == s2.peer() {
			t.Error("two sockets of the container share a mapping")
		}
	})
}

// RFC 4787 REQ-8.
func TestUDPFiltering(t *testing.T) {
	for _, open := range []bool{false, true} {
		b := newBed(t, Config{OpenUDP: open})
		b.versions(func(t *testing.T, c, host, out netip.Addr) {
			s := echoUDP(t, b.out.NS, out)
			k := bindUDP(t, b.c, c, 0)
			ask(t, k, s.addr(), []byte("hello"))
			mapped := netip.AddrPortFrom(host, s.peer().Port())

			same := bindUDP(t, b.out.NS, out, 0) // another port of an address that was sent to: admitted
			same.WriteToUDPAddrPort([]byte("same"), mapped)
			if got, from := hear(t, k); string(got) != "same" || from != addrOf(same) {
				t.Errorf("got %q from %v", got, from)
			}
			before := b.Drops().Get(frame.DropNoFlow)
			stranger := bindUDP(t, testbed.Host(t), host, 0)
			stranger.WriteToUDPAddrPort([]byte("stranger"), mapped)
			if open {
				if got, _ := hear(t, k); string(got) != "stranger" {
					t.Errorf("got %q", got)
				}
				return
			}
			silent(t, k)
			if n := b.Drops().Get(frame.DropNoFlow); n != before+1 {
				t.Errorf("no-flow counts %d, want 1", n-before)
			}
		})
	}
}

// Superframes keep the borders of their datagrams, both ways, and cross as superframes.
func TestUDPSuperframes(t *testing.T) {
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := bindUDP(t, b.out.NS, out, 0)
		k := bindUDP(t, b.c, c, 0)
		k.SetReadBuffer(4 << 20)
		s.SetReadBuffer(4 << 20)
		data := pattern(100*400 + 7)
		train := func(from *net.UDPConn, to netip.AddrPort, seg int) {
			t.Helper()
			oob := binary.NativeEndian.AppendUint16(nil, uint16(seg))
			var c control
			copy(c.add(unix.SOL_UDP, unix.UDP_SEGMENT, 2), oob)
			if _, _, err := from.WriteMsgUDPAddrPort(data, c.bytes()[:c.n], to); err != nil {
				t.Fatal(err)
			}
		}
		collect := func(on *net.UDPConn, seg int) (from netip.AddrPort) {
			t.Helper()
			for off := 0; off < len(data); off += seg {
				var got []byte
				got, from = hear(t, on)
				if want := data[off:min(off+seg, len(data))]; !bytes.Equal(got, want) {
					t.Fatalf("at %d: %d bytes, want %d", off, len(got), len(want))
				}
			}
			return from
		}
		for _, seg := range []int{700, 1400} { // 58 and 29 segments
			train(k, addrOf(s), seg)
			from := collect(s, seg)
			var super atomic.Int32
			b.net.watch(func(f *frame.Frame) {
				if f.Hdr.GSO() == wire.GSOUDPL4 && int(f.Hdr.GSOSize) == seg {
					super.Add(1)
				}
			})
			train(s, netip.AddrPortFrom(host, from.Port()), seg)
			collect(k, seg)
			if super.Load() == 0 {
				t.Error("the train came in as single frames")
			}
			b.net.watch(nil)
		}
	})
}

// Datagrams up to the largest cross in fragments. Outward ones reach the NAT whole: the gateway has put them together.
func TestUDPLargeDatagrams(t *testing.T) {
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := bindUDP(t, b.out.NS, out, 0)
		k := bindUDP(t, b.c, c, 0)
		s.SetReadBuffer(4 << 20)
		k.SetReadBuffer(4 << 20)
		for _, n := range []int{1453, 1473, 2952, 2953, 9000, 65507} {
			data := pattern(n)
			p := udpPacket(addrOf(k), addrOf(s), data)
			b.UDP().HandlePackets([]stack.Packet{p})
			got, from := hear(t, s)
			if !bytes.Equal(got, data) {
				t.Fatalf("%d bytes out: %d came, or others", n, len(got))
			}
			if _, err := s.WriteToUDPAddrPort(data, from); err != nil {
				t.Fatal(err)
			}
			if got, _ := hear(t, k); !bytes.Equal(got, data) {
				t.Fatalf("%d bytes in: %d came, or others", n, len(got))
			}
		}
	})
}

// udpPacket is a datagram as the gateway hands it over.
func udpPacket(src, dst netip.AddrPort, data []byte) stack.Packet {
	buf := make([]byte, headroom+len(data))
	copy(buf[headroom:], data)
	f := udpFrame(buf, len(data), src, dst, 0, 0)
	if n := ipHdrLen(src.Addr()) + wire.UDPLen + len(data); n > 1500 && src.Addr().Is4() {
		ip := f.Data[wire.EthernetLen:]
		putIP(ip, src.Addr(), dst.Addr(), wire.ProtoUDP, 0, 64, wire.UDPLen+len(data), 1, false)
	}
	p := stack.Packet{Frame: f, L3: wire.EthernetLen}
	p.IP, _ = wire.ParseIP(f.Data[p.L3:], false)
	return p
}

func TestUDPPortUnreachable(t *testing.T) {
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		var k net.Conn
		b.c.Do(func() { k, _ = net.Dial("udp", netip.AddrPortFrom(out, 9).String()) })
		defer k.Close()
		for range 3 { // each by itself: an error that waits must not eat the next datagram
			k.Write([]byte("anybody?"))
			k.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, err := k.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("read: %v, want connection refused", err)
			}
		}
		// Many at once: those that are sent while errors wait must still arrive.
		s := echoUDP(t, b.out.NS, out)
		u := bindUDP(t, b.c, c, 0)
		for i := range 20 {
			u.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(out, 9))
			ask(t, u, s.addr(), pattern(i))
		}
	})
}

// A router beyond the host says "time exceeded": traceroute.
func TestUDPTimeExceeded(t *testing.T) {
	b := newBed(t, Config{})
	b.out.Uplink(t)
	testbed.Sysctl(t, b.out.NS, "net/ipv4/ip_forward", "1")
	testbed.Sysctl(t, b.out.NS, "net/ipv6/conf/all/forwarding", "1")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		dst := netip.MustParseAddrPort("203.0.113.9:33434")
		level, ttl, recverr := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_RECVERR
		if c.Is6() {
			dst = netip.MustParseAddrPort("[2001:db8:ffff::9]:33434")
			level, ttl, recverr = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR
		}
		k := bindUDP(t, b.c, c, 0)
		raw, _ := k.SyscallConn()
		raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), level, ttl, 2)
			unix.SetsockoptInt(int(fd), level, recverr, 1)
		})
		k.WriteToUDPAddrPort([]byte("where am I"), dst)
		he, peer, quote := queuedError(t, raw)
		if want := uint8(11); c.Is4() && he.typ != want || c.Is6() && he.typ != 3 || he.from != out || peer != dst || string(quote) != "where am I" {
			t.Errorf("type %d from %v about %q to %v, want time exceeded from %v about what was sent to %v", he.typ, he.from, quote, peer, out, dst)
		}
	})
}

// queuedError waits for an entry of a socket's error queue.
func queuedError(t *testing.T, raw syscall.RawConn) (he hostError, peer netip.AddrPort, data []byte) {
	t.Helper()
	buf, oob := make([]byte, 2048), make([]byte, 512)
	ok := testbed.Wait(3*time.Second, func() (ok bool) {
		raw.Control(func(fd uintptr) {
			n, m, _, from, err := unix.Recvmsg(int(fd), buf, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			switch a := from.(type) {
			case *unix.SockaddrInet4:
				peer = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
			case *unix.SockaddrInet6:
				peer = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
			}
			data = buf[:n]
			he, ok = parseHostError(oob[:m])
		})
		return ok
	})
	if !ok {
		t.Fatal("no error came")
	}
	return he, peer, data
}

// A router beyond the host has a narrower link: its word reaches the container, MTU and all, and what comes then gets through.
func TestUDPTooBigFarAway(t *testing.T) {
	b := newBed(t, Config{})
	b.out.Uplink(t)
	testbed.Sysctl(t, b.out.NS, "net/ipv4/ip_forward", "1")
	testbed.Sysctl(t, b.out.NS, "net/ipv6/conf/all/forwarding", "1")
	far := testbed.NewNS(t, "far")
	testbed.Veth(t, b.out.NS, "narrow", far, "eth0")
	b.out.Do(func() { setMTU(t, "narrow", 1300) })
	far.Do(func() { setMTU(t, "eth0", 1300) })
	far4, far6 := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:ffff::9")
	testbed.AddAddrs(t, b.out.NS, "narrow", netip.MustParsePrefix("203.0.113.1/24"), netip.MustParsePrefix("2001:db8:ffff::1/64"))
	testbed.AddAddrs(t, far, "eth0", netip.PrefixFrom(far4, 24), netip.PrefixFrom(far6, 64))
	testbed.DefaultVia(t, far, netip.MustParseAddr("203.0.113.1"))
	testbed.DefaultVia(t, far, netip.MustParseAddr("2001:db8:ffff::1"))
	awaitLocal(t, far, far6)
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		dst := far4
		if c.Is6() {
			dst = far6
		}
		s := echoUDP(t, far, dst)
		k := bindUDP(t, b.c, c, 0)
		raw, _ := k.SyscallConn()
		wantErrors(t, raw, c.Is6())
		ask(t, k, s.addr(), pattern(1000))
		k.WriteToUDPAddrPort(pattern(1450), s.addr())
		he, peer, _ := queuedError(t, raw)
		if he.info != 1300 || he.from != out || peer != s.addr() {
			t.Errorf("%+v about %v, want MTU 1300 from %v", he, peer, out)
		}
		// The container's kernel cuts from now on, the gateway joins, the host cuts again.
		data := pattern(1440)
		b.UDP().HandlePackets([]stack.Packet{notDF(udpPacket(addrOf(k), s.addr(), data))})
		if got, _ := hear(t, k); !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back", len(got))
		}
	})
}

// notDF takes the DF bit off an IPv4 packet, as the fragments had it that it was made of.
func notDF(p stack.Packet) stack.Packet {
	p.IP.DontFragment = p.IP.Version == 6
	return p
}

// The way out is narrower than the container's network.
func TestUDPTooBig(t *testing.T) {
	b := newBed(t, Config{})
	setMTU(t, b.out.HostLink, 1400)
	b.out.Do(func() { setMTU(t, "eth0", 1400) })
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := echoUDP(t, b.out.NS, out)
		k := bindUDP(t, b.c, c, 0)
		ask(t, k, s.addr(), pattern(1000))
		before := b.net.refusals(stack.UnreachTooBig)
		k.WriteToUDPAddrPort(pattern(1450), s.addr()) // Linux sets DF on what fits its link
		testbed.Eventually(t, 3*time.Second, func() bool { return b.net.refusals(stack.UnreachTooBig) == before+1 })
		if m := b.net.lastMTU(); m != 1400 {
			t.Errorf("told MTU %d, want 1400", m)
		}
		// A datagram that came in fragments goes on in fragments.
		data := pattern(5000)
		b.UDP().HandlePackets([]stack.Packet{udpPacket(addrOf(k), s.addr(), data)})
		if got, _ := hear(t, k); !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back, or others", len(got))
		}
		// A train whose datagrams are too long for the way is no reason to lose those that are not.
		ask(t, k, s.addr(), pattern(1300))
	})
}

func TestUDPPolicy(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		b := newBed(t, Config{})
		k := bindUDP(t, b.c, bedC4, 0)
		for _, c := range []struct {
			dst  string
			drop frame.Drop
		}{{"10.88.0.254:1", frame.DropPolicyLoopback}, {"127.0.0.1:1", frame.DropPolicyLoopback}, {"169.254.169.254:80", frame.DropPolicyMetadata}, {"224.0.0.251:5353", frame.DropPolicyAddress}} {
			b.UDP().HandlePackets([]stack.Packet{udpPacket(addrOf(k), netip.MustParseAddrPort(c.dst), []byte("x"))})
			if n := b.Drops().Get(c.drop); n == 0 {
				t.Errorf("%s: %s does not count", c.dst, c.drop)
			}
		}
		if n := b.net.refusals(stack.UnreachProhibited); n != 4 {
			t.Errorf("%d answers of 4", n)
		}
		if n := b.udp.flows.quota.inUse(); n != 0 {
			t.Errorf("refusals hold %d flows", n)
		}
	})
	t.Run("allowed", func(t *testing.T) {
		b := newBed(t, Config{HostLoopback: true})
		s4, s6 := echoUDP(t, testbed.Host(t), netip.MustParseAddr("127.0.0.1")), echoUDP(t, testbed.Host(t), netip.IPv6Loopback())
		ask(t, bindUDP(t, b.c, bedC4, 0), netip.AddrPortFrom(bedAlias4, s4.addr().Port()), []byte("four"))
		ask(t, bindUDP(t, b.c, bedC6, 0), netip.AddrPortFrom(bedAlias6, s6.addr().Port()), []byte("six"))
	})
}

func TestUDPFlowLimits(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{Limits: Limits{UDPFlows: 6, UDPFlowsPerContainer: 4}})
	s := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	send := func(c string, port uint16) {
		b.UDP().HandlePackets([]stack.Packet{udpPacket(netip.AddrPortFrom(netip.MustParseAddr(c), port), addrOf(s), []byte("x"))})
	}
	for i := range uint16(10) {
		send("10.88.0.2", 40000+i)
	}
	if n, d := b.udp.flows.quota.inUse(), b.Drops().Get(frame.DropFlowLimit); n != 4 || d != 6 {
		t.Errorf("one container holds %d flows, %d dropped; want 4 and 6", n, d)
	}
	for i := range uint16(10) {
		send("10.88.0.3", 40000+i) // another container still gets what is left
	}
	if n, d := b.udp.flows.quota.inUse(), b.Drops().Get(frame.DropFlowLimit); n != 6 || d != 14 {
		t.Errorf("%d flows, %d dropped; want 6 and 14", n, d)
	}
	send("10.88.0.2", 40000) // a flow that is there keeps working
	if d := b.Drops().Get(frame.DropFlowLimit); d != 14 {
		t.Errorf("%d dropped", d)
	}
}

// testClock is a clock that tests move.
type testClock struct{ ns atomic.Int64 }

func newTestClock() *testClock {
	c := new(testClock)
	c.ns.Store(time.Now().UnixNano())
	return c
}
func (c *testClock) now() time.Time          { return time.Unix(0, c.ns.Load()) }
func (c *testClock) advance(d time.Duration) { c.ns.Add(int64(d)) }

// sweep runs the tick on the loop, as time does.
func (b *bed) sweep() {
	done := make(chan struct{})
	b.packets.post(func() { b.udp.tick(); close(done) })
	<-done
}

// RFC 4787 REQ-5 and REQ-6.
func TestUDPIdle(t *testing.T) {
	testbed.Leaks(t)
	k := newTestClock()
	b := newBed(t, Config{Clock: k.now})
	s := echoUDP(t, b.out.NS, b.out.Addr4)
	dns := bindUDP(t, b.out.NS, b.out.Addr4, 53)
	mute := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	answered, unanswered, resolver := bindUDP(t, b.c, bedC4, 0), bindUDP(t, b.c, bedC4, 0), bindUDP(t, b.c, bedC4, 0)
	ask(t, answered, s.addr(), []byte("x"))
	unanswered.WriteToUDPAddrPort([]byte("x"), addrOf(mute))
	hear(t, mute)
	resolver.WriteToUDPAddrPort([]byte("x"), addrOf(dns))
	hear(t, dns)
	want := func(n int, why string) {
		t.Helper()
		b.sweep()
		if got := b.udp.flows.quota.inUse(); got != n {
			t.Errorf("%s: %d flows, want %d", why, got, n)
		}
	}
	want(3, "at first")
	k.advance(29 * time.Second)
	want(3, "after 29 s")
	k.advance(2 * time.Second)
	want(2, "after 31 s the question to port 53 is forgotten")
	k.advance(88 * time.Second)
	want(2, "after 119 s")
	k.advance(2 * time.Second)
	want(1, "after 121 s the unanswered one is")
	k.advance(170 * time.Second)
	want(1, "after 291 s")
	ask(t, answered, s.addr(), []byte("again"))
	k.advance(299 * time.Second)
	want(1, "299 s later")
	k.advance(2 * time.Second)
	want(0, "301 s later")
	if n := b.udp.peers.Load(); n != 0 {
		t.Errorf("%d peers are left", n)
	}
	ask(t, answered, s.addr(), []byte("anew"))
}

// A flow remembers a bounded number of peers, and all flows together do.
func TestUDPPeersAreBounded(t *testing.T) {
	b := newBed(t, Config{})
	f, _ := b.udp.flows.get(netip.AddrPortFrom(bedC4, 40000), 1)
	if f == nil {
		t.Fatal("no flow")
	}
	peer := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 1000)
	}
	for i := range 3 * flowPeers {
		f.sent(peer(i), 1)
		if !f.admits(peer(i).Addr()) {
			t.Fatal("the last peer is not admitted")
		}
	}
	if len(f.peers) != flowPeers || b.udp.peers.Load() != flowPeers-1 {
		t.Errorf("%d peers, %d counted; want %d", len(f.peers), b.udp.peers.Load(), flowPeers)
	}
	b.udp.peers.Store(totalPeers)
	g, _ := b.udp.flows.get(netip.AddrPortFrom(bedC4, 40001), 1)
	g.sent(peer(1), 1)
	g.sent(peer(2), 1)
	if !g.admits(peer(2).Addr()) || b.udp.peers.Load() != totalPeers {
		t.Errorf("with all peers used up a flow cannot hear the one it sent to last, or counts wrong (%d)", b.udp.peers.Load())
	}
}

// After Close nothing goes out, nothing comes in, and nothing breaks.
func TestUDPAfterClose(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	s := echoUDP(t, b.out.NS, b.out.Addr4)
	k := bindUDP(t, b.c, bedC4, 0)
	ask(t, k, s.addr(), []byte("x"))
	b.NAT.Close()
	b.NAT.Close()
	b.UDP().HandlePackets([]stack.Packet{udpPacket(addrOf(k), s.addr(), []byte("x"))})
	silent(t, k)
	if b.Drops().Get(frame.DropNoFlow) == 0 {
		t.Error("a datagram to a closed NAT is not counted")
	}
}

// One batch with several flows, destinations and sizes in turns: each datagram arrives once, whole, and in order towards its destination.
func TestUDPMixedBatch(t *testing.T) {
	b := newBed(t, Config{})
	var sinks []*net.UDPConn
	for range 20 { // more than laneLook
		sinks = append(sinks, bindUDP(t, b.out.NS, b.out.Addr4, 0))
	}
	var ps []stack.Packet
	want := make([][][]byte, len(sinks))
	for i := range 400 {
		k := i * 7 % len(sinks)
		data := pattern(8 + i%5*300)
		binary.BigEndian.PutUint32(data, uint32(i))
		src := netip.AddrPortFrom(bedC4, 40000+uint16(i%3))
		ps = append(ps, udpPacket(src, addrOf(sinks[k]), data))
		want[k] = append(want[k], data)
	}
	b.UDP().HandlePackets(ps)
	for k, s := range sinks {
		got := make(map[uint32]bool)
		lastOf := make(map[uint16]uint32)
		for range want[k] {
			d, from := hear(t, s)
			i := binary.BigEndian.Uint32(d)
			data := udpData(ps[i])
			if !bytes.Equal(d, data) || got[i] || lastOf[from.Port()] > i {
				t.Fatalf("datagram %d: %d bytes of %d, seen before %v, after %d", i, len(d), len(data), got[i], lastOf[from.Port()])
			}
			got[i], lastOf[from.Port()] = true, i
		}
	}
}

func udpData(p stack.Packet) []byte { return p.L4()[wire.UDPLen:] }

// The steady state costs no allocation, neither way.
func TestUDPAllocs(t *testing.T) {
	b := newBed(t, Config{})
	s := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	k := addrOf(bindUDP(t, b.c, bedC4, 40000)) // it takes what comes, so that no ICMP goes back
	ps := make([]stack.Packet, 64)
	for i := range ps {
		ps[i] = udpPacket(k, addrOf(s), pattern(200+100*(i/16)))
	}
	b.UDP().HandlePackets(ps)
	if n := testing.AllocsPerRun(100, func() { b.UDP().HandlePackets(ps) }); n != 0 && !raceEnabled {
		t.Errorf("%v allocations for a batch outwards", n)
	}
	f, _ := b.udp.flows.get(k, time.Now().UnixNano())
	b.packets.remove(f.fd) // the test receives itself
	mapped := netip.AddrPortFrom(b.out.HostAddr4, uint16(f.localPort()))
	data := pattern(1000)
	fill := func() {
		for range 20 {
			s.WriteToUDPAddrPort(data, mapped)
		}
	}
	fill()
	f.ready(unix.EPOLLIN)
	write := testing.AllocsPerRun(50, fill) // what the test's own sending allocates
	var n0, n1 uint64
	n0 = b.dev.Stats().TxFrames
	if n := testing.AllocsPerRun(50, func() { fill(); f.ready(unix.EPOLLIN) }) - write; n > 0 && !raceEnabled {
		t.Errorf("%v allocations for a batch inwards", n)
	}
	if n1 = b.dev.Stats().TxFrames; n1-n0 < 500 {
		t.Errorf("only %d frames were received", n1-n0)
	}
}

func setMTU(t testing.TB, link string, mtu int) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	if err == nil {
		err = netlink.LinkSetMTU(l, mtu)
	}
	if err != nil {
		t.Fatal(err)
	}
}
