package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
	"patchbay/stack"

	"github.com/miekg/dns"
)

func ip(s string) netip.Addr     { return netip.MustParseAddr(s) }
func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
func addrs(ss ...string) (as []netip.Addr) {
	for _, s := range ss {
		as = append(as, ip(s))
	}
	return as
}

var (
	gw4, gw6 = ip("10.88.0.1"), ip("fd00:1::1")
	client4  = ap("10.88.0.2:40000")
	client6  = ap("[fd00:1::2]:40000")
	testZone = &Zone{
		Network: "mynet",
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.88.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Hosts: []Host{
			{Name: "web", Addrs: addrs("10.88.0.2", "fd00:1::2"), Aliases: []string{"www", "pool"}},
			{Name: "DB", Addrs: addrs("10.88.0.3")},
			{Name: "six", Addrs: addrs("fd00:1::4")},
			{Name: "w1", Addrs: addrs("10.88.0.11"), Aliases: []string{"pool"}},
			{Name: "w2", Addrs: addrs("10.88.0.12"), Aliases: []string{"pool"}},
			{Name: "my.app", Addrs: addrs("10.88.0.20")},
			{Name: "bad name", Addrs: addrs("10.88.0.66")},
			{Name: "", Addrs: addrs("10.88.0.67")},
		},
		Gateway:   []netip.Addr{gw4, gw6},
		HostAlias: addrs("10.88.0.254"),
		Names:     map[string][]netip.Addr{"host.docker.internal": addrs("10.88.0.254")},
	}
)

// network takes what the server sends and lets a test wait for it.
type network struct {
	mtu  int
	sent chan []byte
}

func newNetwork() *network { return &network{mtu: 1500, sent: make(chan []byte, 1000)} }

func (n *network) MTU() int { return n.mtu }
func (n *network) Send(fs []frame.Frame) {
	for _, f := range fs {
		select {
		case n.sent <- append([]byte(nil), f.Data...): // lent: copied
		default:
		}
	}
}

