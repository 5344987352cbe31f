package secure

import (
	"strings"
	"testing"
)

// TestImportTrust: sessions are not taken over by a node that lets in others than the one before, as after a CA or a key that got out was replaced; with a new certificate of the same CA, or the same key, they are.
func TestImportTrust(t *testing.T) {
	ca, other := newTestCA(t), newTestCA(t)
	ids := map[string]*Identity{
		"CA": ca.identity(t, "a.test", nil), "the CA, another certificate": ca.identity(t, "a.test", nil), "another CA": other.identity(t, "a.test", nil),
		"key": pskIdentity(t, secretA), "the key in another file": pskIdentity(t, secretA), "another key": pskIdentity(t, secretB),
	}
	link := func(who string) *Link {
		l, err := NewLink(LinkConfig{Identity: ids[who], Network: "lab", VNI: 42, Host: "b.test", Send: func([]byte) error { return nil }})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, c := range []struct {
		from, to string
		taken    bool
	}{
		{"CA", "the CA, another certificate", true}, {"CA", "another CA", false}, {"CA", "key", false},
		{"key", "the key in another file", true}, {"key", "another key", false}, {"key", "CA", false},
	} {
		l := link(c.from)
		s, err := newSession(keys{ID: [4]byte{1}}, true, l.stats.Since, l.cfg.RekeyBytes, l.wake)
		if err == nil {
			err = l.add(s)
		}
		if err != nil {
			t.Fatal(err)
		}
		l.confirm(s)
		data, err := l.Export()
		if err != nil {
			t.Fatal(err)
		}
		heir := link(c.to)
		err = heir.Import(data)
		if taken := heir.Session() != nil; taken != c.taken || taken != (err == nil) || err != nil && !strings.Contains(err.Error(), "another CA") {
			t.Errorf("from %s to %s: taken %v, %v", c.from, c.to, taken, err)
		}
	}
}
