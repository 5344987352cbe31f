package nat

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/stack"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

// network is a whole container network: TAPs in namespaces, the switch, the gateway, and the NAT under test in the namespace that plays the host.
//
//	[c0] eth0 ── tap ┐
//	                 switch ── gateway ── NAT ── [host]
//	[c1] eth0 ── tap ┘
type network struct {
	*NAT
	gw *stack.Gateway
	sw *vswitch.Switch
	cs []*peer

	port vswitch.PortID // of gw
	stop func()         // ends NAT and gateway
}

var own4, own6 = netip.MustParseAddr("10.88.0.1"), netip.MustParseAddr("fd00:88::1")

// peer is a container.
type peer struct {
	*testbed.NS
	addr4, addr6 netip.Addr
}

// late lets the gateway, which wants its handlers, be made before the NAT, which wants the gateway.
type late struct{ n *NAT }

func (l *late) HandleTCP(r stack.TCPRequest) { l.n.HandleTCP(r) }

func newNetwork(t testing.TB, containers int, cfg Config) *network {
	t.Helper()
	testbed.RequireTUN(t)
	nw := &network{sw: vswitch.New(vswitch.Config{})}
	nw.addGateway(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	for i := range containers {
		c := &peer{NS: testbed.NewNS(t, fmt.Sprintf("c%d", i))}
		c.addr4 = netip.AddrFrom4([4]byte{10, 88, 0, byte(10 + i)})
		c.addr6 = netip.MustParseAddr(fmt.Sprintf("fd00:88::%x", 0x10+i))
		var h *tap.Handle
		var err error
		c.Do(func() {
			if h, err = tap.Open(tap.OpenConfig{Name: "eth0"}); err != nil {
				return
			}
			_, err = h.Configure(tap.IfConfig{
				Name:   "eth0",
				Addrs:  []netip.Prefix{netip.PrefixFrom(c.addr4, 16), netip.PrefixFrom(c.addr6, 64)},
				Routes: []tap.Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: own4}, {Dst: netip.MustParsePrefix("::/0"), Via: own6}},
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		d, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
		if err != nil {
			t.Fatal(err)
		}
		id, err := nw.sw.AddPort(d, vswitch.PortConfig{Name: fmt.Sprintf("c%d", i), MAC: h.MAC})
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- d.Serve(ctx, 0, nw.sw.Ingress(id)) }()
		t.Cleanup(func() {
			nw.sw.RemovePort(id)
			d.Close()
			<-served
		})
		nw.cs = append(nw.cs, c)
	}
	return nw
}

// addGateway puts a gateway with a NAT on the network.
func (nw *network) addGateway(t testing.TB, cfg Config) {
	t.Helper()
	l := new(late)
	udp, icmp := new(latePackets), new(latePackets)
	gw, err := stack.New(stack.Config{
		MAC:         wire.MAC{2, 0, 0x5e, 0, 0, 1},
		Addrs:       []netip.Prefix{netip.PrefixFrom(own4, 16), netip.PrefixFrom(own6, 64)},
		HostAliases: []netip.Addr{netip.MustParseAddr("10.88.0.2"), netip.MustParseAddr("fd00:88::2")},
		Handlers:    stack.Handlers{TCP: l, UDP: udp, ICMP: icmp},
		Drops:       new(frame.DropCounters),
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Network, cfg.Subnets = gw, []netip.Prefix{netip.MustParsePrefix("10.88.0.0/16"), netip.MustParsePrefix("fd00:88::/64")}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.n, udp.h, icmp.h = n, n.UDP(), n.ICMP()
	gw.DelayACKs(n.Later)
	port, err := nw.sw.AddPort(gw, vswitch.PortConfig{Name: "gateway"})
	if err != nil {
		t.Fatal(err)
	}
	gw.Connect(func() frame.Sink { return nw.sw.Ingress(port) })
	done := make(chan error, 1)
	go func() { done <- n.Run(context.Background()) }()
	nw.NAT, nw.gw, nw.port = n, gw, port
	stop := sync.OnceFunc(func() {
		n.Close()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if s := n.Stats(); s.held() != 0 {
			t.Errorf("after Close: %+v", s)
		}
		nw.sw.RemovePort(port)
		gw.Close()
	})
	nw.stop = stop
	t.Cleanup(stop)
}

// crash ends gateway and NAT as a kill does: the containers hear nothing of it. The journal stays as it is.
func (nw *network) crash(j *Journal) {
	nw.sw.RemovePort(nw.port)
	j.Freeze()
	nw.stop()
	j.Close()
}

type latePackets struct{ h stack.PacketHandler }

func (l *latePackets) HandlePackets(ps []stack.Packet) { l.h.HandlePackets(ps) }

// dial connects from a container.
func (p *peer) dial(t testing.TB, to string) *net.TCPConn {
	t.Helper()
	c, err := p.tryDial(to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (p *peer) tryDial(to string) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := p.DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}
