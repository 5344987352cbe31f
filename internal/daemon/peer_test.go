package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// nameList is a resolver of a test.
type nameList struct {
	mu sync.Mutex
	m  map[string][]netip.Addr
}

func (s *nameList) set(name string, addrs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = map[string][]netip.Addr{}
	}
	s.m[name] = nil
	for _, a := range addrs {
		s.m[name] = append(s.m[name], netip.MustParseAddr(a))
	}
}

func (s *nameList) resolve(_ context.Context, host string) ([]netip.Addr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.m[host]) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return s.m[host], nil
}

// newTunnelNode is a node whose tunnels listen at a port of its own.
func newTunnelNode(t *testing.T, dir string, s *nameList, listen string) *Node {
	t.Helper()
	testbed.RequireTUN(t)
	n, err := New(t.Context(), Config{StateDir: dir, Version: "test", Listen: netip.MustParseAddrPort(listen), Resolve: s.resolve, Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

func mustCreate(t *testing.T, n *Node, spec api.NetworkSpec) api.Network {
	t.Helper()
	nw, err := n.CreateNetwork(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return nw
}

func mustPeer(t *testing.T, n *Node, network string, spec api.PeerSpec) api.Peer {
	t.Helper()
	p, err := n.AddPeer(t.Context(), network, spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bound reports whether something listens at a UDP port of this host.
func bound(port int) bool {
	c, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
	if err == nil {
		c.Close()
	}
	return err != nil
}

// TestPeersRefused: what cannot be a peer is refused with the reason, and leaves nothing.
func TestPeersRefused(t *testing.T) {
	testbed.Leaks(t)
	ext := testbed.NewExternal(t, "b")
	s := &nameList{}
	n := newTunnelNode(t, t.TempDir(), s, "[::]:14789")
	mustCreate(t, n, api.NetworkSpec{Name: "plain"})
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7, Subnets: prefixes("10.9.0.0/24")})
	mustCreate(t, n, api.NetworkSpec{Name: "twin", VNI: 8, Subnets: prefixes("10.9.0.0/24")})
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "third", VNI: 7}); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), `VNI 7 is network "lab"'s`) {
		t.Errorf("a VNI twice: %v", err)
	}
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "sealed", VNI: 9, Seal: true}); err == nil || !strings.Contains(err.Error(), "is sealed, and this node has nothing to be known by") {
		t.Errorf("sealed: %v", err)
	}
	blocker, err := net.ListenUDP("udp", &net.UDPAddr{Port: 14790})
	if err != nil {
		t.Fatal(err)
	}
	defer blocker.Close()
	mustCreate(t, n, api.NetworkSpec{Name: "ported", VNI: 10, Port: 14790})
	s.set("self.test", ext.HostAddr4.String())
	mustPeer(t, n, "lab", api.PeerSpec{Host: ext.Addr4.String()})
	s.set("b.test", ext.Addr4.String())
	for _, c := range []struct {
		network, host string
		port          uint16
		code          api.Code
		want          string
	}{
		{"nowhere", "192.0.2.7", 0, api.CodeNotFound, "does not exist"},
		{"plain", "192.0.2.7", 0, api.CodeInvalid, `network "plain" has no VNI; make the network with --vni`},
		{"lab", "not a name", 0, api.CodeInvalid, "is none"},
		{"lab", "127.0.0.1", 0, api.CodeInvalid, "that is this node itself"},
		{"lab", ext.HostAddr4.String(), 0, api.CodeInvalid, "that is this node itself"},
		{"lab", ext.HostAddr6.String(), 14789, api.CodeInvalid, "that is this node itself"},
		{"lab", "self.test", 0, api.CodeInvalid, "that is this node itself"},
		{"lab", ext.Addr4.String(), 0, api.CodeConflict, "already; remove it first with `patchbay peer rm lab"},
		{"lab", ext.Addr4.String(), 14789, api.CodeConflict, "already"},
		{"lab", "b.test", 0, api.CodeConflict, "already a peer"}, // by another name
		{"ported", ext.Addr4.String(), 0, api.CodeConflict, "UDP port 14790, where tunnels listen, is another program's; give the network another with --port"},
	} {
		_, err := n.AddPeer(t.Context(), c.network, api.PeerSpec{Host: c.host, Port: c.port})
		if api.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s %s %d: %s %v, want %s %q", c.network, c.host, c.port, api.CodeOf(err), err, c.code, c.want)
		}
	}
	// The same host in another network, and another port of the same host, are other peers.
	mustPeer(t, n, "twin", api.PeerSpec{Host: ext.Addr4.String()})
	mustPeer(t, n, "lab", api.PeerSpec{Host: ext.Addr4.String(), Port: 8472, OnePort: true})
	mac := wire.MAC{2, 0, 0, 0, 0, 7}
	if _, err := n.AddPeerFDB(t.Context(), "lab", ext.Addr4.String(), mac); err != nil {
		t.Error(err)
	}
	if _, err := n.AddPeerFDB(t.Context(), "lab", ext.Addr4.String()+":8472", mac); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("a static entry of two peers: %v", err)
	}
	if _, err := n.RemovePeerFDB(t.Context(), "lab", ext.Addr4.String()+":8472", mac); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("a static entry of another peer: %v", err)
	}
	if fdb, err := n.FDB("lab"); err != nil || !slices.ContainsFunc(fdb, func(e api.FDBEntry) bool { return e.MAC == mac && e.Static && e.Port == ext.Addr4.String()+":14789" }) {
		t.Errorf("fdb: %+v, %v", fdb, err)
	}
	if !bound(14789) {
		t.Error("nobody listens while there are peers")
	}
	for _, c := range [][2]string{{"twin", ext.Addr4.String()}, {"lab", ext.Addr4.String()}, {"lab", ext.Addr4.String() + ":8472"}} {
		if !bound(14789) {
			t.Error("closed too early")
		}
		if err := n.RemovePeer(t.Context(), c[0], c[1]); err != nil {
			t.Error(err)
		}
	}
	if bound(14789) {
		t.Error("the port is still open without a peer")
	}
	if err := n.RemovePeer(t.Context(), "lab", "b.test"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("remove again: %v", err)
	}
}

