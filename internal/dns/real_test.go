package dns

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/stack"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// world is a container with a real kernel, and the resolver on a real gateway; the resolvers of the host are those of upstreamServer.
//
//	[container] eth0 10.88.0.2 fd00:1::2 ── tap ── switch ── gateway 10.88.0.1 fd00:1::1 ── Server ── [host] upstream on lo
type world struct {
	*testbed.NS
	s     *Server
	drops *frame.DropCounters
}

type latePackets struct{ stack.PacketHandler }
type lateTCP struct{ stack.TCPHandler }

func newWorld(t *testing.T, c Config) *world {
	t.Helper()
	testbed.RequireTUN(t)
	w := &world{NS: testbed.NewNS(t, "container"), drops: new(frame.DropCounters)}
	udp, tcp := new(latePackets), new(lateTCP)
	gw, err := stack.New(stack.Config{
		MAC:      wire.MAC{2, 0, 0x5e, 0, 0, 1},
		Addrs:    []netip.Prefix{netip.PrefixFrom(gw4, 24), netip.PrefixFrom(gw6, 64)},
		Handlers: stack.Handlers{TCP: tcp, LocalUDP: map[uint16]stack.PacketHandler{Port: udp}},
		Drops:    w.drops,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Network, c.Drops = gw, w.drops
	w.s, _ = newServer(t, c)
	w.s.SetZone(testZone)
	udp.PacketHandler, tcp.TCPHandler = w.s, w.s
	sw := vswitch.New(vswitch.Config{})
	gwPort, err := sw.AddPort(gw, vswitch.PortConfig{Name: "gateway"})
	if err != nil {
		t.Fatal(err)
	}
	gw.Connect(func() frame.Sink { return sw.Ingress(gwPort) })
	var h *tap.Handle
	w.Do(func() {
		if h, err = tap.Open(tap.OpenConfig{Name: "eth0"}); err != nil {
			return
		}
		_, err = h.Configure(tap.IfConfig{
			Name:   "eth0",
			Addrs:  []netip.Prefix{netip.PrefixFrom(client4.Addr(), 24), netip.PrefixFrom(client6.Addr(), 64)},
			Routes: []tap.Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: gw4}},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		t.Fatal(err)
	}
	port, err := sw.AddPort(d, vswitch.PortConfig{Name: "container", MAC: h.MAC})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- d.Serve(context.Background(), 0, sw.Ingress(port)) }()
	t.Cleanup(func() {
		w.s.Close()
		sw.RemovePort(port)
		d.Close()
		<-served
		sw.RemovePort(gwPort)
		gw.Close()
	})
	return w
}

// run is what a program prints in the container.
func (w *world) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := w.Command(testbed.Tool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestDig asks with the real tool, over UDP and TCP, IPv4 and IPv6.
func TestDig(t *testing.T) {
	upBig := upstreamServer(t, "127.0.0.1", big(15))
	w := newWorld(t, Config{Upstreams: []netip.AddrPort{upBig}})
	for _, c := range []struct {
		args string
		want string
	}{
		{"@10.88.0.1 web A +short", "10.88.0.2"},
		{"@10.88.0.1 web.mynet AAAA +short", "fd00:1::2"},
		{"@fd00:1::1 web.mynet.patchbay.internal A +short", "10.88.0.2"},
		{"@fd00:1::1 gateway.patchbay.internal AAAA +short +tcp", "fd00:1::1"},
		{"@10.88.0.1 host.patchbay.internal A +short +tcp", "10.88.0.254"},
		{"@10.88.0.1 -x 10.88.0.2 +short", "web.mynet.patchbay.internal."},
		{"@10.88.0.1 -x fd00:1::2 +short", "web.mynet.patchbay.internal."},
		{"@10.88.0.1 nobody.mynet.patchbay.internal A", "status: NXDOMAIN"},
		{"@10.88.0.1 db AAAA", "status: NOERROR"},
		{"@10.88.0.1 example.com TXT +ignore +bufsize=1232", "flags: qr tc"},
		{"@10.88.0.1 example.com TXT +ignore +noedns", "flags: qr tc"},
		{"@10.88.0.1 example.com TXT", "ANSWER: 15"}, // TC, then TCP
		{"@fd00:1::1 example.com TXT", "ANSWER: 15"},
		{"@10.88.0.1 example.com TXT +tcp", "ANSWER: 15"},
		{"@10.88.0.1 version.bind CH TXT", "status: REFUSED"},
		{"@10.88.0.1 web AXFR", "Transfer failed"},
	} {
		if out := w.run(t, "dig", append(strings.Fields(c.args), "+tries=1", "+time=5")...); !strings.Contains(out, c.want) ||
			strings.Contains(c.args, "+short") && out != c.want {
			t.Errorf("dig %s: want %q, got\n%s", c.args, c.want, out)
		}
	}
	for _, d := range []frame.Drop{frame.DropMalformed, frame.DropChecksum, frame.DropServiceLimit, frame.DropUnresolved} {
		if n := w.drops.Get(d); n != 0 {
			t.Errorf("%d packets were dropped: %s", n, d)
		}
	}
}

// TestLibc resolves as programs do, with the resolv.conf that containers get: glibc's getaddrinfo, and busybox' own resolver.
func TestLibc(t *testing.T) {
	up := upstreamServer(t, "127.0.0.1", big(15))
	w := newWorld(t, Config{Upstreams: []netip.AddrPort{up}})
	testbed.BindFile(t, "/etc/resolv.conf", string(ContainerResolvConf(HostConf{Search: []string{"corp.example"}}, "mynet", gw4, gw6)))
	for _, c := range []struct{ name, want string }{
		{"web", "10.88.0.2"},
		{"web.mynet", "10.88.0.2"},
		{"db", "10.88.0.3"},
		{"six", "fd00:1::4"},
		{"host.patchbay.internal", "10.88.0.254"},
	} {
		if out := w.run(t, "getent", "ahosts", c.name); !strings.HasPrefix(out, c.want) && !strings.Contains(out, "\n"+c.want) {
			t.Errorf("getent ahosts %s: want %s, got\n%s", c.name, c.want, out)
		}
	}
	if out := w.run(t, "busybox", "nslookup", "web.mynet"); !strings.Contains(out, "10.88.0.2") || !strings.Contains(out, "fd00:1::2") {
		t.Errorf("busybox nslookup: %s", out)
	}
}

// TestDeadResolverFromTheContainer: the container waits for the delay of the dead resolver once or twice, and never for a timeout.
func TestDeadResolverFromTheContainer(t *testing.T) {
	w := newWorld(t, Config{Upstreams: []netip.AddrPort{deadUpstream(t), upstreamServer(t, "::1", says("alive", 0))}})
	start := time.Now()
	for range 5 {
		if out := w.run(t, "dig", "@10.88.0.1", "example.com", "TXT", "+short", "+tries=1", "+time=5"); out != `"alive"` {
			t.Errorf("got %s", out)
		}
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("five queries took %v", d)
	}
}

// TestFileChangeFromTheContainer changes the host's file between two queries. Its resolvers listen where the file can name them: on
// port 53 of the namespace that plays the host.
func TestFileChangeFromTheContainer(t *testing.T) {
	testbed.Require(t)
	path := filepath.Join(t.TempDir(), "resolv.conf")
	for _, a := range []string{"127.0.0.53", "127.0.0.54"} {
		stubResolver(t, a)
	}
	write := func(a string) {
		if err := os.WriteFile(path, []byte("nameserver "+a+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("127.0.0.53")
	w := newWorld(t, Config{ResolvConf: path, CheckEvery: time.Millisecond})
	for _, a := range []string{"127.0.0.53", "127.0.0.54", "127.0.0.53"} {
		write(a)
		time.Sleep(20 * time.Millisecond) // longer than CheckEvery, and than the file system's clock is coarse
		if out := w.run(t, "dig", "@10.88.0.1", "example.com", "TXT", "+short", "+tries=1", "+time=5"); out != `"`+a+`"` {
			t.Errorf("with nameserver %s, got %s", a, out)
		}
	}
}
