package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
	"patchbay/internal/wire"
)

// quiet is how long nothing must come until it is believed that nothing will.
const quiet = time.Second

// Two networks that are alike in everything exchange nothing.
//
//	[la] ┐                     ┌ [ra]   the same addresses, the same MACs
//	     left ── daemon ── right
//	[lb] ┘                     └ [rb]
func TestNetworksAreApart(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemonWithLogin(t)
	type end struct {
		station
		*packets
		*space
	}
	ends := map[string]end{}
	for _, network := range []string{"left", "right"} {
		d.do("network", "create", network, "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
		for _, name := range []string{"a", "b"} {
			s, at := d.newAttached(network, name)
			ends[network+name] = end{station: stationOf(at), space: s, packets: s.packets("eth0")}
		}
	}
	if ends["lefta"].station != ends["righta"].station || ends["leftb"].station != ends["rightb"].station {
		t.Fatalf("the networks are not alike: %+v %+v", ends["lefta"].station, ends["righta"].station)
	}
	for _, from := range []string{"left", "right"} {
		other := map[string]string{"left": "right", "right": "left"}[from]
		a, b := ends[from+"a"], ends[from+"b"]
		frames := honest(a.station, b.station)
		for _, f := range frames {
			a.send(f.data)
		}
		got := b.heard(5*time.Second, marksOf(frames)...)
		for _, f := range frames {
			if !got[f.mark] {
				t.Errorf("%s: the neighbor does not hear: %s", from, f.what)
			}
		}
		for _, name := range []string{other + "a", other + "b"} {
			for m := range ends[name].heard(quiet, marksOf(frames)...) {
				for _, f := range frames {
					if f.mark == m {
						t.Errorf("%s hears from %s: %s", name, from, f.what)
					}
				}
			}
		}
	}
	// The same with the kernels' own: a server on one network's address is not the other's.
	ends["leftb"].serve(":7")
	bin := probe.Binary(t)
	addr := net.JoinHostPort(ends["leftb"].ip4.String(), "7")
	if o := ends["lefta"].try(bin, probe.Attempt{Net: "tcp", Addr: addr})[0]; !o.OK() {
		t.Error(o)
	}
	if o := ends["righta"].try(bin, probe.Attempt{Net: "tcp", Addr: addr})[0]; o.Err != "ECONNREFUSED" {
		t.Errorf("%v: want the other server's absence", o)
	}
}

// On an isolated network containers reach the gateway and what is behind it, and each other by no means.
//
//	[a] ┐
//	    shy ── daemon ── [host] ── eth0 [external: server on 7]
//	[b] ┘ server on 7
func TestIsolate(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext := testbed.NewExternal(t, "external")
	serve(t, ext, net.JoinHostPort(ext.Addr4.String(), "7"), net.JoinHostPort(ext.Addr6.String(), "7"))
	d := startDaemonWithLogin(t)
	d.do("network", "create", "shy", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64", "--isolate")
	sa, aa := d.newAttached("shy", "a")
	sb, ab := d.newAttached("shy", "b")
	a, b := stationOf(aa), stationOf(ab)
	sb.serve(":7")
	pa, pb := sa.packets("eth0"), sb.packets("eth0")
	bin := probe.Binary(t)

	before := d.drops("shy")["isolated"]
	frames := honest(a, b)
	for _, f := range frames {
		pa.send(f.data)
	}
	// Through the gateway is no way round.
	nw, err := d.client().Network(t.Context(), "shy")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []crafted{
		craft("IPv4 by way of the gateway", nw.GatewayMAC, a.mac, wire.EtherTypeIPv4, udpPacket(a.ip4, b.ip4, 4000, 7)),
		craft("IPv6 by way of the gateway", nw.GatewayMAC, a.mac, wire.EtherTypeIPv6, udpPacket(a.ip6, b.ip6, 4000, 7)),
	} {
		pa.send(f.data)
		frames = append(frames, f)
	}
	got := pb.heard(quiet, marksOf(frames)...)
	for _, f := range frames {
		if got[f.mark] {
			t.Errorf("b hears: %s", f.what)
		}
	}
	if after := d.drops("shy")["isolated"]; after == before {
		t.Error("nothing is counted as isolated")
	}
	// The datagrams by way of the gateway carry no mark when they come out, so the server's silence is what counts: with the gateway as neighbor.
	for _, to := range []netip.Addr{b.ip4, b.ip6} {
		sa.do("ip", "neigh", "replace", to.String(), "lladdr", nw.GatewayMAC.String(), "dev", "eth0", "nud", "permanent")
	}
	for _, to := range []netip.Addr{b.ip4, b.ip6} {
		for _, o := range sa.try(bin, probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(to.String(), "7")}, probe.Attempt{Net: "udp", Addr: net.JoinHostPort(to.String(), "7")}, probe.Attempt{Net: "ping", Addr: to.String()}) {
			if o.OK() {
				t.Errorf("by way of the gateway: %v", o)
			}
		}
	}
	for _, o := range sa.try(bin,
		probe.Attempt{Net: "ping", Addr: nw.Gateways[0].String()}, probe.Attempt{Net: "ping", Addr: nw.Gateways[1].String()},
		probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(ext.Addr4.String(), "7")}, probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(ext.Addr6.String(), "7")},
		probe.Attempt{Net: "udp", Addr: net.JoinHostPort(ext.Addr4.String(), "7")}, probe.Attempt{Net: "ping", Addr: ext.Addr4.String()}) {
		if !o.OK() {
			t.Errorf("isolated, but the gateway and the world are open: %v", o)
		}
	}
	if got := sa.do("dig", "+short", "+timeout=5", "@"+nw.Gateways[0].String(), "b"); strings.TrimSpace(got) != b.ip4.String() {
		t.Errorf("b is %q", got)
	}
}

