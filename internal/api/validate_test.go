package api

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// check decodes text as the server would and validates it.
func check[T any, P interface {
	*T
	Validate() error
}](text string) error {
	v := P(new(T))
	if err := decodeStrict([]byte(text), v); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	return v.Validate()
}

type verdict struct{ text, want string } // want "" is valid

func verify(t *testing.T, check func(string) error, list []verdict) {
	t.Helper()
	for _, c := range list {
		err := check(c.text)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", abbreviate(c.text), err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", abbreviate(c.text), err, c.want)
		case err != nil && !strings.HasPrefix(err.Error(), "decode: ") && (CodeOf(err) != CodeInvalid || asError(err).Remedy == ""):
			t.Errorf("%s: code %s, remedy %q", abbreviate(c.text), CodeOf(err), asError(err).Remedy)
		}
	}
}

func TestNetworkSpec(t *testing.T) {
	verify(t, check[NetworkSpec], []verdict{
		{`{"name":"lan"}`, ""},
		{`{"name":"LAN-2","subnets":["10.1.0.0/16","fd00:1::/64"],"gateways":["10.1.0.1","fd00:1::1"],"mtu":65521,"vni":16777215,"dns":["9.9.9.9:53","[2620:fe::fe]:53"],"isolate":true}`, ""},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"mtu":576}`, ""},
		{`{"name":"lan","mtu":576}`, ""},
		{`{"name":"lan","internal":true,"subnets":["fd00:1::/64"],"mtu":1280}`, ""},
		{`{"name":"a/b"}`, `network: name "a/b" is not a host name; use 1 to 63 letters, digits and hyphens, not starting or ending with a hyphen`},
		{`{"name":"-a"}`, "not a host name"},
		{`{"name":"a."}`, "not a host name"},
		{`{"name":"ä"}`, "not a host name"},
		{`{"name":"` + strings.Repeat("a", 64) + `"}`, "not a host name"},
		{`{"name":"a b"}`, "not a host name"},
		{`{"name":"lan","subnets":["10.1.0.0/16","10.1.2.0/24"]}`, "subnets 10.1.0.0/16 and 10.1.2.0/24 overlap; give at most one IPv4 and one IPv6 subnet"},
		{`{"name":"lan","subnets":["10.1.0.0/16","10.1.0.0/16"]}`, "overlap"},
		{`{"name":"lan","subnets":["10.1.0.0/16","10.2.0.0/16"]}`, "are of the same IP version"},
		{`{"name":"lan","subnets":["fd00:1::/64","10.2.0.0/16","fd00:2::/64"]}`, "are of the same IP version"},
		{`{"name":"lan","subnets":["10.1.0.5/16"]}`, "host bits"},
		{`{"name":"lan","subnets":["10.1.0.0/31"]}`, "too small"},
		{`{"name":"lan","subnets":["127.0.0.0/8"]}`, "loopback"},
		{`{"name":"lan","subnets":["::ffff:10.0.0.0/104"]}`, "subnet"},
		{`{"name":"lan","subnets":[""]}`, "subnet"},
		{`{"name":"lan","gateways":["10.1.0.1"]}`, "the network has no subnet"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":["10.2.0.1"]}`, "not in 10.1.0.0/16"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":["fd00::1"]}`, "not in 10.1.0.0/16"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":["10.1.0.0"]}`, "address of the subnet itself"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":["10.1.255.255"]}`, "broadcast"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":["10.1.0.1","10.1.0.2"]}`, "on the same subnet"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"gateways":[""]}`, "gateway"},
		{`{"name":"lan","mtu":67}`, "MTU 67 is out of range"},
		{`{"name":"lan","mtu":70000}`, "MTU 70000 is out of range"},
		{`{"name":"lan","mtu":-1}`, "MTU -1 is out of range"},
		{`{"name":"lan","subnets":["fd00:1::/64"],"mtu":1279}`, "too small for IPv6"},
		{`{"name":"lan","vni":16777216}`, "VNI 16777216 is out of range; take one from 1 to 16777215"},
		{`{"name":"lan","vni":4294967296}`, `decode: field "vni"`},
		{`{"name":"lan","dns":["9.9.9.9"]}`, "decode"},
		{`{"name":"lan","dns":["9.9.9.9:0"]}`, "cannot be asked"},
		{`{"name":"lan","dns":["0.0.0.0:53"]}`, "cannot be asked"},
		{`{"name":"lan","dns":["224.0.0.1:53"]}`, "cannot be asked"},
		{`{"name":"lan","dns":[""]}`, "cannot be asked"},
		{`{"name":"lan","dns":[` + strings.Repeat(`"9.9.9.9:53",`, 16) + `"9.9.9.9:53"]}`, "17 resolvers are too many"},
		{`{"name":"lan","internal":true,"dns":["9.9.9.9:53"]}`, "an internal network reaches no resolver"},
		{`{"name":"lan","internal":true,"hostLoopback":true}`, "an internal network"},
		{`{"name":"lan","vni":7,"wire":"patchbay","seal":true,"port":8472,"subnets":["10.1.0.0/16","fd00:1::/64"],"ipRanges":["10.1.4.0/22","fd00:1::1:0/112"]}`, ""},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"ipRanges":["10.1.0.0/16"]}`, ""},
		{`{"name":"lan","vni":7,"subnets":["10.1.0.0/16","fd00:1::/64"],"ipRanges":["10.1.4.0/22"]}`, "subnet fd00:1::/64 has no range, and another one has"},
		{`{"name":"lan","vni":7,"wire":"geneve"}`, `wire "geneve" is not known; use vxlan or patchbay`},
		{`{"name":"lan","wire":"vxlan"}`, "a wire is for a network on several hosts; give it a VNI too"},
		{`{"name":"lan","vni":7,"group":"239.1.1.1%eth0"}`, ""},
		{`{"name":"lan","vni":7,"group":"ff05::1%eth0"}`, ""},
		{`{"name":"lan","vni":7,"group":"239.1.1.1"}`, "ADDR%IFACE"},
		{`{"name":"lan","vni":7,"group":"10.1.1.1%eth0"}`, "ADDR%IFACE"},
		{`{"name":"lan","vni":7,"group":"239.1.1.1%a/b"}`, "ADDR%IFACE"},
		{`{"name":"lan","vni":7,"group":"239.1.1.1%eth0","seal":true}`, "leave one of them out"},
		{`{"name":"lan","group":"239.1.1.1%eth0"}`, "a group is for a network on several hosts"},
		{`{"name":"lan","seal":true}`, "seal is for a network on several hosts"},
		{`{"name":"lan","port":4789}`, "a port is for a network on several hosts"},
		{`{"name":"lan","vni":7,"port":65536}`, `decode: field "port"`},
		{`{"name":"lan","ipRanges":["10.1.0.0/24"]}`, "range 10.1.0.0/24 of addresses is in no subnet that was given; give the subnet too"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"ipRanges":["10.2.0.0/24"]}`, "is in no subnet"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"ipRanges":["10.0.0.0/8"]}`, "is in no subnet"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"ipRanges":["10.1.0.1/24"]}`, "range 10.1.0.1/24 of addresses is none"},
		{`{"name":"lan","subnets":["10.1.0.0/16"],"ipRanges":["10.1.0.0/24","10.1.1.0/24"]}`, "are of the same IP version"},
	})
}

