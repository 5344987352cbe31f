package dns

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/stack"

	"github.com/miekg/dns"
)

func TestForward(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		var seen atomic.Pointer[dns.Msg]
		up := upstreamServer(t, host, func(w dns.ResponseWriter, q *dns.Msg) {
			seen.Store(q.Copy())
			m := new(dns.Msg).SetReply(q)
			m.AuthenticatedData = true
			m.Answer = []dns.RR{must(dns.NewRR("example.com. 60 IN A 192.0.2.7"))}
			m.SetEdns0(4096, true)
			_ = w.WriteMsg(m)
		})
		s, n := newServer(t, Config{Upstreams: []netip.AddrPort{up}})
		q := query("example.com", dns.TypeA)
		q.SetEdns0(1300, true)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"},
			&dns.EDNS0_LOCAL{Code: 65100, Data: []byte("as it is")})
		q.CheckingDisabled = true
		m := ask(t, s, n, q)
		if summary(m) != "NOERROR 192.0.2.7" || !m.AuthenticatedData || m.IsEdns0() == nil {
			t.Errorf("%s: got %v", host, m)
		}
		got := seen.Load()
		if got.Id == q.Id {
			t.Error("the container's id was used outside: it is to be a random one (may be chance, once in 65536)")
		}
		got.Id = q.Id
		if got.String() != q.String() {
			t.Errorf("%s: the resolver was asked\n%v\nwant\n%v", host, got, q)
		}
		if st := s.Stats(); st.Forwarded != 1 || st.Failed != 0 || st.Local != 0 {
			t.Errorf("stats %+v", st)
		}
	}
}

func TestNXDomainIsPassedOn(t *testing.T) {
	up := upstreamServer(t, "127.0.0.1", fails(dns.RcodeNameError))
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{up, upstreamServer(t, "127.0.0.1", says("second", 0))}})
	if m := ask(t, s, n, query("nope.example.com", dns.TypeTXT)); summary(m) != "NXDOMAIN" {
		t.Errorf("got %v", m)
	}
}

// TestUpstreams: whatever is the matter with some resolvers, the one that works answers, and in time.
func TestUpstreams(t *testing.T) {
	good := upstreamServer(t, "127.0.0.1", says("good", 0))
	good6 := upstreamServer(t, "::1", says("good6", 0))
	slow := upstreamServer(t, "127.0.0.1", says("slow", 700*time.Millisecond))
	dead := deadUpstream(t)
	servfail := upstreamServer(t, "127.0.0.1", fails(dns.RcodeServerFailure))
	refused := upstreamServer(t, "127.0.0.1", fails(dns.RcodeRefused))
	closed := ap("127.0.0.1:1")
	const delay = 100 * time.Millisecond
	for _, c := range []struct {
		what     string
		ups      []netip.AddrPort
		want     string
		min, max time.Duration
	}{
		{"good first", []netip.AddrPort{good, dead}, "NOERROR good", 0, delay},
		{"dead, good", []netip.AddrPort{dead, good}, "NOERROR good", delay, 5 * delay},
		{"dead, dead, good over IPv6", []netip.AddrPort{dead, deadUpstream(t), good6}, "NOERROR good6", 2 * delay, 7 * delay},
		{"closed, good", []netip.AddrPort{closed, good}, "NOERROR good", 0, delay},
		{"SERVFAIL, good", []netip.AddrPort{servfail, good}, "NOERROR good", 0, delay},
		{"REFUSED, good", []netip.AddrPort{refused, good}, "NOERROR good", 0, delay},
		{"slow, good", []netip.AddrPort{slow, good}, "NOERROR good", delay, 5 * delay},
		{"slow alone", []netip.AddrPort{slow}, "NOERROR slow", 500 * time.Millisecond, 2 * time.Second},
		{"slow, dead", []netip.AddrPort{slow, dead}, "NOERROR slow", 500 * time.Millisecond, 2 * time.Second},
		{"closed", []netip.AddrPort{closed}, "SERVFAIL", 0, delay},
		{"REFUSED, closed", []netip.AddrPort{refused, closed}, "REFUSED", 0, delay},
		{"dead", []netip.AddrPort{dead}, "SERVFAIL", time.Second, 3 * time.Second},
	} {
		t.Run(c.what, func(t *testing.T) {
			s, n := newServer(t, Config{Upstreams: c.ups, Delay: delay, Timeout: time.Second})
			q := query("example.com", dns.TypeTXT)
			q.SetEdns0(1232, false)
			start := time.Now()
			m := ask(t, s, n, q)
			d := time.Since(start)
			if summary(m) != c.want {
				t.Errorf("got %v, want %s", m, c.want)
			}
			if d < c.min || d > c.max+2*time.Second { // the machine may be busy; the upper bounds are for a hang
				t.Errorf("took %v, want %v to %v", d, c.min, c.max)
			}
			if c.want == "SERVFAIL" {
				if opt := m.IsEdns0(); opt == nil || len(opt.Option) != 1 || opt.Option[0].Option() != dns.EDNS0EDE {
					t.Errorf("SERVFAIL without its reason: %v", m)
				}
			}
		})
	}
}

