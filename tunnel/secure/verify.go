package secure

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/pion/dtls/v3"
)

// AnyNetwork is the network in the URI of a certificate that is good for all networks, as `patchbay ca issue` writes without --network.
const AnyNetwork = "*"

const (
	maxChain      = 8        // certificates that a peer may send
	maxChainBytes = 32 << 10 // of all of them
)

// NetworkURI is the URI SAN that pins a certificate to a network: patchbay://network/NAME, or with AnyNetwork to all.
func NetworkURI(network string) *url.URL {
	return &url.URL{Scheme: "patchbay", Host: "network", Path: "/" + network}
}

// Networks lists what the certificate's URI SANs pin it to, AnyNetwork among them. One that lists none is good for none.
func Networks(c *x509.Certificate) (names []string) {
	for _, u := range c.URIs {
		if name, ok := strings.CutPrefix(u.Path, "/"); ok && u.Scheme == "patchbay" && u.Host == "network" && name != "" && u.RawQuery == "" && u.Fragment == "" && u.User == nil {
			names = append(names, name)
		}
	}
	return names
}

// verifyPeer is what a handshake has to pass besides what DTLS itself proves: that the other side has the certificate's private key, or the pre-shared key. The library calls it in
// every handshake, before its last flight goes out.
func (l *Link) verifyPeer(st *dtls.State, initiator bool) error {
	if !initiator && l.cfg.Identity.reflected(st.RemoteRandomBytes()) {
		return errReflected
	}
	if st.NegotiatedProtocol != l.alpn {
		return fmt.Errorf("the other side speaks of %.100q and not of %q", st.NegotiatedProtocol, l.alpn)
	}
	if !slices.Contains(l.suites(), st.CipherSuiteID) {
		return fmt.Errorf("cipher suite %s was not offered", st.CipherSuiteID)
	}
	if l.cfg.Identity.psk != nil {
		if !bytes.Equal(st.IdentityHint, []byte(l.cfg.Network)) {
			return fmt.Errorf("the other side has the key of network %.70q", st.IdentityHint)
		}
		return nil
	}
	n, size := len(st.PeerCertificates), 0
	for _, der := range st.PeerCertificates {
		size += len(der)
	}
	if n == 0 || n > maxChain || size > maxChainBytes {
		return fmt.Errorf("the other side sent %d certificates of %d bytes; it may send 1 to %d, of at most %d", n, size, maxChain, maxChainBytes)
	}
	var chain []*x509.Certificate
	for _, der := range st.PeerCertificates {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("its certificate cannot be read: %w", err)
		}
		chain = append(chain, c)
	}
	if err := verify(chain, l.cfg.Identity.cas, l.cfg.Now(), l.cfg.Network, l.cfg.Host); err != nil {
		return fmt.Errorf("its certificate: %w", err)
	}
	return nil
}

// verify holds a chain, leaf first, against everything that a node's certificate has to be, in either role: a node starts handshakes and answers them. An empty host is not looked at.
func verify(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, network, host string) error {
	leaf := chain[0]
	// Of all of them before any signature is looked at: who sends them is not known yet, and a signature under a key of half a million bits takes minutes.
	for _, c := range chain {
		if err := suitable(c); err != nil {
			return err
		}
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	for _, u := range []struct {
		usage x509.ExtKeyUsage
		name  string
	}{{x509.ExtKeyUsageServerAuth, "server"}, {x509.ExtKeyUsageClientAuth, "client"}} {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{u.usage}})
		var invalid x509.CertificateInvalidError
		switch {
		// Verify takes a certificate that lists no use for one that is for all.
		case err == nil && !slices.Contains(leaf.ExtKeyUsage, u.usage), errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
			return fmt.Errorf("not issued for use as a %s; issue it with `patchbay ca issue`, which allows both uses that a node needs", u.name)
		case err != nil:
			return explainX509(err, leaf, now)
		}
	}
	if leaf.IsCA {
		return errors.New("that of a CA; issue one to each host with `patchbay ca issue`")
	}
	if host != "" {
		if err := matchHost(leaf, host); err != nil {
			return err
		}
	}
	names := Networks(leaf)
	switch {
	case slices.Contains(names, network), slices.Contains(names, AnyNetwork):
		return nil
	case len(names) == 0:
		return fmt.Errorf("names no network, and so is good for none; issue it with `patchbay ca issue --network %s`", network)
	}
	return fmt.Errorf("issued for network %.100s and not for %s; issue it with `patchbay ca issue --network %[2]s`", strings.Join(names, ", "), network)
}

// matchHost wants a SAN that is host: equal, not matched by a wildcard, and also in what Go holds to be the rules of names.
func matchHost(leaf *x509.Certificate, host string) error {
	ok := false
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap().WithZone("")
		for _, ip := range leaf.IPAddresses {
			b, isIP := netip.AddrFromSlice(ip)
			ok = ok || isIP && b.Unmap() == a
		}
		host = a.String()
	} else {
		host = strings.TrimSuffix(host, ".")
		ok = slices.ContainsFunc(leaf.DNSNames, func(n string) bool { return strings.EqualFold(strings.TrimSuffix(n, "."), host) }) && leaf.VerifyHostname(host) == nil
	}
	if ok {
		return nil
	}
	var has []string
	has = append(has, leaf.DNSNames...)
	for _, ip := range leaf.IPAddresses {
		has = append(has, ip.String())
	}
	return fmt.Errorf("issued for host %.200s and not for %s, as the peer was added; add it by the name in its certificate, or issue one with --san %[2]s", strings.Join(has, ", "), host)
}

// explainX509 words the errors that people meet.
func explainX509(err error, leaf *x509.Certificate, now time.Time) error {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("%.80q was not issued by the given CA (issuer %.80q); both nodes need certificates of one CA", leaf.Subject, leaf.Issuer)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		day := time.RFC3339
		if now.Before(leaf.NotBefore) {
			return fmt.Errorf("not valid before %s; set the clocks right", leaf.NotBefore.UTC().Format(day))
		}
		if now.After(leaf.NotAfter) {
			return fmt.Errorf("expired at %s; issue a new one with `patchbay ca issue`", leaf.NotAfter.UTC().Format(day))
		}
		return fmt.Errorf("the CA's own certificate has expired or is not valid yet: %w", err)
	}
	return err
}
