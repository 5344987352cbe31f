package tunnel

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/ca"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
	"patchbay/tunnel/secure"
)

// sharedKey is the identity of a node that shares a key with others. Each node loads its own: one that meets itself is refused.
func sharedKey(t testing.TB, key string) *secure.Identity {
	t.Helper()
	name := filepath.Join(t.TempDir(), "psk")
	if err := os.WriteFile(name, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := secure.LoadPSK(name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

const testKey = "c29tZSBrZXkgdGhhdCBpcyBsb25nIGVub3VnaCBmb3IgYSB0ZXN0"

// certificates are identities of hosts, from one CA.
func certificates(t testing.TB, networks []string, hosts ...string) (ids []*secure.Identity) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := ca.Init(dir, ca.Options{}); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		if _, err := ca.Issue(dir, h, ca.Options{Networks: networks}); err != nil {
			t.Fatal(err)
		}
		cert, key := ca.HostFiles(dir, h)
		id, err := secure.LoadIdentity(cert, key, filepath.Join(dir, "ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

// sealPair are the seals of two nodes that share a key.
func sealPair(t testing.TB) (a, b *Seal) {
	t.Helper()
	return &Seal{Identity: sharedKey(t, testKey), Network: "blue", Host: "b"}, &Seal{Identity: sharedKey(t, testKey), Network: "blue", Host: "a"}
}

func isSealed(ps ...*Peer) func() bool {
	return func() bool {
		for _, p := range ps {
			if s := p.Stats(); !s.Sealed || s.State != PeerUp {
				return false
			}
		}
		return true
	}
}

// sealPattern is in what containers send, and nowhere on the underlay.
var sealPattern = []byte{0xfe, 0xed, 0xfa, 0xce, 0xca, 0xfe, 0xbe, 0xef}

// Two nodes, each wire, sealed with certificates and with a key: everything gets through, and nothing that is in it, nor anything but sealed messages and handshakes, is on the underlay.
func TestSealed(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		wire   Wire
		remote string
		mtu    int
		inner  int
		psk    bool
	}{
		{WirePatchbay, "10.9.0.2", 1500, 1418, false}, {WirePatchbay, "fd09::2", 9000, 8898, true},
		{WireVXLAN, "10.9.0.2", 1500, 1418, true}, {WireVXLAN, "fd09::2", 1500, 1398, false},
	} {
		t.Run(fmt.Sprintf("%v %s MTU %d", c.wire, c.remote, c.mtu), func(t *testing.T) {
			a, b := underlay(t, c.mtu)
			there := netip.MustParseAddr(c.remote)
			here := there.Prev()
			sa, sb := sealPair(t)
			if !c.psk {
				ids := certificates(t, []string{"blue"}, here.String(), there.String())
				sa, sb = &Seal{Identity: ids[0], Network: "blue", Host: c.remote}, &Seal{Identity: ids[1], Network: "blue", Host: here.String()}
			}
			ping(t, a, c.remote)
			read := porttest.PacketReader(t, b, "eth0")
			na, nb := newNetwork(newVTEP(t, a, Config{}), 42), newNetwork(newVTEP(t, b, Config{}), 42)
			pa := na.peer(t, PeerConfig{Remote: netip.AddrPortFrom(there, 0), Wire: c.wire, Seal: sa})
			if s := pa.Stats(); s.State != PeerHandshake || s.Sealed {
				t.Errorf("without keys it is %v, sealed %v", s.State, s.Sealed)
			}
			pb := nb.peer(t, PeerConfig{Remote: netip.AddrPortFrom(here, 0), Wire: c.wire, Seal: sb})
			if mtu, err := pa.MTU(); mtu != c.inner || err != nil {
				t.Fatalf("inner MTU %d, %v", mtu, err)
			}
			testbed.Eventually(t, tardy+10*time.Second, isSealed(pa, pb))
			c1, c2 := na.container(t, 1, c.inner, "10.1.0.1/24", "fd01::1/64"), nb.container(t, 2, c.inner, "10.1.0.2/24", "fd01::2/64")
			for _, ip := range []struct {
				to   string
				head int
			}{{"10.1.0.2", 28}, {"fd01::2", 48}} {
				ping(t, c1, ip.to, "-p", fmt.Sprintf("%x", sealPattern))
				ping(t, c1, ip.to, "-M", "do", "-s", fmt.Sprint(c.inner-ip.head))
			}
			var fs []frame.Frame
			for got := read(time.Second); len(got) > 0; got = read(200 * time.Millisecond) {
				fs = append(fs, got...)
			}
			porttest.OnlySealed(t, fs, 20, sealPattern)
			transfer(t, c1, c2, "10.1.0.2", 16<<20)
			transfer(t, c2, c1, "10.1.0.1", 16<<20)
			transfer(t, c1, c2, "fd01::2", 16<<20)
			broadcast(t, c1, c2)
			udpSuperframes(t, c1, c2, "10.1.0.2", c.inner-28)
			s, mode := pa.Stats(), "superframes"
			if c.wire == WireVXLAN {
				mode = "segments"
			}
			if s.Mode != mode || s.Wire != c.wire || s.SealError != "" {
				t.Errorf("%+v", s)
			}
			clean(t, []*frame.DropCounters{pa.Drops(), pb.Drops(), na.v.Drops(), nb.v.Drops()}, a, b, c1, c2)
		})
	}
}
