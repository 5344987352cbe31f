package tap

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// transfer sends size random bytes over TCP from ns a to addr in ns b and compares what arrives.
func transfer(t testing.TB, a, b *testbed.NS, addr string, size int) {
	t.Helper()
	l, err := b.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan [sha256.Size]byte, 1)
	go func() {
		h := sha256.New()
		if c, err := l.Accept(); err == nil {
			c.SetDeadline(time.Now().Add(20 * time.Second))
			io.Copy(h, c)
			c.Close()
		}
		got <- [sha256.Size]byte(h.Sum(nil))
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := a.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	data := make([]byte, size)
	rand.Read(data)
	if _, err := c.Write(data); err != nil {
		t.Fatalf("%s: %v", l.Addr(), err)
	}
	c.(*net.TCPConn).CloseWrite()
	if <-got != sha256.Sum256(data) {
		t.Errorf("%s: what arrived is not what was sent", l.Addr())
	}
}

// datagrams sends n UDP datagrams of up to size bytes from ns a to addr in ns b, a few at a time, and waits for each.
func datagrams(t testing.TB, a, b *testbed.NS, addr string, n, size int) {
	t.Helper()
	pc, err := b.ListenPacket("udp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c, err := a.DialContext(t.Context(), "udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data, buf := make([]byte, size), make([]byte, size+1)
	rand.Read(data)
	const burst = 16
	for i := 0; i < n; i += burst {
		length := func(j int) int { return (i+j)*(size/n) + 1 }
		for j := range burst {
			if _, err := c.Write(data[:length(j)]); err != nil {
				t.Fatal(err)
			}
		}
		for j := range burst {
			pc.SetReadDeadline(time.Now().Add(3 * time.Second))
			if m, _, err := pc.ReadFrom(buf); err != nil || !bytes.Equal(buf[:m], data[:length(j)]) {
				t.Fatalf("%s: datagram %d: %d bytes, %v", addr, i+j, m, err)
			}
		}
	}
}

func ping(t testing.TB, ns *testbed.NS, addr string, args ...string) {
	t.Helper()
	out, err := ns.Command(testbed.Tool(t, "ping"), append([]string{"-c", "3", "-i", "0.02", "-W", "2", addr}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("ping %s %v: %v\n%s", addr, args, err, out)
	}
}

// counters is the receiving kernel's own count of what it found wrong.
func counters(t testing.TB, ns *testbed.NS, names ...string) string {
	t.Helper()
	out, err := ns.Command(testbed.Tool(t, "nstat"), append([]string{"-asz"}, names...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("nstat: %v: %s", err, out)
	}
	var bad []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) >= 2 && !strings.HasPrefix(line, "#") && f[1] != "0" {
			bad = append(bad, line)
		}
	}
	return strings.Join(bad, "")
}

// exchange sends size bytes of TCP each way, datagrams and fragments, over both protocols, and sees to it that neither the Devices nor the
// kernels count anything amiss.
func (p *pair) exchange(t testing.TB, mtu, size int) {
	t.Helper()
	for _, addr := range []string{"10.1.0.2", "fd01::2"} {
		ping(t, p.a, addr)
		ping(t, p.a, addr, "-s", fmt.Sprint(mtu-48), "-M", "do")
		ping(t, p.a, addr, "-s", "20000") // fragments
		transfer(t, p.a, p.b, addr, size)
		transfer(t, p.b, p.a, addr[:len(addr)-1]+"1", size)
		datagrams(t, p.a, p.b, addr, 300, mtu-48)
	}
	for _, d := range []*Device{p.da, p.db} {
		d.Drops().Each(func(r frame.Drop, n uint64) { t.Errorf("%d drops: %v", n, r) })
	}
	for _, ns := range []*testbed.NS{p.a, p.b} {
		if bad := counters(t, ns, "TcpInErrs", "TcpExtTCPRcvCoalesceErr", "UdpInCsumErrors", "Udp6InCsumErrors", "TcpInCsumErrors", "IpInHdrErrors", "Ip6InHdrErrors", "IpReasmFails", "Ip6ReasmFails"); bad != "" {
			t.Errorf("the kernel counts errors:\n%s", bad)
		}
	}
}

// Real kernels talk through two TAPs: each kind of device on each side, MTU 1500 and 9000, IPv4 and IPv6.
func TestTraffic(t *testing.T) {
	testbed.Leaks(t)
	vnet, plain := OpenConfig{}, OpenConfig{Plain: true}
	for _, c := range []struct {
		name   string
		a, b   OpenConfig
		mtu    int
		supers bool // superframes cross from a to b
	}{
		{"offload", vnet, vnet, 1500, true},
		{"offload 9000", vnet, vnet, 9000, true},
		{"queues", OpenConfig{Queues: 2}, OpenConfig{Queues: 3}, 1500, true},
		{"offload to plain", vnet, plain, 1500, true},
		{"plain to offload", plain, vnet, 1500, false},
		{"plain", plain, plain, 1500, false},
		{"plain queues", OpenConfig{Plain: true, Queues: 2}, plain, 9000, false},
		{"checksum only", OpenConfig{Without: frame.CapAll &^ frame.CapCsum}, OpenConfig{Without: frame.CapAll &^ frame.CapCsum}, 1500, false},
		{"packet", OpenConfig{Kind: KindPacket}, OpenConfig{Kind: KindPacket}, 1500, true},
		{"packet 9000", OpenConfig{Kind: KindPacket}, OpenConfig{Kind: KindPacket}, 9000, true},
		{"packet to offload", OpenConfig{Kind: KindPacket}, vnet, 1500, true},
		{"plain to packet", plain, OpenConfig{Kind: KindPacket}, 1500, false},
		{"packet to plain", OpenConfig{Kind: KindPacket}, plain, 1500, true},
		{"offload to none", vnet, OpenConfig{Without: frame.CapAll}, 1500, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, c.a, c.b, c.mtu)
			size := 24 << 20
			if testing.Short() {
				size = 4 << 20
			}
			p.exchange(t, c.mtu, size)
			if got := p.ab.supers.Load() > 0; got != c.supers {
				t.Errorf("superframes crossed: %v, want %v", got, c.supers)
			}
			if long := uint64(wire.EthernetLen + c.mtu); c.supers && p.ab.maxLen.Load() < 4*long || !c.supers && p.ab.maxLen.Load() > long {
				t.Errorf("the longest frame had %d bytes at MTU %d", p.ab.maxLen.Load(), c.mtu)
			}
			if vnet := p.da.Caps() != 0; vnet != (p.ab.csum.Load() > 0) {
				t.Errorf("frames with a checksum to finish: %d", p.ab.csum.Load())
			}
			a, b := p.da.Stats(), p.db.Stats()
			if a.RxFrames != p.ab.frames.Load() || a.RxFrames != b.TxFrames || b.RxFrames != a.TxFrames || b.TxBytes == 0 {
				t.Errorf("counters: a %+v b %+v, forwarded %d and %d", a, b, p.ab.frames.Load(), p.ba.frames.Load())
			}
		})
	}
}

