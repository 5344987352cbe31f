package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// mesh is several hosts on one Ethernet, each with a daemon of another ordinary user:
//
//	[h1] eth0 10.77.0.1 fd77::1 ┐
//	[h2] eth0 10.77.0.2 fd77::2 ├ bridge [lan]
//	[h3] eth0 10.77.0.3 fd77::3 ┘
type mesh struct {
	t     *testing.T
	lan   *testbed.NS
	hosts []*meshHost
	six   bool // peers are named by their IPv6 addresses
}

type meshHost struct {
	*testbed.NS
	*daemonProc
	addr, addr6 netip.Addr
	port        string // of the bridge
	distinct    bool   // its user is another one than the tests', to the kernel
}

// ip is the host's own root, with the tool of that name.
func (h *meshHost) ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := h.Command(testbed.Tool(t, "ip"), args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

// newMesh makes n hosts with a daemon each.
func newMesh(t *testing.T, n int, flags ...string) *mesh {
	t.Helper()
	return newMeshOf(t, n, func(*meshHost) []string { return flags })
}

// newMeshOf is newMesh with each daemon's own flags.
func newMeshOf(t *testing.T, n int, flags func(h *meshHost) []string) *mesh {
	t.Helper()
	m := &mesh{t: t, lan: testbed.NewNS(t, "lan")}
	var ports []string
	for i := range n {
		h := &meshHost{
			NS: testbed.NewNS(t, fmt.Sprintf("h%d", i+1)), port: fmt.Sprintf("h%d", i+1), addr: netip.AddrFrom4([4]byte{10, 77, 0, byte(i + 1)}),
			addr6: netip.MustParseAddr(fmt.Sprintf("fd77::%d", i+1)),
		}
		testbed.Veth(t, h.NS, "eth0", m.lan, h.port)
		testbed.AddAddrs(t, h.NS, "eth0", netip.PrefixFrom(h.addr, 24), netip.PrefixFrom(h.addr6, 64))
		ports = append(ports, h.port)
		m.hosts = append(m.hosts, h)
	}
	testbed.Bridge(t, m.lan, "br0", ports...)
	for i, h := range m.hosts {
		login, distinct := testbed.NewUser(t)
		if i == 0 {
			t.Logf("users that the kernel tells apart: %v", distinct)
		}
		h.distinct = distinct
		h.daemonProc = &daemonProc{t: t, login: login, host: h.NS}
		h.args = flags(h)
		h.begin()
	}
	return m
}

// network makes one on every host, and everybody everybody's peer. Each host hands out 64 addresses: the first from .64, the next from .128, and so on.
func (m *mesh) network(name string, vni int, flags ...string) {
	m.t.Helper()
	for i, h := range m.hosts {
		args := append([]string{"network", "create", name, "--vni", fmt.Sprint(vni), "--subnet", "10.9.0.0/24", "--subnet", "fd09::/64"}, flags...)
		h.do(append(args, "--ip-range", fmt.Sprintf("10.9.0.%d/26", 64*(i+1)), "--ip-range", fmt.Sprintf("fd09::%d:0/112", i+1))...)
		for _, o := range m.hosts {
			if o != h {
				addr := o.addr
				if m.six {
					addr = o.addr6
				}
				h.do("peer", "add", name, addr.String())
			}
		}
	}
	for _, h := range m.hosts {
		h.waitPeers(name, api.PeerUp, len(m.hosts)-1)
	}
}

// peers are those of a network.
func (h *meshHost) peers(name string) (ps []api.Peer) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.do("peer", "ls", name, "-o", "json")), &ps); err != nil {
		h.t.Fatal(err)
	}
	return ps
}

// count is how many peers of a network are in a state.
func (h *meshHost) count(name string, state api.PeerState) (n int) {
	h.t.Helper()
	for _, p := range h.peers(name) {
		if p.State == state {
			n++
		}
	}
	return n
}

