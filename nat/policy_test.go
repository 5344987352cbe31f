package nat

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/stack"
)

// addrNet is a network of which only the addresses matter.
type addrNet struct{}

func (addrNet) Send([]frame.Frame)                                    {}
func (addrNet) SendUnreachable(*stack.Packet, stack.Unreachable, int) {}
func (addrNet) MTU() int                                              { return 1500 }
func (addrNet) DialTCP(_ context.Context, _, _ netip.AddrPort, done func(stack.Conn, error)) {
	done(nil, context.Canceled)
}
func (addrNet) Addr(v int) netip.Addr {
	if v == 4 {
		return netip.MustParseAddr("10.0.2.1")
	}
	return netip.MustParseAddr("fd00:2::1")
}
func (addrNet) HostAlias(v int) netip.Addr {
	if v == 4 {
		return netip.MustParseAddr("10.0.2.254")
	}
	return netip.MustParseAddr("fd00:2::254")
}

func testPolicy() *policy {
	h := newHostAddrs(time.Now)
	h.list = func() ([]hostAddr, error) {
		return []hostAddr{
			{netip.MustParseAddr("127.0.0.1"), true}, {netip.MustParseAddr("::1"), true},
			{netip.MustParseAddr("192.0.2.53"), true}, // a service address on lo
			{netip.MustParseAddr("192.0.2.10"), false}, {netip.MustParseAddr("2001:db8::10"), false},
		}, nil
	}
	return &policy{network: addrNet{}, hosts: h,
		subnets: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd00:2::/64")}}
}

func TestPolicy(t *testing.T) {
	const allow = "" // what the counter of a refusal is called, otherwise
	for _, c := range []struct{ dst, want string }{
		{"192.0.2.10", allow}, // the host's own address on a network card
		{"2001:db8::10", allow},
		{"198.51.100.7", allow},
		{"10.0.3.1", allow},
		{"240.0.0.1", allow}, // the host's routes decide
		{"2001:db8::1", allow},
		{"fd00:3::1", allow},
		{"64:ff9b::198.51.100.7", allow},
		{"2002:c633:6407::1", allow},
		{"64:ff9b:1::198.51.100.7", allow},
		{"64:ff9b:1:c633:64:700::", allow}, // 198.51.100.7 under a /48 prefix

		{"10.0.2.254", "policy-loopback"}, // the host alias, closed by default
		{"fd00:2::254", "policy-loopback"},
		{"127.0.0.1", "policy-loopback"},
		{"127.255.255.254", "policy-loopback"},
		{"0.0.0.0", "policy-loopback"},
		{"0.1.2.3", "policy-loopback"},
		{"::", "policy-loopback"},
		{"::1", "policy-loopback"},
		{"::ffff:127.0.0.1", "policy-loopback"},
		{"::ffff:0.0.0.0", "policy-loopback"},
		{"::127.0.0.1", "policy-loopback"},
		{"::2", "policy-loopback"}, // 0.0.0.2, IPv4-compatible
		{"::ffff:0:127.0.0.1", "policy-loopback"},
		{"64:ff9b::127.0.0.1", "policy-loopback"},
		{"64:ff9b::0.0.0.0", "policy-loopback"},
		{"64:ff9b:1::127.0.0.1", "policy-loopback"},
		{"64:ff9b:1:7f00:0:100::", "policy-loopback"}, // RFC 6052 with a /48 prefix
		{"64:ff9b:1:0:7f:0:100::", "policy-loopback"}, // the same with /64
		{"64:ff9b:1::", "policy-loopback"},
		{"2002:7f00:1::1", "policy-loopback"},
		{"2001:0:7f00:1::", "policy-loopback"},
		{"2001:0:c633:6407:0:0:80ff:fffe", "policy-loopback"}, // Teredo client 127.0.0.1, inverted
		{"2001:db8::5efe:127.0.0.1", "policy-loopback"},
		{"2001:db8::200:5efe:127.0.0.1", "policy-loopback"},
		{"192.0.2.53", "policy-loopback"}, // on a loopback interface

		{"169.254.169.254", "policy-metadata"},
		{"169.254.1.1", "policy-metadata"},
		{"::ffff:169.254.169.254", "policy-metadata"},
		{"64:ff9b::169.254.169.254", "policy-metadata"},
		{"2002:a9fe:a9fe::1", "policy-metadata"},
		{"fe80::1", "policy-metadata"},
		{"febf::1", "policy-metadata"},
		{"fd00:ec2::254", "policy-metadata"},
		{"fd20:ce::254", "policy-metadata"},
		{"100.100.100.200", "policy-metadata"},

		{"224.0.0.251", "policy-address"},
		{"239.255.255.255", "policy-address"},
		{"255.255.255.255", "policy-address"},
		{"ff02::fb", "policy-address"},
		{"::ffff:198.51.100.7", "policy-address"},
		{"::198.51.100.7", "policy-address"},
		{"64:ff9b::224.0.0.1", "policy-address"},
		{"10.0.2.255", "policy-address"},
		{"10.0.2.9", "policy-address"},
		{"fd00:2::9", "policy-address"},

		{"10.0.2.1", "not-for-gateway"},
		{"fd00:2::1", "not-for-gateway"},
	} {
		v := testPolicy().check(netip.MustParseAddr(c.dst))
		got := v.drop.String()
		if v.ok {
			got = allow
			if v.host != netip.MustParseAddr(c.dst) || v.loopback {
				t.Errorf("%s: allowed as %s, loopback %v", c.dst, v.host, v.loopback)
			}
		}
		if got != c.want {
			t.Errorf("%s: got %q, want %q", c.dst, got, c.want)
		}
	}
}

func TestPolicyHostLoopback(t *testing.T) {
	p := testPolicy()
	p.hostLoopback = true
	for alias, want := range map[string]string{"10.0.2.254": "127.0.0.1", "fd00:2::254": "::1"} {
		if v := p.check(netip.MustParseAddr(alias)); !v.ok || v.host.String() != want || !v.loopback {
			t.Errorf("%s: %+v, want %s", alias, v, want)
		}
	}
	// The alias is the one spelling that is opened.
	for _, dst := range []string{"127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1", "127.0.0.53"} {
		if v := p.check(netip.MustParseAddr(dst)); v.ok {
			t.Errorf("%s: allowed", dst)
		}
	}
}

func TestPolicyAllowLinkLocal(t *testing.T) {
	p := testPolicy()
	p.allowLinkLocal = true
	for dst, want := range map[string]bool{"169.254.169.254": true, "fd00:ec2::254": true, "fe80::1": false, "127.0.0.1": false} {
		if v := p.check(netip.MustParseAddr(dst)); v.ok != want {
			t.Errorf("%s: allowed %v, want %v", dst, v.ok, want)
		}
	}
}

// FuzzPolicy holds that whatever is allowed is not a loopback, multicast or link-local address, nor one of IPv4 in IPv6 clothes.
func FuzzPolicy(f *testing.F) {
	for _, s := range []string{"127.0.0.1", "::1", "::ffff:127.0.0.1", "2002:7f00:1::", "198.51.100.7", "64:ff9b::1"} {
		f.Add(netip.MustParseAddr(s).AsSlice())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return
		}
		v := testPolicy().check(a)
		if v.ok && (v.host != a || v.host.IsLoopback() || v.host.IsUnspecified() || v.host.IsMulticast() || v.host.IsLinkLocalUnicast() || v.host.Is4In6()) {
			t.Fatalf("%s is allowed as %s", a, v.host)
		}
		for _, e := range embedded4(a) {
			if v.ok && a.Is6() && e.IsValid() && e.IsLoopback() {
				t.Fatalf("%s is allowed and stands for %s", a, e)
			}
		}
	})
}

