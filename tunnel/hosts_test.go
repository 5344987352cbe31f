package tunnel

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tunnel/udp"
)

// mesh is n hosts on one Ethernet, which know each other as peers of every network:
//
//	[c1] ── [h1] eth0 ┐
//	[c2] ── [h2] eth0 ├ bridge [lan]
//	[c3] ── [h3] eth0 ┘
type mesh struct {
	hosts []*testbed.NS
	vteps []*VTEP
}

func newMesh(t testing.TB, n int) *mesh {
	t.Helper()
	m := &mesh{}
	lan := testbed.NewNS(t, "lan")
	var ports []string
	for i := range n {
		ns := testbed.NewNS(t, fmt.Sprintf("h%d", i+1))
		port := fmt.Sprintf("h%d", i+1)
		testbed.Veth(t, ns, "eth0", lan, port)
		testbed.AddAddrs(t, ns, "eth0", netip.PrefixFrom(m.addr(i), 24))
		ports = append(ports, port)
		m.hosts = append(m.hosts, ns)
		m.vteps = append(m.vteps, newVTEP(t, ns, Config{Listen: netip.AddrPortFrom(m.addr(i), 0)}))
	}
	testbed.Bridge(t, lan, "br0", ports...)
	return m
}

func (m *mesh) addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 0, byte(i + 1)}) }

// network is one VNI on all hosts.
func (m *mesh) network(t testing.TB, vni uint32) (ns []*network) {
	t.Helper()
	for i, v := range m.vteps {
		n := newNetwork(v, vni)
		for j := range m.vteps {
			if i != j {
				n.peer(t, PeerConfig{Remote: netip.AddrPortFrom(m.addr(j), 0)})
			}
		}
		ns = append(ns, n)
	}
	return ns
}

// counter counts what comes to a port, by its payload.
type counter struct {
	mu sync.Mutex
	n  map[string]int
}