func (h *meshHost) waitPeers(name string, state api.PeerState, n int) {
	h.t.Helper()
	if !testbed.Wait(20*time.Second, func() bool { return h.count(name, state) == n }) {
		h.t.Fatalf("not %d peers are %s: %s", n, state, h.do("peer", "ls"))
	}
}

// container is a running `patchbay run` that can be looked into.
type container struct {
	*running
	*space
	station
	distinct bool // as meshHost.distinct
}

// run starts a container that does nothing, or a command.
func (h *meshHost) run(network, name string, args ...string) *container {
	h.t.Helper()
	if !slices.Contains(args, "--") {
		args = append(args, "--", "sleep", "1000000")
	}
	r := h.background(name, append([]string{"--network", network}, args...)...)
	c := &container{running: r, distinct: h.distinct}
	as, err := h.attachments()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, a := range as {
		if a.Name == name {
			c.space, c.station = &space{t: h.t, pid: a.PID}, stationOf(a)
		}
	}
	return c
}

func (c *container) exec(name string, args ...string) *exec.Cmd {
	if !c.distinct {
		return c.space.command(name, args...)
	}
	// The tests' credentials are nobody's in another user's namespace.
	return exec.Command(testbed.Tool(c.space.t, "nsenter"), append([]string{"-t", fmt.Sprint(c.pid), "-U", "-n", "--", testbed.Tool(c.space.t, name)}, args...)...)
}

// text runs a command in the container and returns what it wrote.
func (c *container) text(name string, args ...string) string {
	c.space.t.Helper()
	out, err := c.exec(name, args...).CombinedOutput()
	if err != nil {
		c.space.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// pings reports whether an address answers.
func (c *container) pings(addr netip.Addr, flags ...string) (string, bool) {
	out, err := c.exec("ping", append([]string{"-c", "2", "-i", "0.2", "-W", "2", addr.String()}, flags...)...).CombinedOutput()
	return string(out), err == nil
}

func (c *container) mustPing(addr netip.Addr, flags ...string) {
	c.space.t.Helper()
	if out, ok := c.pings(addr, flags...); !ok {
		c.space.t.Errorf("ping %s %v: %s", addr, flags, out)
	}
}

// once sees to it that a broadcast and a multicast of each container reach every other one, and that exactly once, and that nothing comes back to its sender.
func once(t *testing.T, cs []*container) {
	t.Helper()
	var socks []*packets
	for _, c := range cs {
		socks = append(socks, c.packets("eth0"))
	}
	for i, c := range cs {
		var ms []mark
		for _, dst := range []wire.MAC{wire.Broadcast, {0x01, 0, 0x5e, 1, 2, 3}, {0x33, 0x33, 0, 0, 0, 0x77}} {
			m := newMark()
			ms = append(ms, m)
			f := make([]byte, wire.EthernetLen, 100)
			wire.PutEthernet(f, dst, c.mac, 0x88b6) // IEEE 802 local experimental 2
			socks[i].send(append(f, m[:]...))
		}
		for j, s := range socks {
			got := map[mark]int{}
			s.listen(700*time.Millisecond, func(f []byte) bool {
				for _, m := range ms {
					if strings.Contains(string(f), string(m[:])) {
						got[m]++
					}
				}
				return false
			})
			for _, m := range ms {
				want := 1
				if i == j {
					want = 0
				}
				if got[m] != want {
					t.Errorf("container %d hears a frame of container %d to several %d times, want %d", j+1, i+1, got[m], want)
				}
			}
		}
	}
}

// TestMesh: three ordinary users' nodes are one network: everybody reaches everybody, over IPv4 and IPv6, by unicast and broadcast, and each node keeps its gateway to itself.
func TestMesh(t *testing.T) {
	testbed.Leaks(t)
	for _, wire := range []string{"vxlan", "patchbay"} {
		t.Run(wire, func(t *testing.T) {
			m := newMesh(t, 3)
			m.network("lab", 42, "--wire", wire)
			var cs []*container
			for i, h := range m.hosts {
				cs = append(cs, h.run("lab", fmt.Sprintf("c%d", i+1), "--", testbed.Tool(t, "iperf3"), "-s"))
			}
			mtu := map[string]int{"vxlan": 1450, "patchbay": 1434}[wire]
			for i, c := range cs {
				if want := netip.MustParsePrefix(fmt.Sprintf("10.9.0.%d/26", 64*(i+1))); !want.Contains(c.ip4) {
					t.Errorf("container %d has %s, want one of %s", i+1, c.ip4, want)
				}
				if out := c.text("ip", "link", "show", "eth0"); !strings.Contains(out, fmt.Sprintf("mtu %d ", mtu)) {
					t.Errorf("MTU: %s, want %d", out, mtu)
				}
				c.mustPing(netip.MustParseAddr("10.9.0.1"))
				for j, o := range cs {
					if i == j {
						continue
					}
					c.mustPing(o.ip4)
					c.mustPing(o.ip6)
					c.mustPing(o.ip4, "-M", "do", "-s", fmt.Sprint(mtu-28))
					if out, err := c.exec("iperf3", "-c", o.ip4.String(), "-n", "4M", "--connect-timeout", "5000").CombinedOutput(); err != nil {
						t.Errorf("TCP from container %d to %d: %v: %s", i+1, j+1, err, out)
					}
				}
			}
			once(t, cs)
			for i, h := range m.hosts {
				nw := h.inspectNetwork("lab")
				// Nobody's but the own gateway has been heard of, and nobody was told to use another's.
				out := cs[i].text("ip", "neigh", "show", "10.9.0.1")
				if !strings.Contains(out, nw.GatewayMAC.String()) {
					t.Errorf("container %d knows the gateway as %s, want %s", i+1, out, nw.GatewayMAC)
				}
				for _, e := range h.fdb("lab") {
					for _, o := range m.hosts {
						if o != h && e.MAC == o.inspectNetwork("lab").GatewayMAC {
							t.Errorf("host %d has heard the gateway of another: %+v", i+1, e)
						}
					}
				}
				for _, p := range h.peers("lab") {
					if p.RTT <= 0 || p.State != api.PeerUp || p.RxFrames == 0 || p.TxFrames == 0 || p.MTU != mtu {
						t.Errorf("peer: %+v", p)
					}
				}
			}
			t.Logf("\n%s", m.hosts[0].do("peer", "ls"))
		})
	}
}

func (h *meshHost) inspectNetwork(name string) (nw api.Network) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.do("network", "inspect", name, "-o", "json")), &nw); err != nil {
		h.t.Fatal(err)
	}
	return nw
}

