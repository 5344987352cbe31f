package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"patchbay/tunnel/secure"
)

// The files of a CA's directory besides HOST.crt and HOST.key.
const (
	CertFile = "ca.crt"
	KeyFile  = "ca.key"
)

// Days that certificates are valid unless told otherwise, and at most.
const (
	DefaultCADays   = 3650
	DefaultLeafDays = 825
	MaxDays         = 36500
)

const skew = time.Hour // that clocks of hosts may differ: certificates are valid from so much before they were made

// Options are those of Init and Issue.
type Options struct {
	Days     int       // for which it is valid, 1 to MaxDays; 0: the default. A host's certificate ends with its CA's at the latest
	Networks []string  // Issue: that the host may join; none: all
	SANs     []string  // Issue: further DNS names and IP addresses of the host
	Force    bool      // replace files that are there
	Now      time.Time // zero: time.Now()
}

func (o *Options) defaults(days int) error {
	if o.Days == 0 {
		o.Days = days
	}
	if o.Days < 1 || o.Days > MaxDays {
		return fmt.Errorf("%d days is out of range; take 1 to %d", o.Days, MaxDays)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	return nil
}

// Init makes a CA in dir, which it makes if it is not there, and returns its certificate.
func Init(dir string, o Options) (*x509.Certificate, error) {
	if err := o.defaults(DefaultCADays); err != nil {
		return nil, err
	}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	if err := absent(dir, o.Force, KeyFile, CertFile); err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: fmt.Sprintf("patchbay CA %x", serial.Bytes()[:4])},
		NotBefore:    o.Now.Add(-skew), NotAfter: o.Now.AddDate(0, 0, o.Days),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 0, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return sign(tmpl, tmpl, key, key, filepath.Join(dir, KeyFile), filepath.Join(dir, CertFile), o.Force)
}

// Issue makes a key and a certificate for host, a DNS name or an IP address, with the CA in dir, and returns the certificate. HostFiles names the files.
func Issue(dir, host string, o Options) (*x509.Certificate, error) {
	if err := o.defaults(DefaultLeafDays); err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		NotBefore: o.Now.Add(-skew), NotAfter: o.Now.AddDate(0, 0, o.Days),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for i, name := range append([]string{host}, o.SANs...) {
		text, err := addHost(tmpl, name)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			host, tmpl.Subject.CommonName = text, commonName(text)
		}
	}
	for _, n := range o.Networks {
		if !isLabel(n) {
			return nil, fmt.Errorf("network %.70q: no name of a network; use 1 to 63 letters, digits and hyphens, as `patchbay network create` does", n)
		}
		if u := secure.NetworkURI(n); !slices.ContainsFunc(tmpl.URIs, func(v *url.URL) bool { return *v == *u }) {
			tmpl.URIs = append(tmpl.URIs, u)
		}
	}
	if len(tmpl.URIs) == 0 {
		tmpl.URIs = []*url.URL{secure.NetworkURI(secure.AnyNetwork)}
	}
	caCert, caKey, err := load(dir)
	if err != nil {
		return nil, err
	}
	if !o.Now.Before(caCert.NotAfter) {
		return nil, fmt.Errorf("CA %s: it expired on %s; make another one with `patchbay ca init` and issue all certificates anew", filepath.Join(dir, CertFile), caCert.NotAfter.UTC().Format(time.DateOnly))
	}
	if tmpl.NotAfter.After(caCert.NotAfter) {
		tmpl.NotAfter = caCert.NotAfter
	}
	if tmpl.NotBefore.Before(caCert.NotBefore) {
		tmpl.NotBefore = caCert.NotBefore
	}
	if tmpl.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	certFile, keyFile := HostFiles(dir, host)
	if err := absent(dir, o.Force, filepath.Base(keyFile), filepath.Base(certFile)); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return sign(tmpl, caCert, key, caKey, keyFile, certFile, o.Force)
}