func newServer(t testing.TB, c Config) (*Server, *network) {
	t.Helper()
	n := newNetwork()
	if c.Network == nil {
		c.Network = n
	}
	if c.Upstreams == nil && c.ResolvConf == "" {
		c.Upstreams = []netip.AddrPort{ap("127.0.0.1:1")} // refuses
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, n
}

// packet makes the UDP packet a container would send.
func packet(t testing.TB, from, to netip.AddrPort, data []byte) stack.Packet {
	t.Helper()
	l4 := wire.EthernetLen + ipLen(from.Addr())
	b := make([]byte, l4+wire.UDPLen+len(data))
	if from.Addr().Is4() {
		wire.PutIPv4(b[wire.EthernetLen:], from.Addr(), to.Addr(), wire.ProtoUDP, 0, 64, len(b)-wire.EthernetLen, 7, false)
	} else {
		wire.PutIPv6(b[wire.EthernetLen:], from.Addr(), to.Addr(), wire.ProtoUDP, 0, 64, len(b)-l4)
	}
	wire.PutUDP(b[l4:], from.Port(), to.Port(), len(data))
	copy(b[l4+wire.UDPLen:], data)
	wire.PutL4Checksum(b[l4:], from.Addr(), to.Addr(), wire.ProtoUDP)
	p, ok := wire.ParseIP(b[wire.EthernetLen:], false)
	if !ok {
		t.Fatal("the test made a bad packet")
	}
	return stack.Packet{Frame: frame.Frame{Data: b}, L3: wire.EthernetLen, IP: p}
}

// datagram takes a frame apart as a container's kernel would.
func datagram(t testing.TB, b []byte) (from, to netip.AddrPort, data []byte) {
	t.Helper()
	p, ok := wire.ParseIP(b[wire.EthernetLen:], false)
	if !ok || p.Len != len(b)-wire.EthernetLen {
		t.Fatalf("bad IP packet %x", b)
	}
	l4 := b[wire.EthernetLen+p.HdrLen:]
	u, ok := wire.ParseUDP(l4)
	if !ok || u.Len != len(l4) || u.Checksum == 0 || !wire.VerifyL4(&p, l4) {
		t.Fatalf("bad UDP packet %x", b)
	}
	return netip.AddrPortFrom(p.Src, u.SrcPort), netip.AddrPortFrom(p.Dst, u.DstPort), l4[wire.UDPLen:]
}

// ask sends a query by UDP and waits for the answer.
func ask(t testing.TB, s *Server, n *network, q *dns.Msg) *dns.Msg {
	t.Helper()
	return askFrom(t, s, n, client4, netip.AddrPortFrom(gw4, 53), q)
}

func askFrom(t testing.TB, s *Server, n *network, from, to netip.AddrPort, q *dns.Msg) *dns.Msg {
	t.Helper()
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	s.HandlePackets([]stack.Packet{packet(t, from, to, b)})
	select {
	case f := <-n.sent:
		src, dst, data := datagram(t, f)
		if src != to || dst != from {
			t.Fatalf("answer from %s to %s, want from %s to %s", src, dst, to, from)
		}
		m := new(dns.Msg)
		if err := m.Unpack(data); err != nil {
			t.Fatal(err)
		}
		if m.Id != q.Id || !m.Response || len(m.Question) != 1 || m.Question[0] != q.Question[0] {
			t.Fatalf("not the answer to %v: %v", q, m)
		}
		return m
	case <-time.After(20 * time.Second):
		t.Fatalf("no answer to %v", q)
		return nil
	}
}

func query(name string, typ uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
}

// summary is an answer in a few words.
func summary(m *dns.Msg) string {
	var w []string
	for _, rr := range m.Answer {
		switch r := rr.(type) {
		case *dns.A:
			w = append(w, r.A.String())
		case *dns.AAAA:
			w = append(w, r.AAAA.String())
		case *dns.PTR:
			w = append(w, r.Ptr)
		case *dns.TXT:
			w = append(w, strings.Join(r.Txt, ""))
		}
	}
	return strings.TrimSpace(dns.RcodeToString[m.Rcode] + " " + strings.Join(w, " "))
}

func TestZone(t *testing.T) {
	s, n := newServer(t, Config{})
	s.SetZone(testZone)
	for _, c := range []struct {
		name string
		typ  uint16
		want string // REFUSED upstream makes SERVFAIL: the question left the house
	}{
		{"web", dns.TypeA, "NOERROR 10.88.0.2"},
		{"web", dns.TypeAAAA, "NOERROR fd00:1::2"},
		{"web", dns.TypeANY, "NOERROR 10.88.0.2 fd00:1::2"},
		{"WeB.MyNet", dns.TypeA, "NOERROR 10.88.0.2"},
		{"web.mynet.patchbay.internal", dns.TypeA, "NOERROR 10.88.0.2"},
		{"www", dns.TypeA, "NOERROR 10.88.0.2"},
		{"www.mynet", dns.TypeAAAA, "NOERROR fd00:1::2"},
		{"db", dns.TypeA, "NOERROR 10.88.0.3"},
		{"db", dns.TypeAAAA, "NOERROR"},
		{"db", dns.TypeMX, "NOERROR"},
		{"db", dns.TypeHTTPS, "NOERROR"},
		{"six", dns.TypeA, "NOERROR"},
		{"six.mynet", dns.TypeAAAA, "NOERROR fd00:1::4"},
		{"my.app", dns.TypeA, "NOERROR 10.88.0.20"},
		{"app.mynet.patchbay.internal", dns.TypeA, "NOERROR"},
		{"my.app.mynet.patchbay.internal", dns.TypeA, "NOERROR 10.88.0.20"},
		{"gateway.patchbay.internal", dns.TypeA, "NOERROR 10.88.0.1"},
		{"gateway.patchbay.internal", dns.TypeAAAA, "NOERROR fd00:1::1"},
		{"host.patchbay.internal", dns.TypeA, "NOERROR 10.88.0.254"},
		{"host.patchbay.internal", dns.TypeAAAA, "NOERROR"},
		{"host.docker.internal", dns.TypeA, "NOERROR 10.88.0.254"},
		{"patchbay.internal", dns.TypeA, "NOERROR"},
		{"mynet.patchbay.internal", dns.TypeA, "NOERROR"},
		{"nobody.mynet.patchbay.internal", dns.TypeA, "NXDOMAIN"},
		{"other.patchbay.internal", dns.TypeA, "NXDOMAIN"},
		{"web.othernet.patchbay.internal", dns.TypeA, "NXDOMAIN"},
		{"a.web.mynet.patchbay.internal", dns.TypeA, "NXDOMAIN"},
		{"localhost", dns.TypeA, "NOERROR 127.0.0.1"},
		{"x.localhost", dns.TypeAAAA, "NOERROR ::1"},
		{"2.0.88.10.in-addr.arpa", dns.TypePTR, "NOERROR web.mynet.patchbay.internal."},
		{"2.0.88.10.in-addr.arpa", dns.TypeA, "NOERROR"},
		{"1.0.88.10.in-addr.arpa", dns.TypePTR, "NOERROR gateway.patchbay.internal."},
		{"254.0.88.10.in-addr.arpa", dns.TypePTR, "NOERROR host.patchbay.internal."},
		{"99.0.88.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN"},
		{strings.TrimSuffix(must(dns.ReverseAddr("fd00:1::2")), "."), dns.TypePTR, "NOERROR web.mynet.patchbay.internal."},
		{strings.TrimSuffix(must(dns.ReverseAddr("fd00:1::99")), "."), dns.TypePTR, "NXDOMAIN"},
		// These are for others to answer.
		{"nobody", dns.TypeA, "SERVFAIL"},
		{"nobody.mynet", dns.TypeA, "SERVFAIL"},
		{"mynet", dns.TypeA, "SERVFAIL"},
		{"example.com", dns.TypeA, "SERVFAIL"},
		{"notpatchbay.internal", dns.TypeA, "SERVFAIL"},
		{"2.1.88.10.in-addr.arpa", dns.TypePTR, "SERVFAIL"},
		{"88.10.in-addr.arpa", dns.TypeNS, "SERVFAIL"},
		{".", dns.TypeNS, "SERVFAIL"},
	} {
		m := ask(t, s, n, query(c.name, c.typ))
		if got := summary(m); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.name, dns.TypeToString[c.typ], got, c.want)
		}
		if c.want == "SERVFAIL" {
			continue
		}
		if !m.Authoritative || !m.RecursionAvailable || !m.RecursionDesired {
			t.Errorf("%s: flags %v", c.name, m.MsgHdr)
		}
		if len(m.Answer) == 0 {
			if len(m.Ns) != 1 || m.Ns[0].Header().Rrtype != dns.TypeSOA || m.Ns[0].Header().Ttl > 10 {
				t.Errorf("%s %s: a negative answer without its SOA: %v", c.name, dns.TypeToString[c.typ], m)
			} else if !dns.IsSubDomain(m.Ns[0].Header().Name, m.Question[0].Name) {
				t.Errorf("%s: the SOA of %s, which is no parent", c.name, m.Ns[0].Header().Name)
			}
		}
		for _, rr := range m.Answer {
			if rr.Header().Ttl == 0 || rr.Header().Ttl > 10 {
				t.Errorf("%s: TTL %d", c.name, rr.Header().Ttl)
			}
		}
	}
}