func (h *meshHost) fdb(name string) (es []api.FDBEntry) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.do("fdb", name, "-o", "json")), &es); err != nil {
		h.t.Fatal(err)
	}
	return es
}

// TestMeshNetworksAreApart: two networks with the same subnet and the same addresses never mix, and isolation holds across hosts.
func TestMeshNetworksAreApart(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	m.network("red", 1)
	m.six = true
	m.network("blue", 2)
	if nw := m.hosts[0].inspectNetwork("blue"); nw.MTU != 1430 {
		t.Errorf("MTU over IPv6: %d", nw.MTU)
	}
	m.network("apart", 3, "--isolate")
	busybox := testbed.Tool(t, "busybox")
	var red, blue, apart []*container
	for i, h := range m.hosts {
		ip := fmt.Sprintf("10.9.0.%d", 64*(i+1)+9)
		red = append(red, h.run("red", fmt.Sprintf("red%d", i+1), "--ip", ip))
		blue = append(blue, h.run("blue", fmt.Sprintf("blue%d", i+1), "--ip", ip, "--", busybox, "nc", "-ll", "-p", "7000", "-e", "echo", "blue"))
		apart = append(apart, h.run("apart", fmt.Sprintf("apart%d", i+1)))
	}
	red[0].mustPing(red[1].ip4)
	blue[0].mustPing(blue[1].ip4)
	// The same address is another container on each network.
	if out, err := blue[0].exec("busybox", "nc", "-w", "3", blue[1].ip4.String(), "7000").CombinedOutput(); err != nil || !strings.Contains(string(out), "blue") {
		t.Errorf("blue to blue: %v: %s", err, out)
	}
	if out, err := red[0].exec("busybox", "nc", "-w", "3", red[1].ip4.String(), "7000").CombinedOutput(); err == nil {
		t.Errorf("red reaches what listens on blue: %s", out)
	}
	hears := func(from *container, to *packets) bool {
		mk := newMark()
		f := make([]byte, wire.EthernetLen, 100)
		wire.PutEthernet(f, wire.Broadcast, from.mac, 0x88b6)
		s := from.packets("eth0")
		s.send(append(f, mk[:]...))
		return to.heard(700*time.Millisecond, mk)[mk]
	}
	if !hears(red[0], red[1].packets("eth0")) {
		t.Error("red does not hear red")
	}
	for _, c := range []*container{blue[0], blue[1], apart[0], apart[1]} {
		if hears(red[0], c.packets("eth0")) {
			t.Error("another network hears red")
		}
	}
	// Isolated ones reach their gateway, and nobody on the other host.
	apart[0].mustPing(netip.MustParseAddr("10.9.0.1"))
	if out, ok := apart[0].pings(apart[1].ip4); ok {
		t.Errorf("isolation has a way around by another host: %s", out)
	}
	if hears(apart[0], apart[1].packets("eth0")) {
		t.Error("an isolated container on another host hears a broadcast")
	}
}

