package secure

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
)

// hugeChain is what somebody without a certificate of the CA can send: a leaf of his own, and behind it a CA that is said to have issued it, with an RSA key of so many bytes. To see that the signature is none
// takes time that grows with the square of that.
func hugeChain(t testing.TB, bytes int) [][]byte {
	t.Helper()
	modulus := make([]byte, bytes)
	rand.Read(modulus)
	modulus[0] |= 0x80
	modulus[bytes-1] |= 1
	huge := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 1<<31 - 1}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	began, ends := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	between := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "between"}, NotBefore: began, NotAfter: ends,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1},
	}
	betweenDER, err := x509.CreateCertificate(rand.Reader, between, &x509.Certificate{Subject: pkix.Name{CommonName: "nobody"}}, huge, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "a.test"}, NotBefore: began, NotAfter: ends, SignatureAlgorithm: x509.SHA256WithRSA}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, between, key.Public(), small)
	if err != nil {
		t.Fatal(err)
	}
	// The signature is as long as the key, and anything.
	var outer struct {
		TBS asn1.RawValue
		Alg pkix.AlgorithmIdentifier
		Sig asn1.BitString
	}
	if _, err := asn1.Unmarshal(leafDER, &outer); err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, bytes)
	rand.Read(sig[1:])
	outer.Sig = asn1.BitString{Bytes: sig, BitLength: 8 * bytes}
	if leafDER, err = asn1.Marshal(outer); err != nil {
		t.Fatal(err)
	}
	return [][]byte{leafDER, betweenDER}
}

// TestHugeKeys: nobody who has not proved anything yet has this node compute for longer than a moment. The handshake could not be called off meanwhile, nor the node be ended.
func TestHugeKeys(t *testing.T) {
	cfg, peer := configs(t)
	cfg.Send = func([]byte) error { return nil }
	l, err := NewLink(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		chain [][]byte
		says  string
	}{
		{"a key of 96,000 bits", hugeChain(t, 12000), "RSA key of 96000 bits"},
		{"a key of 400,000 bits", hugeChain(t, 50000), "at most 32768"},
		{"a true certificate, and a huge one behind it", append(slices.Clone(peer.Identity.cert.Certificate), hugeChain(t, 12000)[1]), "RSA key of 96000 bits"},
	} {
		began := time.Now()
		err := l.verifyPeer(&dtls.State{NegotiatedProtocol: l.alpn, CipherSuiteID: l.suites()[0], PeerCertificates: c.chain}, false)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s, after %v: %v", c.name, time.Since(began), err)
		}
	}
}
