package secure

import (
	"crypto/x509"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v3"

	"patchbay/frame"
)

// TestRefused has two nodes that must not come together, each for another reason, and looks for that reason in the log of either.
func TestRefused(t *testing.T) {
	edit := func(f func(c *x509.Certificate)) func(t testing.TB) (a, b LinkConfig) {
		return func(t testing.TB) (a, b LinkConfig) {
			ca := newTestCA(t)
			return LinkConfig{Identity: ca.identity(t, "a.test", nil), Network: "lab", VNI: 42, Host: "b.test"},
				LinkConfig{Identity: ca.identity(t, "b.test", f), Network: "lab", VNI: 42, Host: "a.test"}
		}
	}
	cases := map[string]struct {
		cfgs   func(t testing.TB) (a, b LinkConfig)
		reason string
	}{
		"wrong CA": {func(t testing.TB) (a, b LinkConfig) {
			a, _ = configs(t)
			_, b = configs(t)
			return a, b
		}, "was not issued by the given CA"},
		"self-signed": {func(t testing.TB) (a, b LinkConfig) {
			a, b = configs(t)
			b.Identity = newTestCA(t).identityFrom(t, "b.test", nil, nil)
			return a, b
		}, "was not issued by the given CA"},
		"wrong host":           {edit(func(c *x509.Certificate) { c.DNSNames = []string{"c.test"} }), "issued for host c.test and not for b.test"},
		"wildcard":             {edit(func(c *x509.Certificate) { c.DNSNames = []string{"*.test"} }), `issued for host \*.test and not for b.test`},
		"only the common name": {edit(func(c *x509.Certificate) { c.DNSNames = nil }), "and not for b.test"},
		"wrong network":        {edit(func(c *x509.Certificate) { c.URIs = []*url.URL{NetworkURI("prod")} }), "issued for network prod and not for lab"},
		"no network":           {edit(func(c *x509.Certificate) { c.URIs = nil }), "names no network"},
		"another kind of URI": {edit(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "https", Host: "network", Path: "/lab"}, {Scheme: "patchbay", Host: "host", Path: "/lab"}, {Scheme: "patchbay", Host: "network", Path: "/lab/x"}}
		}), "and not for lab"},
		"expired":         {edit(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }), "expired at"},
		"not yet valid":   {edit(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), "not valid before"},
		"no client usage": {edit(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "not issued for use as a"},
		"no server usage": {edit(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "not issued for use as a"},
		"no usage":        {edit(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "not issued for use as"},
		"wrong PSK": {func(t testing.TB) (a, b LinkConfig) {
			a, b = pskConfigs(t)
			b.Identity = pskIdentity(t, secretB)
			return a, b
		}, "its pre-shared key is another one"},
		"PSK against certificate": {func(t testing.TB) (a, b LinkConfig) {
			a, _ = configs(t)
			_, b = pskConfigs(t)
			return a, b
		}, "one node has a certificate and the other a pre-shared key"},
		"network of another name": {func(t testing.TB) (a, b LinkConfig) {
			a, b = configs(t)
			b.Network = "prod"
			return a, b
		}, "under another name or VNI"},
		"network of another name, PSK": {func(t testing.TB) (a, b LinkConfig) {
			a, b = pskConfigs(t)
			b.Network = "prod"
			return a, b
		}, "under another name or VNI"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, cb := c.cfgs(t)
				// The one who is wrong does not know it: its link is made without looking at its own certificate.
				bad := *cb.Identity.clone()
				na := newNode(t, ca)
				cb.Identity = pskIdentity(t, secretA)
				nb := newNode(t, cb)
				nb.link.cfg.Identity = &bad
				if bad.psk == nil {
					nb.link.psk = nil
				} else {
					nb.link.psk, _ = bad.networkKey(cb.Network)
				}
				b := connect(na, nb)
				defer b.end(t)
				b.a.start()
				b.b.start()
				for range 60 {
					time.Sleep(time.Second)
					if b.a.link.Session() != nil || len(*b.a.link.sessions.Load()) > 0 {
						t.Fatal("a session was made")
					}
				}
				if b.b.link.Session() != nil {
					m, _ := seal(b.b.link, "x")
					t.Errorf("the other side believes in session %08x", m.id)
				}
				if log := b.a.log.String() + b.b.log.String(); !strings.Contains(log, strings.ReplaceAll(c.reason, `\`, "")) {
					t.Errorf("no %q in the logs:\n%s", c.reason, log)
				}
				if n := strings.Count(b.a.log.String(), "handshake failed"); n == 0 || n > 6 {
					t.Errorf("%d failures logged in a minute:\n%s", n, b.a.log)
				}
				if st := b.a.link.Stats(); st.Failed == 0 || st.LastError == "" {
					t.Errorf("stats %+v", st)
				}
			})
		})
	}
}

func (id *Identity) clone() *Identity {
	return &Identity{cert: id.cert, cas: id.cas, psk: id.psk, files: id.files, trust: id.trust, mine: map[random]struct{}{}}
}

// TestSwappedPeers: a's datagrams for b go to c, which is good for the same network, and c's answers come back as b's.
func TestSwappedPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		a := newNode(t, LinkConfig{Identity: ca.identity(t, "a.test", nil), Network: "lab", VNI: 42, Host: "b.test"})
		c := newNode(t, LinkConfig{Identity: ca.identity(t, "c.test", nil), Network: "lab", VNI: 42, Host: "a.test"})
		b := connect(a, c)
		defer b.end(t)
		a.start()
		c.start()
		time.Sleep(40 * time.Second)
		if a.link.Session() != nil || c.link.Session() != nil {
			t.Error("a took c for b")
		}
		if !strings.Contains(a.log.String(), "issued for host c.test and not for b.test") {
			t.Errorf("log:\n%s", a.log)
		}
	})
}

// TestRewrittenVNI: one certificate is good for two networks, and somebody rewrites the VNI so that a handshake of one ends in the other.
func TestRewrittenVNI(t *testing.T) {
	for name, cfgs := range map[string]func(testing.TB) (LinkConfig, LinkConfig){"certificates": configs, "psk": pskConfigs} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, cb := cfgs(t)
				cb.VNI = 43
				b := connect(newNode(t, ca), newNode(t, cb))
				defer b.end(t)
				rewrite := func(vni byte) func(d []byte, deliver func([]byte)) {
					return func(d []byte, deliver func([]byte)) {
						d[7] = vni
						deliver(d)
					}
				}
				b.a.to.set(rewrite(43))
				b.b.to.set(rewrite(42))
				b.a.start()
				b.b.start()
				time.Sleep(40 * time.Second)
				if b.a.link.Session() != nil || b.b.link.Session() != nil {
					t.Error("a handshake went from one network into another")
				}
			})
		})
	}
	// The export alone keeps them apart, too.
	x, _ := pskConfigs(t)
	y := x
	y.VNI = 43
	x.Send, y.Send = func([]byte) error { return nil }, func([]byte) error { return nil }
	lx, err := NewLink(x)
	if err != nil {
		t.Fatal(err)
	}
	ly, err := NewLink(y)
	if err != nil {
		t.Fatal(err)
	}
	if lx.label == ly.label {
		t.Error("two VNIs export the same keys")
	}
}

// TestReflected leads a node's own datagrams back to it.
func TestReflected(t *testing.T) {
	for name, cfgs := range map[string]func(testing.TB) (LinkConfig, LinkConfig){"certificates": configs, "psk": pskConfigs} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, cb := cfgs(t)
				b := connect(newNode(t, ca), newNode(t, cb))
				defer b.end(t)
				b.a.to.deliver = func(d []byte) { b.a.link.Deliver(d) }
				b.a.start()
				b.b.start()
				time.Sleep(40 * time.Second)
				if len(*b.a.link.sessions.Load()) > 0 {
					t.Error("a node made a session with itself")
				}
				if b.a.link.psk != nil && !strings.Contains(b.a.log.String(), "this node's own") {
					t.Errorf("log:\n%s", b.a.log)
				}
			})
		})
	}
	// Two links of one node, led to each other: with a shared key only that the handshake is its own tells them from two nodes.
	synctest.Test(t, func(t *testing.T) {
		x, _ := pskConfigs(t)
		y := x
		y.Host = "192.0.2.3"
		b := connect(newNode(t, x), newNode(t, y))
		defer b.end(t)
		b.a.start()
		b.b.start()
		time.Sleep(40 * time.Second)
		if len(*b.a.link.sessions.Load())+len(*b.b.link.sessions.Load()) > 0 {
			t.Error("two links of one node made a session")
		}
	})
	// A frame that comes back to its sender does not open.
	inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		m, _ := seal(b.a.link, "x")
		if _, drop, ok := m.open(b.a.link); ok || drop != frame.DropUnauthentic {
			t.Errorf("reflected frame: drop %v, ok %v", drop, ok)
		}
	})
}

func TestNewLinkRefuses(t *testing.T) {
	good, _ := configs(t)
	good.Send = func([]byte) error { return nil }
	for name, edit := range map[string]func(c *LinkConfig){
		"no identity": func(c *LinkConfig) { c.Identity = nil }, "no network": func(c *LinkConfig) { c.Network = "" }, "any network": func(c *LinkConfig) { c.Network = "*" },
		"no VNI": func(c *LinkConfig) { c.VNI = 0 }, "big VNI": func(c *LinkConfig) { c.VNI = 1 << 24 }, "no host": func(c *LinkConfig) { c.Host = "" }, "no send": func(c *LinkConfig) { c.Send = nil },
		"rekey": func(c *LinkConfig) { c.RekeyAfter = time.Millisecond },
	} {
		c := good
		edit(&c)
		if l, err := NewLink(c); err == nil || l != nil {
			t.Errorf("%s: %v, %v", name, l, err)
		}
	}
	ca := newTestCA(t)
	c := good
	c.Identity = ca.identity(t, "a.test", func(x *x509.Certificate) { x.URIs = []*url.URL{NetworkURI("prod")} })
	if _, err := NewLink(c); err == nil || !strings.Contains(err.Error(), "issued for network prod and not for lab") {
		t.Errorf("certificate for another network: %v", err)
	}
	if _, err := NewLink(good); err != nil {
		t.Error(err)
	}
}

// TestVerifyPeer shows verifyPeer what a handshake with another implementation could end in.
func TestVerifyPeer(t *testing.T) {
	cfg, peer := configs(t)
	cfg.Send = func([]byte) error { return nil }
	l, err := NewLink(cfg)
	if err != nil {
		t.Fatal(err)
	}
	good := dtls.State{NegotiatedProtocol: l.alpn, CipherSuiteID: l.suites()[0], PeerCertificates: peer.Identity.cert.Certificate}
	if err := l.verifyPeer(&good, true); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(s *dtls.State){
		"no ALPN":              func(s *dtls.State) { s.NegotiatedProtocol = "" },
		"another ALPN":         func(s *dtls.State) { s.NegotiatedProtocol = "patchbay-seal/1 43 lab" },
		"no certificate":       func(s *dtls.State) { s.PeerCertificates = nil },
		"an empty certificate": func(s *dtls.State) { s.PeerCertificates = [][]byte{{}} },
		"many certificates": func(s *dtls.State) {
			for range maxChain {
				s.PeerCertificates = append(s.PeerCertificates, s.PeerCertificates[0])
			}
		},
		"one's own certificate": func(s *dtls.State) { s.PeerCertificates = cfg.Identity.cert.Certificate },
		"a suite without ECDHE": func(s *dtls.State) { s.CipherSuiteID = dtls.TLS_PSK_WITH_AES_128_GCM_SHA256 },
	} {
		for _, initiator := range []bool{true, false} {
			st := dtls.State{NegotiatedProtocol: good.NegotiatedProtocol, CipherSuiteID: good.CipherSuiteID, PeerCertificates: slices.Clone(good.PeerCertificates)}
			edit(&st)
			if l.verifyPeer(&st, initiator) == nil {
				t.Errorf("%s passed (initiator: %v)", name, initiator)
			}
		}
	}
	x, _ := pskConfigs(t)
	x.Send = cfg.Send
	if l, err = NewLink(x); err != nil {
		t.Fatal(err)
	}
	st := dtls.State{NegotiatedProtocol: l.alpn, CipherSuiteID: l.suites()[0], IdentityHint: []byte("lab")}
	if err := l.verifyPeer(&st, true); err != nil {
		t.Fatal(err)
	}
	st.IdentityHint = []byte("prod")
	if l.verifyPeer(&st, true) == nil {
		t.Error("the key of another network passed")
	}
}