// A UDP superframe, which only an application that asks for it sends, crosses whole and comes out as the datagrams that went in.
func TestTrafficUDPSegmentation(t *testing.T) {
	for _, c := range []struct {
		name string
		b    OpenConfig
	}{{"offload", OpenConfig{}}, {"plain", OpenConfig{Plain: true}}, {"packet", OpenConfig{Kind: KindPacket}}} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, OpenConfig{}, c.b, 1500)
			if p.da.Caps()&frame.CapUSO == 0 {
				testbed.Lacking(t, "this kernel's TAP has no UDP segmentation offload (Linux 6.2)")
			}
			const segments, size = 40, 1000
			for i, addr := range []string{"10.1.0.2:7000", "[fd01::2]:7000"} {
				got := receiveUDP(t, p.b, addr)
				sendUDPSegments(t, p.a, addr, segments, size)
				for seg := range segments {
					select {
					case b := <-got:
						if len(b) != size || b[0] != byte(seg) || b[size-1] != byte(seg) {
							t.Fatalf("%s: datagram %d: %d bytes, starts with %d", addr, seg, len(b), b[0])
						}
					case <-time.After(3 * time.Second):
						t.Fatalf("%s: datagram %d of %d did not arrive", addr, seg, segments)
					}
				}
				if n := p.ab.udp.Load(); n != uint64(i+1) {
					t.Errorf("%s: %d UDP superframes crossed, want %d", addr, n, i+1)
				}
			}
		})
	}
}

func receiveUDP(t testing.TB, ns *testbed.NS, addr string) <-chan []byte {
	t.Helper()
	c, err := ns.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	got := make(chan []byte, 1000)
	go func() {
		for {
			b := make([]byte, 2000)
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			got <- b[:n]
		}
	}()
	return got
}
