package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

func TestMain(m *testing.M) { testbed.Main(m) }

var quiet = slog.New(slog.DiscardHandler)

// newVTEP is a VTEP in ns that runs until the test ends.
func newVTEP(t testing.TB, ns *testbed.NS, cfg Config) *VTEP {
	t.Helper()
	cfg.Log = quiet
	var v *VTEP
	var err error
	ns.Do(func() { v, err = Listen(cfg) })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- v.Run(context.Background()) }()
	t.Cleanup(func() {
		v.Close()
		if err := <-done; err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
	return v
}

func addPeer(t testing.TB, v *VTEP, cfg PeerConfig) *Peer {
	t.Helper()
	p, err := v.AddPeer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// network is one VNI on one host: a switch, and what is plugged into it.
type network struct {
	v   *VTEP
	vni uint32
	sw  *vswitch.Switch
	gso int // of the containers to come
}

func newNetwork(v *VTEP, vni uint32) *network {
	return &network{v: v, vni: vni, sw: vswitch.New(vswitch.Config{Log: quiet})}
}

// peer adds a remote VTEP to the network, in the split-horizon group of all peers.
func (n *network) peer(t testing.TB, cfg PeerConfig) *Peer {
	t.Helper()
	cfg.VNI = n.vni
	p := addPeer(t, n.v, cfg)
	if cfg.Wire == WirePatchbay {
		n.gso = GSOMaxSize
	}
	id, err := n.sw.AddPort(p, vswitch.PortConfig{Name: "peer-" + p.Remote().String(), Group: 1})
	if err != nil {
		t.Fatal(err)
	}
	p.Attach(n.sw.Ingress(id))
	return p
}

// container is a namespace with a TAP on the network; number makes its MAC.
func (n *network) container(t testing.TB, number byte, mtu int, addrs ...string) *testbed.NS {
	t.Helper()
	testbed.RequireTUN(t)
	ns := testbed.NewNS(t, fmt.Sprintf("c%d", number))
	var h *tap.Handle
	var err error
	ns.Do(func() {
		if h, err = tap.Open(tap.OpenConfig{Name: "eth0"}); err != nil {
			return
		}
		cfg := tap.IfConfig{MTU: mtu, MAC: wire.MAC{2, 0, 0, 0, 0, number}, GSOMaxSize: n.gso}
		for _, a := range addrs {
			cfg.Addrs = append(cfg.Addrs, netip.MustParsePrefix(a))
		}
		if _, err = h.Configure(cfg); err != nil {
			h.Close()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := tap.New(tap.Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		h.Close()
		t.Fatal(err)
	}
	id, err := n.sw.AddPort(d, vswitch.PortConfig{Name: fmt.Sprintf("c%d", number)})
	if err != nil {
		t.Fatal(err)
	}
	in := n.sw.Ingress(id)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := d.Serve(ctx, 0, in); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait(); n.sw.RemovePort(id); d.Close() })
	return ns
}

// run runs a program in ns.
func run(t testing.TB, ns *testbed.NS, args ...string) {
	t.Helper()
	if out, err := ns.Command(testbed.Tool(t, args[0]), args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v in %s: %v\n%s", args, ns.Name, err, out)
	}
}

func ping(t testing.TB, ns *testbed.NS, addr string, args ...string) {
	t.Helper()
	out, err := ns.Command(testbed.Tool(t, "ping"), append([]string{"-c", "3", "-i", "0.02", "-W", "3", addr}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("ping %s %v from %s: %v\n%s", addr, args, ns.Name, err, out)
	}
}

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
			c.SetDeadline(time.Now().Add(30 * time.Second))
			io.Copy(h, c)
			c.Close()
		}
		got <- [sha256.Size]byte(h.Sum(nil))
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := a.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
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

// counters is a kernel's own count of what it found wrong.
func counters(t testing.TB, ns *testbed.NS) string {
	t.Helper()
	out, err := ns.Command(testbed.Tool(t, "nstat"), "-asz", "TcpInErrs", "TcpInCsumErrors", "UdpInErrors", "UdpInCsumErrors", "Udp6InErrors", "Udp6InCsumErrors",
		"IpInHdrErrors", "IpReasmReqds", "IpFragCreates", "Ip6ReasmReqds", "Ip6FragCreates").CombinedOutput()
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

// clean sees to it that neither we nor the kernels count anything amiss. Whoever has a peer asks after it at once, and the other end may not have got its own by then: that is the one thing that is
// let pass.
func clean(t testing.TB, counts []*frame.DropCounters, nss ...*testbed.NS) {
	t.Helper()
	for _, c := range counts {
		c.Each(func(d frame.Drop, n uint64) {
			if early := d == frame.DropUnknownVNI || d == frame.DropUnknownPeer; !early || n > 2 {
				t.Errorf("%d drops: %v", n, d)
			}
		})
	}
	for _, ns := range nss {
		if bad := counters(t, ns); bad != "" {
			t.Errorf("the kernel in %s counts:\n%s", ns.Name, bad)
		}
	}
}

// collector is a sink that copies what it gets.
type collector struct {
	mu sync.Mutex
	fs []frame.Frame
}

func (c *collector) Forward(fs []frame.Frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range fs {
		c.fs = append(c.fs, frame.Frame{Hdr: f.Hdr, Data: bytes.Clone(f.Data)})
	}
}

func (c *collector) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.fs)
}

// underlay joins two hosts:
//
//	[a] eth0 10.9.0.1 fd09::1 ── MTU ── 10.9.0.2 fd09::2 eth0 [b]
func underlay(t testing.TB, mtu int) (a, b *testbed.NS) {
	t.Helper()
	a, b = testbed.NewNS(t, "a"), testbed.NewNS(t, "b")
	testbed.Veth(t, a, "eth0", b, "eth0")
	for i, ns := range []*testbed.NS{a, b} {
		run(t, ns, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(mtu))
		testbed.AddAddrs(t, ns, "eth0", netip.MustParsePrefix(fmt.Sprintf("10.9.0.%d/24", i+1)), netip.MustParsePrefix(fmt.Sprintf("fd09::%d/64", i+1)))
	}
	return a, b
}