func TestHostAddrs(t *testing.T) {
	now := time.Unix(1e9, 0)
	calls := 0
	h := newHostAddrs(func() time.Time { return now })
	cur := []hostAddr{{netip.MustParseAddr("192.0.2.1"), false}}
	var fail error
	h.list = func() ([]hostAddr, error) { calls++; return cur, fail }
	is := func(a string, want bool) {
		t.Helper()
		if got := h.local(netip.MustParseAddr(a)); got != want {
			t.Fatalf("%s on the host: %v, want %v", a, got, want)
		}
	}
	is("192.0.2.1", true)
	is("::ffff:192.0.2.1", true)
	is("127.8.8.8", true)
	is("::1", true)
	is("192.0.2.2", false)
	cur = append(cur, hostAddr{netip.MustParseAddr("192.0.2.2"), false})
	is("192.0.2.2", false) // still the old list
	if calls != 1 {
		t.Fatalf("list read %d times while fresh", calls)
	}
	now = now.Add(hostAddrsTTL)
	is("192.0.2.2", true)
	cur, fail = nil, context.DeadlineExceeded
	now = now.Add(hostAddrsTTL)
	is("192.0.2.2", true) // a list that cannot be read does not make the host's addresses foreign
	if n := testing.AllocsPerRun(100, func() { h.local(netip.MustParseAddr("192.0.2.2")) }); n != 0 {
		t.Errorf("a look-up allocates %v times", n)
	}
}

func TestListHostAddrs(t *testing.T) {
	as, err := listHostAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range as {
		if a.addr == netip.MustParseAddr("127.0.0.1") && a.loopback {
			return
		}
	}
	t.Fatalf("127.0.0.1 is not among %v", as)
}

func TestQuota(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	q := newQuota(5, 3)
	for i, s := range []struct {
		who  netip.Addr
		want bool
	}{{a, true}, {a, true}, {a, true}, {a, false}, {b, true}, {b, true}, {b, false}, {c, false}} {
		if got := q.take(s.who); got != s.want {
			t.Fatalf("take %d: %v", i, got)
		}
	}
	q.give(a)
	if !q.take(c) || q.take(a) || q.inUse() != 5 {
		t.Fatal("what one gives back another may take")
	}
	for _, w := range []netip.Addr{a, a, b, b, c} {
		q.give(w)
	}
	if q.inUse() != 0 || len(q.by) != 0 {
		t.Fatalf("not empty: %d, %v", q.inUse(), q.by)
	}
}
