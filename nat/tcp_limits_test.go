package nat

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// blackhole gives a machine whose address swallows SYNs: it is on the link, and its neighbour entry is there, but it answers nothing.
func blackhole(t testing.TB) netip.Addr {
	t.Helper()
	ext := testbed.NewExternal(t)
	gone := netip.MustParseAddr("203.0.113.1")
	testbed.AddRoute(t, testbed.Host(t), netip.PrefixFrom(gone, 32), ext.Addr4)
	return gone // ext does not forward
}

func hostListener(t testing.TB, addr string) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// TestAnswers holds what a container is told about each way in which the host's connect can end.
func TestAnswers(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	ext := testbed.NewExternal(t)
	l, err := ext.Listen("tcp", netip.AddrPortFrom(ext.Addr4, 80).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := startNAT(t, Config{Network: addrNet{}, Subnets: testPolicy().subnets})
	const src = "10.0.2.9:1000"
	n.try(t, src, netip.AddrPortFrom(ext.Addr4, 80).String()).want(t, "accept")
	n.try(t, src, netip.AddrPortFrom(ext.Addr4, 81).String()).want(t, "refuse")
	n.try(t, src, netip.AddrPortFrom(ext.Addr6, 81).String()).want(t, "refuse")
	n.try(t, src, netip.AddrPortFrom(ext.HostAddr4, 81).String()).want(t, "refuse")
	n.try(t, src, "203.0.113.9:80").want(t, "net")
	n.try(t, src, "[2001:db8:ffff::1]:80").want(t, "net")
	n.try(t, src, "127.0.0.1:80").want(t, "refuse")
	n.try(t, src, "10.0.2.254:80").want(t, "refuse")
	n.try(t, src, "10.0.2.1:80").want(t, "refuse")
	n.try(t, src, "169.254.169.254:80").want(t, "prohibited")
	n.try(t, src, "224.0.0.1:80").want(t, "prohibited")
	n.try(t, src, "10.0.2.77:80").want(t, "host")
	for d, want := range map[frame.Drop]uint64{frame.DropPolicyLoopback: 2, frame.DropNotForGateway: 1, frame.DropPolicyMetadata: 1, frame.DropPolicyAddress: 2} {
		if got := n.Drops().Get(d); got != want {
			t.Errorf("%s: %d, want %d", d, got, want)
		}
	}
	// A neighbour that does not answer ARP, and a router's ICMP.
	last := ext.Addr4.As4()
	last[3] = 77
	r := n.try(t, src, netip.AddrPortFrom(netip.AddrFrom4(last), 80).String())
	testbed.Eventually(t, 10*time.Second, func() bool { return r.got() != "" })
	r.want(t, "host")
}

// TestFlowsLeaveDescriptors holds that no container can use up the process's descriptors by its flows, however few there are.
func TestFlowsLeaveDescriptors(t *testing.T) {
	for _, files := range []int{64, 256, 1024, 4096, 20000, 1 << 20} {
		l := Limits{}.withDefaults()
		full := l
		if less := l.fit(files); less != (l != full) || less != (files < 1<<20) {
			t.Errorf("%d files: less %v: %+v", files, less, l)
		}
		if sum := l.TCPFlows + l.UDPFlows + l.PingFlows; sum > files*3/4 {
			t.Errorf("%d files: %d flows", files, sum)
		}
		// A container has three addresses.
		if 3*l.TCPFlowsPerContainer > l.TCPFlows*3/4 || 3*l.UDPFlowsPerContainer > l.UDPFlows*3/4 || 3*l.PingFlowsPerContainer > l.PingFlows*3/4 {
			t.Errorf("%d files: one container may have nearly all: %+v", files, l)
		}
	}
	alone := Limits{TCPFlowsPerContainer: 1 << 20}.withDefaults()
	if alone.fit(1024); alone.TCPFlowsPerContainer != alone.TCPFlows || alone.UDPFlowsPerContainer != alone.UDPFlows/4 {
		t.Errorf("all for one: %+v", alone)
	}
	// What nobody publishes and nobody pings with is for those who connect.
	outwards := Limits{TCPFlowsPerContainer: 1 << 20, PublishedFlows: 1}.withDefaults()
	if outwards.fit(20000); outwards.TCPFlows < 10_000 || outwards.TCPFlowsPerContainer != outwards.TCPFlows || outwards.TCPFlows+outwards.PublishedFlows+outwards.UDPFlows+outwards.PingFlows > 20000*3/4 {
		t.Errorf("nothing published: %+v", outwards)
	}
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		t.Fatal(err)
	}
	n := startNAT(t, Config{Network: addrNet{}, Limits: Limits{TCPFlows: 1 << 30, UDPFlows: 1 << 30, PingFlows: 1 << 30}})
	if got := n.tcp.flows.total + n.udp.flows.quota.total + n.icmp.flows.quota.total; uint64(got) > r.Cur*3/4 {
		t.Errorf("%d flows with %d descriptors", got, r.Cur)
	}
}

