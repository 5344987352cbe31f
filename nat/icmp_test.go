package nat

import (
	"encoding/binary"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/stack"
)

// ping runs ping in the container and returns what it printed.
func (b *bed) ping(t *testing.T, args ...string) string {
	t.Helper()
	out, _ := b.c.Command(testbed.Tool(t, "ping"), append([]string{"-n"}, args...)...).CombinedOutput()
	return string(out)
}

func TestPing(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	b := newBed(t, Config{})
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		got := b.ping(t, "-c3", "-i0.05", "-W2", out.String())
		if !strings.Contains(got, " 3 received") || !strings.Contains(got, "ttl=63") {
			t.Errorf("want 3 replies with the real TTL, less one hop:\n%s", got)
		}
		// Larger than the network's MTU: the reply comes back in fragments. The request is handed over whole, as the gateway does it.
		for _, n := range []int{1473, 4000, 65000} {
			k := b.rawPing(t, c)
			b.ICMP().HandlePackets([]stack.Packet{echoPacket(c, out, 77, pattern(n))})
			k(n)
		}
	})
}

// rawPing counts the bytes of echo replies that the NAT sends: the returned function waits for n bytes of echo data behind the 8 of the header.
func (b *bed) rawPing(t *testing.T, c netip.Addr) func(n int) {
	got := make(chan int, 100)
	b.net.watch(func(f *frame.Frame) {
		ip, ok := wire.ParseIP(f.Data[wire.EthernetLen:], false)
		if !ok || ip.Dst != c || len(f.Data) > 1514 {
			t.Errorf("bad frame of %d bytes", len(f.Data))
			return
		}
		got <- ip.Len - ip.HdrLen
	})
	return func(n int) {
		t.Helper()
		defer b.net.watch(nil)
		for sum := 0; sum < n+8; {
			select {
			case k := <-got:
				sum += k
			case <-time.After(3 * time.Second):
				t.Fatalf("%d bytes of a reply of %d came", sum, n)
			}
		}
	}
}

// echoPacket is an echo request as the gateway hands it over.
func echoPacket(src, dst netip.Addr, id uint16, data []byte) stack.Packet {
	hdr, proto, typ := wire.IPv4Len, wire.ProtoICMP, byte(8)
	var acc uint64
	n := wire.ICMPLen + len(data)
	if src.Is6() {
		hdr, proto, typ = wire.IPv6Len, wire.ProtoICMPv6, 128
		acc = wire.PseudoSum(src, dst, proto, n)
	}
	b := make([]byte, wire.EthernetLen+hdr+n)
	putIP(b[wire.EthernetLen:], src, dst, proto, 0, 64, n, 1, false)
	m := b[wire.EthernetLen+hdr:]
	m[0] = typ
	binary.BigEndian.PutUint16(m[4:], id)
	copy(m[wire.ICMPLen:], data)
	binary.BigEndian.PutUint16(m[2:], ^wire.Fold(wire.Sum(m, acc)))
	p := stack.Packet{Frame: frame.Frame{Data: b}, L3: wire.EthernetLen}
	p.IP, _ = wire.ParseIP(b[p.L3:], false)
	return p
}

// An address that does not answer stays silent: no reply is ever made up.
func TestPingUnanswered(t *testing.T) {
	testbed.RequirePing(t)
	b := newBed(t, Config{})
	b.out.Uplink(t)
	// The machine outside takes packets for these and says nothing.
	for _, dst := range []string{"203.0.113.9", "2001:db8:ffff::9"} {
		got := b.ping(t, "-c2", "-i0.1", "-W1", dst)
		if !strings.Contains(got, " 0 received") || strings.Contains(got, "bytes from") || strings.Contains(got, "rom 10.88") {
			t.Errorf("%s:\n%s", dst, got)
		}
	}
}