func TestAttachmentSpec(t *testing.T) {
	list := func(n int, f func(int) string) string {
		var s []string
		for i := range n {
			s = append(s, `"`+f(i)+`"`)
		}
		return strings.Join(s, ",")
	}
	verify(t, check[AttachmentSpec], []verdict{
		{`{"lifetime":"session"}`, ""},
		{`{"lifetime":"namespace","name":"web","aliases":["www","Web-2"],"ifname":"eth0.7","addrs":["10.1.0.5","fd00::5"],"mac":"02:00:00:00:00:01","publish":["8080:80"],"rate":1,"stormLimit":1,"macLimit":1,"trust":true,"device":"packet","queues":64,"hostname":"web.example","pid":7,"netns":"/run/netns/x"}`, ""},
		{`{"lifetime":"stream","stream":"/run/vm.sock","device":"auto","queues":1,"mac":"02:00:00:00:00:01"}`, ""},
		{`{}`, "no lifetime is given; use session, namespace or stream"},
		{`{"lifetime":"Session"}`, `lifetime "Session" is not known`},
		{`{"lifetime":"session","name":"a/b"}`, `attachment "a/b": name "a/b" is not a host name`},
		{`{"lifetime":"session","name":"` + strings.Repeat("x", 200000) + `"}`, "x…"},
		{`{"lifetime":"session","name":"Gateway"}`, `name "gateway" is the gateway's; choose another`},
		{`{"lifetime":"session","aliases":["a","b_c"]}`, `name "b_c"`},
		{`{"lifetime":"session","name":"a","aliases":["b","A"]}`, `name "a" is given twice`},
		{`{"lifetime":"session","aliases":[` + list(65, func(i int) string { return fmt.Sprint("a", i) }) + `]}`, "65 aliases are too many"},
		{`{"lifetime":"session","ifname":"sixteen-bytes-xx"}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":"a/b"}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":"a b"}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":"eth%d"}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":".."}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":"a\u0000b"}`, "is none that Linux takes"},
		{`{"lifetime":"session","ifname":"é"}`, "is none that Linux takes"},
		{`{"lifetime":"session","addrs":["10.1.0.5","10.1.0.6"]}`, "are of the same IP version"},
		{`{"lifetime":"session","addrs":["fe80::1%eth0"]}`, "is no container's"},
		{`{"lifetime":"session","addrs":["::ffff:10.0.0.1"]}`, "is no container's"},
		{`{"lifetime":"session","addrs":["127.0.0.1"]}`, "is no container's"},
		{`{"lifetime":"session","addrs":["224.0.0.1"]}`, "is no container's"},
		{`{"lifetime":"session","addrs":["0.0.0.0"]}`, "is no container's"},
		{`{"lifetime":"session","addrs":[""]}`, "is no container's"},
		{`{"lifetime":"session","mac":"01:00:00:00:00:01"}`, "is a group address"},
		{`{"lifetime":"session","mac":"02:00:00:00:00:00:00:01"}`, "decode: MAC address"},
		{`{"lifetime":"session","publish":["8080:80",""]}`, `publish "" is no port specification`},
		{`{"lifetime":"session","publish":["` + strings.Repeat("8", 300) + `"]}`, "is no port specification"},
		{`{"lifetime":"session","publish":[` + list(257, func(i int) string { return fmt.Sprint(1024+i, ":80") }) + `]}`, "257 published ports are too many"},
		{`{"lifetime":"session","rate":-1}`, "a limit is negative (rate -1"},
		{`{"lifetime":"session","stormLimit":-1}`, "a limit is negative"},
		{`{"lifetime":"session","macLimit":-1}`, "a limit is negative"},
		{`{"lifetime":"session","queues":65}`, "65 queues; take 1 to 64"},
		{`{"lifetime":"session","queues":-1}`, "-1 queues"},
		{`{"lifetime":"session","device":"tun"}`, `device "tun" is not known; use auto, tap or packet`},
		{`{"lifetime":"session","hostname":"a..b"}`, `host name "a..b"`},
		{`{"lifetime":"session","hostname":"` + strings.Repeat("a.", 40) + `a"}`, "is too long"},
		{`{"lifetime":"session","pid":-7}`, "pid -7 is none"},
		{`{"lifetime":"session","netns":"blue"}`, `netns path "blue" means nothing to another process`},
		{`{"lifetime":"session","netns":"/run/` + strings.Repeat("x", 5000) + `"}`, "is longer than 4095"},
		{`{"lifetime":"session","stream":"/run/vm.sock"}`, "has no meaning with lifetime session"},
		{`{"lifetime":"stream"}`, "without a stream socket"},
		{`{"lifetime":"stream","stream":"vm.sock"}`, "means nothing to another process"},
		{`{"lifetime":"stream","stream":"/run/` + strings.Repeat("x", 108) + `"}`, "is longer than 107"},
		{`{"lifetime":"stream","stream":"/s","pid":7}`, "has no namespace"},
		{`{"lifetime":"stream","stream":"/s","ifname":"eth0"}`, "has no namespace"},
		{`{"lifetime":"stream","stream":"/s","device":"tap"}`, "has no namespace"},
	})
}