// TestHostWithoutIPv6: where IPv6 is switched off the kernel says EADDRNOTAVAIL, as it does when ports run out. A container that is told
// at once goes on with IPv4; one that is told nothing waits for minutes.
func TestHostWithoutIPv6(t *testing.T) {
	ns := testbed.NewNS(t, "v4-only")
	testbed.Sysctl(t, ns, "net/ipv6/conf/all/disable_ipv6", "1")
	n := startNAT(t, Config{Network: addrNet{}, Subnets: testPolicy().subnets})
	ns.Do(func() { n.try(t, "10.0.2.9:1000", "[2001:db8::1]:80").want(t, "net") })
}

// TestHostLoopback holds that the alias leads to a service on 127.0.0.1 when, and only when, it is opened.
func TestHostLoopback(t *testing.T) {
	testbed.Leaks(t)
	l := hostListener(t, "127.0.0.1:0")
	dst := netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(l.Addr().(*net.TCPAddr).Port)).String()
	startNAT(t, Config{Network: addrNet{}}).try(t, "10.0.2.9:1", dst).want(t, "refuse")
	startNAT(t, Config{Network: addrNet{}, HostLoopback: true}).try(t, "10.0.2.9:1", dst).want(t, "accept")
}

// TestDialLimits fills one container's share of half-open connects with a black hole; another container is served as if nothing were.
func TestDialLimits(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	gone := netip.AddrPortFrom(blackhole(t), 80).String()
	l := hostListener(t, "127.0.0.1:0")
	ok := netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(l.Addr().(*net.TCPAddr).Port)).String()
	var now atomic.Int64
	clock := func() time.Time { return time.Unix(1e9, now.Load()) }
	n := startNAT(t, Config{Network: addrNet{}, HostLoopback: true, Clock: clock, Limits: Limits{HalfOpen: 15, HalfOpenPerContainer: 10, DialTimeout: 20 * time.Second}})

	var held []*request
	for range 10 {
		held = append(held, n.try(t, "10.0.2.9:1", gone))
	}
	n.try(t, "10.0.2.9:1", gone).want(t, "ignore")
	if d := n.Drops().Get(frame.DropDialLimit); d != 1 {
		t.Fatalf("dial-limit is %d", d)
	}
	for range 100 {
		start := time.Now()
		n.try(t, "10.0.2.10:1", ok).want(t, "accept")
		if d := time.Since(start); d > time.Second {
			t.Fatalf("another container waited %v", d)
		}
	}
	for range 5 {
		held = append(held, n.try(t, "10.0.2.11:1", gone))
	}
	n.try(t, "10.0.2.12:1", gone).want(t, "ignore") // the total
	if h := n.Stats().HalfOpen; h != 15 {
		t.Fatalf("%d half-open", h)
	}
	for _, r := range held {
		if a := r.got(); a != "" {
			t.Fatalf("a waiting connect was answered %q", a)
		}
	}
	now.Add(int64(20 * time.Second))
	n.streams.armTick(0)
	for _, r := range held {
		r.want(t, "ignore")
	}
	testbed.Eventually(t, time.Second, func() bool { return n.Stats().HalfOpen == 0 })
	n.try(t, "10.0.2.9:1", ok).want(t, "accept")
	n.try(t, "10.0.2.9:1", gone) // left for Close
}

