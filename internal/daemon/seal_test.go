package daemon

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/ca"
	"patchbay/internal/testbed"
	"patchbay/tunnel/secure"
)

// sharedKey is an identity of nodes that share a key; each node has its own, which knows the handshakes that it has begun.
func sharedKey(t *testing.T) *secure.Identity {
	t.Helper()
	file := filepath.Join(t.TempDir(), "psk")
	if err := os.WriteFile(file, []byte("bm90IGEgc2VjcmV0IGFueSBtb3JlLCBpdCBpcyBpbiBhIHRlc3Q="), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := secure.LoadPSK(file)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// expired is an identity that was good until a day ago.
func expired(t *testing.T) *secure.Identity {
	t.Helper()
	dir, then := filepath.Join(t.TempDir(), "ca"), time.Now().Add(-48*time.Hour)
	if _, err := ca.Init(dir, ca.Options{Now: then}); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Issue(dir, "a.test", ca.Options{Now: then, Days: 1}); err != nil {
		t.Fatal(err)
	}
	cert, key := ca.HostFiles(dir, "a.test")
	id, err := LoadIdentity(strings.Join([]string{cert, key, filepath.Join(dir, "ca.crt")}, ","))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// newSealNode is a node that is known by id.
func newSealNode(t *testing.T, dir string, id *secure.Identity, listen string) *Node {
	t.Helper()
	testbed.RequireTUN(t)
	n, err := New(t.Context(), Config{StateDir: dir, Version: "test", Listen: netip.MustParseAddrPort(listen), Identity: id, Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))})
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

// TestSealedRestore: a node that comes back with nothing to be known by, or with what is good no more, keeps its sealed networks, and says nothing to their peers, nor lets any in.
func TestSealedRestore(t *testing.T) {
	peer, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	at := peer.LocalAddr().(*net.UDPAddr).AddrPort()
	// hears is whether the node says anything; clear is whether any of it is no handshake.
	hears := func(within time.Duration) (heard, clear bool) {
		b := make([]byte, 2048)
		_ = peer.SetReadDeadline(time.Now().Add(within))
		for {
			k, err := peer.Read(b)
			if err != nil {
				return heard, clear
			}
			heard = true
			if k == 0 || b[0] != 0xc3 {
				clear = true
			}
		}
	}
	dir, key := t.TempDir(), sharedKey(t)
	n := newSealNode(t, dir, key, "127.0.0.1:14789")
	mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7, Seal: true})
	if p := mustPeer(t, n, "lab", api.PeerSpec{Host: at.Addr().String(), Port: at.Port()}); p.State != api.PeerHandshake || p.Sealed {
		t.Errorf("before there are keys: %+v", p)
	}
	if heard, clear := hears(3 * time.Second); !heard || clear {
		t.Errorf("before there are keys: heard %v, something else than a handshake %v", heard, clear)
	}
	n.Close()
	hears(100 * time.Millisecond) // what was left
	for _, c := range []struct {
		name  string
		id    *secure.Identity
		words string
	}{{"none", nil, "--psk-file"}, {"expired", expired(t), "expired"}} {
		t.Run(c.name, func(t *testing.T) {
			n := newSealNode(t, dir, c.id, "127.0.0.1:14789")
			defer n.Close()
			for end := time.Now().Add(2500 * time.Millisecond); ; { // it is tried again meanwhile
				p := first(n.Peers("lab"))
				if p.State != api.PeerWaiting || p.Sealed || !strings.Contains(p.Error, c.words) {
					t.Errorf("%+v, want an error with %q", p, c.words)
				}
				if heard, _ := hears(time.Second); heard {
					t.Error("something is sent")
				}
				if time.Now().After(end) {
					break
				}
			}
			if _, err := n.AddPeer(t.Context(), "lab", api.PeerSpec{Host: "192.0.2.9"}); err == nil || !strings.Contains(err.Error(), c.words) || strings.Contains(err.Error(), "\n") {
				t.Errorf("another peer: %v", err)
			}
			if bound(14789) {
				t.Error("the tunnels are open, with nobody to let in")
			}
		})
	}
	n = newSealNode(t, dir, key, "127.0.0.1:14789")
	if heard, clear := hears(3 * time.Second); !heard || clear {
		t.Errorf("known again: heard %v, something else than a handshake %v", heard, clear)
	}
	if p := first(n.Peers("lab")); p.State != api.PeerHandshake || p.Error != "" {
		t.Errorf("known again: %+v", p)
	}
}

// TestSealedTakeoverFails: keys that were handed over are the successor's. When there is none after all, new ones are agreed on.
func TestSealedTakeoverFails(t *testing.T) {
	var nodes []*Node
	ports := []uint16{14789, 14790}
	for i, port := range ports {
		n := newSealNode(t, t.TempDir(), sharedKey(t), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		mustCreate(t, n, api.NetworkSpec{Name: "lab", VNI: 7, Seal: true})
		mustCreate(t, n, api.NetworkSpec{Name: "clear", VNI: 8})
		for _, name := range []string{"lab", "clear"} {
			mustPeer(t, n, name, api.PeerSpec{Host: "127.0.0.1", Port: ports[1-i]})
		}
		nodes = append(nodes, n)
	}
	up := func() bool {
		for _, n := range nodes {
			if p := first(n.Peers("lab")); p.State != api.PeerUp || !p.Sealed || p.SealError != "" {
				return false
			}
			if p := first(n.Peers("clear")); p.State != api.PeerUp || p.Sealed || p.Handshakes != 0 {
				return false
			}
		}
		return true
	}
	testbed.Eventually(t, 20*time.Second, up)
	before := first(nodes[0].Peers("lab")).Handshakes
	var handed []api.Part
	h, err := nodes[0].HandOver(func(p api.Part, fds []int) error {
		if p.Kind == api.PartSessions {
			p.Data = append([]byte(nil), p.Data...)
			handed = append(handed, p)
			if len(fds) != 0 {
				t.Errorf("descriptors with keys: %v", fds)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(handed) != 1 || handed[0].Network != "lab" || handed[0].Name != "127.0.0.1:14790" || len(handed[0].Data) == 0 {
		t.Fatalf("handed over: %d parts, want the keys of the sealed network's peer alone", len(handed))
	}
	if p := first(nodes[0].Peers("lab")); p.Sealed {
		t.Errorf("keys that were handed over are used here: %+v", p)
	}
	h.Resume()
	testbed.Eventually(t, 30*time.Second, func() bool { return up() && first(nodes[0].Peers("lab")).Handshakes > before })
}
