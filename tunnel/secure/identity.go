package secure

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"
)

// Identity is who this node is to its peers: a certificate with its key and the CA of the others, or a key that all share. It is safe for concurrent use.
type Identity struct {
	cert tls.Certificate // Leaf is set
	cas  *x509.CertPool  // the only roots
	psk  []byte          // nil: certificates

	// trust is a digest of whom it lets in: of the CA's certificates, or of the pre-shared key.
	trust [sha256.Size]byte

	mu    sync.Mutex
	mine  map[random]struct{} // of the handshakes this node has started and not ended
	files string              // for messages
}

// random is what a handshake's ClientHello carries, and so tells it from all others.
type random = [28]byte

const (
	maxFile = 1 << 20 // bytes
	minBits = 112     // of a pre-shared key, as strength counts: 128 random bits in hexadecimal digits come out a little below 128
)

// LoadIdentity reads a certificate (with its intermediates behind it), its private key, and the CA certificates that peers' chains must end in; all PEM. No other roots are trusted, the
// system's neither. A key file that others may read is refused, and each that anybody may write.
func LoadIdentity(certFile, keyFile, caFile string) (*Identity, error) {
	certPEM, err := readFile("certificate", certFile, false)
	if err != nil {
		return nil, err
	}
	keyPEM, err := readFile("key", keyFile, true)
	if err != nil {
		return nil, err
	}
	caPEM, err := readFile("CA", caFile, false)
	if err != nil {
		return nil, err
	}
	id := &Identity{cas: x509.NewCertPool(), mine: map[random]struct{}{}, files: certFile}
	if id.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w; give the two files that `patchbay ca issue` wrote for one host", certFile, keyFile, err)
	}
	if err := suitable(id.cert.Leaf); err != nil {
		return nil, fmt.Errorf("certificate %s: %w", certFile, err)
	}
	n, trust := 0, sha256.New()
	for rest := caPEM; ; n++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		ca, err := x509.ParseCertificate(b.Bytes)
		if b.Type != "CERTIFICATE" || err != nil {
			return nil, fmt.Errorf("CA %s: block %d is a %s that cannot be read as a certificate; give the CA's ca.crt", caFile, n+1, b.Type)
		}
		if !ca.IsCA || !ca.BasicConstraintsValid {
			return nil, fmt.Errorf("CA %s: %q is no CA's certificate; give the CA's ca.crt", caFile, ca.Subject)
		}
		id.cas.AddCert(ca)
		trust.Write(ca.Raw) // DER tells where it ends
	}
	trust.Sum(id.trust[:0])
	if n == 0 {
		return nil, fmt.Errorf("CA %s: there is no certificate in it; give the CA's ca.crt, in PEM", caFile)
	}
	return id, nil
}

// suitable refuses keys that a handshake cannot or should not use.
func suitable(c *x509.Certificate) error {
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("an RSA key of %d bits; use 2048 to 8192, or a P-256 key as `patchbay ca issue` makes", n)
		}
		return nil
	}
	return fmt.Errorf("a %s key is not supported; use P-256, as `patchbay ca issue` makes", c.PublicKeyAlgorithm)
}

// LoadPSK reads a pre-shared key: one line of text, at least 112 bits strong by a generous estimate. A file that others may read is refused. Each network has a key of its own, derived
// from it (HKDF-SHA256 with the network's name).
func LoadPSK(file string) (*Identity, error) {
	b, err := readFile("key", file, true)
	if err != nil {
		return nil, err
	}
	remedy := fmt.Sprintf("make one with: head -c 32 /dev/urandom | base64 > %s", file)
	b = bytes.TrimSpace(b)
	switch {
	case len(b) == 0:
		return nil, fmt.Errorf("key %s: the file is empty; %s", file, remedy)
	case bytes.HasPrefix(b, []byte("-----BEGIN")):
		return nil, fmt.Errorf("key %s: this is a PEM file, and no pre-shared key; give it with --identity, or %s", file, remedy)
	case bytes.ContainsAny(b, "\r\n"):
		return nil, fmt.Errorf("key %s: more than one line; %s", file, remedy)
	case strength(b) < minBits:
		return nil, fmt.Errorf("key %s: it has at most %.0f bits of randomness and can be guessed, %d are needed; %s", file, strength(b), minBits, remedy)
	}
	id := &Identity{psk: b, mine: map[random]struct{}{}, files: file}
	trust, err := hkdf.Key(sha256.New, b, nil, "patchbay trust 1", len(id.trust))
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	copy(id.trust[:], trust)
	return id, nil
}

