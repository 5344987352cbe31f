package nat

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// publishUDP publishes ports as "-p spec" does, for the container of the bed.
func (b *bed) publishUDP(t testing.TB, spec string) *Published {
	t.Helper()
	s, err := ParseSpec(spec + "/udp")
	if err != nil {
		t.Fatal(err)
	}
	p, err := b.Publish(s, []netip.Addr{bedC4, bedC6})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestPublishUDPClientAddress(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	p := b.publishUDP(t, "5300:53")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := echoUDP(t, b.c, c, 53)
		k := bindUDP(t, b.out.NS, out, 0)
		for _, n := range []int{1, 1400, 9000, 60000} {
			// Answers leave from the address and port that the client spoke to: ask checks it. Large ones are the stack's to put together.
			if n <= 1400 {
				ask(t, k, netip.AddrPortFrom(host, 5300), pattern(n))
			} else {
				k.WriteToUDPAddrPort(pattern(n), netip.AddrPortFrom(host, 5300))
			}
			testbed.Eventually(t, 3*time.Second, func() bool { return s.size() == n })
			if s.peer() != addrOf(k) {
				t.Errorf("the container saw %v, want the client's own %v", s.peer(), addrOf(k))
			}
		}
		// An address of the host other than the one that a fresh packet would leave from.
		second := netip.MustParseAddr("198.51.100.7")
		if c.Is6() {
			second = netip.MustParseAddr("2001:db8:5::7")
		}
		bits := 32
		if c.Is6() {
			bits = 128
		}
		testbed.AddAddrs(t, testbed.Host(t), b.out.HostLink, netip.PrefixFrom(second, bits))
		awaitLocal(t, testbed.Host(t), second)
		ask(t, k, netip.AddrPortFrom(second, 5300), []byte("second"))
	})
	if n := b.udp.pubs.quota.inUse(); n != 2 {
		t.Errorf("%d clients are known, want 2", n)
	}
	p.Close()
	if n := b.udp.pubs.quota.inUse(); n != 0 {
		t.Errorf("%d clients of a closed port are known", n)
	}
}

// A client on the host is shown as the gateway, one port each.
func TestPublishUDPHostLocalClient(t *testing.T) {
	b := newBed(t, Config{})
	b.publishUDP(t, "5300:53")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := echoUDP(t, b.c, c, 53)
		gateway, loopback := bedGateway4, netip.MustParseAddr("127.0.0.1")
		if c.Is6() {
			gateway, loopback = bedGateway6, netip.IPv6Loopback()
		}
		for _, from := range []netip.Addr{loopback, host} {
			k1, k2 := bindUDP(t, testbed.Host(t), from, 0), bindUDP(t, testbed.Host(t), from, 0)
			ask(t, k1, netip.AddrPortFrom(from, 5300), []byte("one"))
			first := s.peer()
			ask(t, k2, netip.AddrPortFrom(from, 5300), []byte("two"))
			if first.Addr() != gateway || s.peer().Addr() != gateway || first == s.peer() {
				t.Errorf("clients on %v: the container saw %v and %v, want two ports of the gateway", from, first, s.peer())
			}
			ask(t, k1, netip.AddrPortFrom(from, 5300), []byte("one again"))
			if s.peer() != first {
				t.Errorf("a client was %v and is %v", first, s.peer())
			}
		}
	})
}

// What the container starts itself from a published port leaves from that port: the mapping is the same to everybody.
func TestPublishUDPOutbound(t *testing.T) {
	b := newBed(t, Config{})
	b.publishUDP(t, "5300:53")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := echoUDP(t, b.out.NS, out)
		k := bindUDP(t, b.c, c, 53)
		ask(t, k, s.addr(), []byte("x"))
		if want := netip.AddrPortFrom(host, 5300); s.peer() != want {
			t.Errorf("the peer saw %v, want %v", s.peer(), want)
		}
		// Published on one address alone it cannot be used for everything.
		b.publishUDP(t, "127.0.0.1:5400:54")
		k2 := bindUDP(t, b.c, c, 54)
		ask(t, k2, s.addr(), []byte("y"))
		if s.peer().Port() == 5400 {
			t.Error("a port of the loopback sent to the world")
		}
	})
}