// TestOthers holds whose names a client on several networks finds, and that nobody else does.
func TestOthers(t *testing.T) {
	far, _ := newServer(t, Config{})
	far.SetZone(&Zone{
		Network: "far", Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")},
		Hosts: []Host{{Name: "db", Addrs: addrs("10.9.0.7")}, {Name: "web", Addrs: addrs("10.9.0.8")}},
	})
	both := ap("10.88.0.5:4000")
	s, n := newServer(t, Config{Others: func(client netip.Addr) []*Server {
		if client == both.Addr() {
			return []*Server{far}
		}
		return nil
	}})
	s.SetZone(&Zone{Network: "near", Hosts: []Host{{Name: "web", Addrs: addrs("10.88.0.2")}, {Name: "four", Addrs: addrs("10.88.0.4")}}})
	for _, c := range []struct {
		name       string
		typ        uint16
		both, near string // what a client of both networks is told, and one of near alone
	}{
		{"db", dns.TypeA, "NOERROR 10.9.0.7", "SERVFAIL"},
		{"db.far", dns.TypeA, "NOERROR 10.9.0.7", "SERVFAIL"},
		{"db.far.patchbay.internal", dns.TypeA, "NOERROR 10.9.0.7", "NXDOMAIN"},
		{"db.far.patchbay.internal", dns.TypeAAAA, "NOERROR", "NXDOMAIN"},
		{"web", dns.TypeA, "NOERROR 10.88.0.2", "NOERROR 10.88.0.2"}, // its own comes first
		{"web.far.patchbay.internal", dns.TypeA, "NOERROR 10.9.0.8", "NXDOMAIN"},
		{"four", dns.TypeAAAA, "NOERROR", "NOERROR"},
		{"none.near.patchbay.internal", dns.TypeA, "NXDOMAIN", "NXDOMAIN"},
		{"7.0.9.10.in-addr.arpa", dns.TypePTR, "NOERROR db.far.patchbay.internal.", "SERVFAIL"},
		{"99.0.9.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN", "SERVFAIL"},
		{"elsewhere.test", dns.TypeA, "SERVFAIL", "SERVFAIL"},
	} {
		for from, want := range map[netip.AddrPort]string{both: c.both, client4: c.near} {
			if got := summary(askFrom(t, s, n, from, netip.AddrPortFrom(gw4, 53), query(c.name, c.typ))); got != want {
				t.Errorf("%s %s from %s: %s, want %s", c.name, dns.TypeToString[c.typ], from, got, want)
			}
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestAnswersTakeTurns(t *testing.T) {
	s, n := newServer(t, Config{})
	s.SetZone(testZone)
	first := map[string]int{}
	for range 30 {
		m := ask(t, s, n, query("pool", dns.TypeA))
		if len(m.Answer) != 3 {
			t.Fatalf("%d answers, want 3: %v", len(m.Answer), m)
		}
		first[m.Answer[0].(*dns.A).A.String()]++
	}
	if len(first) != 3 || first["10.88.0.2"] != 10 {
		t.Errorf("first answers %v, want each of three ten times", first)
	}
}

func TestIPv6ClientAndEDNS(t *testing.T) {
	s, n := newServer(t, Config{})
	s.SetZone(testZone)
	q := query("web", dns.TypeAAAA)
	q.SetEdns0(1400, true)
	m := askFrom(t, s, n, client6, netip.AddrPortFrom(gw6, 53), q)
	if opt := m.IsEdns0(); summary(m) != "NOERROR fd00:1::2" || opt == nil || !opt.Do() || opt.UDPSize() != ednsSize {
		t.Errorf("got %v", m)
	}
	q.IsEdns0().SetVersion(1)
	b := must(q.Pack())
	s.HandlePackets([]stack.Packet{packet(t, client6, netip.AddrPortFrom(gw6, 53), b)})
	_, _, data := datagram(t, <-n.sent)
	if m := new(dns.Msg); m.Unpack(data) != nil || m.Rcode != dns.RcodeBadVers {
		t.Errorf("EDNS version 1: %v", m)
	}
	if m := ask(t, s, n, query("web", dns.TypeA)); m.IsEdns0() != nil {
		t.Error("an OPT for a client that sent none")
	}
}

func TestRefusedRequests(t *testing.T) {
	s, n := newServer(t, Config{})
	s.SetZone(testZone)
	for _, c := range []struct {
		what string
		edit func(*dns.Msg)
		want int
	}{
		{"AXFR", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
		{"CHAOS", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		{"UPDATE", func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		{"NOTIFY", func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented},
		{"two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		{"no question", func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
	} {
		q := query("web", dns.TypeA)
		c.edit(q)
		s.HandlePackets([]stack.Packet{packet(t, client4, netip.AddrPortFrom(gw4, 53), must(q.Pack()))})
		_, _, data := datagram(t, <-n.sent)
		if m := new(dns.Msg); m.Unpack(data) != nil || m.Rcode != c.want || m.Id != q.Id {
			t.Errorf("%s: got %v", c.what, m)
		}
	}
}

// TestQueryBomb: a query that would expand to megabytes is refused by its header.
func TestQueryBomb(t *testing.T) {
	s, _ := newServer(t, Config{})
	long := strings.Repeat("\x3f"+strings.Repeat("x", 63), 3) + "\x00"
	for _, size := range []int{1400, maxQuery, 64000} {
		for _, section := range []int{4, 10} { // questions; records of a type without data
			record := "\xc0\x0c\x00\x01\x00\x01"
			if section == 10 {
				record += "\x00\x00\x00\x00\x00\x00"
			}
			b := []byte("\x12\x34\x01\x00" + "\x00\x01\x00\x00\x00\x00\x00\x00" + long + "\x00\x01\x00\x01")
			for n := count(b, section); len(b)+len(record) <= size; {
				b = append(b, record...)
				n++
				binary.BigEndian.PutUint16(b[section:], uint16(n))
			}
			var v verdict
			allocs := testing.AllocsPerRun(5, func() { v = s.judge(netip.Addr{}, b) })
			m := new(dns.Msg)
			if err := m.Unpack(v.answer); err != nil || m.Rcode != dns.RcodeFormatError || m.Id != 0x1234 {
				t.Errorf("%d bytes: %v, %v", size, m, err)
			}
			if allocs > 30 {
				t.Errorf("%d bytes, count at %d: %.0f allocations", size, section, allocs)
			}
		}
	}
}

func TestPacketsThatAreDropped(t *testing.T) {
	drops := new(frame.DropCounters)
	s, n := newServer(t, Config{Drops: drops})
	s.SetZone(testZone)
	good := must(query("web", dns.TypeA).Pack())
	answer := append([]byte(nil), good...)
	answer[2] |= flagQR
	to := netip.AddrPortFrom(gw4, 53)
	for _, c := range []struct {
		what string
		p    stack.Packet
		edit func(*stack.Packet)
		want frame.Drop
	}{
		{"an answer", packet(t, client4, to, answer), nil, frame.DropMalformed},
		{"nothing", packet(t, client4, to, nil), nil, frame.DropMalformed},
		{"eleven bytes", packet(t, client4, to, good[:11]), nil, frame.DropMalformed},
		{"source port 0", packet(t, netip.AddrPortFrom(client4.Addr(), 0), to, good), nil, frame.DropMalformed},
		{"wrong checksum", packet(t, client4, to, good), func(p *stack.Packet) { p.Frame.Data[len(p.Frame.Data)-1] ^= 1 }, frame.DropChecksum},
		{"UDP length too long", packet(t, client4, to, good), func(p *stack.Packet) { p.L4()[5] = 0xff }, frame.DropMalformed},
	} {
		if c.edit != nil {
			c.edit(&c.p)
		}
		before := drops.Get(c.want)
		s.HandlePackets([]stack.Packet{c.p})
		if got := drops.Get(c.want) - before; got != 1 || len(n.sent) != 0 {
			t.Errorf("%s: %d drops, %d answers", c.what, got, len(n.sent))
		}
	}
}

func TestSuperframeOfQueries(t *testing.T) {
	s, n := newServer(t, Config{})
	s.SetZone(testZone)
	b := must(query("web", dns.TypeA).Pack())
	p := packet(t, client4, netip.AddrPortFrom(gw4, 53), append(append(append([]byte(nil), b...), b...), b...))
	p.Frame.Hdr = wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOUDPL4, GSOSize: uint16(len(b)), CsumStart: 34, CsumOffset: 6}
	p.L4()[6] ^= 0x55 // not finished, so not looked at
	s.HandlePackets([]stack.Packet{p})
	if len(n.sent) != 3 {
		t.Errorf("%d answers to three queries", len(n.sent))
	}
}

// TestZoneChangesUnderQueries: no query fails while the zone is replaced, and each sees one zone whole.
func TestZoneChangesUnderQueries(t *testing.T) {
	s, _ := newServer(t, Config{Network: discard{}})
	zones := [2]*Zone{
		{Network: "n", Hosts: []Host{{Name: "web", Addrs: addrs("10.88.0.2", "10.88.0.3")}}},
		{Network: "n", Hosts: []Host{{Name: "web", Addrs: addrs("10.88.0.4", "10.88.0.5")}}},
	}
	s.SetZone(zones[0])
	b := must(query("web.n", dns.TypeA).Pack())
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				v := s.judge(netip.Addr{}, b)
				m := new(dns.Msg)
				if v.answer == nil || m.Unpack(v.answer) != nil || len(m.Answer) != 2 {
					t.Errorf("got %v", m)
					return
				}
				x, y := m.Answer[0].(*dns.A).A.To4()[3], m.Answer[1].(*dns.A).A.To4()[3]
				if x/2 != y/2 {
					t.Errorf("half of each zone: %v", m)
					return
				}
			}
		})
	}
	for i := range 2000 {
		s.SetZone(zones[i%2])
	}
	stop.Store(true)
	wg.Wait()
}

type discard struct{}

func (discard) Send([]frame.Frame) {}
func (discard) MTU() int           { return 1500 }

func TestBadUpstream(t *testing.T) {
	for _, a := range []string{"0.0.0.0:53", "[::]:53", "224.0.0.1:53"} {
		if _, err := New(Config{Upstreams: []netip.AddrPort{ap(a)}}); err == nil || !strings.Contains(err.Error(), "--dns") {
			t.Errorf("%s: %v", a, err)
		}
	}
}

// TestCloseEndsEverything: queries that wait for a dead resolver, and idle connections, end with Close, and leave no goroutine behind.
func TestCloseEndsEverything(t *testing.T) {
	before := runtime.NumGoroutine()
	dead := deadUpstream(t)
	s, err := New(Config{Network: discard{}, Upstreams: []netip.AddrPort{dead}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		b := must(query(fmt.Sprintf("x%d.example.com", i), dns.TypeA).Pack())
		s.HandlePackets([]stack.Packet{packet(t, client4, netip.AddrPortFrom(gw4, 53), b)})
	}
	c1, c2 := tcpPair(t)
	go s.ServeTCP(c2)
	if _, err := c1.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return s.Stats().Conns == 1 && s.Stats().Waiting == 20 })
	start := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("Close took %v", d)
	}
	if st := s.Stats(); st.Conns != 0 || st.Waiting != 0 {
		t.Errorf("after Close: %+v", st)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	s.HandlePackets([]stack.Packet{packet(t, client4, netip.AddrPortFrom(gw4, 53), must(query("example.com", dns.TypeA).Pack()))})
	c1.Close()
	waitFor(t, func() bool { return runtime.NumGoroutine() <= before+1 }) // the dead upstream's test socket has none
}

func waitFor(t testing.TB, f func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited for 5 s")
		}
	}
}