// TestMeshRestart kills a node, and has others take it over, under a transfer to a container on another host: the connection goes on.
func TestMeshRestart(t *testing.T) {
	t.Run("vxlan", func(t *testing.T) {
		testbed.Leaks(t)
		m := newMesh(t, 3)
		m.network("lab", 42)
		m.restart()
	})
	t.Run("sealed", func(t *testing.T) {
		testbed.Leaks(t)
		m := newMeshOf(t, 3, certified(t, "lab"))
		m.network("lab", 42, "--seal", "--wire", "patchbay")
		m.restart()
	})
}

func (m *mesh) restart() {
	t := m.t
	t.Helper()
	iperf3 := testbed.Tool(t, "iperf3")
	srv := m.hosts[1].run("lab", "srv", "--", iperf3, "-s")
	third := m.hosts[2].run("lab", "third")
	load := func(name string, seconds int, meanwhile func()) {
		t.Helper()
		cli := m.hosts[0].background(name, "--network", "lab", "--", iperf3, "-c", srv.ip4.String(), "-t", fmt.Sprint(seconds), "-i", "0.1", "-J")
		time.Sleep(2 * time.Second)
		late := lateness()
		meanwhile()
		if err := <-cli.done; err != nil {
			t.Fatalf("the connection did not survive: %v: %s%s", err, cli.out, cli.stderr)
		}
		cli.done <- nil
		longest, last := gap(t, []byte(cli.out.String()))
		t.Logf("%s: longest time without a byte %.1f to %.1f s; %.0f MB in the last second", name, longest, longest+0.2, last/1e6) // whole tenths are seen
		if bound := 3 + 10*late().Seconds(); longest > bound || last == 0 {
			t.Errorf("%s: gap %.1f s, want at most %.1f", name, longest, bound)
		}
	}
	// handshakes are those of a host with another one.
	handshakes := func(h, with *meshHost) uint64 {
		for _, p := range h.peers("lab") {
			if p.Host == with.addr.String() {
				return p.Handshakes
			}
		}
		t.Errorf("%s is no peer", with.addr)
		return 0
	}
	sealed := m.hosts[0].peers("lab")[0].Sealed
	before := handshakes(m.hosts[0], m.hosts[1])
	load("kill", 8, func() {
		m.hosts[1].end(syscall.SIGKILL)
		m.hosts[1].start()
	})
	if after := handshakes(m.hosts[0], m.hosts[1]); sealed && after == before {
		t.Errorf("%d handshakes with a node before it was killed and after: keys that died with it are used", before)
	}
	for _, h := range m.hosts {
		h.waitPeers("lab", api.PeerUp, 2)
	}
	// The third node sees the others taken over: where it is sealed, their keys go along.
	ofThird := func() uint64 { return handshakes(m.hosts[2], m.hosts[0]) + handshakes(m.hosts[2], m.hosts[1]) }
	before = ofThird()
	load("takeover", 8, func() {
		for range 2 {
			m.hosts[1].takeOver()
			m.hosts[0].takeOver()
		}
	})
	for _, h := range m.hosts {
		h.waitPeers("lab", api.PeerUp, 2)
	}
	if after := ofThird(); after != before {
		t.Errorf("%d handshakes with the third node because of takeovers", after-before)
	} else {
		t.Logf("handshakes with the third node: %d before the takeovers and after them", before)
	}
	third.mustPing(srv.ip4)
}

