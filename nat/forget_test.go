package nat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/stack"
)

func descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// wantReset reads until the connection ends, which must be by a reset and soon.
func wantReset(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
}

// TestForgetTCP holds that every kind of TCP flow of one container ends at once, at both ends, with its quotas and descriptors, and that nothing of another's does.
func TestForgetTCP(t *testing.T) {
	testbed.Leaks(t)
	o := newOutside(t)
	gone := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), 80).String()
	testbed.AddRoute(t, testbed.Host(t), netip.MustParsePrefix("203.0.113.1/32"), o.Addr4)
	nw := newNetwork(t, 2, Config{})
	a, b := nw.cs[0], nw.cs[1]
	swallowed := swallow(t, a)
	silent, err := nw.Publish(mustSpec(t, fmt.Sprintf("127.0.0.1:8080:%d", swallowed)), []netip.Addr{a.addr4})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	inward, _ := publishOpen(t, nw, a)
	before := descriptors(t)
	in, out := join(t, a, o.v4)
	in6, out6 := join(t, a, o.v6)
	other, otherOut := join(t, b, o.v4)
	var clients []net.Conn
	for range 5 {
		c, err := net.Dial("tcp", "127.0.0.1:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	waits := make(chan error, 1)
	ctx, giveUp := context.WithTimeout(context.Background(), 30*time.Second)
	defer giveUp()
	go func() { _, err := a.DialContext(ctx, "tcp", gone); waits <- err }()
	testbed.Eventually(t, 5*time.Second, func() bool {
		s := nw.Stats()
		return s.HalfOpen == 1 && s.TCPFlows == 4 && s.PublishedHalfOpen == 5 && s.PublishedFlows == 6
	})

	start := time.Now()
	var wg sync.WaitGroup
	for range 2 { // also when two do it at one time
		wg.Go(func() { nw.Forget(a.addr4); nw.Forget(a.addr6) })
	}
	wg.Wait()
	if d := time.Since(start); d > 500*time.Millisecond {
		t.Errorf("took %v", d)
	}
	if s := nw.Stats(); s.TCPFlows != 1 || s.held() != 1 || s.PublishedPorts != 2 {
		t.Errorf("%+v, want the one flow of the other container and two ports", s)
	}
	nw.tcp.mu.Lock()
	if len(nw.tcp.live) != 1 || len(nw.tcp.inward) != 0 || nw.tcp.dialing.first != nil {
		t.Errorf("%d live, %d dials into the network, dials out %v", len(nw.tcp.live), len(nw.tcp.inward), nw.tcp.dialing.first)
	}
	nw.tcp.mu.Unlock()
	for _, c := range append(clients, in, out, in6, out6, inward) {
		wantReset(t, c)
		c.Close()
	}
	if _, err := otherOut.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := other.Read(make([]byte, 1)); err != nil {
		t.Errorf("another container's flow: %v", err)
	}
	other.Close()
	otherOut.Close()
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().held() == 0 })
	// The address is somebody else's now.
	in, out = join(t, a, o.v4)
	in.Close()
	out.Close()
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().held() == 0 })
	select { // it still sends SYNs
	case err := <-waits:
		t.Errorf("the dial that waits: %v", err)
	default:
	}
	giveUp()
	<-waits
	nw.Forget(a.addr4)
	testbed.Eventually(t, 5*time.Second, func() bool { return descriptors(t) <= before+2 })
}