// Two published ports of one container port, and one client that uses both from one socket.
func TestPublishUDPTwice(t *testing.T) {
	b := newBed(t, Config{})
	b.publishUDP(t, "5300:53")
	b.publishUDP(t, "5301:53")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		echoUDP(t, b.c, c, 53)
		k := bindUDP(t, b.out.NS, out, 0)
		for range 2 {
			ask(t, k, netip.AddrPortFrom(host, 5300), []byte("one"))
			ask(t, k, netip.AddrPortFrom(host, 5301), []byte("two"))
		}
	})
}

func TestPublishUDPInUse(t *testing.T) {
	b := newBed(t, Config{})
	bindUDP(t, testbed.Host(t), netip.MustParseAddr("127.0.0.1"), 5309)
	s, _ := ParseSpec("5300-5310:5300-5310/udp")
	if _, err := b.Publish(s, []netip.Addr{bedC4}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want address in use", err)
	}
	bindUDP(t, testbed.Host(t), netip.MustParseAddr("0.0.0.0"), 5300) // those bound before it failed are free again
	if n := b.udp.pubs.number.Load(); n != 0 {
		t.Errorf("%d ports are open", n)
	}
}

// A client that is gone: the container that answers is told, as it would be without NAT.
func TestPublishUDPClientGone(t *testing.T) {
	b := newBed(t, Config{})
	b.publishUDP(t, "5300:53")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		s := bindUDP(t, b.c, c, 53)
		k := bindUDP(t, b.out.NS, out, 0)
		k.WriteToUDPAddrPort([]byte("bye"), netip.AddrPortFrom(host, 5300))
		_, from := hear(t, s)
		k.Close()
		raw, _ := s.SyscallConn()
		wantErrors(t, raw, c.Is6())
		s.WriteToUDPAddrPort([]byte("hello?"), from)
		if he, peer, _ := queuedError(t, raw); peer != from || he.from != out {
			t.Errorf("error from %v about %v, want port unreachable from %v about %v", he.from, peer, out, from)
		}
	})
}

func TestPublishUDPClientsAreBounded(t *testing.T) {
	k := newTestClock()
	b := newBed(t, Config{Clock: k.now, Limits: Limits{UDPFlows: 100, UDPFlowsPerContainer: 5}})
	b.publishUDP(t, "5300:53")
	s := bindUDP(t, b.c, bedC4, 53)
	dst := netip.AddrPortFrom(b.out.HostAddr4, 5300)
	for range 8 {
		bindUDP(t, b.out.NS, b.out.Addr4, 0).WriteToUDPAddrPort([]byte("x"), dst)
	}
	testbed.Eventually(t, 3*time.Second, func() bool { return b.Stats().UDPEvicted == 3 })
	if n := b.udp.pubs.quota.inUse(); n != 5 {
		t.Errorf("%d clients, want 5", n)
	}
	var from netip.AddrPort
	for range 8 { // the last one is still there
		_, from = hear(t, s)
	}
	s.WriteToUDPAddrPort([]byte("answer"), from)
	testbed.Eventually(t, 3*time.Second, func() bool {
		b.udp.pubs.mu.RLock()
		defer b.udp.pubs.mu.RUnlock()
		for _, c := range b.udp.pubs.clients {
			if c.answered.Load() {
				return true
			}
		}
		return false
	})
	k.advance(121 * time.Second)
	b.sweep()
	if n := b.udp.pubs.quota.inUse(); n != 1 {
		t.Errorf("%d clients after two minutes, want the answered one", n)
	}
	k.advance(200 * time.Second)
	b.sweep()
	if n := b.udp.pubs.quota.inUse(); n != 0 {
		t.Errorf("%d clients after five minutes", n)
	}
}

