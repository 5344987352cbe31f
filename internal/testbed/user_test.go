package testbed

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestNewUser: users are without rights over the host and, where root has made the bed, closed to each other.
func TestNewUser(t *testing.T) {
	a, distinct := NewUser(t)
	b, _ := NewUser(t)
	ns := NewNS(t, "host")
	t.Logf("users that the kernel tells apart: %v", distinct)
	out := func(l *Login, args ...string) string {
		o, err := l.In(ns, Tool(t, args[0]), args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, o)
		}
		return strings.TrimSpace(string(o))
	}
	if x, y := out(a, "id", "-u"), out(b, "id", "-u"); x == y || x == "0" || y == "0" {
		t.Errorf("uids %s and %s", x, y)
	}
	if o, err := a.In(ns, Tool(t, "ip"), "link", "set", "lo", "mtu", "1400").CombinedOutput(); err == nil {
		t.Errorf("an ordinary user changes the host: %s", o)
	}
	if o, err := a.In(ns, Tool(t, "unshare"), "-rn", Tool(t, "ip"), "link", "set", "lo", "mtu", "1400").CombinedOutput(); err != nil {
		t.Errorf("an ordinary user cannot have a namespace: %v: %s", err, o)
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a.Own(t, dir)
	touch := func(l *Login, name string) error {
		return l.As(exec.Command(Tool(t, "touch"), filepath.Join(dir, name))).Run()
	}
	if err := touch(a, "mine"); err != nil {
		t.Errorf("in his own directory: %v", err)
	}
	if err := touch(b, "yours"); (err != nil) != distinct {
		t.Errorf("in another's: %v", err)
	}
}