// TestDeadUpstreamIsAskedLast: after a few queries a dead resolver costs nothing.
func TestDeadUpstreamIsAskedLast(t *testing.T) {
	dead := deadUpstream(t)
	good := upstreamServer(t, "127.0.0.1", says("good", 0))
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{dead, good}, Delay: 50 * time.Millisecond})
	for range missesAllowed {
		ask(t, s, n, query("example.com", dns.TypeTXT))
	}
	if got := s.ups.get()[0].addr; got != good {
		t.Errorf("%s is first in line, want %s", got, good)
	}
	if got := (*s.ups.cur.Load())[0]; got.isLate(time.Now().Add(lateFor)) {
		t.Error("the dead one does not get another chance")
	}
}

// TestForgedAnswers: what does not fit the question is passed over, and the right answer still counts.
func TestForgedAnswers(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 4096)
		for {
			k, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if q.Unpack(buf[:k]) != nil {
				continue
			}
			forge := func(edit func(*dns.Msg), text string) {
				m := new(dns.Msg).SetReply(q)
				m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{text}}}
				edit(m)
				_, _ = pc.WriteTo(must(m.Pack()), from)
			}
			forge(func(m *dns.Msg) { m.Id++ }, "wrong id")
			forge(func(m *dns.Msg) { m.Question[0].Name = "evil.example.org." }, "wrong name")
			q.Question[0].Name = "example.com."
			forge(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA }, "wrong type")
			q.Question[0].Qtype = dns.TypeTXT
			forge(func(m *dns.Msg) { m.Response = false }, "no answer")
			_, _ = pc.WriteTo([]byte("garbage"), from)
			forge(func(*dns.Msg) {}, "right")
		}
	}()
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{pc.LocalAddr().(*net.UDPAddr).AddrPort()}})
	if m := ask(t, s, n, query("example.com", dns.TypeTXT)); summary(m) != "NOERROR right" {
		t.Errorf("got %v", m)
	}
}

// TestLostQueryIsSentAgain: one lost datagram costs a retransmission, not the query.
func TestLostQueryIsSentAgain(t *testing.T) {
	var asked atomic.Int32
	up := upstreamServer(t, "127.0.0.1", func(w dns.ResponseWriter, q *dns.Msg) {
		if asked.Add(1) > 1 {
			says("second time", 0)(w, q)
		}
	})
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{up}})
	start := time.Now()
	if m := ask(t, s, n, query("example.com", dns.TypeTXT)); summary(m) != "NOERROR second time" || time.Since(start) < retransmit {
		t.Errorf("after %v: %v", time.Since(start), m)
	}
}