// HostFiles are where Issue puts the certificate and the key of host.
func HostFiles(dir, host string) (cert, key string) {
	if a, err := netip.ParseAddr(host); err == nil {
		host = a.Unmap().String()
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return filepath.Join(dir, host+".crt"), filepath.Join(dir, host+".key")
}

// addHost adds name to the SANs and returns it as it is written there.
func addHost(c *x509.Certificate, name string) (string, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return "", fmt.Errorf("host %.70q: not the address of one host; give one that peers reach, such as 192.0.2.1", name)
		}
		a = a.Unmap()
		if ip := net.IP(a.AsSlice()); !slices.ContainsFunc(c.IPAddresses, ip.Equal) {
			c.IPAddresses = append(c.IPAddresses, ip)
		}
		return a.String(), nil
	}
	n := strings.ToLower(strings.TrimSuffix(name, "."))
	ok := len(n) > 0 && len(n) <= 253
	for _, label := range strings.Split(n, ".") {
		ok = ok && isLabel(label)
	}
	switch {
	case strings.Contains(n, "*"):
		return "", fmt.Errorf("host %.70q: peers take no wildcard for a name; issue a certificate to each host", name)
	case !ok || n == "ca":
		return "", fmt.Errorf("host %.70q: neither a DNS name nor an IP address; give what other nodes name this host by in `patchbay peer add`", name)
	case strings.Trim(n, "0123456789.") == "":
		return "", fmt.Errorf("host %.70q: looks like an IPv4 address, but is none", name)
	}
	if !slices.Contains(c.DNSNames, n) {
		c.DNSNames = append(c.DNSNames, n)
	}
	return n, nil
}

// commonName fits what X.520 allows; nothing reads it but people.
func commonName(host string) string { return host[:min(len(host), 64)] }

// isLabel reports whether s is a DNS label (RFC 1123 §2.1), which also names networks.
func isLabel(s string) bool {
	ok := len(s) > 0 && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		c := s[i] | 0x20
		ok = c >= 'a' && c <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '-'
	}
	return ok
}

// newSerial is 128 bits, random but for the highest, so that it is always of one length and never zero (RFC 5280 §4.1.2.2).
func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("random number: %w", err)
	}
	b[0] |= 0x80
	return new(big.Int).SetBytes(b[:]), nil
}

// sign makes the certificate and writes both files, the key first: a certificate without a key would say that all is done.
func sign(tmpl, parent *x509.Certificate, key, signer *ecdsa.PrivateKey, keyFile, certFile string, force bool) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", certFile, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", certFile, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", keyFile, err)
	}
	if err := put(keyFile, "PRIVATE KEY", keyDER, 0o600, force); err != nil {
		return nil, err
	}
	if err := put(certFile, "CERTIFICATE", der, 0o644, force); err != nil {
		return nil, err
	}
	return cert, nil
}

// load reads the CA of dir.
func load(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certFile, keyFile := filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)
	if err := checkDir(dir); err != nil {
		return nil, nil, initFirst(err, dir)
	}
	certs, err := Read(certFile)
	if err != nil {
		return nil, nil, initFirst(err, dir)
	}
	b, err := readFile(keyFile, true)
	if err != nil {
		return nil, nil, initFirst(err, dir)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, nil, fmt.Errorf("CA key %s: no private key in PEM; put back the one that `patchbay ca init` wrote", keyFile)
	}
	any, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("CA key %s: %w", keyFile, err)
	}
	key, ok := any.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(certs[0].PublicKey) {
		return nil, nil, fmt.Errorf("CA key %s: it is not the key of %s; put back the two that `patchbay ca init` wrote", keyFile, certFile)
	}
	if !certs[0].IsCA {
		return nil, nil, fmt.Errorf("CA %s: not the certificate of a CA; put back the one that `patchbay ca init` wrote", certFile)
	}
	return certs[0], key, nil
}

func initFirst(err error, dir string) error {
	if errors.Is(err, errNotExist) {
		return fmt.Errorf("%w; make a CA first: patchbay ca init %s", err, dir)
	}
	return err
}