// ICMP errors about echo requests come back to ping: a router's time exceeded, and unreachable.
func TestPingErrors(t *testing.T) {
	testbed.RequirePing(t)
	b := newBed(t, Config{})
	b.out.Uplink(t)
	testbed.Sysctl(t, b.out.NS, "net/ipv4/ip_forward", "1")
	testbed.Sysctl(t, b.out.NS, "net/ipv6/conf/all/forwarding", "1")
	b.versions(func(t *testing.T, c, host, out netip.Addr) {
		far, noRoute := "203.0.113.9", "203.0.113.77"
		if c.Is6() {
			far, noRoute = "2001:db8:ffff::9", "2001:db8:fffe::9"
		}
		got := b.ping(t, "-c1", "-W2", "-t2", far)
		if !regexp.MustCompile(`From ` + regexp.QuoteMeta(out.String()) + `:? icmp_seq=1 Time (to live )?exceeded`).MatchString(got) {
			t.Errorf("TTL 2: want time exceeded from %v:\n%s", out, got)
		}
		addUnreachable(t, b.out.NS, noRoute)
		got = b.ping(t, "-c1", "-W2", noRoute)
		if !strings.Contains(got, "From "+out.String()) || !strings.Contains(strings.ToLower(got), "unreachable") && !strings.Contains(got, "No route") {
			t.Errorf("want unreachable from %v:\n%s", out, got)
		}
	})
}

func addUnreachable(t *testing.T, ns *testbed.NS, dst string) {
	t.Helper()
	if o, err := ns.Command(testbed.Tool(t, "ip"), "route", "add", "unreachable", dst).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, o)
	}
}

// Where the host forbids ping sockets the container is told so, and nothing is invented.
func TestPingForbidden(t *testing.T) {
	b := newBed(t, Config{})
	var err error
	b.c.Do(func() {
		// A fresh namespace forbids them to everybody; Do puts the thread back.
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			b.ICMP().HandlePackets([]stack.Packet{echoPacket(bedC4, b.out.Addr4, 1, []byte("x")), echoPacket(bedC6, b.out.Addr6, 1, []byte("x"))})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := b.Drops().Get(frame.DropPingForbidden); n != 2 {
		t.Errorf("ping-forbidden counts %d, want 2", n)
	}
	if n := b.net.refusals(stack.UnreachProhibited); n != 2 {
		t.Errorf("%d of 2 answered as prohibited", n)
	}
	if n := b.NAT.icmp.flows.quota.inUse(); n != 0 {
		t.Errorf("%d flows are held", n)
	}
}

func TestPingPolicyAndLimits(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	k := newTestClock()
	b := newBed(t, Config{Clock: k.now, Limits: Limits{PingFlows: 10, PingFlowsPerContainer: 3}})
	for i := range uint16(5) {
		b.ICMP().HandlePackets([]stack.Packet{echoPacket(bedC4, b.out.Addr4, 100+i, []byte("x"))})
	}
	if n, d := b.NAT.icmp.flows.quota.inUse(), b.Drops().Get(frame.DropFlowLimit); n != 3 || d != 2 {
		t.Errorf("%d flows and %d dropped, want 3 and 2", n, d)
	}
	testbed.Eventually(t, 3*time.Second, func() bool { return b.dev.Stats().TxFrames == 3 }) // the replies
	k.advance(61 * time.Second)                                                              // RFC 5508 REQ-2
	b.sweep()
	if n := b.NAT.icmp.flows.quota.inUse(); n != 0 {
		t.Errorf("%d flows after a minute of silence", n)
	}
	for dst, drop := range map[string]frame.Drop{"10.88.0.254": frame.DropPolicyLoopback, "169.254.169.254": frame.DropPolicyMetadata, "224.0.0.1": frame.DropPolicyAddress} {
		b.ICMP().HandlePackets([]stack.Packet{echoPacket(bedC4, netip.MustParseAddr(dst), 1, []byte("x"))})
		if b.Drops().Get(drop) == 0 {
			t.Errorf("ping %s: %s does not count", dst, drop)
		}
	}
	if n := b.net.refusals(stack.UnreachProhibited); n != 3 {
		t.Errorf("%d of 3 refusals answered", n)
	}
}