func TestPeerSpec(t *testing.T) {
	verify(t, check[PeerSpec], []verdict{
		{`{"host":"b"}`, ""},
		{`{"host":"b_1.example.test","port":8472,"wire":"vxlan","noOffload":true,"onePort":true,"fdb":["02:00:00:00:00:01","02:00:00:00:00:02"]}`, ""},
		{`{"host":"192.0.2.7"}`, ""}, {`{"host":"2001:db8::7"}`, ""}, {`{"host":"fe80::1%eth0"}`, ""},
		{`{}`, `peer "": host "" is no name of one; give a name such as b.example.test, or an address`},
		{`{"host":"b:4789"}`, `host "b:4789" is no name of one`},
		{`{"host":"[2001:db8::7]"}`, "is no name of one"}, {`{"host":"a b"}`, "is no name of one"}, {`{"host":"a..b"}`, "is no name of one"}, {`{"host":"300.1.2.3"}`, "is no name of one"},
		{`{"host":"` + strings.Repeat("a.", 127) + `a"}`, "is no name of one"},
		{`{"host":"0.0.0.0"}`, "address 0.0.0.0 is no host's"}, {`{"host":"::"}`, "is no host's"}, {`{"host":"239.1.1.1"}`, "is no host's"}, {`{"host":"255.255.255.255"}`, "is no host's"},
		{`{"host":"::ffff:192.0.2.7"}`, "is no host's"}, {`{"host":"fe80::1%a b"}`, "is no host's"}, {`{"host":"2001:db8::1%eth0"}`, "is no host's"}, {`{"host":"fe80::1%a\nb"}`, "is no host's"},
		{`{"host":"b","wire":"Vxlan"}`, `wire "Vxlan" is not known`}, {`{"host":"b","port":-1}`, `decode: field "port"`},
		{`{"host":"b","fdb":["01:00:5e:00:00:01"]}`, "static entry 01:00:5e:00:00:01 is no station's"},
		{`{"host":"b","fdb":["02:00:00:00:00:01","02:00:00:00:00:01"]}`, "is given twice"},
		{`{"host":"b","network":"lan"}`, "decode"},
	})
	verify(t, check[FDBSpec], []verdict{{`{"mac":"02:00:00:00:00:01"}`, ""}, {`{}`, "is no station's"}, {`{"mac":"ff:ff:ff:ff:ff:ff"}`, "is no station's"}, {`{"mac":"x"}`, "decode"}})
}

