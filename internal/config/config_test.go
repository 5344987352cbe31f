package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"patchbay/internal/api"
	"patchbay/internal/wire"
	"patchbay/nat"
)

const whole = `
networks:
  lab:
    subnets: [10.9.0.0/24, fd09::/64]
    gateways: 10.9.0.254
    mtu: 1400
    isolate: true
    vni: 42
    dns: [9.9.9.9, "[2620:fe::fe]:5353"]
    hostLoopback: true
    linkLocal: yes
    wire: patchbay
    seal: false
    port: 4790
    ipRange: [10.9.0.128/25, "fd09::1:0/112"]
    peers:
      - B.Test
      - host: "[2001:db8::7]:8472"
        wire: vxlan
        noOffload: true
        onePort: true
        fdb: ["02:00:00:00:00:01"]
  quiet:
    internal: true
  plain:
publish:
  - attachment: Web
    network: lab
    ports: ["8080:80", "127.0.0.1:5300-5301:53/udp"]
  - attachment: db
    ports: 5432:5432
`

func TestParse(t *testing.T) {
	f, err := Parse("lab.yaml", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	want := []Network{
		{Line: 3, NetworkSpec: api.NetworkSpec{
			Name: "lab", Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64")}, Gateways: []netip.Addr{netip.MustParseAddr("10.9.0.254")},
			MTU: 1400, Isolate: true, VNI: 42, DNS: []netip.AddrPort{netip.MustParseAddrPort("9.9.9.9:53"), netip.MustParseAddrPort("[2620:fe::fe]:5353")}, HostLoopback: true, LinkLocal: true,
			Wire: api.WirePatchbay, Port: 4790, IPRanges: []netip.Prefix{netip.MustParsePrefix("10.9.0.128/25"), netip.MustParsePrefix("fd09::1:0/112")},
		}, Peers: []Peer{
			{Line: 17, PeerSpec: api.PeerSpec{Host: "b.test"}},
			{Line: 18, PeerSpec: api.PeerSpec{Host: "2001:db8::7", Port: 8472, Wire: api.WireVXLAN, NoOffload: true, OnePort: true, FDB: []wire.MAC{{2, 0, 0, 0, 0, 1}}}},
		}},
		{Line: 23, NetworkSpec: api.NetworkSpec{Name: "quiet", Internal: true}},
		{Line: 25, NetworkSpec: api.NetworkSpec{Name: "plain"}},
	}
	if !reflect.DeepEqual(f.Networks, want) {
		t.Errorf("networks\n%+v, want\n%+v", f.Networks, want)
	}
	spec := func(s string) nat.Spec {
		v, err := nat.ParseSpec(s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	rules := []Rule{
		{Network: "lab", Attachment: "web", Spec: spec("8080:80"), Line: 27},
		{Network: "lab", Attachment: "web", Spec: spec("127.0.0.1:5300-5301:53/udp"), Line: 27},
		{Network: "default", Attachment: "db", Spec: spec("5432:5432"), Line: 30},
	}
	if !reflect.DeepEqual(f.Publish, rules) {
		t.Errorf("rules\n%+v, want\n%+v", f.Publish, rules)
	}
	for _, empty := range []string{"", "# nothing\n", "networks:\npublish:\n"} {
		if f, err := Parse("x", []byte(empty)); err != nil || len(f.Networks)+len(f.Publish) > 0 {
			t.Errorf("%q: %+v, %v", empty, f, err)
		}
	}
}

// TestErrors holds that each error names the file, the line and what is wrong.
func TestErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown section", "networks:\nvolumes: {}\n", `f.yaml:2: the file has no setting "volumes"; there are networks, publish`},
		{"unknown key", "networks:\n  a:\n    mtu: 1500\n    color: red\n", `f.yaml:4: network "a" has no setting "color"`},
		{"key twice", "networks:\n  a:\n    mtu: 1500\n    mtu: 1400\n", `f.yaml:4: network "a" has "mtu" twice, first in line 3`},
		{"network twice", "networks:\n  a:\n  A:\n", `f.yaml:3: network "a" stands twice, first in line 2`},
		{"bad subnet", "networks:\n  a:\n    subnets:\n      - 10.9.0.0/24\n      - 10.9.0.0/33\n", `f.yaml:5: `},
		{"subnets overlap", "networks:\n  a:\n    subnets: [10.9.0.0/24, 10.9.0.0/16]\n", `f.yaml:2: network "a": subnets 10.9.0.0/24 and 10.9.0.0/16 overlap`},
		{"gateway outside", "networks:\n  a:\n    subnets: [10.9.0.0/24]\n    gateways: [10.8.0.1]\n", `f.yaml:2: network "a": gateway: `},
		{"gateway is no address", "networks:\n  a:\n    gateways: [here]\n", `f.yaml:3: "here" is not an address`},
		{"mtu 67", "networks:\n  a: {mtu: 67}\n", `f.yaml:2: network "a": MTU 67 is out of range`},
		{"mtu 70000", "networks:\n  a: {mtu: 70000}\n", `f.yaml:2: network "a": MTU 70000 is out of range`},
		{"mtu is a word", "networks:\n  a:\n    mtu: big\n", `f.yaml:3: "big" is not a number of bytes`},
		{"mtu is a list", "networks:\n  a:\n    mtu: [1500]\n", `f.yaml:3: `},
		{"yes or no", "networks:\n  a:\n    internal: perhaps\n", `f.yaml:3: "perhaps" is not true or false`},
		{"vni", "networks:\n  a:\n    vni: -1\n", `f.yaml:3: "-1" is not a number from 1`},
		{"vni too large", "networks:\n  a:\n    vni: 16777216\n", `f.yaml:2: network "a": VNI 16777216 is out of range`},
		{"name", "networks:\n  a/b:\n", `f.yaml:2: network: name "a/b" is not a host name`},
		{"long name", "networks:\n  ? " + strings.Repeat("a", 5000) + "\n  :\n", `f.yaml:2: network: name "aaa`},
		{"wire", "networks:\n  a:\n    vni: 1\n    wire: geneve\n", `f.yaml:4: wire "geneve" is not known; use vxlan or patchbay`},
		{"wire without vni", "networks:\n  a:\n    wire: vxlan\n", `f.yaml:2: network "a": a wire is for a network on several hosts`},
		{"port", "networks:\n  a:\n    vni: 1\n    port: 65536\n", `f.yaml:4: "65536" is not a port from 1 to 65535`},
		{"port 0", "networks:\n  a:\n    vni: 1\n    port: 0\n", `f.yaml:4: "0" is not a port`},
		{"range", "networks:\n  a:\n    ipRange: some\n", `f.yaml:3: "some" is no range of addresses`},
		{"range outside", "networks:\n  a:\n    subnets: 10.9.0.0/24\n    ipRange: 10.8.0.0/25\n", `f.yaml:2: network "a": range 10.8.0.0/25 of addresses is in no subnet`},
		{"peers without vni", "networks:\n  a:\n    peers:\n      - b\n", `f.yaml:4: network "a" has peers and no vni`},
		{"peer", "networks:\n  a:\n    vni: 1\n    peers:\n      - b\n      - b:0\n", `f.yaml:6: peer "b:0" is none`},
		{"peer's setting", "networks:\n  a:\n    vni: 1\n    peers:\n      - host: b\n        port: 1\n", `f.yaml:6: a peer has no setting "port"; there are fdb, host, noOffload, onePort, wire`},
		{"peer without host", "networks:\n  a:\n    vni: 1\n    peers:\n      - wire: vxlan\n", `f.yaml:5: a peer has no host`},
		{"peer's MAC", "networks:\n  a:\n    vni: 1\n    peers:\n      - host: b\n        fdb: nonsense\n", `f.yaml:6: "nonsense" is no MAC`},
		{"peer's group MAC", "networks:\n  a:\n    vni: 1\n    peers:\n      - {host: b, fdb: \"01:00:00:00:00:01\"}\n", `f.yaml:5: peer "b": static entry 01:00:00:00:00:01 is no station's`},
		{"peer's wire", "networks:\n  a:\n    vni: 1\n    peers:\n      - host: b\n        wire: x\n", `f.yaml:6: wire "x" is not known`},
		{"peer twice", "networks:\n  a:\n    vni: 1\n    peers: [b, c, B]\n", `f.yaml:4: peer "b" stands twice, first in line 4`},
		{"resolver", "networks:\n  a:\n    dns: nowhere\n", `f.yaml:3: resolver "nowhere" is not the address of one`},
		{"rule without attachment", "publish:\n  - ports: 80:80\n", `f.yaml:2: a rule of publish has no attachment`},
		{"rule without ports", "publish:\n  - attachment: a\n", `f.yaml:2: a rule of publish has no ports`},
		{"port garbage", "publish:\n  - attachment: a\n    ports: [\"80:80\", nonsense]\n", `f.yaml:3: publish "nonsense"`},
		{"rule twice", "publish:\n  - {attachment: a, ports: \"80:80\"}\n  - {attachment: a, ports: \"80:80/tcp\"}\n", `f.yaml:3: ports 80:80/tcp of "a" are published twice, first in line 2`},
		{"rule's name", "publish:\n  - attachment: a/b\n    ports: 80:80\n", `f.yaml:2: name "a/b" is not a host name`},
		{"no mapping", "- a\n- b\n", `f.yaml:1: the file wants settings`},
		{"networks is a list", "networks:\n  - a\n", `f.yaml:2: networks wants settings`},
		{"not YAML", "networks:\n  a: [\n", `f.yaml:`},
		{"tab", "networks:\n\ta:\n", `f.yaml:2: not YAML: `},
		{"alias", "networks:\n  a: &x {mtu: 1500}\n  b: *x\n", `f.yaml:3: `},
		{"second document", "networks:\n---\nnetworks:\n", `f.yaml:`},
		{"too long", strings.Repeat("#", MaxSize+1), `f.yaml:1: the file is longer than`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := Parse("f.yaml", []byte(c.text))
			if err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 500 {
				t.Errorf("%+v, %v; want %s…", f, err, c.want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte(whole), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := Load(path); err != nil || len(f.Networks) != 3 {
		t.Errorf("%+v, %v", f, err)
	}
}

// FuzzParse holds that nothing panics, an error is one line that begins with the file's name, and what is accepted is valid.
func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("networks: {a: {mtu: 1}}"))
	f.Add([]byte("networks: {a: {vni: 1, port: 8472, subnets: 10.9.0.0/24, ipRange: 10.9.0.0/25, peers: [b, {host: 'c:1', fdb: '02:00:00:00:00:01'}]}}"))
	f.Add([]byte("publish: [{attachment: a, ports: '1:1'}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("f.yaml", b)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f.yaml:") || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q", err)
			}
			return
		}
		for _, n := range c.Networks {
			if err := n.Validate(); err != nil {
				t.Errorf("accepted an invalid network: %v", err)
			}
			for _, p := range n.Peers {
				if err := p.Validate(); err != nil || n.VNI == 0 {
					t.Errorf("accepted an invalid peer: %v", err)
				}
			}
		}
		for _, r := range c.Publish {
			if again, err := nat.ParseSpec(r.Spec.String()); err != nil || again != r.Spec {
				t.Errorf("rule %+v: %v", r, err)
			}
		}
	})
}