// big answers with k TXT records of 200 bytes.
func big(k int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		for range k {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{strings.Repeat("x", 200)}})
		}
		if opt := q.IsEdns0(); opt != nil {
			m.SetEdns0(4096, false)
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			size := dns.MinMsgSize
			if opt := q.IsEdns0(); opt != nil {
				size = int(opt.UDPSize())
			}
			m.Truncate(size)
		}
		_ = w.WriteMsg(m)
	}
}

// TestTruncation: an answer that is too long for the resolver, the client or the network comes back with TC set, and by TCP it comes whole.
func TestTruncation(t *testing.T) {
	up := upstreamServer(t, "127.0.0.1", big(15)) // about 3,200 bytes
	for _, c := range []struct {
		what  string
		mtu   int
		edns  uint16
		limit int
	}{
		{"no EDNS0", 1500, 0, 512},
		{"1232", 1500, 1232, 1232},
		{"4096 at MTU 1500", 1500, 4096, 1472},
		{"4096 at MTU 9000", 9000, 4096, 4096},
	} {
		t.Run(c.what, func(t *testing.T) {
			n := newNetwork()
			n.mtu = c.mtu
			s, _ := newServer(t, Config{Upstreams: []netip.AddrPort{up}, Network: n})
			q := query("big.example.com", dns.TypeTXT)
			if c.edns > 0 {
				q.SetEdns0(c.edns, false)
			}
			s.HandlePackets([]stack.Packet{packet(t, client4, netip.AddrPortFrom(gw4, 53), must(q.Pack()))})
			_, _, data := datagram(t, <-n.sent)
			m := new(dns.Msg)
			if err := m.Unpack(data); err != nil {
				t.Fatal(err)
			}
			if whole := c.limit == 4096; len(data) > c.limit || m.Truncated == whole || whole && len(m.Answer) != 15 || (m.IsEdns0() != nil) != (c.edns > 0) {
				t.Errorf("%d bytes, TC %v, %d answers", len(data), m.Truncated, len(m.Answer))
			}
			if m := askTCP(t, s, q); m.Truncated || len(m.Answer) != 15 {
				t.Errorf("by TCP: TC %v, %d answers", m.Truncated, len(m.Answer))
			}
		})
	}
}

func askTCP(t testing.TB, s *Server, q *dns.Msg) *dns.Msg {
	t.Helper()
	client, server := tcpPair(t)
	go s.ServeTCP(server)
	co := &dns.Conn{Conn: client}
	_ = client.SetDeadline(time.Now().Add(20 * time.Second))
	if err := co.WriteMsg(q); err != nil {
		t.Fatal(err)
	}
	m, err := co.ReadMsg()
	if err != nil {
		t.Fatal(err)
	}
	if m.Id != q.Id {
		t.Errorf("id %d, want %d", m.Id, q.Id)
	}
	return m
}

// TestOversizedUDPAnswer: a resolver that sends more than was asked for does no harm.
func TestOversizedUDPAnswer(t *testing.T) {
	up := upstreamServer(t, "127.0.0.1", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		for range 100 {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 200)}})
		}
		_ = w.WriteMsg(m)
	})
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{up}})
	if m := ask(t, s, n, query("example.com", dns.TypeTXT)); !m.Truncated || len(m.Answer) != 0 {
		t.Errorf("TC %v, %d answers", m.Truncated, len(m.Answer))
	}
}

