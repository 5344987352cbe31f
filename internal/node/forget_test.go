package node

import (
	"net/netip"
	"testing"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
	"patchbay/nat"
)

// TestNothingOutlivesItsContainer holds that, when Close has returned, nothing counts any more of what a container had on the host's side: connections, datagrams,
// pings, and clients of its published ports. Whoever gets its address next starts with nothing.
func TestNothingOutlivesItsContainer(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext, addr := outsideLoad(t)
	n := newNet(t, NetworkConfig{})
	b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "b", Publish: specs(t, "127.0.0.1:8081:81/udp")}})
	s, err := probe.Serve(t.Context(), ext, netip.AddrPortFrom(ext.Addr4, 9).String(), netip.AddrPortFrom(ext.Addr6, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b.do(ask{Probe: []string{":81"}})
	b.do(ask{Flows: &flows{Addr: addr, Open: 20, Rounds: 1, Size: 100}})
	for _, a := range []netip.Addr{ext.Addr4, ext.Addr6} {
		b.reach(probe.Attempt{Net: "ping", Addr: a.String()}, probe.Attempt{Net: "udp", Addr: netip.AddrPortFrom(a, 9).String()})
	}
	if o := probe.Try(probe.Attempt{Net: "udp", Addr: "127.0.0.1:8081"}); !o.OK() {
		t.Error(o)
	}
	if s := n.Status().NAT; s.TCPFlows != 20 || s.UDPFlows < 2 || s.PingFlows < 2 || s.UDPClients < 1 || s.PublishedPorts != 1 {
		t.Errorf("before: %+v", s)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	left := n.Status().NAT
	left.IdleEnded, left.UDPEvicted = 0, 0
	if left != (nat.Stats{}) {
		t.Errorf("after: %+v", left)
	}
}