// TestParsePeer reads what people write, and what PeerRef does.
func TestParsePeer(t *testing.T) {
	for in, want := range map[string]string{
		"b": "b", "B.Example.Test.": "b.example.test", "b:8472": "b:8472", "192.0.2.7": "192.0.2.7", "192.0.2.7:1": "192.0.2.7:1", "2001:db8:0::7": "2001:db8::7", "[2001:db8::7]": "2001:db8::7",
		"[2001:db8::7]:4789": "[2001:db8::7]:4789", "::ffff:192.0.2.7": "192.0.2.7", "fe80::1%eth0": "fe80::1%eth0",
		"": "", "b:": "", ":4789": "", "b:0": "", "b:65536": "", "b:x": "", "[b]:1:2": "", "a b": "", "b:4789:1": "", "0.0.0.0": "", "224.0.0.1:4789": "", "1.2.3": "", "-b": "", "b/c": "",
	} {
		host, port, err := ParsePeer(in)
		switch {
		case want == "" && (err == nil || asError(err).Remedy == ""):
			t.Errorf("%q: %q %d, %v; want a refusal", in, host, port, err)
		case want != "" && (err != nil || PeerRef(host, port) != want):
			t.Errorf("%q: %q, %v; want %q", in, PeerRef(host, port), err, want)
		}
	}
}

func TestOtherSpecs(t *testing.T) {
	verify(t, check[PublishSpec], []verdict{{`{"spec":"[::1]:8080-8090:80-90/udp"}`, ""}, {`{}`, "no port specification"}, {`{"spec":"80:80\n"}`, "no port specification"}, {`{"spec":"８０:80"}`, "no port"}})
	verify(t, check[CaptureSpec], []verdict{
		{`{"attachment":"gateway","filter":"tcp port 80","snaplen":262144,"count":1}`, ""}, {`{}`, ""},
		{`{"attachment":"a/b"}`, "not a host name"}, {`{"snaplen":262145}`, "262145 bytes of each frame; take 1 to 262144"}, {`{"snaplen":-1}`, "-1 bytes"}, {`{"count":-1}`, "-1 frames"},
		{`{"filter":"a\u0000b"}`, "no tcpdump expression"},
	})
}

