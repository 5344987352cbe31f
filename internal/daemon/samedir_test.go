package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

// TestSameDir holds that a node is not taken over by one with another state directory, however they are written.
func TestSameDir(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"state", "other"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("state", "link"); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(here, "state")
	for _, c := range []struct {
		theirs, own string
		want        bool
	}{
		{state, state, true},
		{state, "state", true},
		{state, "other/../state/", true},
		{state, filepath.Join(here, "link"), true},
		{state, filepath.Join(here, "other"), false},
		{state, filepath.Join(here, "none"), false},
		{"state", "state", false}, // it may run elsewhere
	} {
		if got := sameDir(c.theirs, c.own); got != c.want {
			t.Errorf("sameDir(%q, %q) = %v", c.theirs, c.own, got)
		}
	}
}