// TestPeersAreKept: peers, with what was said of them, are back after a restart, also when their name leads nowhere then, and go with their network.
func TestPeersAreKept(t *testing.T) {
	testbed.Leaks(t)
	ext := testbed.NewExternal(t, "b")
	dir := t.TempDir()
	s := &nameList{}
	s.set("b.test", ext.Addr4.String())
	n := newTunnelNode(t, dir, s, "[::]:14789")
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7, Wire: api.WirePatchbay})
	p := mustPeer(t, n, "lab", api.PeerSpec{Host: "B.Test.", Wire: api.WireVXLAN, NoOffload: true})
	if p.Host != "b.test" || p.Port != 14789 || p.Address.Addr() != ext.Addr4 || p.State != api.PeerNew || p.Offloads != "off" || p.Wire != api.WireVXLAN || p.MTU != 1450 {
		t.Errorf("peer: %+v", p)
	}
	mac := wire.MAC{2, 0, 0, 0, 0, 7}
	if _, err := n.AddPeerFDB(t.Context(), "lab", "b.test", mac); err != nil {
		t.Fatal(err)
	}
	waiting := mustPeer(t, n, "lab", api.PeerSpec{Host: "c.test"})
	if waiting.State != api.PeerWaiting || !strings.Contains(waiting.Error, "its name leads nowhere now") || waiting.Wire != api.WirePatchbay {
		t.Errorf("a name that leads nowhere: %+v", waiting)
	}
	s.set("c.test", ext.Addr6.String())
	testbed.Eventually(t, 20*time.Second, func() bool {
		ps, _ := n.Peers("lab")
		return len(ps) == 2 && ps[1].State == api.PeerNew && ps[1].Address.Addr() == ext.Addr6 && ps[1].Error == "" && ps[1].MTU == 1500-86
	})
	n.Close()

	s.set("b.test")
	s.set("c.test")
	n = newTunnelNode(t, dir, s, "[::]:14789")
	ps, err := n.Peers("")
	if err != nil || len(ps) != 2 {
		t.Fatalf("peers: %+v, %v", ps, err)
	}
	if p := ps[0]; p.Host != "b.test" || p.Address.Addr() != ext.Addr4 || p.State != api.PeerNew || !p.NoOffload || !slices.Equal(p.FDB, []wire.MAC{mac}) || p.Origin != "api" {
		t.Errorf("after a restart: %+v", p)
	}
	if fdb, _ := n.FDB("lab"); !slices.ContainsFunc(fdb, func(e api.FDBEntry) bool { return e.MAC == mac && e.Static }) {
		t.Errorf("fdb: %+v", fdb)
	}
	// Silent and nameless is shown, and it stays where it was.
	testbed.Eventually(t, 30*time.Second, func() bool {
		p := first(n.Peers("lab"))
		return strings.Contains(p.Error, "leads nowhere") && p.Address.Addr() == ext.Addr4
	})
	// It follows its name.
	s.set("b.test", "198.51.100.9")
	testbed.Eventually(t, 60*time.Second, func() bool {
		p := first(n.Peers("lab"))
		return p.Address.Addr() == netip.MustParseAddr("198.51.100.9")
	})
	if err := n.RemoveNetwork(t.Context(), "lab"); err != nil {
		t.Fatal(err)
	}
	if bound(14789) {
		t.Error("the tunnels of a removed network are open")
	}
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7})
	n.Close()
	n = newTunnelNode(t, dir, s, "[::]:14789")
	if ps, err := n.Peers("lab"); err != nil || len(ps) != 0 {
		t.Errorf("peers of a network that was removed: %+v, %v", ps, err)
	}
}

