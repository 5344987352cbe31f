package capture

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// samples are frames of every kind that filters tell apart.
func samples() (out [][]byte) {
	a4, b4 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.1.0.2")
	a6, b6 := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00:1::2")
	macs := []wire.MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, {1, 0, 0x5e, 0, 0, 0xfb}}
	ether := func(dst, src wire.MAC, typ uint16, body []byte) []byte {
		b := make([]byte, wire.EthernetLen, wire.EthernetLen+len(body))
		wire.PutEthernet(b, dst, src, typ)
		return append(b, body...)
	}
	ip := func(src, dst netip.Addr, proto uint8, l4 []byte, fragOff int) []byte {
		if src.Is4() {
			b := make([]byte, wire.IPv4Len, wire.IPv4Len+len(l4))
			wire.PutIPv4(b, src, dst, proto, 0, 64, wire.IPv4Len+len(l4), 7, false)
			if fragOff > 0 {
				b[7] = byte(fragOff / 8)
				b[10], b[11] = 0, 0
				sum := ^wire.Fold(wire.Sum(b, 0))
				b[10], b[11] = byte(sum>>8), byte(sum)
			}
			return append(b, l4...)
		}
		b := make([]byte, wire.IPv6Len, wire.IPv6Len+len(l4))
		wire.PutIPv6(b, src, dst, proto, 0, 64, len(l4))
		return append(b, l4...)
	}
	l4 := func(proto uint8, sport, dport uint16, flags byte) []byte {
		b := make([]byte, 60)
		b[0], b[1], b[2], b[3] = byte(sport>>8), byte(sport), byte(dport>>8), byte(dport)
		if proto == wire.ProtoTCP {
			b[12], b[13] = 5<<4, flags
		}
		return b
	}
	for _, pair := range [][2]netip.Addr{{a4, b4}, {b4, a4}, {a6, b6}, {b6, a6}} {
		typ, icmp := wire.EtherTypeIPv4, uint8(wire.ProtoICMP)
		if pair[0].Is6() {
			typ, icmp = wire.EtherTypeIPv6, wire.ProtoICMPv6
		}
		for _, ports := range [][2]uint16{{40000, 80}, {443, 40000}, {53, 53}, {85, 22}} {
			for _, flags := range []byte{2, 16, 18, 4} {
				out = append(out, ether(macs[0], macs[1], typ, ip(pair[0], pair[1], wire.ProtoTCP, l4(wire.ProtoTCP, ports[0], ports[1], flags), 0)))
			}
			out = append(out, ether(macs[1], macs[0], typ, ip(pair[0], pair[1], wire.ProtoUDP, l4(wire.ProtoUDP, ports[0], ports[1], 0), 0)))
		}
		for _, t := range []byte{0, 8, 3, 128, 135} {
			out = append(out, ether(macs[3], macs[0], typ, ip(pair[0], pair[1], icmp, append([]byte{t, 0}, make([]byte, 30)...), 0)))
		}
		out = append(out, ether(macs[0], macs[1], typ, ip(pair[0], pair[1], 47, make([]byte, 1200), 0)))
		if pair[0].Is4() {
			out = append(out, ether(macs[0], macs[1], typ, ip(pair[0], pair[1], wire.ProtoUDP, l4(wire.ProtoUDP, 80, 80, 0), 64))) // a later fragment
		}
	}
	arp := make([]byte, 28)
	wire.PutARP(arp, wire.ARP{Op: wire.ARPRequest, SenderMAC: macs[0], SenderIP: a4, TargetIP: b4})
	out = append(out, ether(macs[2], macs[0], wire.EtherTypeARP, arp), ether(wire.MAC{2, 0, 0, 0, 0, 9}, macs[1], 0x88cc, make([]byte, 50)))
	return out
}

// expressions that both tcpdump and this package understand alike, on frames without VLAN tags.
var expressions = []string{
	"tcp", "udp", "icmp", "icmp6", "ip", "ip6", "arp", "not arp", "! icmp", "tcp port 80", "port 80", "src port 443", "dst port 80", "port 80 or 443", "not port 53",
	"host 10.0.0.1", "src host 10.0.0.1", "dst 10.0.0.1", "net 10.0.0.0/8", "src net 10.1.0.0/16", "host fd00::1", "net fd00::/32", "ip6 host fd00::1", "arp host 10.0.0.1",
	"portrange 80-90", "udp portrange 50-60", "ether host 02:00:00:00:00:01", "ether src 02:00:00:00:00:01", "ether dst 02:00:00:00:00:02", "broadcast", "multicast", "ether multicast",
	"ip proto 47", "ip6 proto 47", "ether proto 0x88cc", "less 100", "greater 1000", "tcp and port 22 or udp", "tcp or udp and port 53", "(tcp or udp) and port 53", "not (tcp port 80)",
	"ip and tcp[tcpflags] & tcp-syn != 0", "ip and tcp[13] & 18 == 18", "ip and tcp[tcpflags] & (tcp-syn|tcp-ack) = tcp-syn", "icmp[icmptype] = icmp-echo", "icmp[0] != 8", "ip[8] = 64", "ether[0] & 1 = 1", "ip[2:2] > 500",
	"ip and udp[0:2] = 53", "src host 10.0.0.1 and dst port 80", "src or dst port 80", "src or dst host 10.0.0.1 and udp", "host 10.0.0.1 and not port 22", "host 10.0.0.1 && (port 80 || port 443)", "icmp or arp", "not tcp and not udp",
}