// TestMeshHostDies: a host that dies is down within 5 s and what was learned of it forgotten; when its cable is plugged in again everything recovers by itself.
func TestMeshHostDies(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 3)
	m.network("lab", 42)
	var cs []*container
	for i, h := range m.hosts {
		cs = append(cs, h.run("lab", fmt.Sprintf("c%d", i+1)))
	}
	knows := func(h *meshHost, c *container) bool {
		for _, e := range h.fdb("lab") {
			if e.MAC == c.mac {
				return true
			}
		}
		return false
	}
	cable := func(state string) {
		t.Helper()
		if out, err := m.lan.Command(testbed.Tool(t, "ip"), "link", "set", m.hosts[2].port, state).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for round := range 2 {
		cs[0].mustPing(cs[2].ip4)
		cs[1].mustPing(cs[2].ip4)
		if !knows(m.hosts[0], cs[2]) {
			t.Error("nothing was learned")
		}
		late := lateness()
		cable("down")
		began := time.Now()
		down := testbed.Wait(20*time.Second, func() bool { return m.hosts[0].count("lab", api.PeerDown) == 1 })
		took := time.Since(began)
		for _, p := range m.hosts[0].peers("lab") {
			if p.State == api.PeerDown {
				took = p.Since.Sub(began) // without the time that the command takes
			}
		}
		t.Logf("round %d: down after %v", round+1, took.Round(10*time.Millisecond))
		if bound := 5*time.Second + 10*late(); !down || took > bound {
			t.Errorf("down after %v, want at most %v: %s", took, bound, m.hosts[0].do("peer", "ls"))
		}
		if knows(m.hosts[0], cs[2]) {
			t.Error("a MAC of a host that is down is still known")
		}
		cs[0].mustPing(cs[1].ip4) // the others do not notice
		cable("up")
		for _, h := range m.hosts {
			h.waitPeers("lab", api.PeerUp, 2)
		}
	}
	cs[2].mustPing(cs[0].ip4)
	// A daemon that is killed is as dead; the others need not be told when it is back.
	m.hosts[2].end(syscall.SIGKILL)
	m.hosts[0].waitPeers("lab", api.PeerDown, 1)
	m.hosts[2].start()
	m.hosts[0].waitPeers("lab", api.PeerUp, 2)
	if !testbed.Wait(20*time.Second, func() bool { _, ok := cs[0].pings(cs[2].ip4); return ok }) {
		t.Error("the container of a node that was killed is not reached again")
	}
}

