package nat

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
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
	"patchbay/tap"
)

// Addresses of the container network in these tests.
var (
	bedGateway4 = netip.MustParseAddr("10.88.0.1")
	bedGateway6 = netip.MustParseAddr("fd88::1")
	bedAlias4   = netip.MustParseAddr("10.88.0.254")
	bedAlias6   = netip.MustParseAddr("fd88::fe")
	bedC4       = netip.MustParseAddr("10.88.0.2")
	bedC6       = netip.MustParseAddr("fd88::2")
	bedMAC      = wire.MAC{2, 0, 0, 0, 0, 1}
)

// bed is a container on a TAP, the NAT, and a machine outside.
//
//	[container] eth0 ══TAP══ bedNet ── NAT ── sockets of [host] ext0 ───────── eth0 [out]
//	 10.88.0.2, fd88::2                                198.18.n.1       198.18.n.2
type bed struct {
	*NAT
	t   testing.TB
	c   *testbed.NS
	out *testbed.External
	net *bedNet
	dev *tap.Device
}

// bedNet is the least of a gateway: a single container, whose kernel knows it as a static neighbour. What it sends is what the NAT made; the kernel
// in the container judges it.
type bedNet struct {
	nat  atomic.Pointer[NAT]
	dev  *tap.Device
	cMAC wire.MAC
	mtu  int

	mu          sync.Mutex
	unreachable map[stack.Unreachable]int
	toldMTU     int
	sent        func(f *frame.Frame) // where set, sees every frame
}

func newBed(t testing.TB, cfg Config) *bed {
	t.Helper()
	testbed.RequireTUN(t)
	b := &bed{t: t, c: testbed.NewNS(t, "c"), out: testbed.NewExternal(t, "out")}
	awaitLocal(t, b.out.NS, b.out.Addr6)
	awaitLocal(t, testbed.Host(t), b.out.HostAddr6)
	var h *tap.Handle
	var err error
	b.c.Do(func() {
		if h, err = tap.Open(tap.OpenConfig{Name: "eth0"}); err != nil {
			return
		}
		_, err = tap.Configure(tap.IfConfig{Name: "eth0",
			Addrs:  []netip.Prefix{netip.PrefixFrom(bedC4, 24), netip.PrefixFrom(bedC6, 64)},
			Routes: []tap.Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: bedGateway4}, {Dst: netip.MustParsePrefix("::/0"), Via: bedGateway6}}})
		if err != nil {
			return
		}
		var link netlink.Link
		if link, err = netlink.LinkByName("eth0"); err != nil {
			return
		}
		for _, a := range []netip.Addr{bedGateway4, bedGateway6, bedAlias4, bedAlias6} {
			if err = netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: bedMAC[:], State: netlink.NUD_PERMANENT}); err != nil {
				return
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	awaitLocal(t, b.c, bedC6)
	if b.dev, err = tap.New(tap.Config{Info: h.Info, FDs: h.FDs}); err != nil {
		t.Fatal(err)
	}
	b.net = &bedNet{dev: b.dev, cMAC: h.MAC, mtu: 1500, unreachable: make(map[stack.Unreachable]int)}
	cfg.Network = b.net
	if b.NAT, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	b.net.nat.Store(b.NAT)
	var wg sync.WaitGroup
	wg.Go(func() { b.NAT.Run(context.Background()) })
	wg.Go(func() { b.dev.Serve(context.Background(), 0, b.net) })
	t.Cleanup(func() {
		if t.Failed() {
			b.Drops().Each(func(d frame.Drop, n uint64) { t.Logf("dropped: %s %d", d, n) })
			b.dev.Drops().Each(func(d frame.Drop, n uint64) { t.Logf("dropped by the TAP: %s %d", d, n) })
			t.Logf("%+v; refusals %v; flows %v", b.dev.Stats(), b.net.unreachable, b.udp.flows.m)
		}
		b.NAT.Close()
		b.dev.Close()
		wg.Wait()
	})
	return b
}

// awaitLocal waits until ns takes packets to a: the kernel installs the local route of a new IPv6 address a little after it has taken the address.
func awaitLocal(t testing.TB, ns *testbed.NS, a netip.Addr) {
	t.Helper()
	testbed.Eventually(t, 3*time.Second, func() (ok bool) {
		ns.Do(func() {
			r, err := netlink.RouteGet(a.AsSlice())
			ok = err == nil && len(r) == 1 && r[0].Type == unix.RTN_LOCAL
		})
		return ok
	})
}

