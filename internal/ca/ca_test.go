package ca

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"patchbay/tunnel/secure"
)

func mustInit(t *testing.T, o Options) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "deep", "ca")
	if _, err := Init(dir, o); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestIssue issues as people do and loads what came of it as a daemon does.
func TestIssue(t *testing.T) {
	dir := mustInit(t, Options{})
	for _, c := range []struct {
		host     string
		networks []string
		sans     []string
		hosts    string // as Describe lists them
		good     []string
		bad      []string
	}{
		{"host1.example.net", []string{"lab"}, nil, "host1.example.net", []string{"lab"}, []string{"prod", "Lab", "*", ""}},
		{"Host2.Example.NET.", []string{"lab", "prod", "lab"}, []string{"192.0.2.7", "h2", "host2.example.net"}, "host2.example.net h2 192.0.2.7", []string{"lab", "prod"}, []string{"dev"}},
		{"192.0.2.9", nil, nil, "192.0.2.9", []string{"lab", "anything"}, nil},
		{"::ffff:192.0.2.10", nil, nil, "192.0.2.10", []string{"lab"}, nil},
		{"2001:DB8::1", nil, nil, "2001:db8::1", []string{"lab"}, nil},
	} {
		cert, err := Issue(dir, c.host, Options{Networks: c.networks, SANs: c.sans})
		if err != nil {
			t.Errorf("%s: %v", c.host, err)
			continue
		}
		i := Describe(cert, time.Now())
		if got := strings.Join(i.Hosts, " "); got != c.hosts {
			t.Errorf("%s: hosts %q, want %q", c.host, got, c.hosts)
		}
		if i.CA || i.DaysLeft != DefaultLeafDays-1 && i.DaysLeft != DefaultLeafDays || len(cert.SerialNumber.Bytes()) != 16 || cert.PublicKeyAlgorithm != x509.ECDSA {
			t.Errorf("%s: %+v", c.host, i)
		}
		certFile, keyFile := HostFiles(dir, c.host)
		id, err := secure.LoadIdentity(certFile, keyFile, filepath.Join(dir, CertFile))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, n := range c.good {
			if err := id.Check(n, time.Now()); err != nil {
				t.Errorf("%s: %v", c.host, err)
			}
		}
		for _, n := range c.bad {
			if id.Check(n, time.Now()) == nil {
				t.Errorf("%s: good for network %q", c.host, n)
			}
		}
		if id.Check(c.good[0], time.Now().AddDate(0, 0, DefaultLeafDays+1)) == nil {
			t.Errorf("%s: good for ever", c.host)
		}
	}
}