// swallow has a container listen and take no connection: its kernel drops SYNs when the queue is full.
func swallow(t testing.TB, c *peer) (port uint16) {
	t.Helper()
	var fd int
	var err error
	c.Do(func() {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		if err = unix.Bind(fd, &unix.SockaddrInet4{}); err == nil {
			err = unix.Listen(fd, 0)
		}
		port = localAddr(fd).Port()
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	c.dial(t, fmt.Sprintf("127.0.0.1:%d", port)) // one fills it
	return port
}

// publishOpen is an open connection through a published port of c.
func publishOpen(t testing.TB, nw *network, c *peer) (client, server net.Conn) {
	t.Helper()
	l, err := c.Listen("tcp", ":81")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p, err := nw.Publish(mustSpec(t, "127.0.0.1:8081:81"), []netip.Addr{c.addr4})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if client, err = net.Dial("tcp", "127.0.0.1:8081"); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// TestForgetPackets is the same for UDP and ping.
func TestForgetPackets(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	b := newBed(t, Config{})
	to := addrOf(bindUDP(t, b.out.NS, b.out.Addr4, 0))
	before := descriptors(t)
	other := netip.MustParseAddr("10.88.0.3")
	for i := range uint16(50) {
		for _, c := range []netip.Addr{bedC4, other} {
			b.UDP().HandlePackets([]stack.Packet{udpPacket(netip.AddrPortFrom(c, 40000+i), to, []byte("x"))})
			b.ICMP().HandlePackets([]stack.Packet{echoPacket(c, b.out.Addr4, i, []byte("x"))})
		}
	}
	if s := b.Stats(); s.UDPFlows != 100 || s.PingFlows != 100 {
		t.Fatalf("%+v", s)
	}
	b.Forget(bedC4)
	if s := b.Stats(); s.UDPFlows != 50 || s.PingFlows != 50 {
		t.Errorf("%+v, want the other container's 50 and 50", s)
	}
	b.Forget(other)
	if s := b.Stats(); s.held() != 0 || b.udp.peers.Load() != 0 {
		t.Errorf("%+v, %d peers", s, b.udp.peers.Load())
	}
	if d := descriptors(t); d != before {
		t.Errorf("%d descriptors, %d before", d, before)
	}
}

// TestSwallowedSYNs: outside clients of a published port whose service takes no connection do not keep its container from connecting, nor anybody from another port of
// another container.
func TestSwallowedSYNs(t *testing.T) {
	testbed.Leaks(t)
	o := newOutside(t)
	nw := newNetwork(t, 2, Config{Limits: Limits{TCPFlows: 40, TCPFlowsPerContainer: 10, HalfOpen: 20, HalfOpenPerContainer: 5, DialTimeout: 30 * time.Second,
		PublishedFlowsPerContainer: 8, PublishedHalfOpenPerContainer: 6}})
	c := nw.cs[0]
	port := swallow(t, c)
	p, err := nw.Publish(mustSpec(t, fmt.Sprintf("127.0.0.1:8080:%d", port)), []netip.Addr{c.addr4})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 30 {
		if k, err := net.Dial("tcp", "127.0.0.1:8080"); err == nil {
			defer k.Close()
		}
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Drops().Get(frame.DropDialLimit) == 24 })
	if s := nw.Stats(); s.PublishedHalfOpen != 6 || s.PublishedFlows != 6 || s.TCPFlows != 0 || s.HalfOpen != 0 {
		t.Fatalf("%+v", s)
	}
	for range 10 { // its own share is whole
		start := time.Now()
		c.dial(t, o.v4.Addr().String())
		if d := time.Since(start); d > 900*time.Millisecond {
			t.Fatalf("the container's own dial took %v", d)
		}
	}
	if client, server := publishOpen(t, nw, nw.cs[1]); client == nil || server == nil {
		t.Fatal("another container's port is not served")
	}
	nw.Forget(c.addr4)
	if s := nw.Stats(); s.PublishedHalfOpen != 0 || s.PublishedFlows != 1 {
		t.Errorf("after Forget: %+v", s)
	}
}

// TestKeepAlive holds what the kernel is asked to do for flows that have lived for a sweep, in both directions, and that it is asked.
func TestKeepAlive(t *testing.T) {
	testbed.Leaks(t)
	l := hostListener(t, "127.0.0.1:0")
	n := startNAT(t, Config{Network: &dialNet{}, HostLoopback: true})
	n.try(t, "10.0.2.9:1", netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(l.Addr().(*net.TCPAddr).Port)).String()).want(t, "accept")
	p, err := n.Publish(mustSpec(t, fmt.Sprintf("127.0.0.1:8080:%d", l.Addr().(*net.TCPAddr).Port)), container)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	k, err := net.Dial("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	testbed.Eventually(t, 5*time.Second, func() bool {
		s := n.Stats()
		return s.TCPFlows == 1 && s.PublishedFlows == 1 && s.PublishedHalfOpen == 0
	})
	testbed.Eventually(t, 5*time.Second, func() bool { n.tcp.mu.Lock(); defer n.tcp.mu.Unlock(); return len(n.tcp.live) == 2 })
	done := make(chan struct{})
	n.streams.post(func() { n.tcp.sweep(); close(done) })
	<-done
	n.tcp.mu.Lock()
	defer n.tcp.mu.Unlock()
	for f := range n.tcp.live {
		for _, o := range []struct {
			name             string
			level, opt, want int
		}{
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 75},
			{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15}, {"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 8},
		} {
			if got, err := unix.GetsockoptInt(f.fd, o.level, o.opt); err != nil || got != o.want {
				t.Errorf("port %d: %s is %d, %v; want %d", f.port, o.name, got, err, o.want)
			}
		}
	}
}

// TestBudgets holds that a container that has used up its errors takes none from others, that an hour gives no more than a second, and the bound.
func TestBudgets(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := budgets{rate: 10}
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}) }
	use := func(a netip.Addr) (n int) {
		for range 100 {
			if b.allow(a, now) {
				n++
			}
		}
		return n
	}
	for _, a := range []netip.Addr{addr(1), addr(2)} {
		if n := use(a); n != 10 {
			t.Errorf("%v: %d, want 10", a, n)
		}
	}
	now = now.Add(300 * time.Millisecond)
	if n := use(addr(1)); n != 3 {
		t.Errorf("%d after 0.3 s, want 3", n)
	}
	now = now.Add(time.Hour)
	if n := use(addr(1)); n != 10 {
		t.Errorf("%d after an hour, want 10", n)
	}
	for i := range maxBudgets + 50 {
		b.allow(addr(1000+i), now)
	}
	if len(b.m) > maxBudgets {
		t.Errorf("%d budgets", len(b.m))
	}
	if n := use(addr(1000 + maxBudgets + 49)); n >= 10 {
		t.Errorf("%d from the shared budget", n)
	}
	now = now.Add(2 * time.Second)
	if n := use(addr(9)); n != 10 || len(b.m) != 1 {
		t.Errorf("%d, want 10; %d budgets, want 1: the others are full and so as good as none", n, len(b.m))
	}
	b.forget(addr(9))
	if len(b.m) != 0 {
		t.Error("a budget is left")
	}
}