// Forward implements frame.Sink: it sorts what the container sends.
func (n *bedNet) Forward(fs []frame.Frame) {
	var udp, icmp []stack.Packet
	for i := range fs {
		p := stack.Packet{Frame: fs[i], L3: wire.EthernetLen}
		var ok bool
		if p.IP, ok = wire.ParseIP(fs[i].Data[wire.EthernetLen:], fs[i].Superframe()); !ok || p.IP.IsFragment() || p.IP.Dst.IsMulticast() {
			continue
		}
		switch p.IP.Proto {
		case wire.ProtoUDP:
			udp = append(udp, p)
		case wire.ProtoICMP, wire.ProtoICMPv6:
			icmp = append(icmp, p)
		}
	}
	if len(udp) > 0 {
		n.nat.Load().UDP().HandlePackets(udp)
	}
	if len(icmp) > 0 {
		n.nat.Load().ICMP().HandlePackets(icmp)
	}
}

func (n *bedNet) Send(fs []frame.Frame) {
	for i := range fs {
		typ := wire.EtherTypeIPv4
		if fs[i].Data[wire.EthernetLen]>>4 == 6 {
			typ = wire.EtherTypeIPv6
		}
		wire.PutEthernet(fs[i].Data, n.cMAC, bedMAC, typ)
		n.mu.Lock()
		f := n.sent
		n.mu.Unlock()
		if f != nil {
			f(&fs[i])
		}
	}
	n.dev.Transmit(fs)
}

func (n *bedNet) SendUnreachable(p *stack.Packet, why stack.Unreachable, mtu int) {
	n.mu.Lock()
	n.unreachable[why]++
	n.toldMTU = mtu
	n.mu.Unlock()
}

func (n *bedNet) lastMTU() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.toldMTU
}

// watch has f see every frame to the container; nil ends it.
func (n *bedNet) watch(f func(f *frame.Frame)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent = f
}

func (n *bedNet) refusals(why stack.Unreachable) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.unreachable[why]
}

func (n *bedNet) DialTCP(_ context.Context, _, _ netip.AddrPort, done func(stack.Conn, error)) {
	done(nil, net.ErrClosed)
}

func (n *bedNet) Addr(v int) netip.Addr {
	if v == 4 {
		return bedGateway4
	}
	return bedGateway6
}

func (n *bedNet) HostAlias(v int) netip.Addr {
	if v == 4 {
		return bedAlias4
	}
	return bedAlias6
}

func (n *bedNet) MTU() int { return n.mtu }

// versions calls f for each IP version with the container's address and the machine outside.
func (b *bed) versions(f func(t *testing.T, c, host, out netip.Addr)) {
	t := b.t.(*testing.T)
	t.Run("v4", func(t *testing.T) { f(t, bedC4, b.out.HostAddr4, b.out.Addr4) })
	t.Run("v6", func(t *testing.T) { f(t, bedC6, b.out.HostAddr6, b.out.Addr6) })
}

// bindUDP opens a UDP socket in ns.
func bindUDP(t testing.TB, ns *testbed.NS, a netip.Addr, port uint16) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	var err error
	ns.Do(func() { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port))) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// echoServer answers every datagram to it with itself and tells who sent the last one.
type echoServer struct {
	*net.UDPConn
	mu   sync.Mutex
	from netip.AddrPort
	n    int
}

func echoUDP(t testing.TB, ns *testbed.NS, a netip.Addr, port ...uint16) *echoServer {
	t.Helper()
	s := &echoServer{UDPConn: bindUDP(t, ns, a, append(port, 0)[0])}
	s.SetReadBuffer(4 << 20)
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := s.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.from, s.n = from, n
			s.mu.Unlock()
			s.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return s
}

func (s *echoServer) addr() netip.AddrPort { return addrOf(s.UDPConn) }

// peer is who sent the last datagram.
func (s *echoServer) peer() netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return netip.AddrPortFrom(s.from.Addr().Unmap(), s.from.Port())
}

// size is that of the last datagram.
func (s *echoServer) size() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// wantErrors has the kernel queue ICMP errors on a socket.
func wantErrors(t testing.TB, raw syscall.RawConn, v6 bool) {
	t.Helper()
	raw.Control(func(fd uintptr) {
		s := packetSock{fd: int(fd), v6: v6}
		s.wantErrors()
	})
}

func addrOf(c *net.UDPConn) netip.AddrPort {
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// ask sends data from c to dst and fails t unless it comes back from there.
func ask(t testing.TB, c *net.UDPConn, dst netip.AddrPort, data []byte) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort(data, dst); err != nil {
		t.Fatal(err)
	}
	got, from := hear(t, c)
	if from != dst {
		t.Errorf("answer from %v, want %v", from, dst)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back of %d, or others", len(got), len(data))
	}
}

// hear returns the next datagram to c.
func hear(t testing.TB, c *net.UDPConn) ([]byte, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// silent fails t if a datagram comes to c within a short while.
func silent(t testing.TB, c *net.UDPConn) {
	t.Helper()
	b := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, from, err := c.ReadFromUDPAddrPort(b); err == nil {
		t.Errorf("%d bytes from %v, want silence", n, from)
	}
}

// pattern is n bytes that are the same nowhere.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := 0; i+4 <= n; i += 4 {
		binary.BigEndian.PutUint32(b[i:], uint32(i)*2654435761)
	}
	return b
}