// tcpPair is both ends of a real connection.
func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// deadUpstream swallows queries.
func deadUpstream(t testing.TB) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// upstreamServer is a real resolver on loopback, UDP and TCP on one port.
func upstreamServer(t testing.TB, host string, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	var pc net.PacketConn
	var l net.Listener
	var err error
	for range 20 {
		if pc, err = net.ListenPacket("udp", net.JoinHostPort(host, "0")); err != nil {
			t.Fatal(err)
		}
		if l, err = net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			break
		}
		pc.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h, UDPSize: 4096}, {Listener: l, Handler: h}} {
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go func() { _ = s.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() { _ = s.Shutdown() })
	}
	return pc.LocalAddr().(*net.UDPAddr).AddrPort()
}

// stubResolver is a real resolver on port 53 of a loopback address, as systemd-resolved is on 127.0.0.53; it says its own address.
func stubResolver(t testing.TB, host string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", net.JoinHostPort(host, "53"))
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: says(host, 0)}
	ready := make(chan struct{})
	s.NotifyStartedFunc = func() { close(ready) }
	go func() { _ = s.ActivateAndServe() }()
	<-ready
	t.Cleanup(func() { _ = s.Shutdown() })
}

// says answers every question with one TXT of text, after d.
func says(text string, d time.Duration) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		time.Sleep(d)
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{text}}}
		_ = w.WriteMsg(m)
	}
}

// fails answers every question with code.
func fails(code int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) { _ = w.WriteMsg(new(dns.Msg).SetRcode(q, code)) }
}

// dialVia sends what is for a resolver of a resolv.conf, which cannot name a port, to a test's.
func dialVia(to map[string]netip.AddrPort) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		a, ok := to[addr]
		if !ok {
			return nil, fmt.Errorf("no such resolver in this test: %s", addr)
		}
		return new(net.Dialer).DialContext(ctx, network, a.String())
	}
}
