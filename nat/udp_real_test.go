package nat

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"patchbay/internal/testbed"
)

// Through TAP, switch and gateway: what the gateway takes apart and puts together for UDP and echo.
//
//	[c0] eth0 ── TAP ── switch ── gateway ── NAT ── [host] ext ───── eth0 [out]
func TestUDPThroughGateway(t *testing.T) {
	testbed.Leaks(t)
	n := newNetwork(t, 1, Config{})
	c, out := n.cs[0], testbed.NewExternal(t, "out")
	awaitLocal(t, c.NS, c.addr6)
	awaitLocal(t, out.NS, out.Addr6)
	awaitLocal(t, testbed.Host(t), out.HostAddr6)
	for _, v := range []struct {
		name            string
		c, out, gateway netip.Addr
		loopback        netip.Addr
	}{
		{"v4", c.addr4, out.Addr4, n.gw.Addr(4), netip.MustParseAddr("127.0.0.1")},
		{"v6", c.addr6, out.Addr6, n.gw.Addr(6), netip.IPv6Loopback()},
	} {
		t.Run(v.name, func(t *testing.T) {
			s := echoUDP(t, out.NS, v.out)
			k := bindUDP(t, c.NS, v.c, 0)
			k.SetReadBuffer(4 << 20)
			for _, size := range []int{0, 1, 1472, 1473, 9000, 65507} {
				ask(t, k, s.addr(), pattern(size))
			}
			if got, _ := c.Command(testbed.Tool(t, "ping"), "-n", "-c2", "-i0.1", "-W2", "-s", "8000", v.out.String()).CombinedOutput(); !strings.Contains(string(got), " 2 received") {
				t.Errorf("ping with 8000 bytes:\n%s", got)
			}

			// Published: a client on the host is the gateway with a port of its own, and the answer finds its way back through it.
			spec, _ := ParseSpec("5300:53/udp")
			p, err := n.Publish(spec, []netip.Addr{c.addr4, c.addr6})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			inner := echoUDP(t, c.NS, v.c, 53)
			local := bindUDP(t, testbed.Host(t), v.loopback, 0)
			ask(t, local, netip.AddrPortFrom(v.loopback, 5300), pattern(1000))
			if inner.peer().Addr() != v.gateway {
				t.Errorf("the container saw %v, want the gateway %v", inner.peer(), v.gateway)
			}
			far := bindUDP(t, out.NS, v.out, 0)
			far.SetReadBuffer(4 << 20)
			host := out.HostAddr4
			if v.out.Is6() {
				host = out.HostAddr6
			}
			ask(t, far, netip.AddrPortFrom(host, 5300), pattern(30000))
			if inner.peer() != addrOf(far) {
				t.Errorf("the container saw %v, want the client %v", inner.peer(), addrOf(far))
			}

			// Nobody at the gateway: told so.
			var g net.Conn
			c.Do(func() { g, err = net.Dial("udp", netip.AddrPortFrom(v.gateway, 9).String()) })
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			g.Write([]byte("x"))
			g.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, err := g.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("a port of the gateway that nobody serves: %v", err)
			}
		})
	}
}
