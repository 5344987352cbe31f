package ca

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"patchbay/tunnel/secure"
)

const maxFile = 1 << 20 // bytes

var errNotExist = fs.ErrNotExist

// makeDir makes dir for its owner alone, or looks at the one that is there.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	return checkDir(dir)
}

func checkDir(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %s: others may write to it (mode %04o) and put their own CA in place; chmod go-w %[1]s, or name another one", dir, st.Mode().Perm())
	}
	return nil
}

// absent refuses to go on when one of the files is there.
func absent(dir string, force bool, names ...string) error {
	if force {
		return nil
	}
	for _, n := range names {
		p := filepath.Join(dir, n)
		if _, err := os.Lstat(p); err == nil {
			return fmt.Errorf("%s is there already; use another directory or host, or --force to replace it: what it was used for then stops working", p)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// put writes a file whole or not at all. One that is there it replaces only if force is set.
func put(name, typ string, der []byte, mode os.FileMode, force bool) (err error) {
	f, err := os.OpenFile(fmt.Sprintf("%s.%d.new", name, os.Getpid()), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // renamed or linked when all went well
	err = pem.Encode(f, &pem.Block{Type: typ, Bytes: der})
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if force {
		err = os.Rename(f.Name(), name)
	} else {
		err = os.Link(f.Name(), name) // unlike a rename, it fails if name is there
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already; use --force to replace it", name)
	} else if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// readFile reads a small regular file. One that is secret must be its owner's alone.
func readFile(name string, secret bool) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s: not a regular file", name)
	case secret && st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s: others may read or change it (mode %04o), so it is no secret; make a new CA, or if nobody did: chmod 600 %[1]s", name, st.Mode().Perm())
	case st.Size() > maxFile:
		return nil, fmt.Errorf("%s: %d bytes are too many for a certificate", name, st.Size())
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// Read reads the certificates of a PEM file, at least one.
func Read(name string) (certs []*x509.Certificate, err error) {
	rest, err := readFile(name, false)
	if err != nil {
		return nil, err
	}
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: it holds a %s; name the certificate's file, such as %s", name, b.Type, CertFile)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d cannot be read: %w", name, len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: there is no certificate in it; name a file in PEM, such as %s", name, CertFile)
	}
	return certs, nil
}

// Info is what `patchbay ca show` says of a certificate.
type Info struct {
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Serial      string    `json:"serial"` // hexadecimal
	CA          bool      `json:"ca"`
	Hosts       []string  `json:"hosts"`
	Networks    []string  `json:"networks"` // secure.AnyNetwork stands for all
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	DaysLeft    int       `json:"daysLeft"`    // rounded down; below zero once it has expired
	Fingerprint string    `json:"fingerprint"` // SHA-256 of the DER, hexadecimal
}

// Describe is the Info of c as of now.
func Describe(c *x509.Certificate, now time.Time) Info {
	sum := sha256.Sum256(c.Raw)
	i := Info{
		Subject: c.Subject.String(), Issuer: c.Issuer.String(), Serial: fmt.Sprintf("%x", c.SerialNumber), CA: c.IsCA,
		Hosts: append([]string{}, c.DNSNames...), Networks: append([]string{}, secure.Networks(c)...),
		NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(), Fingerprint: hex.EncodeToString(sum[:]),
	}
	for _, ip := range c.IPAddresses {
		i.Hosts = append(i.Hosts, ip.String())
	}
	left := c.NotAfter.Sub(now)
	i.DaysLeft = int(left / (24 * time.Hour))
	if left < 0 {
		i.DaysLeft--
	}
	return i
}
