package daemon

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"patchbay/internal/api"
	"patchbay/internal/ca"
	"patchbay/tunnel/secure"
)

// identity is what `patchbay ca issue` makes for a host and networks, as --identity names it.
func identity(t *testing.T, host string, networks ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := ca.Init(dir, ca.Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Issue(dir, host, ca.Options{Networks: networks}); err != nil {
		t.Fatal(err)
	}
	cert, key := ca.HostFiles(dir, host)
	return strings.Join([]string{cert, key, filepath.Join(dir, "ca.crt")}, ",")
}

func TestLoadIdentity(t *testing.T) {
	good := identity(t, "a.test")
	if _, err := LoadIdentity(good); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "a,b", "a,b,c,d", ",,", good + ",", strings.ReplaceAll(good, "a.test.key", "ca.key")} {
		if _, err := LoadIdentity(bad); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// A certificate is good for the networks it names, a shared key for all.
func TestSealing(t *testing.T) {
	named, err := LoadIdentity(identity(t, "a.test", "blue"))
	if err != nil {
		t.Fatal(err)
	}
	shared := sharedKey(t)
	for _, c := range []struct {
		id      *secure.Identity
		network string
		refused string
	}{
		{nil, "blue", "nothing to be known by"}, {named, "blue", ""}, {named, "green", "green"}, {shared, "green", ""}, {expired(t), "green", "expired"},
	} {
		n, err := New(t.Context(), Config{StateDir: t.TempDir(), Version: "test", Identity: c.id, Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))})
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.CreateNetwork(t.Context(), api.NetworkSpec{Name: c.network, VNI: 7, Seal: true})
		if c.refused == "" && err != nil || c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%s: %v, want %q", c.network, err, c.refused)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}
