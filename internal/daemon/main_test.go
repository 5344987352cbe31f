package daemon

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/testbed"
	"patchbay/tap"
)

func TestMain(m *testing.M) {
	edge.Main()
	testbed.Main(m)
}

// newTestNode is a node in this process, with a state directory of its own.
func newTestNode(t *testing.T, dir string) *Node {
	t.Helper()
	testbed.RequireTUN(t)
	n, err := New(t.Context(), Config{StateDir: dir, Version: "test", Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Logf("%s", b)
	return len(b), nil
}

func self() api.Caller { return api.Caller{PID: os.Getpid(), UID: os.Getuid()} }

// attachTAP attaches a TAP that this process opens in its own namespace.
func attachTAP(t *testing.T, n *Node, network string, spec api.AttachmentSpec) (api.Attachment, error) {
	t.Helper()
	spec.Lifetime = api.LifetimeSession
	at, err := n.Attach(t.Context(), network, spec, self())
	if err != nil {
		return api.Attachment{}, err
	}
	h, err := tap.Open(tap.OpenConfig{})
	if err != nil {
		at.Abort()
		t.Fatal(err)
	}
	return at.Plug(t.Context(), api.Device{Info: h.Info, FDs: h.FDs, PID: os.Getpid()})
}

func prefixes(ss ...string) (out []netip.Prefix) {
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// write puts a configuration file into dir.
func write(t *testing.T, dir, text string) string {
	t.Helper()
	path := filepath.Join(dir, "patchbay.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