// TestMeshKernelGroup: a kernel that sends broadcast to a multicast group and learns where to send the rest is a peer of a node that listens to the group.
func TestMeshKernelGroup(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	h, k := m.hosts[0], m.hosts[1]
	for _, c := range []struct {
		vni   int
		group string
		addr  netip.Addr
		mtu   int
	}{{42, "239.9.9.9", k.addr, 1450}, {43, "ff05::99", k.addr6, 1430}} {
		name, dev := fmt.Sprintf("lab%d", c.vni), fmt.Sprintf("vxlan%d", c.vni)
		h.do("network", "create", name, "--vni", fmt.Sprint(c.vni), "--subnet", fmt.Sprintf("10.%d.0.0/24", c.vni), "--group", c.group+"%eth0")
		h.do("peer", "add", name, c.addr.String())
		k.ip(t, "link", "add", dev, "type", "vxlan", "id", fmt.Sprint(c.vni), "dstport", "4789", "local", c.addr.String(), "group", c.group, "dev", "eth0")
		k.ip(t, "link", "set", dev, "up", "mtu", fmt.Sprint(c.mtu))
		k.ip(t, "addr", "add", fmt.Sprintf("10.%d.0.200/24", c.vni), "dev", dev)
		cont := h.run(name, "c1", "--", testbed.Tool(t, "iperf3"), "-s")
		// The kernel knows nobody: its question who has the address goes to the group.
		out, err := k.Command(testbed.Tool(t, "ping"), "-c", "3", "-i", "0.2", "-W", "3", cont.ip4.String()).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", c.group, err, out)
		}
		if out, err := k.Command(testbed.Tool(t, "iperf3"), "-c", cont.ip4.String(), "-n", "20M").CombinedOutput(); err != nil {
			t.Errorf("%s: TCP from the kernel: %v: %s", c.group, err, out)
		}
		h.takeOver()
		k.ip(t, "neigh", "flush", "dev", dev)
		k.ip(t, "link", "set", dev, "down")
		k.ip(t, "link", "set", dev, "up")
		if out, err := k.Command(testbed.Tool(t, "ping"), "-c", "3", "-i", "0.2", "-W", "3", cont.ip4.String()).CombinedOutput(); err != nil {
			t.Errorf("%s, after a takeover: %v: %s", c.group, err, out)
		}
		if g := h.inspectNetwork(name).Group; g != c.group+"%eth0" {
			t.Errorf("its group is said to be %q", g)
		}
	}
}

// TestMeshKernel: a host without a daemon, whose kernel has a vxlan device, is a peer as well.
//
//	[h1] daemon ── lan ── [h2] vxlan0 10.9.0.200
func TestMeshKernel(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	h, k := m.hosts[0], m.hosts[1]
	h.do("network", "create", "lab", "--vni", "42", "--subnet", "10.9.0.0/24", "--port", "8472")
	h.do("peer", "add", "lab", k.addr.String())
	k.ip(t, "link", "add", "vxlan0", "type", "vxlan", "id", "42", "dstport", "8472", "local", k.addr.String(), "remote", h.addr.String())
	k.ip(t, "link", "set", "vxlan0", "up")
	k.ip(t, "addr", "add", "10.9.0.200/24", "dev", "vxlan0")
	c := h.run("lab", "c1", "--", testbed.Tool(t, "iperf3"), "-s")
	other := netip.MustParseAddr("10.9.0.200")
	c.mustPing(other)
	c.mustPing(other, "-M", "do", "-s", "1422")
	if out, err := k.Command(testbed.Tool(t, "iperf3"), "-c", c.ip4.String(), "-n", "20M").CombinedOutput(); err != nil {
		t.Errorf("TCP from the kernel: %v: %s", err, out)
	}
	if out, err := k.Command(testbed.Tool(t, "iperf3"), "-c", c.ip4.String(), "-n", "20M", "-R").CombinedOutput(); err != nil {
		t.Errorf("TCP to the kernel: %v: %s", err, out)
	}
	h.waitPeers("lab", api.PeerHeard, 1)
	if p := h.peers("lab")[0]; p.RxFrames == 0 || p.Heard.IsZero() || p.MTU != 1450 {
		t.Errorf("peer: %+v", p)
	}

	// It cannot take over what is the local container's or the gateway's: such frames are dropped, and the addresses stay where they are.
	hostile := &packets{t: t, fd: -1}
	var err error
	k.Do(func() { err = hostile.open("vxlan0") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(hostile.fd) })
	gw := h.inspectNetwork("lab").GatewayMAC
	listener := c.packets("eth0")
	mk, honest := newMark(), newMark()
	for _, src := range []wire.MAC{c.mac, gw} {
		f := make([]byte, wire.EthernetLen, 100)
		wire.PutEthernet(f, wire.Broadcast, src, 0x88b6)
		hostile.send(append(f, mk[:]...))
	}
	f := make([]byte, wire.EthernetLen, 100)
	wire.PutEthernet(f, wire.Broadcast, wire.MAC{2, 0, 0, 0, 9, 9}, 0x88b6)
	hostile.send(append(f, honest[:]...))
	if got := listener.heard(2*time.Second, mk, honest); got[mk] || !got[honest] {
		t.Errorf("forged frames arrive: %v, honest ones: %v", got[mk], got[honest])
	}
	for _, e := range h.fdb("lab") {
		if e.MAC == c.mac && (e.Port != "c1" || !e.Static) || e.MAC == gw && e.Port != "gateway" {
			t.Errorf("taken over: %+v", e)
		}
	}
	if out := h.do("drops", "lab"); !strings.Contains(out, "spoof-mac") {
		t.Errorf("forged sources are not counted: %s", out)
	}
	c.mustPing(other)
	c.mustPing(netip.MustParseAddr("10.9.0.1"))
}

