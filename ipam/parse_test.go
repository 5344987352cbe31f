package ipam

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
)

func TestParseSubnet(t *testing.T) {
	for _, s := range []string{"10.88.0.0/24", "10.0.0.0/8", "192.168.7.4/30", "fd12:3456:789a::/64", "fd00::/126", "2001:db8::/32", "198.51.100.0/24"} {
		p, err := ParseSubnet(s)
		if err != nil || p.String() != s {
			t.Errorf("%s: got %s, %v", s, p, err)
		}
	}
	for s, want := range map[string]string{
		"":                       "such as 10.88.0.0/24",
		"web":                    "such as 10.88.0.0/24",
		"10.88.0.0":              "10.88.0.0/24",
		"fd00::":                 "fd00::/64",
		"10.88.0.0/":             "such as",
		"10.88.0.0/33":           "such as",
		"10.88.0.0/-1":           "such as",
		"10.88.0.0/024":          "such as",
		"10.88.0/24":             "such as",
		"10.88.0.256/24":         "such as",
		"10.88.0.1/24":           "did you mean 10.88.0.0/24?",
		"fd00::1/64":             "did you mean fd00::/64?",
		"10.88.0.0/31":           "/30",
		"10.88.0.0/32":           "/30",
		"fd00::/127":             "/126",
		"fd00::/128":             "/126",
		"12.0.0.0/7":             "/8",
		"2000::/8":               "/16",
		"0.0.0.0/0":              "choose",
		"::/0":                   "choose",
		"127.0.0.0/8":            "loopback",
		"127.5.0.0/16":           "loopback",
		"169.254.169.0/24":       "link-local",
		"224.0.0.0/24":           "multicast",
		"240.0.0.0/24":           "reserved",
		"255.255.255.0/24":       "reserved",
		"fe80::/64":              "link-local",
		"ff02::/64":              "multicast",
		"::1/128":                "/126",
		"::ffff:10.88.0.0/120":   "IPv4",
		"fe80::%eth0/64":         "zone",
		"10.88.0.0/24 ":          "such as",
		"10.88.0.0/24,fd00::/64": "such as",
	} {
		p, err := ParseSubnet(s)
		if err == nil {
			t.Errorf("%q: accepted as %s", s, p)
			continue
		}
		if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: error %q does not say %q", s, err, want)
		}
	}
}

func TestParseIP(t *testing.T) {
	v4, v6 := pfx("10.88.0.0/24"), pfx("fd00:1::/64")
	for _, s := range []string{"10.88.0.1", "10.88.0.254", "fd00:1::1", "fd00:1::ffff:ffff:ffff:ffff"} {
		if a, err := ParseIP(s, v4, v6); err != nil || a.String() != s {
			t.Errorf("%s: got %s, %v", s, a, err)
		}
	}
	for s, want := range map[string]string{
		"":                 "such as",
		"web":              "such as",
		"10.88.0.5/24":     "write 10.88.0.5",
		"10.88.0":          "such as",
		"10.88.0.05":       "such as",
		"10.88.0.0":        "subnet itself",
		"10.88.0.255":      "broadcast",
		"fd00:1::":         "anycast",
		"10.89.0.5":        "10.88.0.0/24 or fd00:1::/64",
		"fd00:2::5":        "10.88.0.0/24 or fd00:1::/64",
		"fd00:1::5%eth0":   "write fd00:1::5",
		"::ffff:10.88.0.5": "write 10.88.0.5",
	} {
		a, err := ParseIP(s, v4, v6)
		if err == nil {
			t.Errorf("%q: accepted as %s", s, a)
			continue
		}
		if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: error %q does not say %q", s, err, want)
		}
	}
	if _, err := ParseIP("10.88.0.5"); err == nil {
		t.Error("accepted without a subnet")
	}
}

func TestDefaults(t *testing.T) {
	for _, c := range []struct{ p, gw, alias string }{
		{"10.88.0.0/24", "10.88.0.1", "10.88.0.254"},
		{"10.88.0.0/16", "10.88.0.1", "10.88.255.254"},
		{"10.88.0.0/29", "10.88.0.1", "10.88.0.6"},
		{"10.88.0.0/30", "10.88.0.1", "invalid IP"},
		{"fd00::/64", "fd00::1", "fd00::fe"},
		{"fd00::/124", "fd00::1", "fd00::e"},
		{"fd00::/125", "fd00::1", "fd00::6"},
		{"fd00::/126", "fd00::1", "invalid IP"},
	} {
		if gw, al := DefaultGateway(pfx(c.p)), DefaultHostAlias(pfx(c.p)); gw.String() != c.gw || al.String() != c.alias {
			t.Errorf("%s: gateway %s, alias %s; want %s, %s", c.p, gw, al, c.gw, c.alias)
		}
	}
}

func hostWith(routes ...string) Host {
	return Host{Routes: func() (rs []Route, err error) {
		for _, s := range routes {
			p, dev, _ := strings.Cut(s, " ")
			rs = append(rs, Route{Prefix: pfx(p), Interface: dev})
		}
		return rs, nil
	}}
}