// strength is about the most bits that b can hold: its length times the entropy of how often its characters occur, corrected for short strings (Miller and Madow). Words that people
// think of have far fewer; it finds what is plainly too little.
func strength(b []byte) (bits float64) {
	var count [256]int
	distinct := 0
	for _, c := range b {
		if count[c]++; count[c] == 1 {
			distinct++
		}
	}
	for _, n := range count {
		if n > 0 {
			bits -= float64(n) * math.Log2(float64(n)/float64(len(b)))
		}
	}
	return bits + float64(distinct-1)/(2*math.Ln2)
}

// readFile reads a small regular file. One that is secret must be its owner's alone, and none anybody's to change.
func readFile(what, name string, secret bool) ([]byte, error) {
	if name == "" {
		return nil, fmt.Errorf("%s: no file is named", what)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; name a file that you may read", what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", what, err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s %s: not a regular file", what, name)
	case secret && st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s %s: others may read or change it (mode %04o), so it is no secret; make a new one, or if nobody did: chmod 600 %[2]s", what, name, st.Mode().Perm())
	case st.Mode().Perm()&0o002 != 0:
		return nil, fmt.Errorf("%s %s: anybody may change it (mode %04o), and with it whom this node lets in; see that it is the one you mean, and: chmod o-w %[2]s", what, name, st.Mode().Perm())
	case st.Size() > maxFile:
		return nil, fmt.Errorf("%s %s: %d bytes; it has at most %d", what, name, st.Size(), maxFile)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, name, err)
	}
	return b, nil
}

// String says who, in a few words and without secrets.
func (id *Identity) String() string {
	if id.psk != nil {
		return "pre-shared key " + id.files
	}
	return fmt.Sprintf("certificate %s (%s)", id.files, id.cert.Leaf.Subject)
}

// PSK reports whether the identity is a pre-shared key.
func (id *Identity) PSK() bool { return id.psk != nil }

// Expires is when the certificate does, or the first of its intermediates; zero for a pre-shared key.
func (id *Identity) Expires() (t time.Time) {
	for _, der := range id.cert.Certificate {
		if c, err := x509.ParseCertificate(der); err == nil && (t.IsZero() || c.NotAfter.Before(t)) {
			t = c.NotAfter
		}
	}
	return t
}

// Check says whether the identity can be used on network at that time: its certificate is valid, has been issued for the network and for both uses. nil for a pre-shared key.
func (id *Identity) Check(network string, now time.Time) error {
	if id.psk != nil {
		return nil
	}
	var chain []*x509.Certificate
	for _, der := range id.cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %s: %w", id.files, err)
		}
		chain = append(chain, c)
	}
	if err := verify(chain, id.cas, now, network, ""); err != nil {
		return fmt.Errorf("certificate %s: %w", id.files, err)
	}
	return nil
}

// networkKey is the pre-shared key of one network.
func (id *Identity) networkKey(network string) ([]byte, error) {
	return hkdf.Key(sha256.New, id.psk, nil, "patchbay network key 1 "+network, 32)
}

// begin makes the random of a handshake that this node starts; end forgets it.
func (id *Identity) begin() (r random) {
	mustRandom(r[:])
	id.mu.Lock()
	defer id.mu.Unlock()
	id.mine[r] = struct{}{}
	return r
}

func (id *Identity) end(r random) {
	id.mu.Lock()
	defer id.mu.Unlock()
	delete(id.mine, r)
}

var errReflected = errors.New("the handshake is this node's own, led back to it; the peer's address leads here, or somebody forges")

// reflected reports whether a handshake that came here is one this node started.
func (id *Identity) reflected(r random) bool {
	id.mu.Lock()
	defer id.mu.Unlock()
	_, ok := id.mine[r]
	return ok
}