// TestPublishUDPSpoofed: made-up sources fill a published port, and whoever comes then is served all the same, in the same moment; so is one that the container
// has answered before, and a container whose own share is not used up when others have filled the whole.
func TestPublishUDPSpoofed(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{Limits: Limits{UDPClients: 30, UDPClientsPerContainer: 20}})
	b.publishUDP(t, "5300:53")
	b.publishUDP(t, "5301:54") // nobody answers there
	echoUDP(t, b.c, bedC4, 53)
	bindUDP(t, b.c, bedC4, 54)
	out := func() *net.UDPConn { return bindUDP(t, b.out.NS, b.out.Addr4, 0) }
	answered := out()
	ask(t, answered, netip.AddrPortFrom(b.out.HostAddr4, 5300), []byte("one"))
	flood := func(n int) {
		evicted := b.Stats().UDPEvicted
		for range n {
			out().WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(b.out.HostAddr4, 5301))
		}
		testbed.Eventually(t, 3*time.Second, func() bool { return b.Stats().UDPEvicted >= evicted+uint64(n)-20 })
	}
	flood(60)
	ask(t, out(), netip.AddrPortFrom(b.out.HostAddr4, 5300), []byte("two"))
	before := b.Stats()
	ask(t, answered, netip.AddrPortFrom(b.out.HostAddr4, 5300), []byte("three"))
	if s := b.Stats(); s.UDPClients != 20 || s.UDPEvicted != before.UDPEvicted {
		t.Errorf("%+v, want 20 clients and the answered one among them all along", s)
	}
	// Another container, whose share is not used up when the whole is: those of the one that has most make room.
	p := &b.udp.pubs
	p.mu.RLock()
	var port *pubPort
	for port = range p.ports {
		if port.b.port == 53 {
			break
		}
	}
	p.mu.RUnlock()
	for i := range uint16(40) {
		p.mu.Lock()
		c := &pubClient{port: port, host: netip.AddrPortFrom(b.out.Addr4, 100+i), inner: netip.AddrPortFrom(b.out.Addr4, 100+i), dst: netip.MustParseAddrPort("10.88.0.77:53"), inbound: true}
		if drop := p.keep(c, time.Now().UnixNano()); drop != 0 {
			t.Fatalf("client %d of another container: %v", i, drop)
		}
		p.mu.Unlock()
	}
	if own, other := p.quota.heldBy(bedC4), p.quota.heldBy(netip.MustParseAddr("10.88.0.77")); own < 14 || other < 14 || own+other != 30 {
		t.Errorf("%d and %d clients of two containers, want half of 30 each", own, other)
	}
	// Only those that were answered are left in the end: then the table is full.
	p.mu.Lock()
	for _, c := range p.clients {
		c.answered.Store(true)
	}
	p.mu.Unlock()
	out().WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(b.out.HostAddr4, 5300))
	testbed.Eventually(t, 3*time.Second, func() bool { return b.Drops().Get(frame.DropFlowLimit) == 1 })
	ask(t, answered, netip.AddrPortFrom(b.out.HostAddr4, 5300), []byte("four"))
	b.Forget(bedC4)
	b.Forget(netip.MustParseAddr("10.88.0.77"))
	s := b.Stats()
	p.mu.Lock()
	if s.UDPClients != 0 || len(p.clients) != 0 || len(p.fresh) != 0 || s.PublishedPorts != 2 {
		t.Errorf("after Forget: %+v, %d clients, %d lists", s, len(p.clients), len(p.fresh))
	}
	p.mu.Unlock()
	ask(t, answered, netip.AddrPortFrom(b.out.HostAddr4, 5300), []byte("five")) // the ports are still there
}

// Ten thousand ports cost a descriptor and little else each, and no goroutine.
func TestPublishUDPManyPorts(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	const n = 10000
	var m0, m1 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m0)
	g0 := runtime.NumGoroutine()
	start := time.Now()
	p := b.publishUDP(t, "20000-29999:20000-29999")
	took := time.Since(start)
	runtime.GC()
	runtime.ReadMemStats(&m1)
	per := int64(m1.HeapAlloc-m0.HeapAlloc) / n
	t.Logf("%d ports in %v, %d heap bytes each", n, took, per)
	if per > 700 || runtime.NumGoroutine() > g0 {
		t.Errorf("a port costs %d bytes, and %d goroutines were started", per, runtime.NumGoroutine()-g0)
	}
	s := echoUDP(t, b.c, bedC4, 29999)
	k := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	ask(t, k, netip.AddrPortFrom(b.out.HostAddr4, 29999), []byte("x"))
	if s.peer() != addrOf(k) {
		t.Errorf("saw %v", s.peer())
	}
	start = time.Now()
	p.Close()
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("closing took %v", took)
	}
	if b.udp.pubs.number.Load() != 0 || len(b.udp.pubs.targets) != 0 {
		t.Error("ports are left")
	}
}