func listenFor(t testing.TB, ns *testbed.NS, group netip.Addr) *counter {
	t.Helper()
	var pc net.PacketConn
	var err error
	ns.Do(func() {
		if !group.IsValid() {
			pc, err = net.ListenPacket("udp4", ":7777")
			return
		}
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName("eth0"); err == nil {
			pc, err = net.ListenMulticastUDP("udp", ifi, &net.UDPAddr{IP: group.AsSlice(), Port: 7778})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{n: map[string]int{}}
	done := make(chan bool)
	go func() {
		defer close(done)
		buf := make([]byte, 100)
		for {
			n, _, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			c.mu.Lock()
			c.n[string(buf[:n])]++
			c.mu.Unlock()
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return c
}

func (c *counter) get(s string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[s]
}

// Broadcast and multicast reach each container of a full mesh exactly once, whoever sends, and unicast goes to one.
func TestMesh(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 3)
	nets := m.network(t, 77)
	var cs []*testbed.NS
	var heard, heard6 []*counter
	group := netip.MustParseAddr("ff15::7777")
	for i, n := range nets {
		c := n.container(t, byte(i+1), 1450, fmt.Sprintf("10.1.0.%d/24", i+1), fmt.Sprintf("fd01::%d/64", i+1))
		cs = append(cs, c)
		heard, heard6 = append(heard, listenFor(t, c, netip.Addr{})), append(heard6, listenFor(t, c, group))
	}
	for i, from := range cs {
		for j := range cs {
			if i != j {
				ping(t, from, fmt.Sprintf("10.1.0.%d", j+1))
				ping(t, from, fmt.Sprintf("fd01::%d", j+1))
			}
		}
	}
	transfer(t, cs[0], cs[1], "10.1.0.2", 4<<20)
	transfer(t, cs[2], cs[0], "fd01::1", 4<<20)
	const times = 20
	for i, from := range cs {
		send := func(pc net.PacketConn, err error, to netip.AddrPort, kind string) {
			if err != nil {
				t.Fatal(err)
			}
			defer pc.Close()
			for k := range times {
				if _, err := pc.(*net.UDPConn).WriteToUDPAddrPort(fmt.Appendf(nil, "%s %d %d", kind, i, k), to); err != nil {
					t.Fatal(err)
				}
			}
		}
		pc, err := from.ListenPacket("udp4", fmt.Sprintf("10.1.0.%d:0", i+1))
		send(pc, err, netip.MustParseAddrPort("10.1.0.255:7777"), "broadcast")
		pc, err = from.ListenPacket("udp6", fmt.Sprintf("[fd01::%d]:0", i+1))
		send(pc, err, netip.AddrPortFrom(group, 7778), "multicast")
	}
	check := func(want int) bool {
		for i := range cs {
			for j := range cs {
				for k := range times {
					if i == j {
						continue
					}
					if heard[j].get(fmt.Sprintf("broadcast %d %d", i, k)) != want || heard6[j].get(fmt.Sprintf("multicast %d %d", i, k)) != want {
						return false
					}
				}
			}
		}
		return true
	}
	if !testbed.Wait(10*time.Second, func() bool { return check(1) }) {
		t.Errorf("not everybody heard everything once: %v %v", heard[0].n, heard6[1].n)
	}
	time.Sleep(200 * time.Millisecond) // for a second copy, if there is one
	if !check(1) {
		t.Error("somebody heard something twice")
	}
	var counts []*frame.DropCounters
	for _, v := range m.vteps {
		counts = append(counts, v.Drops())
		for _, p := range v.Peers() {
			counts = append(counts, p.Drops())
		}
	}
	clean(t, counts, m.hosts...)
}

// Networks with the same addresses, and the same MACs, on the same hosts do not meet.
func TestNetworksAreApart(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	for _, vni := range []uint32{5, 6} {
		nets := m.network(t, vni)
		c1, c2 := nets[0].container(t, 1, 1450, "10.1.0.1/24"), nets[1].container(t, 2, 1450, "10.1.0.2/24")
		ping(t, c1, "10.1.0.2")
		l, err := c2.Listen("tcp", fmt.Sprintf("10.1.0.2:%d", 1000+vni))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for _, port := range []int{1005, 1006} {
			c, err := c1.DialContext(t.Context(), "tcp", fmt.Sprintf("10.1.0.2:%d", port))
			if err == nil {
				c.Close()
			}
			// Of the other network's container nothing is to be had: ours refuses.
			if (err == nil) != (port == 1000+int(vni)) {
				t.Errorf("VNI %d, port %d: %v", vni, port, err)
			}
		}
		transfer(t, c1, c2, "10.1.0.2", 1<<20)
	}
}

// A host that is not in the list is not heard, and a peer that moves is found at its new address.
func TestPeerMoves(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 3)
	var nets []*network
	for _, v := range m.vteps {
		nets = append(nets, newNetwork(v, 1))
	}
	p := nets[0].peer(t, PeerConfig{Remote: netip.AddrPortFrom(m.addr(1), 0)})
	nets[1].peer(t, PeerConfig{Remote: netip.AddrPortFrom(m.addr(0), 0)})
	nets[2].peer(t, PeerConfig{Remote: netip.AddrPortFrom(m.addr(0), 0)})
	c1 := nets[0].container(t, 1, 1450, "10.1.0.1/24")
	nets[1].container(t, 2, 1450, "10.1.0.2/24")
	c3 := nets[2].container(t, 3, 1450, "10.1.0.3/24")
	ping(t, c1, "10.1.0.2")
	c3.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "1", "10.1.0.1").Run()
	if m.vteps[0].Drops().Get(frame.DropUnknownPeer) == 0 {
		t.Error("a stranger's frames are not counted")
	}
	if err := p.SetRemote(netip.AddrPortFrom(m.addr(2), 0)); err != nil {
		t.Fatal(err)
	}
	ping(t, c1, "10.1.0.3")
	ping(t, c3, "10.1.0.1")
}

// The underlay goes away and comes back; nobody has to do anything.
func TestUnderlayComesBack(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	nets := m.network(t, 1)
	c1, c2 := nets[0].container(t, 1, 1450, "10.1.0.1/24"), nets[1].container(t, 2, 1450, "10.1.0.2/24")
	ping(t, c1, "10.1.0.2")
	run(t, m.hosts[0], "ip", "link", "set", "eth0", "down")
	if c1.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "1", "10.1.0.2").Run() == nil {
		t.Fatal("the underlay is not down")
	}
	p := m.vteps[0].Peers()[0]
	if p.Drops().Get(frame.DropUnderlay) == 0 {
		t.Errorf("frames without an underlay are not counted as %v", frame.DropUnderlay)
	}
	run(t, m.hosts[0], "ip", "link", "set", "eth0", "up")
	testbed.Eventually(t, 10*time.Second, func() bool {
		return c1.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "1", "10.1.0.2").Run() == nil
	})
	transfer(t, c2, c1, "10.1.0.1", 1<<20)
	if cut := p.Stats().Cut; cut != udp.CutOn {
		t.Errorf("cut: %v", cut)
	}
}