// TestFlowLimit holds the bound on connections, per container and in all, and that an ended one makes room.
func TestFlowLimit(t *testing.T) {
	testbed.Leaks(t)
	l := hostListener(t, "127.0.0.1:0")
	ok := netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(l.Addr().(*net.TCPAddr).Port)).String()
	n := startNAT(t, Config{Network: addrNet{}, HostLoopback: true, Limits: Limits{TCPFlows: 5, TCPFlowsPerContainer: 3}})
	var a []*request
	for range 3 {
		r := n.try(t, "10.0.2.9:1", ok)
		r.want(t, "accept")
		a = append(a, r)
	}
	n.try(t, "10.0.2.9:1", ok).want(t, "ignore")
	for range 2 {
		n.try(t, "10.0.2.10:1", ok).want(t, "accept")
	}
	n.try(t, "10.0.2.10:1", ok).want(t, "ignore")
	if d := n.Drops().Get(frame.DropFlowLimit); d != 2 {
		t.Fatalf("flow-limit is %d", d)
	}
	a[0].conn.Reset()
	testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().TCPFlows == 4 })
	n.try(t, "10.0.2.11:1", ok).want(t, "accept")
}

// TestIdle holds that silent flows end, half-closed ones sooner, and that one with traffic does not.
func TestIdle(t *testing.T) {
	testbed.Leaks(t)
	l := hostListener(t, "127.0.0.1:0")
	ok := netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(l.Addr().(*net.TCPAddr).Port)).String()
	var now atomic.Int64
	n := startNAT(t, Config{Network: addrNet{}, HostLoopback: true, Clock: func() time.Time { return time.Unix(1e9, now.Load()) },
		Limits: Limits{TCPIdle: 10 * sweepEvery, TCPHalfIdle: 3 * sweepEvery}})
	open := func() (*request, net.Conn) {
		r := n.try(t, "10.0.2.9:1", ok)
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		r.want(t, "accept")
		return r, c
	}
	sweeps := func(k int) {
		for range k {
			done := make(chan struct{})
			now.Add(int64(sweepEvery))
			n.streams.post(func() { n.tcp.tick(); close(done) })
			<-done
		}
	}
	open()
	half, halfHost := open()
	busy, busyHost := open()
	half.conn.CloseWrite()
	if _, err := halfHost.Read(make([]byte, 1)); err == nil {
		t.Fatal("no FIN")
	}
	testbed.Eventually(t, time.Second, func() bool {
		n.tcp.mu.Lock()
		defer n.tcp.mu.Unlock()
		for f := range n.tcp.live {
			if f.ended.Load() == 1 {
				return true
			}
		}
		return false
	})
	sweeps(5)
	testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().TCPFlows == 2 })
	busyHost.Write([]byte("x"))
	busy.conn.Read(make([]byte, 1))
	sweeps(7)
	testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().TCPFlows == 1 })
	if got := n.Stats().IdleEnded; got != 2 {
		t.Fatalf("IdleEnded is %d", got)
	}
	busyHost.Write([]byte("y"))
	if _, err := busy.conn.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the flow with traffic was ended: %v", err)
	}
}

func TestNewNeedsNetwork(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Fatal("no error")
	}
}

func TestRunEndsWithContext(t *testing.T) {
	testbed.Leaks(t)
	n, err := New(Config{Network: addrNet{}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	n.Close()
	n.Close()
}

// TestRecycle holds that a destination with many connections in TIME-WAIT gets their source ports again, the oldest first, instead of ever new ones.
func TestRecycle(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	ext := testbed.NewExternal(t)
	l, err := ext.Listen("tcp", netip.AddrPortFrom(ext.Addr4, 80).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// Ports of its own: an earlier test's TIME-WAIT without SO_REUSEADDR, towards whatever address, keeps its port from being bound.
	testbed.Sysctl(t, testbed.Host(t), "net/ipv4/ip_local_port_range", "62000 63000")
	n := startNAT(t, Config{Network: addrNet{}})
	n.tcp.recycler.depth = 5
	var ports []uint16
	for i := range 17 {
		r := n.try(t, "10.0.2.9:1", l.Addr().String())
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, netip.MustParseAddrPort(c.RemoteAddr().String()).Port())
		r.want(t, "accept")
		r.conn.CloseWrite() // the container closes first
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Fatal("no FIN")
		}
		c.Close()
		testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().TCPFlows == 0 })
		if i >= 5 && ports[i] != ports[i-5] {
			t.Fatalf("connection %d came from port %d and not from %d; all: %v", i, ports[i], ports[i-5], ports)
		}
	}
	n.tcp.recycler.expire(time.Now().Add(2 * recycleFor))
	if len(n.tcp.recycler.m) != 0 {
		t.Fatal("destinations are kept for ever")
	}
}
