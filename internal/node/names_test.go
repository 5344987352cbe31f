package node

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// resolver is a DNS server on the host, at port 53 of addr. It answers every TXT question with text, and big. ones with 15 records of 200 bytes.
func resolver(t *testing.T, addr, text string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", net.JoinHostPort(addr, "53"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(addr, "53"))
	if err != nil {
		t.Fatal(err)
	}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		hdr := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}
		if strings.HasPrefix(q.Question[0].Name, "big.") {
			for range 15 {
				m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{strings.Repeat("x", 200)}})
			}
		} else {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{text}})
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			size := dns.MinMsgSize
			if opt := q.IsEdns0(); opt != nil {
				size = int(opt.UDPSize())
			}
			m.Truncate(size)
		}
		_ = w.WriteMsg(m) // the client that is gone asks no more
	})
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		ready, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
}

// TestNames has containers find each other, the gateway and the host by name, and names outside through the host's resolvers.
func TestNames(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	resolver(t, "127.0.0.53", "first")
	resolver(t, "127.0.0.54", "second")
	file := testbed.BindFile(t, "/etc/resolv.conf", "nameserver 127.0.0.53\nsearch corp.example\n")
	n := newNet(t, NetworkConfig{Name: "lan", HostLoopback: true})
	a, b := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "Alpha"}}), newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "beta"}})
	b.do(ask{Probe: []string{":7"}})
	l, err := probe.Serve(t.Context(), nil, "127.0.0.1:7007", "[::1]:7007")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	// Each sees itself and the other, by libc's resolver and with its own address.
	for _, c := range []struct{ net, addr, from string }{
		{"tcp4", "beta:7", a.addrs[0].String()}, {"tcp6", "beta:7", a.addrs[1].String()}, {"udp4", "beta.lan:7", a.addrs[0].String()},
		{"tcp6", "beta.lan.patchbay.internal:7", a.addrs[1].String()}, {"ping", "beta", ""}, {"ping", "BETA.lan", ""}, {"ping", "alpha", ""},
		{"ping", "gateway.patchbay.internal", ""}, {"tcp4", "host.patchbay.internal:7007", "127.0.0.1"}, {"tcp6", "host.patchbay.internal:7007", "::1"},
	} {
		for _, o := range a.reach(probe.Attempt{Net: c.net, Addr: c.addr}) {
			if host, _, _ := net.SplitHostPort(o.Said); c.from != "" && host != c.from && host != "::ffff:"+c.from {
				t.Errorf("%v: want it to be seen as %s", o, c.from)
			}
		}
	}
	gw4, gw6 := addrOf(n.gwAddrs, 4), addrOf(n.gwAddrs, 6)
	dig := func(args string) string {
		t.Helper()
		return a.run(append([]string{testbed.Tool(t, "dig"), "+tries=1", "+time=5"}, strings.Fields(args)...)...)
	}
	type digs []struct{ args, want string }
	check := func(ds digs) {
		t.Helper()
		for _, d := range ds {
			if out := dig(d.args); out != d.want && (strings.Contains(d.args, "+short") || !strings.Contains(out, d.want)) {
				t.Errorf("dig %s: %q, want %q", d.args, out, d.want)
			}
		}
	}
	check(digs{
		{"beta.lan A +short", b.addrs[0].String()},
		{"beta.lan AAAA +short +tcp", b.addrs[1].String()},
		{fmt.Sprintf("@%s alpha A +short", gw6), a.addrs[0].String()},
		{"gateway.patchbay.internal A +short", gw4.String()},
		{"gateway.patchbay.internal AAAA +short", gw6.String()},
		{fmt.Sprintf("-x %s +short", b.addrs[0]), "beta.lan.patchbay.internal."},
		{fmt.Sprintf("-x %s +short +tcp", b.addrs[1]), "beta.lan.patchbay.internal."},
		{fmt.Sprintf("-x %s +short", gw4), "gateway.patchbay.internal."},
		{"nobody.lan.patchbay.internal A", "status: NXDOMAIN"},
		{"www.example.com TXT +short", `"first"`},
		{"www.example.com TXT +short +tcp", `"first"`},
		{"big.example.com TXT +ignore +bufsize=1232", "flags: qr tc"},
		{"big.example.com TXT", "ANSWER: 15"}, // TC, then TCP
		{"big.example.com TXT +bufsize=4096", "ANSWER: 15"},
		{"big.example.com TXT +tcp", "ANSWER: 15"},
	})
	if out := a.run("cat", "/etc/resolv.conf"); !strings.Contains(out, "search lan.patchbay.internal corp.example") || !strings.Contains(out, "nameserver "+gw4.String()) {
		t.Errorf("resolv.conf: %s", out)
	}
	if out := a.run("hostname"); out != "alpha" && out != "Alpha" {
		t.Errorf("host name %q", out)
	}

	// The host moves to another network.
	if err := os.WriteFile(file, []byte("nameserver 127.0.0.54\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if !testbed.Wait(5*time.Second, func() bool { return dig("www.example.com TXT +short") == `"second"` }) {
		t.Error("the host's new resolver is not asked")
	}

	// A name goes with its container, and its address with it.
	gone := b.addrs[0]
	b.end()
	check(digs{
		{"beta.lan.patchbay.internal A", "status: NXDOMAIN"},
		{fmt.Sprintf("-x %s", gone), "status: NXDOMAIN"},
	})
	// Another one may have the name, and is found at once.
	b2 := newBox(t, n, ContainerConfig{AttachConfig: AttachConfig{Name: "beta"}})
	if slices.Equal(b2.addrs, b.addrs) {
		t.Log("the new container got the old one's addresses")
	}
	check(digs{{"beta.lan A +short", b2.addrs[0].String()}})
}

// TestConfiguredResolver holds that NetworkConfig.DNS is asked instead of the host's.
func TestConfiguredResolver(t *testing.T) {
	testbed.Leaks(t)
	resolver(t, "127.0.0.53", "the host's")
	resolver(t, "127.0.0.99", "the network's")
	testbed.BindFile(t, "/etc/resolv.conf", "nameserver 127.0.0.53\n")
	n := newNet(t, NetworkConfig{DNS: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.99:53")}})
	a := newBox(t, n, ContainerConfig{})
	if out := a.run(testbed.Tool(t, "dig"), "+tries=1", "www.example.com", "TXT", "+short"); out != `"the network's"` {
		t.Errorf("got %s", out)
	}
}