// Frames above the inner MTU are dropped and counted, and the node hears when the path shrinks.
func TestTooBig(t *testing.T) {
	testbed.Leaks(t)
	a, _ := underlay(t, 1500)
	v := newVTEP(t, a, Config{})
	for _, c := range []struct {
		remote string
		inner  int
	}{{"10.9.0.2:4789", 1450}, {"[fd09::2]:4789", 1430}} {
		heard := make(chan int, 10)
		p := addPeer(t, v, PeerConfig{VNI: 1, Remote: netip.MustParseAddrPort(c.remote), OnMTU: func(n int) { heard <- n }})
		if n, err := p.MTU(); n != c.inner || err != nil {
			t.Errorf("%s: inner MTU %d, %v", c.remote, n, err)
		}
		fit, over := packet(false, wire.ProtoUDP, 0, c.inner-wire.IPv4Len), packet(false, wire.ProtoUDP, 0, c.inner-wire.IPv4Len+1)
		super := frame.Frame{Data: partial(packet(false, wire.ProtoTCP, 0, 30000), false)}
		super.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOTCPv4, GSOSize: uint16(c.inner - 40 + 1), CsumStart: 34, CsumOffset: 16}
		fs := []frame.Frame{{Data: fit}, {Data: over}, {Data: fit}, super, {Data: fit}}
		if n := p.Transmit(fs); n != 3 || p.Drops().Get(frame.DropTooBig) != 2 || p.Drops().Total() != 2 {
			t.Errorf("%s: took %d, dropped %d as too big, %d in all", c.remote, n, p.Drops().Get(frame.DropTooBig), p.Drops().Total())
		}
		// One byte less, and it fits.
		super.Hdr.GSOSize--
		if n := p.Transmit([]frame.Frame{super}); n != 1 {
			t.Errorf("%s: a superframe of segments that fit was refused", c.remote)
		}
		run(t, a, "ip", "link", "set", "eth0", "mtu", "1400")
		time.Sleep(1100 * time.Millisecond) // the path's MTU is asked for once a second
		if n := p.Transmit(fs[:1]); n != 0 {
			t.Errorf("%s: took a frame that is too long by now", c.remote)
		}
		select {
		case n := <-heard:
			if n != c.inner-100 {
				t.Errorf("%s: OnMTU says %d", c.remote, n)
			}
		default:
			t.Errorf("%s: OnMTU was not called", c.remote)
		}
		run(t, a, "ip", "link", "set", "eth0", "mtu", "1500")
		p.Close()
	}
}

// A program behind the kernel's vxlan device that has its own datagrams cut (QUIC does): over a veth the kernel hands us the inner superframe whole.
func TestKernelUDPSuperframes(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	v := newVTEP(t, a, Config{Listen: netip.MustParseAddrPort("10.9.0.1:4789")})
	n := newNetwork(v, 42)
	p := n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789")})
	kernelVXLAN(t, b, 42, []string{"local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789", "udpcsum"}, "10.1.0.2/24", "fd01::2/64")
	run(t, b, "ip", "link", "set", "vx0", "mtu", "1450")
	c1 := n.container(t, 1, 1450, "10.1.0.1/24", "fd01::1/64")
	for _, addr := range []string{"10.1.0.1", "fd01::1"} {
		ping(t, b, addr)
		pc, err := c1.ListenPacket("udp", net.JoinHostPort(addr, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		var s *udp.Socket
		b.Do(func() {
			s, err = udp.Listen(udp.Config{Listen: netip.AddrPortFrom(netip.MustParseAddr(addr).Next(), 0)})
		})
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
		const datagrams = 30
		var want [][]byte
		for i := range datagrams {
			d := make([]byte, 1000)
			for k := range d {
				d[k] = byte(i + k)
			}
			batch.Add(path, 0, 0, i, batch.Head(0), d)
			want = append(want, d)
		}
		if lost := batch.Send(); lost != 0 || path.Stats().Messages != 1 {
			t.Fatalf("%d lost, %d messages", lost, path.Stats().Messages)
		}
		batch.Release()
		buf := make([]byte, 2000)
		for i := range datagrams {
			pc.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, _, err := pc.ReadFrom(buf)
			if err != nil || !slices.Equal(buf[:n], want[i]) {
				t.Fatalf("%s: datagram %d: %d bytes, %v", addr, i, n, err)
			}
		}
	}
	clean(t, []*frame.DropCounters{v.Drops(), p.Drops()}, a, b, c1)
}