func first(ps []api.Peer, _ error) api.Peer {
	if len(ps) == 0 {
		return api.Peer{}
	}
	return ps[0]
}

// TestEarlierState: a file of version 1, which knew no peers, opens.
func TestEarlierState(t *testing.T) {
	dir := t.TempDir()
	n := newTestNode(t, dir)
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7, MTU: 1400})
	n.Close()
	db, err := bbolt.Open(filepath.Join(dir, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.DeleteBucket(peerBucket), tx.Bucket(metaBucket).Put(schemaKey, []byte("1")))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	n = newTestNode(t, dir)
	if nw, err := n.Network("lab"); err != nil || nw.MTU != 1400 || nw.VNI != 7 {
		t.Errorf("network: %+v, %v", nw, err)
	}
	if ps, err := n.Peers(""); err != nil || len(ps) != 0 {
		t.Errorf("peers: %v, %v", ps, err)
	}
	n.Close()
	db, err = bbolt.Open(filepath.Join(dir, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var v int
	if err := db.View(func(tx *bbolt.Tx) error { return json.Unmarshal(tx.Bucket(metaBucket).Get(schemaKey), &v) }); err != nil || v != schema {
		t.Errorf("version %d, %v", v, err)
	}
}

// TestTunnelMTU: a network with a VNI has the MTU of its paths less the tunnel's headers; one that was asked for stays.
func TestTunnelMTU(t *testing.T) {
	ext := testbed.NewExternal(t, "b")
	ext.Uplink(t)
	host := testbed.Host(t)
	link := func(mtu string) {
		t.Helper()
		for _, ns := range []*testbed.NS{host, ext.NS} {
			name := "eth0"
			if ns == host {
				name = ext.HostLink
			}
			if out, err := ns.Command(testbed.Tool(t, "ip"), "link", "set", name, "mtu", mtu).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	link("9000")
	n := newTunnelNode(t, t.TempDir(), &nameList{}, "[::]:14789")
	mtu := func(name string) int {
		nw, err := n.Network(name)
		if err != nil {
			t.Fatal(err)
		}
		return nw.MTU
	}
	for _, c := range []struct {
		spec api.NetworkSpec
		want int
	}{
		{api.NetworkSpec{Name: "here"}, 1500},
		{api.NetworkSpec{Name: "vx", VNI: 1}, 8950},
		{api.NetworkSpec{Name: "pb", VNI: 2, Wire: api.WirePatchbay}, 8934},
		{api.NetworkSpec{Name: "asked", VNI: 3, MTU: 1500}, 1500},
	} {
		if nw := mustCreate(t, n, c.spec); nw.MTU != c.want || mtu(c.spec.Name) != c.want {
			t.Errorf("%s: %d, want %d", c.spec.Name, nw.MTU, c.want)
		}
	}
	for _, name := range []string{"vx", "pb", "asked"} {
		mustPeer(t, n, name, api.PeerSpec{Host: ext.Addr6.String()})
	}
	if mtu("vx") != 8930 || mtu("pb") != 8914 || mtu("asked") != 1500 {
		t.Errorf("with a peer over IPv6: %d, %d, %d", mtu("vx"), mtu("pb"), mtu("asked"))
	}
	at, err := attachTAP(t, n, "vx", api.AttachmentSpec{Name: "c"})
	if err != nil {
		t.Fatal(err)
	}
	// Down at once, also under a container.
	link("1500")
	testbed.Eventually(t, 20*time.Second, func() bool { return mtu("vx") == 1430 && mtu("pb") == 1414 })
	// Up only where nobody would be left behind.
	link("9000")
	testbed.Eventually(t, 20*time.Second, func() bool { return mtu("pb") == 8914 })
	if mtu("vx") != 1430 {
		t.Errorf("with a container: %d", mtu("vx"))
	}
	if err := n.Detach(t.Context(), "vx", at.Name); err != nil {
		t.Fatal(err)
	}
	// Not below what IPv6 must have.
	link("1280")
	testbed.Eventually(t, 20*time.Second, func() bool { return mtu("vx") == 1280 })
}

// TestConfigurePeers: peers of the file come, change and go with it, whole or not at all; those of the API stay.
func TestConfigurePeers(t *testing.T) {
	ext := testbed.NewExternal(t, "b")
	dir := t.TempDir()
	s := &nameList{}
	s.set("b.test", ext.Addr4.String())
	s.set("self.test", ext.HostAddr4.String())
	n := newTunnelNode(t, dir, s, "[::]:14789")
	apply := func(text string) error { return n.Configure(t.Context(), write(t, dir, text)) }
	show := func() string {
		ps, err := n.Peers("")
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, p := range ps {
			out = append(out, p.Network+" "+api.PeerRef(p.Host, p.Port)+" "+string(p.Wire)+" "+p.Origin)
		}
		return strings.Join(out, "; ")
	}
	if err := apply("networks:\n  lab:\n    vni: 7\n    peers:\n      - b.test\n      - host: 198.51.100.9:8472\n        wire: patchbay\n"); err != nil {
		t.Fatal(err)
	}
	if got := show(); got != "lab 198.51.100.9:8472 patchbay config; lab b.test:14789 vxlan config" {
		t.Error(got)
	}
	mustPeer(t, n, "lab", api.PeerSpec{Host: "198.51.100.10"})
	was := show()
	for text, want := range map[string]string{
		"networks:\n  lab:\n    vni: 7\n    peers:\n      - {host: b.test, wire: patchbay}\n      - self.test\n": "patchbay.yaml:6: peer \"self.test\"",
		"networks:\n  lab:\n    vni: 7\n    wire: patchbay\n    peers:\n      - 127.0.0.1\n":                     "patchbay.yaml:6: peer \"127.0.0.1\"",
	} {
		if err := apply(text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "this node itself") {
			t.Errorf("%v, want %s", err, want)
		}
		if got := show(); got != was {
			t.Errorf("after a file that failed: %s, want %s", got, was)
		}
	}
	// One changes, one goes, one that the API made becomes the file's.
	if err := apply("networks:\n  lab:\n    vni: 7\n    peers:\n      - {host: b.test, wire: patchbay}\n      - 198.51.100.10\n"); err != nil {
		t.Fatal(err)
	}
	if got := show(); got != "lab 198.51.100.10:14789 vxlan config; lab b.test:14789 patchbay config" {
		t.Error(got)
	}
	// A network that is made anew keeps what the API made.
	mustPeer(t, n, "lab", api.PeerSpec{Host: "198.51.100.11"})
	if err := apply("networks:\n  lab:\n    vni: 8\n    wire: patchbay\n    peers:\n      - b.test\n"); err != nil {
		t.Fatal(err)
	}
	if got := show(); got != "lab 198.51.100.11:14789 patchbay api; lab b.test:14789 patchbay config" {
		t.Error(got)
	}
	if err := apply("networks:\n"); err != nil {
		t.Fatal(err)
	}
	if ps, err := n.Peers(""); err != nil || len(ps) != 0 || bound(14789) {
		t.Errorf("%v, %v", ps, err)
	}
}

// TestTakeoverFailsTunnels: when nobody takes over after all, the tunnels go on.
func TestTakeoverFailsTunnels(t *testing.T) {
	ext := testbed.NewExternal(t, "b")
	n := newTunnelNode(t, t.TempDir(), &nameList{}, "[::]:14789")
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7})
	mustPeer(t, n, "lab", api.PeerSpec{Host: ext.Addr4.String()})
	var handed []int
	h, err := n.HandOver(func(p api.Part, fds []int) error {
		if p.Kind == api.PartTunnel {
			handed = append(handed, len(fds))
			if p.Listen != netip.MustParseAddrPort("[::]:14789") {
				t.Errorf("handed over: %+v", p)
			}
		}
		return nil
	})
	if err != nil || len(handed) != 1 || handed[0] == 0 {
		t.Fatalf("%v, handed over %v", err, handed)
	}
	running := func() bool {
		n.vteps.mu.Lock()
		defer n.vteps.mu.Unlock()
		return n.vteps.by[14789].stop != nil
	}
	if running() {
		t.Error("it receives while it is handed over")
	}
	if _, err := n.AddPeer(t.Context(), "lab", api.PeerSpec{Host: "192.0.2.9"}); api.CodeOf(err) != api.CodeUnavailable {
		t.Errorf("a peer meanwhile: %v", err)
	}
	h.Resume()
	if !running() {
		t.Error("it does not receive any more")
	}
	// A frame of a kernel is heard.
	c, err := ext.ListenPacket("udp4", net.JoinHostPort(ext.Addr4.String(), "4789"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	datagram := append([]byte{8, 0, 0, 0, 0, 0, 7, 0}, make([]byte, 60)...)
	copy(datagram[8:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x88, 0xb6})
	testbed.Eventually(t, 10*time.Second, func() bool {
		if _, err := c.WriteTo(datagram, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ext.HostAddr4, 14789))); err != nil {
			t.Fatal(err)
		}
		ps, _ := n.Peers("lab")
		return len(ps) == 1 && ps[0].State == api.PeerHeard && ps[0].RxFrames > 0
	})
}
