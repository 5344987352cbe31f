package secure

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestIdentityFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, c := range []struct {
		name, content string
		mode          os.FileMode
		want          string // of the error; "" for none
	}{
		{"base64", secretA + "=\n", 0o600, ""},
		{"hex", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\n", 0o400, ""},
		{"hex of 128 bits", "0123456789abcdef02468ace13579bdf", 0o600, ""},
		{"open to the group", secretA, 0o640, "chmod 600"},
		{"open to all", secretA, 0o604, "chmod 600"},
		{"empty", "\n", 0o600, "is empty"},
		{"short", "hunter2", 0o600, "can be guessed"},
		{"same", strings.Repeat("a", 100), 0o600, "can be guessed"},
		{"words", "correct horse battery", 0o600, "head -c 32 /dev/urandom"},
		{"lines", secretA + "\n" + secretB, 0o600, "more than one line"},
		{"pem", "-----BEGIN PRIVATE KEY-----\n", 0o600, "--identity"},
		{"big", strings.Repeat(secretA, 1<<16), 0o600, "at most"},
	} {
		id, err := LoadPSK(file(c.name, c.content, c.mode))
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), dir)):
			t.Errorf("%s: %v", c.name, err)
		case err == nil && (!id.PSK() || strings.Contains(id.String(), secretA)):
			t.Errorf("%s: String tells the secret", c.name)
		}
	}
	if _, err := LoadPSK(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
	if _, err := LoadPSK(filepath.Join(dir, "none")); err == nil {
		t.Error("a file that is not there")
	}
	ca := newTestCA(t)
	id := ca.identity(t, "a.test", nil)
	crt, base := id.files, filepath.Dir(id.files)
	key, root := filepath.Join(base, "key"), filepath.Join(base, "ca")
	other := filepath.Join(filepath.Dir(ca.identity(t, "b.test", nil).files), "key")
	if err := os.Chmod(other, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ crt, key, ca, want string }{
		{crt, key, root, ""},
		{crt, other, root, "chmod 600"},
		{crt, filepath.Join(filepath.Dir(ca.identity(t, "b.test", nil).files), "key"), root, "private key does not match"},
		{root, key, root, "private key"},
		{crt, key, crt, "is no CA's certificate"},
		{crt, key, key, "cannot be read as a certificate"},
		{crt, key, file("text", "hello", 0o600), "there is no certificate in it"},
		{crt, key, file("open CA", string(ca.pem), 0o666), "anybody may change it"},
		{crt, key, file("the group's CA", string(ca.pem), 0o664), ""},
		{"", key, root, "no file is named"},
	} {
		_, err := LoadIdentity(c.crt, c.key, c.ca)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%v: %v", c, err)
		}
	}
}

func TestNetworkKeysDiffer(t *testing.T) {
	id := pskIdentity(t, secretA)
	x, err := id.networkKey("lab")
	if err != nil {
		t.Fatal(err)
	}
	y, _ := id.networkKey("prod")
	z, _ := pskIdentity(t, secretB).networkKey("lab")
	if len(x) != 32 || bytes.Equal(x, y) || bytes.Equal(x, z) {
		t.Errorf("%x %x %x", x, y, z)
	}
}
