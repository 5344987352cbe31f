package stack

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

var (
	gwMAC  = wire.MAC{0x02, 0x5e, 0x10, 0, 0, 1}
	gw4    = netip.MustParseAddr("10.88.0.1")
	gw6    = netip.MustParseAddr("fd00:88::1")
	alias4 = netip.MustParseAddr("10.88.255.254")
	alias6 = netip.MustParseAddr("fd00:88::fffe")
	con4   = netip.MustParseAddr("10.88.0.2")
	con6   = netip.MustParseAddr("fd00:88::2")
	far4   = netip.MustParseAddr("192.0.2.7") // an address of the world, for tests that answer themselves
	far6   = netip.MustParseAddr("2001:db8::7")
)

func testConfig() Config {
	return Config{
		MAC:         gwMAC,
		Addrs:       []netip.Prefix{netip.PrefixFrom(gw4, 16), netip.PrefixFrom(gw6, 64)},
		HostAliases: []netip.Addr{alias4, alias6},
	}
}

// world is a gateway with one container, a real kernel behind a TAP, and no switch between them.
//
//	[container] eth0 10.88.0.2 fd00:88::2 ── tap.Device ── Gateway 10.88.0.1 fd00:88::1
type world struct {
	*testbed.NS
	gw  *Gateway
	dev *tap.Device
}

// toGateway is the sink of the TAP's reader.
type toGateway struct{ gw *Gateway }

func (s toGateway) Forward(fs []frame.Frame) { s.gw.Transmit(fs) }

// toDevice is the sink of the gateway.
type toDevice struct{ dev *tap.Device }

func (s toDevice) Forward(fs []frame.Frame) { s.dev.Transmit(fs) }

func newWorld(t testing.TB, cfg Config, open tap.OpenConfig) *world {
	t.Helper()
	return newWireWorld(t, cfg, open, func(s frame.Sink) frame.Sink { return s })
}

// newWireWorld is newWorld with a wire of the test's on either way: wire wraps the sinks of both ends.
func newWireWorld(t testing.TB, cfg Config, open tap.OpenConfig, wire func(frame.Sink) frame.Sink) *world {
	t.Helper()
	testbed.RequireTUN(t)
	w := &world{NS: testbed.NewNS(t, "container")}
	var h *tap.Handle
	var err error
	open.Name = "eth0"
	w.Do(func() {
		if h, err = tap.Open(open); err == nil {
			_, err = h.Configure(tap.IfConfig{
				MTU:   cfg.MTU,
				Addrs: []netip.Prefix{netip.PrefixFrom(con4, 16), netip.PrefixFrom(con6, 64)},
				Routes: []tap.Route{
					{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: gw4},
					{Dst: netip.MustParsePrefix("::/0"), Via: gw6},
				},
			})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// The kernel takes an IPv6 address into its routes a little later, and until then drops what comes for it, such as our answer to its first
	// neighbour solicitation.
	testbed.Eventually(t, patience, func() bool {
		var b []byte
		w.Do(func() { b, _ = os.ReadFile("/proc/thread-self/net/ipv6_route") })
		return strings.Contains(string(b), "fd000088000000000000000000000002 80")
	})
	if w.dev, err = tap.New(tap.Config{Info: h.Info, FDs: h.FDs}); err != nil {
		t.Fatal(err)
	}
	if w.gw, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	w.gw.Connect(func() frame.Sink { return wire(toDevice{w.dev}) })
	var wg sync.WaitGroup
	for q := range w.dev.Queues() {
		wg.Go(func() {
			if err := w.dev.Serve(context.Background(), q, wire(toGateway{w.gw})); err != nil && !errors.Is(err, tap.ErrGone) {
				t.Errorf("serve: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		w.dev.Close()
		wg.Wait()
		w.gw.Close()
	})
	return w
}

// tcpFunc is a TCPHandler.
type tcpFunc func(TCPRequest)

func (f tcpFunc) HandleTCP(r TCPRequest) { f(r) }

// accepting runs serve on every connection.
func accepting(serve func(Conn)) TCPHandler {
	return tcpFunc(func(r TCPRequest) {
		go func() {
			c, err := r.Accept()
			if err != nil {
				return
			}
			serve(c)
		}()
	})
}