func TestChooseSubnet(t *testing.T) {
	for _, c := range []struct {
		routes []string
		taken  []string
		want   string
	}{
		{nil, nil, "10.88.0.0/24"},
		{[]string{"0.0.0.0/0", "0.0.0.0/1 tun0", "128.0.0.0/1 tun0", "192.168.1.0/24"}, nil, "10.88.0.0/24"},
		{[]string{"10.88.0.7/32 tun0"}, nil, "10.88.1.0/24"},
		{[]string{"10.88.0.0/16 podman0"}, nil, "10.89.0.0/24"},
		{[]string{"10.88.0.0/16 podman0"}, []string{"10.89.0.0/24", "10.89.1.0/24"}, "10.89.2.0/24"},
		{[]string{"10.0.0.0/8 tun0"}, nil, "172.20.0.0/24"},
		{[]string{"10.0.0.0/8 tun0", "172.16.0.0/12"}, nil, "192.168.100.0/24"},
		{[]string{"10.0.0.0/8 tun0", "172.16.0.0/12", "192.168.0.0/16"}, nil, ""},
	} {
		var taken []netip.Prefix
		for _, s := range c.taken {
			taken = append(taken, pfx(s))
		}
		p, err := hostWith(c.routes...).ChooseSubnet(taken...)
		if c.want == "" {
			if err == nil || !strings.Contains(err.Error(), "--subnet") {
				t.Errorf("%v: got %s, %v; want an error that names --subnet", c.routes, p, err)
			}
			continue
		}
		if err != nil || p != pfx(c.want) {
			t.Errorf("%v: got %s, %v; want %s", c.routes, p, err, c.want)
		}
	}
}

func TestChooseSubnet6(t *testing.T) {
	ula := pfx("fd00::/8")
	check := func(p netip.Prefix, err error) netip.Prefix {
		t.Helper()
		if err != nil || p.Bits() != 64 || !ula.Contains(p.Addr()) || p.Masked() != p {
			t.Fatalf("got %s, %v", p, err)
		}
		if _, err := ParseSubnet(p.String()); err != nil {
			t.Fatal(err)
		}
		return p
	}
	h := hostWith("::/0", "fe80::/64", "2000::/3")
	a := check(h.ChooseSubnet6([]byte("host/net")))
	if b := check(h.ChooseSubnet6([]byte("host/net"))); b != a {
		t.Errorf("one seed, two subnets: %s and %s", a, b)
	}
	if b := check(h.ChooseSubnet6([]byte("host/other"))); b == a {
		t.Errorf("two seeds, one subnet: %s", a)
	}
	if b := check(h.ChooseSubnet6([]byte("host/net"), a)); b == a {
		t.Errorf("%s is taken", a)
	}
	if x, y := check(h.ChooseSubnet6(nil)), check(h.ChooseSubnet6(nil)); x == y {
		t.Errorf("without a seed, twice %s", x)
	}
	h.Rand = bytes.NewReader([]byte{1, 2, 3, 4, 5})
	if p := check(h.ChooseSubnet6(nil)); p != pfx("fd01:203:405::/64") {
		t.Errorf("got %s", p)
	}
	if _, err := h.ChooseSubnet6(nil); err == nil {
		t.Error("no error without randomness")
	}
	if _, err := hostWith("fc00::/7 wg0").ChooseSubnet6([]byte("x")); err == nil {
		t.Error("no error with every ULA routed")
	}
}

func TestCheckSubnet(t *testing.T) {
	h := hostWith("0.0.0.0/0 eth0", "10.88.0.0/16 podman0", "::/0 eth0", "fd00:1::/48 wg0")
	for _, s := range []string{"10.89.0.0/24", "fd00:2::/64", "192.168.0.0/24"} {
		if err := h.CheckSubnet(pfx(s)); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for s, want := range map[string][]string{
		"10.88.5.0/24":    {"10.88.5.0/24", "10.88.0.0/16 on podman0", "10.89.0.0/24", "leave --subnet away"},
		"10.0.0.0/8":      {"10.88.0.0/16 on podman0", "172.20.0.0/24"},
		"fd00:1:0:5::/64": {"fd00:1::/48 on wg0", "leave --subnet away"},
	} {
		err := h.CheckSubnet(pfx(s))
		if err == nil {
			t.Errorf("%s: accepted", s)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: error %q does not say %q", s, err, w)
			}
		}
	}
}

// TestKernelRoutes reads the real ones: loopback is in the local table of every namespace whose lo is up, and of a fresh one nothing is.
func TestKernelRoutes(t *testing.T) {
	rs, err := kernelRoutes()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if !r.Prefix.IsValid() || r.Prefix.Masked() != r.Prefix {
			t.Errorf("route %+v", r)
		}
	}
	p, err := Host{}.ChooseSubnet()
	if err != nil {
		t.Fatal(err)
	}
	if r, clash := Clash(p, rs); clash {
		t.Errorf("chose %s, which clashes with %s", p, r)
	}
}

func FuzzParseSubnet(f *testing.F) {
	for _, s := range []string{"10.88.0.0/24", "fd00::/64", "::ffff:1.2.3.4/100", "10.0.0.0/8", "fe80::%x/64", "::/16", "255.255.255.252/30"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseSubnet(s)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: two lines: %q", s, err)
			}
			return
		}
		// What is accepted makes a pool with at least one address, and comes back the same.
		if q, err := ParseSubnet(p.String()); err != nil || q != p {
			t.Errorf("%s read again: %s, %v", p, q, err)
		}
		pool, err := NewPool(ctx, PoolConfig{Name: "n", Prefix: p})
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		r, err := pool.Lease(ctx, Request{Attachment: "a"})
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		if _, err := ParseIP(r.Addr.String(), p); err != nil {
			t.Errorf("%s handed out: %v", r.Addr, err)
		}
	})
}

func FuzzParseIP(f *testing.F) {
	for _, s := range []string{"10.88.0.5", "fd00:1::5", "10.88.0.255", "::ffff:10.88.0.5", "fd00:1::5%e"} {
		f.Add(s)
	}
	v4, v6 := pfx("10.88.0.0/24"), pfx("fd00:1::/64")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseIP(s, v4, v6)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: two lines: %q", s, err)
			}
			return
		}
		if !v4.Contains(a) && !v6.Contains(a) {
			t.Errorf("%q: %s is in no subnet", s, a)
		}
	})
}