// TestMeshMTU: what is too long for a peer's path is answered by the gateway, over IPv4 and IPv6, TCP passes all the same, and when the path turns out smaller than its interfaces say, the
// network's MTU follows.
func TestMeshMTU(t *testing.T) {
	testbed.Leaks(t)
	m := newMesh(t, 2)
	m.network("fixed", 1, "--mtu", "1500")
	m.network("lab", 2)
	var fixed, lab []*container
	for i, h := range m.hosts {
		fixed = append(fixed, h.run("fixed", fmt.Sprintf("f%d", i+1), "--", testbed.Tool(t, "iperf3"), "-s"))
		lab = append(lab, h.run("lab", fmt.Sprintf("l%d", i+1)))
	}
	a, b := fixed[0], fixed[1]
	a.mustPing(b.ip4)
	for _, c := range []struct {
		to   netip.Addr
		size int
		says string
	}{{b.ip4, 1472, "mtu = 1450"}, {b.ip6, 1452, "mtu=1450"}} {
		out, ok := a.pings(c.to, "-M", "do", "-s", fmt.Sprint(c.size))
		if ok || !strings.Contains(out, "From 10.9.0.1") && !strings.Contains(out, "From fd09::1") || !strings.Contains(out, c.says) {
			t.Errorf("ping of %d bytes to %s is not told %q by the gateway: %s", c.size, c.to, c.says, out)
		}
		a.mustPing(c.to, "-s", fmt.Sprint(c.size)) // in fragments, now that the sender knows
	}
	if out, err := a.exec("iperf3", "-c", b.ip4.String(), "-n", "20M").CombinedOutput(); err != nil {
		t.Errorf("TCP: %v: %s", err, out)
	}
	if out := m.hosts[0].do("drops", "fixed"); !strings.Contains(out, "too-big") {
		t.Errorf("drops: %s", out)
	}
	// The Ethernet between the hosts carries less than their interfaces say, and nobody tells: that has to be found.
	for _, h := range m.hosts {
		if out, err := m.lan.Command(testbed.Tool(t, "ip"), "link", "set", h.port, "mtu", "1400").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	began := time.Now()
	mtu := 0
	if !testbed.Wait(90*time.Second, func() bool { mtu = m.hosts[0].inspectNetwork("lab").MTU; return mtu < 1450 }) || mtu > 1350 || mtu < 1300 {
		t.Errorf("MTU %d after the path became smaller, want 1350: %s", mtu, m.hosts[0].do("peer", "ls"))
	}
	t.Logf("MTU %d found after %v", mtu, time.Since(began).Round(time.Millisecond))
	out, ok := lab[0].pings(lab[1].ip4, "-M", "do", "-s", "1422")
	if ok || !strings.Contains(out, fmt.Sprintf("mtu = %d", mtu)) {
		t.Errorf("a container that was attached before is not told: %s", out)
	}
	late := m.hosts[0].run("lab", "late")
	if out := late.text("ip", "link", "show", "eth0"); !strings.Contains(out, fmt.Sprintf("mtu %d ", mtu)) {
		t.Errorf("a new container: %s, want MTU %d", out, mtu)
	}
}