func TestTCP(t *testing.T) {
	slow := upstreamServer(t, "127.0.0.1", func(w dns.ResponseWriter, q *dns.Msg) {
		if strings.HasPrefix(q.Question[0].Name, "slow.") {
			time.Sleep(300 * time.Millisecond)
		}
		says(q.Question[0].Name, 0)(w, q)
	})
	s, _ := newServer(t, Config{Upstreams: []netip.AddrPort{ap("127.0.0.1:1"), slow}, ConnIdle: time.Second})
	s.SetZone(testZone)
	client, server := tcpPair(t)
	go s.ServeTCP(server)
	co := &dns.Conn{Conn: client}
	_ = client.SetDeadline(time.Now().Add(10 * time.Second))
	// Three queries at once: the slow one does not hold up the others.
	for i, q := range []*dns.Msg{query("slow.example.com", dns.TypeTXT), query("fast.example.com", dns.TypeTXT), query("web", dns.TypeA)} {
		q.Id = uint16(i + 1)
		if err := co.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
	}
	var order []uint16
	for range 3 {
		m, err := co.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if m.Rcode != dns.RcodeSuccess {
			t.Errorf("got %v", m)
		}
		order = append(order, m.Id)
	}
	if order[2] != 1 {
		t.Errorf("answers came in the order %v: the slow one (1) should be last", order)
	}
	// And then the connection is closed for being idle.
	start := time.Now()
	if _, err := co.ReadMsg(); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	waitFor(t, func() bool { return s.Stats().Conns == 0 })
}

func TestTCPGarbageEndsTheConnection(t *testing.T) {
	s, _ := newServer(t, Config{})
	for _, b := range [][]byte{{0, 0}, {0, 3, 1, 2, 3}, append([]byte{0, 12}, make([]byte, 2)...), []byte("GET / HTTP/1.0\r\n\r\n")} {
		client, server := tcpPair(t)
		go s.ServeTCP(server)
		_, _ = client.Write(b)
		_ = client.(*net.TCPConn).CloseWrite()
		_ = client.SetReadDeadline(time.Now().Add(5 * time.Second))
		for buf := make([]byte, 512); ; {
			if _, err := client.Read(buf); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%q: the connection stayed open", b)
				}
				break
			}
		}
	}
	waitFor(t, func() bool { return s.Stats().Conns == 0 })
}

func TestLimits(t *testing.T) {
	drops := new(frame.DropCounters)
	dead := deadUpstream(t)
	s, _ := newServer(t, Config{Network: discard{}, Upstreams: []netip.AddrPort{dead}, MaxQueries: 10, MaxClientQueries: 6, MaxConns: 3, MaxClientConns: 2, Drops: drops})
	s.SetZone(testZone)
	b := must(query("example.com", dns.TypeA).Pack())
	send := func(from string, k int) {
		for range k {
			s.HandlePackets([]stack.Packet{packet(t, ap(from), netip.AddrPortFrom(gw4, 53), b)})
		}
	}
	send("10.88.0.2:1000", 8)
	if got, w := drops.Get(frame.DropServiceLimit), s.Stats().Waiting; got != 2 || w != 6 {
		t.Errorf("one client: %d dropped, %d waiting; want 2, 6", got, w)
	}
	send("10.88.0.3:1000", 6)
	if got, w := drops.Get(frame.DropServiceLimit), s.Stats().Waiting; got != 4 || w != 10 {
		t.Errorf("two clients: %d dropped, %d waiting; want 4, 10", got, w)
	}
	// Names of containers are answered all the same.
	if v := s.judge(netip.Addr{}, must(query("web", dns.TypeA).Pack())); v.answer == nil {
		t.Error("a local name waits")
	}
	// TCP says so.
	q := query("example.com", dns.TypeA)
	q.SetEdns0(1232, false)
	if m := askTCP(t, s, q); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %v", m)
	}
	waitFor(t, func() bool { return s.Stats().Conns <= 1 })
	before := drops.Get(frame.DropServiceLimit)
	var held []net.Conn
	for range 3 { // all from 127.0.0.1
		c, srv := tcpPair(t)
		go s.ServeTCP(srv)
		held = append(held, c)
	}
	waitFor(t, func() bool { return drops.Get(frame.DropServiceLimit) > before })
	_ = held
}

