package testbed

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var extCount atomic.Int64

// External is a machine somewhere out there: a namespace joined to the host by a veth pair, with addresses of both versions and its
// default routes by way of the host.
//
//	[host] hostLink ───────── eth0 [NS]
//	  HostAddr4, HostAddr6      Addr4, Addr6
type External struct {
	*NS
	HostLink             string // the host's end
	Addr4, Addr6         netip.Addr
	HostAddr4, HostAddr6 netip.Addr
}

// NewExternal makes an external machine for the host namespace. Each has a /24 out of 198.18.0.0/15 and a /64 out of 2001:db8::/32.
func NewExternal(t testing.TB, name ...string) *External {
	t.Helper()
	host := Host(t)
	i := int(extCount.Add(1)) % 250
	e := &External{
		NS:        NewNS(t, name...),
		HostLink:  fmt.Sprintf("ext%d", i),
		HostAddr4: netip.AddrFrom4([4]byte{198, 18, byte(i), 1}),
		Addr4:     netip.AddrFrom4([4]byte{198, 18, byte(i), 2}),
		HostAddr6: netip.MustParseAddr(fmt.Sprintf("2001:db8:%x::1", i)),
		Addr6:     netip.MustParseAddr(fmt.Sprintf("2001:db8:%x::2", i)),
	}
	Veth(t, host, e.HostLink, e.NS, "eth0")
	AddAddrs(t, host, e.HostLink, netip.PrefixFrom(e.HostAddr4, 24), netip.PrefixFrom(e.HostAddr6, 64))
	AddAddrs(t, e.NS, "eth0", netip.PrefixFrom(e.Addr4, 24), netip.PrefixFrom(e.Addr6, 64))
	DefaultVia(t, e.NS, e.HostAddr4)
	DefaultVia(t, e.NS, e.HostAddr6)
	return e
}

// Uplink makes the external machine the host's default gateway for both versions, until the test ends.
func (e *External) Uplink(t testing.TB) {
	t.Helper()
	host := Host(t)
	DefaultVia(t, host, e.Addr4)
	DefaultVia(t, host, e.Addr6)
}

// Veth joins two namespaces with a pair of devices, both up. They go away when the test or one of the namespaces ends.
func Veth(t testing.TB, a *NS, aName string, b *NS, bName string) {
	t.Helper()
	a.Do(func() {
		la := netlink.NewLinkAttrs()
		la.Name = aName
		v := &netlink.Veth{LinkAttrs: la, PeerName: bName, PeerNamespace: netlink.NsFd(b.fd)}
		if err := netlink.LinkAdd(v); err != nil {
			t.Fatalf("veth %s in %s - %s in %s: %v", aName, a.Name, bName, b.Name, err)
		}
	})
	t.Cleanup(func() { a.Do(func() { delLink(aName) }) })
	Up(t, a, aName)
	Up(t, b, bName)
}

// Bridge makes a bridge in n with the given links as its ports, up, without multicast snooping or spanning tree.
func Bridge(t testing.TB, n *NS, name string, ports ...string) {
	t.Helper()
	n.Do(func() {
		la := netlink.NewLinkAttrs()
		la.Name = name
		off := false
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la, MulticastSnooping: &off}); err != nil {
			t.Fatalf("bridge %s in %s: %v", name, n.Name, err)
		}
		br := mustLink(t, n, name)
		for _, p := range ports {
			if err := netlink.LinkSetMaster(mustLink(t, n, p), br); err != nil {
				t.Fatalf("bridge %s in %s: port %s: %v", name, n.Name, p, err)
			}
		}
	})
	t.Cleanup(func() { n.Do(func() { delLink(name) }) })
	Up(t, n, name)
}

// Up brings a link of n up.
func Up(t testing.TB, n *NS, link string) {
	t.Helper()
	n.Do(func() {
		if err := netlink.LinkSetUp(mustLink(t, n, link)); err != nil {
			t.Fatalf("%s in %s: %v", link, n.Name, err)
		}
	})
}

// AddAddrs gives a link of n addresses that can be used at once: there is no duplicate address detection.
func AddAddrs(t testing.TB, n *NS, link string, addrs ...netip.Prefix) {
	t.Helper()
	n.Do(func() {
		l := mustLink(t, n, link)
		for _, p := range addrs {
			a := &netlink.Addr{IPNet: ipNet(p)}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				t.Fatalf("address %s on %s in %s: %v", p, link, n.Name, err)
			}
		}
	})
}

// DefaultVia gives n a default route of via's version, until the test ends.
func DefaultVia(t testing.TB, n *NS, via netip.Addr) {
	t.Helper()
	AddRoute(t, n, netip.PrefixFrom(netip.AddrFrom4([4]byte{}), 0), via)
}

// AddRoute gives n a route to dst by way of via, until the test ends. The prefix 0.0.0.0/0 means the default route of via's version.
func AddRoute(t testing.TB, n *NS, dst netip.Prefix, via netip.Addr) {
	t.Helper()
	if dst.Bits() == 0 && via.Is6() {
		dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	r := &netlink.Route{Dst: ipNet(dst), Gw: via.AsSlice()}
	n.Do(func() {
		if err := netlink.RouteAdd(r); err != nil {
			t.Fatalf("route %s via %s in %s: %v", dst, via, n.Name, err)
		}
	})
	t.Cleanup(func() { n.Do(func() { _ = netlink.RouteDel(r) }) })
}

// Sysctl writes a value below /proc/sys, in n for those that belong to a network namespace. It is put back when the test ends.
func Sysctl(t testing.TB, n *NS, name, value string) {
	t.Helper()
	file := "/proc/sys/" + name
	n.Do(func() {
		old, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, []byte(value), 0)
		}
		if err != nil {
			t.Fatalf("sysctl in %s: %v", n.Name, err)
		}
		t.Cleanup(func() { n.Do(func() { _ = os.WriteFile(file, old, 0) }) })
	})
}

func mustLink(t testing.TB, n *NS, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("link %s in %s: %v", name, n.Name, err)
	}
	return l
}

func delLink(name string) {
	if l, err := netlink.LinkByName(name); err == nil {
		_ = netlink.LinkDel(l)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
