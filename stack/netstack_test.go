package stack

import (
	"os"
	"strings"
	"testing"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"patchbay/frame"
)

// netstackVersion is the version of gVisor whose unexported functions linkname.go was written against.
const netstackVersion = "v0.0.0-20260905035102-160fafc42237"

// TestNetstackVersion fails when gVisor was updated: read linkname.go against the new version, then change the constant.
func TestNetstackVersion(t *testing.T) {
	b, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "gvisor.dev/gvisor "+netstackVersion) {
		t.Fatalf("go.mod has another gVisor than %s: check what linkname.go says about its functions", netstackVersion)
	}
}

// TestHandshakeLayout: the endpoint is the first field of what startHandshake returns.
func TestHandshakeLayout(t *testing.T) {
	cfg := testConfig()
	done := make(chan *conn, 1)
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
		}
		done <- c.(*conn)
	})
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	send(g, ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 1, 0, tcpSYN, nil)))
	c := <-done
	if c.ep.EndpointState() != tcp.StateSynRecv || c.ep.TransportEndpointInfo.ID != c.id {
		t.Fatalf("state %v, id %+v", c.ep.EndpointState(), c.ep.TransportEndpointInfo.ID)
	}
	if d := r.one(t, g); header.TCP(d[34:]).Flags() != header.TCPFlagSyn|header.TCPFlagAck {
		t.Fatalf("answer % x", d)
	}
	if unsafe.Sizeof(flowKey{}) > 40 {
		t.Errorf("a flow key has %d bytes", unsafe.Sizeof(flowKey{}))
	}
}

// TestEveryRefusalIsTold: a program that is refused thousands of times a second stalls for a second where one answer is missing.
func TestEveryRefusalIsTold(t *testing.T) {
	cfg := testConfig()
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) { r.Refuse() })
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	const n = 3000
	resets := 0
	for i := range n {
		send(g, ipPacket(con4, far4, 6, 64, tcpSegment(uint16(1000+i), 80, 1, 0, tcpSYN, nil)))
		resets += len(r.take())
	}
	if resets != n {
		t.Errorf("%d resets for %d SYNs", resets, n)
	}
	// Segments of connections that nobody knows are answered at a bounded rate.
	for i := range n {
		send(g, ipPacket(con4, far4, 6, 64, tcpSegment(uint16(1000+i), 80, 1, 1, tcpACK, nil)))
	}
	if got := len(r.take()); got == 0 || got > n/2 || g.Drops().Get(frame.DropServiceLimit) != uint64(n-got) {
		t.Errorf("%d resets for %d strays", got, n)
	}
}

// TestSYNs: retransmissions are swallowed, data behind a SYN that waits is too, and strangers are reset.
func TestSYNs(t *testing.T) {
	cfg := testConfig()
	var rs []TCPRequest
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) { rs = append(rs, r) })
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	g.SetNeighbor(con6, conMAC)
	syn := ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 77, 0, tcpSYN, nil))
	send(g, syn, syn)
	send(g, syn, ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 78, 5, tcpACK, nil)))
	r.none(t)
	if len(rs) != 1 || rs[0].Src().String() != "10.88.0.2:1000" || rs[0].Dst().String() != "192.0.2.7:80" {
		t.Fatalf("%d requests", len(rs))
	}
	rs[0].Refuse()
	d := r.one(t, g)
	if h := header.TCP(d[34:]); h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.AckNumber() != 78 || h.SourcePort() != 80 || h.DestinationPort() != 1000 || !h.IsChecksumValid(toAddress(far4), toAddress(con4), 0, 0) {
		t.Fatalf("refusal % x", d)
	}
	send(g, ipPacket(con6, far6, 6, 64, tcpSegment(1000, 80, 77, 99, tcpACK|tcpPSH, []byte("stray"))))
	d = r.one(t, g)
	if h := header.TCP(d[54:]); h.Flags() != header.TCPFlagRst || h.SequenceNumber() != 99 || !h.IsChecksumValid(toAddress(far6), toAddress(con6), 0, 0) {
		t.Fatalf("answer to a stray segment % x", d)
	}
	send(g, ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 77, 99, tcpRST, nil)))
	bad := ipPacket(con4, far4, 6, 64, tcpSegment(1001, 80, 77, 0, tcpSYN, nil))
	bad[len(bad)-1] ^= 1
	short := ipPacket(con4, far4, 6, 64, tcpSegment(1001, 80, 77, 0, tcpSYN, nil)[:19])
	long := tcpSegment(1001, 80, 77, 0, tcpSYN, nil)
	long[12] = 0xf0
	send(g, bad, short, ipPacket(con4, far4, 6, 64, long))
	r.none(t)
	if len(rs) != 1 || g.Drops().Get(frame.DropChecksum) != 1 || g.Drops().Get(frame.DropMalformed) != 2 {
		t.Fatalf("%d requests; drops %v", len(rs), drops(g))
	}
}

// TestConfig: what cannot work is refused with a word on why.
func TestConfig(t *testing.T) {
	for name, f := range map[string]func(*Config){
		"no MAC":        func(c *Config) { c.MAC = [6]byte{} },
		"group MAC":     func(c *Config) { c.MAC[0] |= 1 },
		"no address":    func(c *Config) { c.Addrs = nil },
		"two of one":    func(c *Config) { c.Addrs = append(c.Addrs[:1:1], c.Addrs[0]) },
		"small MTU":     func(c *Config) { c.MTU = 1279 },
		"large MTU":     func(c *Config) { c.MTU = 65536 },
		"RA resolver":   func(c *Config) { c.RA.RDNSS = append(c.RA.RDNSS, gw4) },
		"search domain": func(c *Config) { c.RA.DNSSL = []string{"a..b"} },
		"congestion":    func(c *Config) { c.TCP.CongestionControl = "vegas" },
		"TCP memory":    func(c *Config) { c.TCP.MaxMemory = 1<<20 - 1 },
	} {
		cfg := testConfig()
		f(&cfg)
		if g, err := New(cfg); err == nil {
			g.Close()
			t.Errorf("%s: accepted", name)
		} else if err.Error() == "" || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q", name, err)
		}
	}
	if g, err := New(testConfig()); err != nil {
		t.Error(err)
	} else {
		g.Close()
		g.Close()
		if g.Transmit([]frame.Frame{{Data: make([]byte, 60)}}) != 0 || g.Drops().Get(frame.DropPortDown) != 1 {
			t.Error("a closed gateway took a frame")
		}
	}
}