// An internal network has names and addresses and no way out, even for who makes itself a route.
//
//	[a], [b] ── vault ── daemon ── [host] ── eth0 [external: server on 7]
func TestInternal(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext := testbed.NewExternal(t, "external")
	serve(t, ext, net.JoinHostPort(ext.Addr4.String(), "7"), net.JoinHostPort(ext.Addr6.String(), "7"))
	d := startDaemonWithLogin(t)
	d.do("network", "create", "vault", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64", "--internal")
	sa, _ := d.newAttached("vault", "a")
	sb, ab := d.newAttached("vault", "b", "--alias", "store")
	b := stationOf(ab)
	sb.serve(":7")
	bin := probe.Binary(t)
	if r := sa.do("ip", "route", "show", "default") + sa.do("ip", "-6", "route", "show", "default"); r != "" {
		t.Errorf("an internal network gave a default route: %s", r)
	}
	for _, o := range sa.try(bin, probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(b.ip4.String(), "7")}, probe.Attempt{Net: "udp", Addr: net.JoinHostPort(b.ip6.String(), "7")}, probe.Attempt{Net: "ping", Addr: b.ip6.String()}) {
		if !o.OK() {
			t.Errorf("inside: %v", o)
		}
	}
	sa.do("ip", "route", "add", "default", "via", "10.66.0.1")
	sa.do("ip", "-6", "route", "add", "default", "via", "fd66::1")
	for _, o := range sa.try(bin,
		probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(ext.Addr4.String(), "7")}, probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(ext.Addr6.String(), "7")},
		probe.Attempt{Net: "udp", Addr: net.JoinHostPort(ext.Addr4.String(), "7")}, probe.Attempt{Net: "udp", Addr: net.JoinHostPort(ext.Addr6.String(), "7")},
		probe.Attempt{Net: "ping", Addr: ext.Addr4.String()}, probe.Attempt{Net: "ping", Addr: ext.Addr6.String()},
		probe.Attempt{Net: "tcp", Addr: net.JoinHostPort(ext.HostAddr4.String(), "7")}, probe.Attempt{Net: "ping", Addr: ext.HostAddr4.String()}) {
		if o.OK() {
			t.Errorf("an internal network, yet: %v", o)
		}
	}
	if n := d.drops("vault")["policy-internal"]; n == 0 {
		t.Error("nothing is counted as policy-internal")
	}
	for _, name := range []string{"b", "store"} {
		if got := sa.do("dig", "+short", "+timeout=5", "@10.66.0.1", name); strings.TrimSpace(got) != b.ip4.String() {
			t.Errorf("%s is %q", name, got)
		}
	}
	if got := sa.do("dig", "+timeout=5", "@10.66.0.1", "example.test"); !strings.Contains(got, "status: REFUSED") && !strings.Contains(got, "status: NXDOMAIN") {
		t.Errorf("an outside name: %s", got)
	}
	d.refused([]string{"publish", "add", "b", "8080:7"}, "internal")
	d.refused([]string{"attach", "vault", "--pid", fmt.Sprint(sa.pid), "-p", "8080:7"}, "internal")
	d.refused([]string{"run", "--network", "vault", "-p", "8080:7", "--", "true"}, "internal")
}
