package secure

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/frame"
)

// testCA issues certificates with any fault that is asked for.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newTestCA(t testing.TB) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-100 * 24 * time.Hour), NotAfter: time.Now().Add(1000 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// identity issues a certificate to host, for all networks, with what edit changes, and loads it through files.
func (ca *testCA) identity(t testing.TB, host string, edit func(c *x509.Certificate)) *Identity {
	t.Helper()
	return ca.identityFrom(t, host, ca, edit)
}

// identityFrom is identity with another issuer than the CA that is trusted; nil for self-signed.
func (ca *testCA) identityFrom(t testing.TB, host string, issuer *testCA, edit func(c *x509.Certificate)) *Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(mrand.Int64()), Subject: pkix.Name{CommonName: host}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(300 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		URIs: []*url.URL{NetworkURI(AnyNetwork)},
	}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{host}
	}
	if edit != nil {
		edit(tmpl)
	}
	parent, signer := tmpl, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	id, err := LoadIdentity(write("crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		write("key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), write("ca", ca.pem))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func pskIdentity(t testing.TB, secret string) *Identity {
	t.Helper()
	p := filepath.Join(t.TempDir(), "psk")
	if err := os.WriteFile(p, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := LoadPSK(p)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

const (
	secretA = "hq3mVb5cXk0nPz8uT2yWf7dJr4sLg9aE1oKiN6vQxBM"
	secretB = "Zr8wQe2tYu5iOp1aSd4fGh7jKl0zXc3vBn6mHqWeRtY"
)

// path is one direction of the underlay. What it does to a datagram is up to pass, which may send none, one or several to deliver.
type path struct {
	mu      sync.Mutex
	deliver func(d []byte)
	pass    func(d []byte, deliver func([]byte))
	seen    [][]byte // all that was sent
}

func (p *path) send(d []byte) error {
	d = bytes.Clone(d)
	p.mu.Lock()
	p.seen = append(p.seen, d)
	pass, deliver := p.pass, p.deliver
	p.mu.Unlock()
	if pass == nil {
		deliver(d)
	} else {
		pass(bytes.Clone(d), deliver)
	}
	return nil
}

func (p *path) set(pass func(d []byte, deliver func([]byte))) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pass = pass
}

func (p *path) recorded() [][]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([][]byte(nil), p.seen...)
}

// lossy drops, doubles and delays at random.
func lossy(loss, double float64, delay time.Duration) func(d []byte, deliver func([]byte)) {
	return func(d []byte, deliver func([]byte)) {
		n := 1
		if mrand.Float64() < loss {
			n = 0
		} else if mrand.Float64() < double {
			n = 2
		}
		for range n {
			time.AfterFunc(mrand.N(delay)+time.Microsecond, func() { deliver(bytes.Clone(d)) })
		}
	}
}

// node is one end.
type node struct {
	t      testing.TB
	link   *Link
	to     *path // what it sends
	cancel context.CancelFunc
	done   chan struct{}
	log    *logBuffer

	mu  sync.Mutex
	up  map[uint32]bool
	bad []string // calls of OnSession that make no sense
	cfg LinkConfig
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newNode(t testing.TB, cfg LinkConfig) *node {
	t.Helper()
	n := &node{t: t, to: &path{}, log: &logBuffer{}, up: map[uint32]bool{}}
	cfg.Send = n.to.send
	cfg.Log = slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.OnSession = func(id uint32, up bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.up[id] == up {
			n.bad = append(n.bad, fmt.Sprintf("session %08x: up %v twice", id, up))
		}
		n.up[id] = up
	}
	n.cfg = cfg
	var err error
	if n.link, err = NewLink(cfg); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	n.cancel, n.done = cancel, done
	link := n.link
	go func() {
		defer close(done)
		if err := link.Run(ctx); err != context.Canceled {
			n.t.Errorf("Run: %v", err)
		}
	}()
}

func (n *node) stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	<-n.done
}

// restart is a crash: another link, which knows nothing of the first.
func (n *node) restart() {
	n.stop()
	n.link.Close()
	var err error
	if n.link, err = NewLink(n.cfg); err != nil {
		n.t.Fatal(err)
	}
	n.start()
}

// bed is two nodes, a and b, each a peer of the other.
type bed struct{ a, b *node }

func connect(a, b *node) *bed {
	a.to.deliver = func(d []byte) { b.link.Deliver(d) }
	b.to.deliver = func(d []byte) { a.link.Deliver(d) }
	return &bed{a, b}
}

func (b *bed) end(t testing.TB) {
	t.Helper()
	for _, n := range []*node{b.a, b.b} {
		n.stop()
		n.link.Close()
		n.mu.Lock()
		for id, up := range n.up {
			if up {
				t.Errorf("session %08x was never said to have ended", id)
			}
		}
		for _, s := range n.bad {
			t.Error(s)
		}
		n.mu.Unlock()
	}
}

// configs are of two nodes with certificates of one CA, named a.test and b.test.
func configs(t testing.TB) (a, b LinkConfig) {
	t.Helper()
	ca := newTestCA(t)
	return LinkConfig{Identity: ca.identity(t, "a.test", nil), Network: "lab", VNI: 42, Host: "b.test"},
		LinkConfig{Identity: ca.identity(t, "b.test", nil), Network: "lab", VNI: 42, Host: "a.test"}
}

// inBubble runs f in a bubble of time with a bed of two running nodes.
func inBubble(t *testing.T, configs func(t testing.TB) (a, b LinkConfig), f func(t *testing.T, b *bed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ca, cb := configs(t)
		b := connect(newNode(t, ca), newNode(t, cb))
		defer b.end(t)
		f(t, b)
	})
}

// within waits until ok, and fails after d.
func within(t testing.TB, d time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > d {
			t.Fatalf("%s: not within %v", what, d)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

func (b *bed) sealed() bool { return b.a.link.Session() != nil && b.b.link.Session() != nil }

// message is one sealed message as its framing would carry it.
type message struct {
	id   uint32
	seq  uint64
	aad  []byte
	text []byte
}

func seal(from *Link, text string) (m message, ok bool) {
	s := from.Session()
	if s == nil {
		return m, false
	}
	if m.seq, ok = s.Next(); !ok {
		return m, false
	}
	m.id = s.ID()
	m.aad = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, m.id), m.seq)
	m.text = s.Seal(nil, m.seq, m.aad, []byte(text))
	return m, true
}

func (m message) open(to *Link) (string, frame.Drop, bool) {
	p, drop, ok := to.Open(m.id, m.seq, m.aad, bytes.Clone(m.text))
	return string(p), drop, ok
}

// exchange sends a message each way.
func (b *bed) exchange(t testing.TB) {
	t.Helper()
	for _, d := range []struct {
		name     string
		from, to *node
	}{{"a to b", b.a, b.b}, {"b to a", b.b, b.a}} {
		m, ok := seal(d.from.link, "over "+d.name)
		if !ok {
			t.Fatalf("%s: nothing to seal under", d.name)
		}
		if got, drop, ok := m.open(d.to.link); !ok || got != "over "+d.name {
			t.Fatalf("%s: %q, drop %v, ok %v", d.name, got, drop, ok)
		}
	}
}