// TestResolvConfIsFollowed: the file is changed in each way editors and daemons do it, and the next query goes to the new resolver.
func TestResolvConfIsFollowed(t *testing.T) {
	a, b := upstreamServer(t, "127.0.0.1", says("a", 0)), upstreamServer(t, "127.0.0.1", says("b", 0))
	lo := upstreamServer(t, "127.0.0.1", says("libc's default", 0))
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 192.0.2.1\n")
	s, n := newServer(t, Config{ResolvConf: path, CheckEvery: time.Nanosecond,
		Dial: dialVia(map[string]netip.AddrPort{"192.0.2.1:53": a, "[2001:db8::2]:53": b, "127.0.0.1:53": lo})})
	expect := func(want string) {
		t.Helper()
		if m := ask(t, s, n, query("example.com", dns.TypeTXT)); summary(m) != "NOERROR "+want {
			t.Errorf("got %s, want %s", summary(m), want)
		}
	}
	expect("a")
	write("# changed in place\nnameserver 2001:db8::2\n")
	expect("b")
	tmp := filepath.Join(dir, "tmp") // replaced by rename, with the same size and time
	if err := os.WriteFile(tmp, []byte("# changed in placE\nnameserver 192.0.2.1   \n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
	expect("a")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	expect("a") // being replaced
	write("")
	expect("a") // being written
	write("# nobody\nsearch example.com\n")
	expect("libc's default")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	stub := filepath.Join(dir, "stub")
	if err := os.WriteFile(stub, []byte("nameserver 2001:db8::2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(stub, path); err != nil {
		t.Fatal(err)
	}
	expect("b")
}

func TestNoResolvConf(t *testing.T) {
	lo := upstreamServer(t, "127.0.0.1", says("libc's default", 0))
	s, n := newServer(t, Config{ResolvConf: filepath.Join(t.TempDir(), "none"), Dial: dialVia(map[string]netip.AddrPort{"127.0.0.1:53": lo})})
	if m := ask(t, s, n, query("example.com", dns.TypeTXT)); summary(m) != "NOERROR libc's default" {
		t.Errorf("got %s", summary(m))
	}
}

func TestParseResolvConf(t *testing.T) {
	h, err := ParseResolvConf(strings.NewReader(`# a comment
; another
nameserver 192.0.2.1
nameserver	2001:db8::1   # trailing
nameserver bogus
nameserver
nameserver fe80::1%eth0
nameserver 192.0.2.4
domain old.example
search corp.example. lab.example .
options ndots:2 timeout:1 rotate
options edns0 trust-ad
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := h.Servers; len(got) != 3 || got[0] != ap("192.0.2.1:53") || got[1] != ap("[2001:db8::1]:53") || got[2] != ap("[fe80::1%eth0]:53") {
		t.Errorf("servers %v", got)
	}
	if got := strings.Join(h.Search, " "); got != "corp.example lab.example" {
		t.Errorf("search %q", got)
	}
	if got := strings.Join(h.Options, " "); got != "ndots:2 timeout:1 rotate edns0 trust-ad" {
		t.Errorf("options %q", got)
	}
	got := string(ContainerResolvConf(h, "mynet", gw4, netip.Addr{}, gw6))
	want := `# Written by patchbay: the resolver is the network's gateway, which asks the host's resolvers.
nameserver 10.88.0.1
nameserver fd00:1::1
search mynet.patchbay.internal corp.example lab.example
options ndots:2 timeout:1 edns0 trust-ad
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	h.Search = []string{strings.Repeat("a.", 60) + "example", strings.Repeat("b.", 60) + "example", "short"}
	if got := string(ContainerResolvConf(h, "mynet", gw4)); strings.Contains(got, "b.b.") {
		t.Errorf("a search list longer than musl heeds:\n%s", got)
	}
}

func TestUpstreamRefusedBySyscall(t *testing.T) {
	// A closed port answers with ICMP, which the connected socket reports: no waiting.
	s, n := newServer(t, Config{Upstreams: []netip.AddrPort{ap("127.0.0.1:1")}, Timeout: 10 * time.Second})
	start := time.Now()
	if m := ask(t, s, n, query("example.com", dns.TypeA)); m.Rcode != dns.RcodeServerFailure || time.Since(start) > 3*time.Second {
		t.Errorf("after %v: %v (%v)", time.Since(start), m, syscall.ECONNREFUSED)
	}
}