// TestAgainstTcpdump holds each expression against tcpdump's own compiler, frame by frame.
func TestAgainstTcpdump(t *testing.T) {
	tcpdump := testbed.Tool(t, "tcpdump")
	frames := samples()
	file := filepath.Join(t.TempDir(), "all.pcap")
	var b bytes.Buffer
	w := pcapgo.NewWriter(&b)
	if err := w.WriteFileHeader(1<<16, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for i, f := range frames {
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(int64(i), 0), CaptureLength: len(f), Length: len(f)}, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, e := range expressions {
		f, err := ParseFilter(e)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		cmd := testbed.AsOrdinaryUser(exec.Command(tcpdump, "-tt", "-n", "-r", file, e))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("tcpdump %q: %v: %s", e, err, &stderr)
		}
		theirs := map[int]bool{}
		for line := range strings.Lines(string(out)) {
			var sec int
			if n, _ := fmt.Sscanf(line, "%d.000000", &sec); n == 1 && line[0] != '\t' {
				theirs[sec] = true
			}
		}
		if len(theirs) == 0 || len(theirs) == len(frames) {
			t.Errorf("%q tells nothing apart: tcpdump takes %d of %d", e, len(theirs), len(frames))
		}
		for i, fr := range frames {
			if f.Match(fr) != theirs[i] {
				t.Errorf("%q, frame %d (% x…): ours %v, tcpdump %v", e, i, fr[:min(54, len(fr))], f.Match(fr), theirs[i])
				break
			}
		}
	}
}

func TestFilterErrors(t *testing.T) {
	for in, want := range map[string]string{
		"garbage here":            `at "garbage", byte 1: it is no primitive`,
		"tcp and":                 "at its end: a primitive is missing",
		"host":                    "at its end: it is not an address",
		"host example.org":        `at "example.org", byte 6: it is not an address; names are not looked up`,
		"port 99999":              `at "99999", byte 6: it is not a port`,
		"portrange 9-1":           `at "9-1", byte 11: it is not a portrange`,
		"net 10.0.0.0/40":         `at "10.0.0.0/40", byte 5: it is not a network`,
		"(tcp":                    "a closing parenthesis is missing",
		"tcp)":                    `at ")", byte 4: nothing can follow here`,
		"tcp[13 & 2 != 0":         "a closing bracket is missing",
		"tcp[13]":                 "a comparison is wanted here",
		"tcp[13:3] = 1":           "the size is 1, 2 or 4",
		"arp port 80":             "arp has no ports",
		"ether host 10.0.0.1":     "it is not a MAC",
		"less many":               "a number of bytes is wanted here",
		strings.Repeat("(", 100):  "nested more than",
		strings.Repeat("x", 5000): "at most 4096",
	} {
		_, err := ParseFilter(in)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 {
			t.Errorf("%.60q: %v; want …%s…", in, err, want)
		}
	}
}

func TestVLAN(t *testing.T) {
	plain := samples()[0]
	tagged := append(append(append([]byte{}, plain[:12]...), 0x81, 0, 0, 5), plain[12:]...)
	for e, want := range map[string][2]bool{"vlan": {false, true}, "vlan 5": {false, true}, "vlan 6": {false, false}, "tcp port 80": {true, true}, "vlan 5 and host 10.0.0.1": {false, true}} {
		f, err := ParseFilter(e)
		if err != nil || f.Match(plain) != want[0] || f.Match(tagged) != want[1] {
			t.Errorf("%q: %v %v, %v", e, f.Match(plain), f.Match(tagged), err)
		}
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	f, err := ParseFilter("tcp port 80 and host 10.0.0.1 or tcp[tcpflags] & tcp-syn != 0")
	if err != nil {
		t.Fatal(err)
	}
	fr := samples()[0]
	if n := testing.AllocsPerRun(100, func() { f.Match(fr) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzFilter holds that no expression and no frame makes it panic, and that errors are one line.
func FuzzFilter(f *testing.F) {
	for _, e := range expressions {
		f.Add(e, samples()[0])
	}
	f.Add("tcp[13:", []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, expr string, data []byte) {
		m, err := ParseFilter(expr)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\r") || len(err.Error()) > 1500 {
				t.Errorf("error %q", err)
			}
			return
		}
		m.Match(data)
	})
}