func TestParseResolver(t *testing.T) {
	for in, want := range map[string]string{
		"9.9.9.9": "9.9.9.9:53", "9.9.9.9:5353": "9.9.9.9:5353", "2620:fe::fe": "[2620:fe::fe]:53", "[2620:fe::fe]:5353": "[2620:fe::fe]:5353",
		"": "", "dns.example": "", "9.9.9.9:0": "", "0.0.0.0": "", "ff02::1": "", "9.9.9.9:99999": "", "[9.9.9.9]": "",
	} {
		got, err := ParseResolver(in)
		if want == "" {
			if CodeOf(err) != CodeInvalid || got.IsValid() {
				t.Errorf("%q: %v, %v", in, got, err)
			}
		} else if err != nil || got.String() != want {
			t.Errorf("%q: %v, %v, want %s", in, got, err, want)
		}
	}
}

// FuzzSpecs: whatever a client sends is decoded and valid, or an error of one line; and what is valid stays so when it is written and read again, as the state file does.
func FuzzSpecs(f *testing.F) {
	for _, s := range []string{
		`{"name":"lan","subnets":["10.1.0.0/16","fd00:1::/64"],"gateways":["10.1.0.1"],"mtu":1400,"vni":7,"dns":["9.9.9.9:53"]}`,
		`{"lifetime":"namespace","name":"web","aliases":["www"],"ifname":"eth0","addrs":["10.1.0.5"],"mac":"02:00:00:00:00:01","publish":["8080:80"],"hostname":"a.b","netns":"/x"}`,
		`{"lifetime":"stream","stream":"/s"}`, `{"spec":"8080:80"}`, `{"host":"b","port":8472,"wire":"patchbay","fdb":["02:00:00:00:00:01"]}`, `{"filter":"tcp","snaplen":96,"count":1}`, `{"name":"x"} `, `[{}]`, "{\"name\":\"\xff\"}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, fresh := range []func() validator{
			func() validator { return new(NetworkSpec) }, func() validator { return new(AttachmentSpec) },
			func() validator { return new(PublishSpec) }, func() validator { return new(CaptureSpec) },
			func() validator { return new(PeerSpec) }, func() validator { return new(FDBSpec) },
		} {
			v := fresh()
			err := decodeStrict(b, v)
			if err == nil {
				err = v.Validate()
			}
			if err != nil {
				if strings.ContainsAny(err.Error(), "\n\r\x00") || len(err.Error()) > 1000 {
					t.Errorf("%T: an error of more than a line: %q", v, err)
				}
				continue
			}
			out, err := json.Marshal(v)
			if err != nil {
				t.Fatalf("%T: %v", v, err)
			}
			w := fresh()
			if err := decodeStrict(out, w); err != nil {
				t.Fatalf("%T: %s: %v", v, out, err)
			}
			if err := w.Validate(); err != nil {
				t.Errorf("%T: valid, but not when written and read again: %s: %v", v, out, err)
			}
		}
	})
}

// FuzzParsePeer: what is taken for a peer is valid, and reads the same again.
func FuzzParsePeer(f *testing.F) {
	for _, s := range []string{"b", "b:8472", "[2001:db8::7]:4789", "::ffff:192.0.2.7", "fe80::1%eth0", "B.test.", "[::1%25]:1", "1.2.3:4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := ParsePeer(s)
		if err != nil {
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 600 {
				t.Errorf("error %q", err)
			}
			return
		}
		if err := (&PeerSpec{Host: host, Port: port}).Validate(); err != nil {
			t.Errorf("%q: %v", s, err)
		}
		if h, p, err := ParsePeer(PeerRef(host, port)); err != nil || h != host || p != port {
			t.Errorf("%q is %q, which is %q %d, %v", s, PeerRef(host, port), h, p, err)
		}
	})
}
