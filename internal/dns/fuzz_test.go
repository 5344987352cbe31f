package dns

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"patchbay/stack"

	"net/netip"

	"github.com/miekg/dns"
)

// FuzzQuery: whatever a container sends by UDP, nothing panics, and an answer is a well-formed message with its id that fits into one packet; only
// well-formed queries go outside.
func FuzzQuery(f *testing.F) {
	for _, q := range []*dns.Msg{query("web", dns.TypeA), query("example.com", dns.TypeTXT), query("2.0.88.10.in-addr.arpa", dns.TypePTR), query(".", dns.TypeNS)} {
		f.Add(must(q.Pack()))
		q.SetEdns0(4096, true)
		f.Add(must(q.Pack()))
	}
	f.Add([]byte{})
	f.Add(make([]byte, headerLen))
	f.Add(append([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 0xc0, 12, 0, 1, 0, 1)) // a name that points to itself
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 60000 {
			return
		}
		n := newNetwork()
		s, err := New(Config{Network: n, Upstreams: []netip.AddrPort{ap("192.0.2.1:53")}, Dial: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("offline")
		}})
		if err != nil {
			t.Fatal(err)
		}
		s.SetZone(testZone)
		s.HandlePackets([]stack.Packet{packet(t, client4, netip.AddrPortFrom(gw4, 53), data)})
		s.queries.idle.Wait()
		if len(n.sent) > 1 {
			t.Fatalf("%d answers", len(n.sent))
		}
		if len(n.sent) == 1 {
			_, _, b := datagram(t, <-n.sent)
			m := new(dns.Msg)
			if err := m.Unpack(b); err != nil || !m.Response || !bytes.Equal(b[:2], data[:2]) || len(b) > 1472 {
				t.Errorf("answer %x (%v)", b, err)
			}
		}
		st := s.Stats()
		if st.Forwarded == 1 {
			if _, _, ok := question(data); !ok {
				t.Errorf("%x was forwarded", data)
			}
			if q := new(dns.Msg); q.Unpack(data) != nil || len(q.Question) != 1 || dns.IsSubDomain(apex, q.Question[0].Name) {
				t.Errorf("%v was forwarded", q)
			}
		}
		s.Close()
	})
}

// FuzzAnswer: whatever a resolver sends, what goes to the container is no longer than it may be, and an answer to another question is never taken.
func FuzzAnswer(f *testing.F) {
	q := query("example.com", dns.TypeTXT)
	q.Id = 7
	raw := must(q.Pack())
	good := new(dns.Msg).SetReply(q)
	for range 20 {
		good.Answer = append(good.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: "example.com.", Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 100)}})
	}
	f.Add(must(good.Pack()), uint16(512))
	good.Compress = true
	f.Add(must(good.Pack()), uint16(1232))
	f.Add(must(new(dns.Msg).SetRcode(q, dns.RcodeRefused).Pack())[:headerLen], uint16(512))
	f.Add(raw, uint16(512))
	f.Fuzz(func(t *testing.T, data []byte, limit uint16) {
		ok := answers(data, raw, 7)
		if !ok {
			return
		}
		if m := new(dns.Msg); m.Unpack(data) == nil && len(m.Question) > 0 {
			if x := m.Question[0]; !strings.EqualFold(x.Name, "example.com.") || x.Qtype != dns.TypeTXT || m.Id != 7 || !m.Response {
				t.Errorf("taken as an answer: %v", m)
			}
		}
		limit = max(limit, dns.MinMsgSize)
		b := fit(bytes.Clone(data), int(limit))
		if len(b) > int(limit) || len(b) < headerLen || !bytes.Equal(b[:2], data[:2]) {
			t.Errorf("%d bytes for a limit of %d", len(b), limit)
		}
		if b[2]&flagTC == 0 && records(b) != records(data) {
			t.Error("cut short without TC")
		}
	})
}

// FuzzResolvConf: whatever the host's file says, the container's has only whole lines of known keywords.
func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:2 edns0\n")
	f.Add("nameserver fe80::1%eth0\ndomain x\noptions")
	f.Add("search " + strings.Repeat("a.", 300))
	f.Fuzz(func(t *testing.T, text string) {
		h, err := ParseResolvConf(strings.NewReader(text))
		if err != nil {
			return
		}
		if len(h.Servers) > maxServers {
			t.Errorf("%d servers", len(h.Servers))
		}
		out := string(ContainerResolvConf(h, "mynet", gw4))
		again, err := ParseResolvConf(strings.NewReader(out))
		if err != nil || len(again.Servers) != 1 || again.Servers[0].Addr() != gw4 || len(again.Search) == 0 || again.Search[0] != "mynet.patchbay.internal" {
			t.Errorf("from %q:\n%s", text, out)
		}
		for line := range strings.Lines(out) {
			if w, _, _ := strings.Cut(line, " "); w != "#" && w != "nameserver" && w != "search" && w != "options" {
				t.Errorf("line %q", line)
			}
		}
	})
}

// FuzzArpa: reverse names are read as the library writes them.
func FuzzArpa(f *testing.F) {
	f.Add("2.0.88.10.in-addr.arpa.")
	f.Add(must(dns.ReverseAddr("fd00::1")))
	f.Add("0002.0.88.10.in-addr.arpa.")
	f.Fuzz(func(t *testing.T, name string) {
		if a, ok := arpaAddr(name); ok {
			if back, err := dns.ReverseAddr(a.String()); !a.Is4In6() && (err != nil || back != name) {
				t.Errorf("%q is read as %s, whose name is %q (%v)", name, a, back, err)
			}
		}
	})
}