func TestCAIsNoMore(t *testing.T) {
	dir := mustInit(t, Options{Days: 10})
	certs, err := Read(filepath.Join(dir, CertFile))
	if err != nil {
		t.Fatal(err)
	}
	c := certs[0]
	if !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.SerialNumber.Bytes()) != 16 || c.NotAfter.Sub(c.NotBefore) > 11*24*time.Hour {
		t.Errorf("%+v", Describe(c, time.Now()))
	}
	leaf, err := Issue(dir, "h", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if leaf.NotAfter.After(c.NotAfter) || leaf.NotBefore.Before(c.NotBefore) {
		t.Error("a certificate that outlives its CA")
	}
	if _, err := Issue(dir, "h2", Options{Now: time.Now().AddDate(0, 0, 11)}); err == nil || !strings.Contains(err.Error(), "patchbay ca init") {
		t.Errorf("a CA that has expired: %v", err)
	}
	another := mustInit(t, Options{})
	b, err := os.ReadFile(filepath.Join(another, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, KeyFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Issue(dir, "h3", Options{}); err == nil || !strings.Contains(err.Error(), "is not the key of") {
		t.Errorf("another CA's key: %v", err)
	}
}

// TestFiles: modes whatever the umask, nothing replaced, nothing left behind.
func TestFiles(t *testing.T) {
	dir := mustInit(t, Options{})
	if _, err := Issue(dir, "h.test", Options{}); err != nil {
		t.Fatal(err)
	}
	mode := func(name string) os.FileMode {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode().Perm()
	}
	for name, want := range map[string]os.FileMode{"": 0o700, KeyFile: 0o600, "h.test.key": 0o600, CertFile: 0o644, "h.test.crt": 0o644} {
		if got := mode(filepath.Join(dir, name)); got != want {
			t.Errorf("%q has mode %04o, want %04o", name, got, want)
		}
	}
	list := func() (names []string) {
		es, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, e.Name()+" "+string(b))
		}
		return names
	}
	before := list()
	if len(before) != 4 {
		t.Errorf("%d files: %q", len(before), before)
	}
	if _, err := Init(dir, Options{}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("init again: %v", err)
	}
	if _, err := Issue(dir, "H.test", Options{}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("issue again: %v", err)
	}
	if err := put(filepath.Join(dir, KeyFile), "X", []byte("x"), 0o600, false); err == nil {
		t.Error("put replaced a file")
	}
	if !slices.Equal(before, list()) {
		t.Error("a refused command changed a file")
	}
	if _, err := Issue(dir, "h.test", Options{Force: true}); err != nil {
		t.Error(err)
	}
	if after := list(); len(after) != 4 || after[2] == before[2] {
		t.Error("--force did not replace the certificate")
	}
	if err := os.Chmod(filepath.Join(dir, KeyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Issue(dir, "h2.test", Options{}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a CA key open to the group: %v", err)
	}
	if err := os.Chmod(dir, 0o775); err != nil {
		t.Fatal(err)
	}
	if _, err := Issue(dir, "h2.test", Options{}); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
		t.Errorf("a directory open to the group: %v", err)
	}
	// A link that somebody laid where a file goes is not followed.
	dir = mustInit(t, Options{})
	if err := os.Symlink("/etc/hostname", filepath.Join(dir, "h.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := Issue(dir, "h", Options{}); err == nil {
		t.Error("a dangling name was taken")
	}
}

func TestRefuses(t *testing.T) {
	dir := mustInit(t, Options{})
	for _, c := range []struct {
		host string
		o    Options
		want string
	}{
		{"", Options{}, "neither a DNS name"},
		{"ca", Options{}, "neither a DNS name"},
		{"../x", Options{}, "neither a DNS name"},
		{"a b", Options{}, "neither a DNS name"},
		{"-a", Options{}, "neither a DNS name"},
		{"a..b", Options{}, "neither a DNS name"},
		{strings.Repeat("a.", 127) + "aa", Options{}, "neither a DNS name"},
		{"*.example.net", Options{}, "wildcard"},
		{"192.0.2.300", Options{}, "looks like an IPv4 address"},
		{"0.0.0.0", Options{}, "not the address of one host"},
		{"ff02::1", Options{}, "not the address of one host"},
		{"fe80::1%eth0", Options{}, "not the address of one host"},
		{"h", Options{SANs: []string{"x y"}}, "neither a DNS name"},
		{"h", Options{Networks: []string{"a/b"}}, "no name of a network"},
		{"h", Options{Networks: []string{"*"}}, "no name of a network"},
		{"h", Options{Networks: []string{""}}, "no name of a network"},
		{"h", Options{Days: -1}, "out of range"},
		{"h", Options{Days: MaxDays + 1}, "out of range"},
	} {
		if _, err := Issue(dir, c.host, c.o); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Issue(%.40q, %+v): %v", c.host, c.o, err)
		}
	}
	if es, _ := os.ReadDir(dir); len(es) != 2 {
		t.Errorf("refused commands left files: %v", es)
	}
	if _, err := Issue(t.TempDir(), "h", Options{}); err == nil || !strings.Contains(err.Error(), "patchbay ca init") {
		t.Errorf("no CA: %v", err)
	}
	if _, err := Read(filepath.Join(dir, KeyFile)); err == nil || !strings.Contains(err.Error(), "PRIVATE KEY") {
		t.Errorf("Read of a key: %v", err)
	}
	if _, err := Read(dir); err == nil {
		t.Error("Read of a directory")
	}
}

func FuzzIsHost(f *testing.F) {
	for _, s := range []string{"host1.example.net", "192.0.2.1", "::1", "../x", "a\x00b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var c x509.Certificate
		name, err := addHost(&c, s)
		if err != nil {
			return
		}
		cert, key := HostFiles("/ca", s)
		if filepath.Dir(cert) != "/ca" || filepath.Dir(key) != "/ca" || filepath.Base(cert) != name+".crt" || filepath.Base(cert) == CertFile {
			t.Fatalf("%q would be written to %s and %s", s, cert, key)
		}
	})
}
