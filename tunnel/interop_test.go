package tunnel

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/tunnel/vxlan"
)

// kernelVXLAN makes a vxlan device of the kernel's in ns and gives it addresses.
func kernelVXLAN(t testing.TB, ns *testbed.NS, vni int, args []string, addrs ...string) {
	t.Helper()
	args = append([]string{"link", "add", "vx0", "address", "02:00:00:00:00:fe", "type", "vxlan", "id", fmt.Sprint(vni)}, args...)
	if out, err := ns.Command(testbed.Tool(t, "ip"), args...).CombinedOutput(); err != nil {
		testbed.Lacking(t, "no vxlan device: ip %v: %s", args, out)
	}
	testbed.Up(t, ns, "vx0")
	for _, a := range addrs {
		testbed.AddAddrs(t, ns, "vx0", netip.MustParsePrefix(a))
	}
}

// A container of ours talks to a kernel's vxlan device:
//
//	[c1] eth0 ── TAP ── switch ── VTEP [a] ── underlay ── [b] vx0
func TestKernelPeer(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		remote string // of the kernel; ours ends in 1
		port   int
		mtu    int
		csum   string
		wire   bool // the kernel finishes its packets, as for a network card that can do nothing
	}{
		{"10.9.0.2", vxlan.Port, 1500, "udpcsum", true},
		{"10.9.0.2", vxlan.Port, 1500, "udpcsum", false},
		{"10.9.0.2", vxlan.Port, 1500, "noudpcsum", true},
		{"10.9.0.2", vxlan.Port, 1500, "noudpcsum", false},
		{"10.9.0.2", vxlan.LinuxPort, 9000, "udpcsum", true},
		{"10.9.0.2", vxlan.LinuxPort, 9000, "udpcsum", false},
		{"fd09::2", vxlan.Port, 9000, "udpcsum", true},
		{"fd09::2", vxlan.LinuxPort, 1500, "udpcsum", true},
		{"fd09::2", vxlan.LinuxPort, 1500, "udpcsum", false},
	} {
		t.Run(fmt.Sprintf("%s port %d MTU %d %s wire %v", c.remote, c.port, c.mtu, c.csum, c.wire), func(t *testing.T) {
			a, b := underlay(t, c.mtu)
			if c.wire {
				run(t, b, "ethtool", "-K", "eth0", "tx", "off")
				run(t, a, "ethtool", "-K", "eth0", "gro", "on") // which veths leave to the sender otherwise
			}
			remote := netip.AddrPortFrom(netip.MustParseAddr(c.remote), uint16(c.port))
			ours := c.remote[:len(c.remote)-1] + "1"
			v := newVTEP(t, a, Config{Listen: netip.AddrPortFrom(netip.MustParseAddr(ours), uint16(c.port))})
			n := newNetwork(v, 4242)
			p := n.peer(t, PeerConfig{Remote: remote})
			mtu, err := p.MTU()
			if err != nil || mtu != c.mtu-map[bool]int{true: 50, false: 70}[remote.Addr().Is4()] {
				t.Fatalf("inner MTU %d, %v", mtu, err)
			}
			kernelVXLAN(t, b, 4242, []string{"local", c.remote, "remote", ours, "dstport", fmt.Sprint(c.port), c.csum}, "10.1.0.2/24", "fd01::2/64")
			run(t, b, "ip", "link", "set", "vx0", "mtu", fmt.Sprint(mtu))
			c1 := n.container(t, 1, mtu, "10.1.0.1/24", "fd01::1/64")
			for _, to := range []string{"10.1.0.", "fd01::"} {
				ping(t, c1, to+"2")
				ping(t, b, to+"1")
				full := fmt.Sprint(mtu - map[bool]int{true: 28, false: 48}[to == "10.1.0."])
				ping(t, c1, to+"2", "-M", "do", "-s", full)
				ping(t, b, to+"1", "-M", "do", "-s", full)
				transfer(t, c1, b, to+"2", 4<<20)
				transfer(t, b, c1, to+"1", 4<<20)
			}
			clean(t, []*frame.DropCounters{v.Drops(), p.Drops()}, a, b, c1)
			// The counts have room for acknowledgements, and for a busy machine.
			st := p.Stats()
			if 2*st.Sent.Datagrams < 3*st.Sent.Messages {
				t.Errorf("%d datagrams went out in %d messages: the kernel cuts too few", st.Sent.Datagrams, st.Sent.Messages)
			}
			rs := v.Socket()
			if c.wire && c.csum == "udpcsum" && 2*rs.Datagrams < 3*rs.Messages {
				t.Errorf("%d datagrams came in %d messages: the kernel joins too few", rs.Datagrams, rs.Messages)
			}
			if !c.wire && rs.Bytes < 3000*rs.Messages {
				t.Errorf("%d bytes came in %d messages: were the kernel's superframes cut?", rs.Bytes, rs.Messages)
			}
			if st.Heard.IsZero() || st.RxFrames == 0 || st.TxFrames == 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A kernel that sends broadcast to a multicast group: we hear it as members of the group, and answer by unicast. The kernel speaks first.
func TestKernelMulticastPeer(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct{ group, remote string }{{"239.9.9.9", "10.9.0.2"}, {"ff05::99", "fd09::2"}} {
		t.Run(c.group, func(t *testing.T) {
			a, b := underlay(t, 1500)
			v := newVTEP(t, a, Config{})
			index := 0
			a.Do(func() {
				l, err := net.InterfaceByName("eth0")
				if err != nil {
					t.Fatal(err)
				}
				index = l.Index
			})
			if err := v.Join(netip.MustParseAddr(c.group), index); err != nil {
				t.Fatal(err)
			}
			n := newNetwork(v, 7)
			p := n.peer(t, PeerConfig{Remote: netip.AddrPortFrom(netip.MustParseAddr(c.remote), 0)})
			kernelVXLAN(t, b, 7, []string{"local", c.remote, "group", c.group, "dev", "eth0", "dstport", "4789"}, "10.1.0.2/24")
			c1 := n.container(t, 1, 1430, "10.1.0.1/24")
			run(t, b, "ip", "link", "set", "vx0", "mtu", "1430")
			ping(t, b, "10.1.0.1")
			ping(t, c1, "10.1.0.2")
			transfer(t, c1, b, "10.1.0.2", 1<<20)
			transfer(t, b, c1, "10.1.0.1", 1<<20)
			if n := p.Drops().Total(); n != 0 {
				t.Errorf("%d drops", n)
			}
		})
	}
}

// Flannel's way: each host has a subnet of its own, reached by a route, a static neighbour and a static FDB entry, and never by broadcast.
//
//	[c1] 10.244.1.2/24 ── TAP ── switch ── VTEP [a] ── underlay ── [b] flannel.1 10.244.2.0/32, cni0 10.244.2.1/24
//
// The container itself plays the router of 10.244.1.0/24 here.
func TestFlannelPeer(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	v := newVTEP(t, a, Config{Listen: netip.MustParseAddrPort("10.9.0.1:8472")})
	n := newNetwork(v, 1)
	p := n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:8472")})
	kernelVXLAN(t, b, 1, []string{"local", "10.9.0.2", "dstport", "8472", "nolearning"}, "10.244.2.0/32")
	run(t, b, "ip", "link", "add", "cni0", "type", "bridge")
	run(t, b, "ip", "addr", "add", "10.244.2.1/24", "dev", "cni0")
	run(t, b, "ip", "link", "set", "cni0", "up")
	c1 := n.container(t, 1, 1450, "10.244.1.0/32", "10.244.1.2/32")
	// What flanneld would write of each other.
	run(t, b, "ip", "route", "add", "10.244.1.0/24", "via", "10.244.1.0", "dev", "vx0", "onlink")
	run(t, b, "ip", "neigh", "add", "10.244.1.0", "lladdr", "02:00:00:00:00:01", "dev", "vx0", "nud", "permanent")
	run(t, b, "bridge", "fdb", "append", "02:00:00:00:00:01", "dev", "vx0", "dst", "10.9.0.1")
	run(t, c1, "ip", "route", "add", "10.244.2.0/24", "via", "10.244.2.0", "dev", "eth0", "onlink", "src", "10.244.1.2")
	run(t, c1, "ip", "neigh", "add", "10.244.2.0", "lladdr", "02:00:00:00:00:fe", "dev", "eth0", "nud", "permanent")
	ping(t, c1, "10.244.2.1")
	ping(t, b, "10.244.1.2", "-I", "10.244.2.1")
	transfer(t, c1, b, "10.244.2.1", 1<<20)
	transfer(t, b, c1, "10.244.1.2", 1<<20)
	clean(t, []*frame.DropCounters{v.Drops(), p.Drops()}, a, b)
}