// TestErrorsPerContainer holds that carryError goes by the container's budget.
func TestErrorsPerContainer(t *testing.T) {
	k := newTestClock()
	b := newBed(t, Config{Clock: k.now})
	other := netip.MustParseAddr("10.88.0.3")
	to := addrOf(bindUDP(t, b.out.NS, b.out.Addr4, 0))
	give := func(a netip.Addr, n int) {
		src := netip.AddrPortFrom(a, 40000)
		b.UDP().HandlePackets([]stack.Packet{udpPacket(src, to, []byte("x"))})
		b.udp.flows.mu.RLock()
		f := b.udp.flows.m[src]
		b.udp.flows.mu.RUnlock()
		var room [icmpErrorRoom]byte
		for range n {
			b.udp.carryError(&f.packetSock, &hostError{origin: eeOriginICMP, typ: 3, code: 3, from: to.Addr()}, to, []byte("x"), room[:])
		}
	}
	give(bedC4, errorsPerSecond+7)
	if d := b.Drops().Get(frame.DropRate); d != 7 {
		t.Errorf("%d over the rate, want 7", d)
	}
	give(other, errorsPerSecond)
	if d := b.Drops().Get(frame.DropRate); d != 7 {
		t.Errorf("%d over the rate, want 7 still: the other container has its own", d)
	}
}

// TestStatsJSON holds the names that scripts read.
func TestStatsJSON(t *testing.T) {
	j, err := json.Marshal(startNAT(t, Config{Network: addrNet{}}).Stats())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range strings.Fields("tcpFlows halfOpen publishedFlows publishedHalfOpen udpFlows udpClients pingFlows publishedPorts idleEnded udpEvicted tcpOrphans probes unjournaled") {
		if !strings.Contains(string(j), fmt.Sprintf("%q:0", k)) {
			t.Errorf("no %s in %s", k, j)
		}
	}
}

// TestForgetUnderLoad forgets containers while they connect and send and clients come, and holds that all is on the books to the end.
func TestForgetUnderLoad(t *testing.T) {
	testbed.Leaks(t)
	o := newOutside(t)
	sink := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}
	go sink(o.v4)
	local := hostListener(t, "127.0.0.1:0")
	go sink(local)
	port := local.Addr().(*net.TCPAddr).Port
	n := startNAT(t, Config{Network: &dialNet{}, HostLoopback: true})
	for i, to := range []int{port, 9} { // one that answers, one that does not
		p, err := n.Publish(mustSpec(t, fmt.Sprintf("127.0.0.1:%d:%d", 8080+i, to)), container)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
	}
	a := container[0]
	src, dsts := netip.AddrPortFrom(a, 1000), []netip.AddrPort{netip.AddrPortFrom(o.Addr4, 80), netip.AddrPortFrom(netip.MustParseAddr("10.0.2.254"), uint16(port))}
	stop := time.Now().Add(1500 * time.Millisecond)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for k := uint16(0); time.Now().Before(stop); k++ {
				switch i {
				case 0:
					n.HandleTCP(&request{t: t, src: src, dst: dsts[k%2]})
				case 1:
					n.UDP().HandlePackets([]stack.Packet{udpPacket(netip.AddrPortFrom(a, 1000+k%500), dsts[0], []byte("x"))})
				case 2:
					if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", 8080+k%2)); err == nil {
						c.Close()
					}
				}
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	var slowest time.Duration
	for time.Now().Before(stop) {
		start := time.Now()
		n.Forget(a)
		slowest = max(slowest, time.Since(start))
		time.Sleep(3 * time.Millisecond)
	}
	wg.Wait()
	testbed.Eventually(t, 5*time.Second, func() bool { n.Forget(a); return n.Stats().held() == 0 })
	t.Logf("the slowest took %v", slowest)
	n.tcp.mu.Lock()
	if len(n.tcp.live)+len(n.tcp.inward) != 0 || n.tcp.dialing.first != nil {
		t.Errorf("%d live, %d dials into the network", len(n.tcp.live), len(n.tcp.inward))
	}
	n.tcp.mu.Unlock()
	if len(n.udp.flows.m) != 0 || n.udp.peers.Load() != 0 {
		t.Errorf("%d UDP flows, %d peers", len(n.udp.flows.m), n.udp.peers.Load())
	}
}
