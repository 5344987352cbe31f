package bench

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
	"patchbay/internal/testbed"
)

// usualCongestion is what a run has by itself on this machine.
func usualCongestion(t *testing.T) string {
	t.Helper()
	available, err := availableCongestion()
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(available, congestionDefault) {
		return congestionDefault
	}
	return congestionAlways
}

func TestChooseCongestion(t *testing.T) {
	both := []string{"reno", "bbr", "cubic"}
	for _, c := range []struct {
		name      string
		available []string
		want      string
	}{
		{"", both, "cubic"}, {"", []string{"reno", "bbr"}, "reno"}, {"bbr", both, "bbr"}, {"reno", both, "reno"}, {"machine", both, "machine"},
	} {
		if got, err := chooseCongestion(c.name, c.available); err != nil || got != c.want {
			t.Errorf("%q of %q: %q, %v", c.name, c.available, got, err)
		}
	}
	if _, err := chooseCongestion("cubic", []string{"reno", "bbr"}); err == nil || !strings.Contains(err.Error(), "use reno, bbr, or machine") {
		t.Errorf("one that is not there: %v", err)
	}
}

// Every congestion control that there is is had by a new namespace, or else reno, and by the generator's sockets in it in any case; an unknown one is reno, with the reason.
func TestSettleCongestion(t *testing.T) {
	testbed.Require(t)
	available, err := availableCongestion()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(available, "nonsense", "") {
		s, err := newSpace("test", name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		err = s.Do(func() error {
			b, err := os.ReadFile(congestionSysctl)
			if err != nil {
				return err
			}
			has := strings.TrimSpace(string(b))
			// A socket that somebody else opens there.
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if got, err := load.Congestion(fd); err != nil || got != has {
				t.Errorf("%q: a socket has %q, %v, and the namespace %q", name, got, err, has)
			}
			c, err := settleCongestion(name)
			if err != nil {
				return err
			}
			switch want := (Congestion{name, has, ""}); name {
			case "":
				want.Sockets = has
				if c != want {
					t.Errorf("nothing asked: %+v", c)
				}
			case "nonsense":
				if c.Sockets != congestionAlways || has != congestionAlways || c.Refused == "" {
					t.Errorf("%s: %+v; before %q", name, c, has)
				}
			default:
				if c != want || has != name && has != congestionAlways {
					t.Errorf("%s: %+v, want %+v", name, c, want)
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// What the agent has settled on is handed down to each kind of measurement over TCP.
func TestMeasureHasCongestion(t *testing.T) {
	h := holder{congestion: "nonsense"}
	for _, kind := range []string{"stream", "rr", "crr", "hold"} {
		r, err := h.measure(t.Context(), request{Kind: kind, Config: load.Config{Addr: "127.0.0.1:1", Count: 1}})
		if why := unix.ENOENT.Error(); err == nil && !strings.Contains(r.FirstErr, why) || err != nil && !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, %q", kind, err, r.FirstErr)
		}
	}
}

// A side's generator is told nothing where the machine's congestion control is left.
func TestGeneratorCongestion(t *testing.T) {
	has := Congestion{Sockets: "reno", Namespace: "reno"}
	if got := (sideSpec{Congestion: "cubic"}).generator(has); got != "reno" {
		t.Errorf("told %q", got)
	}
	if got := (sideSpec{}).generator(has); got != "" {
		t.Errorf("told %q", got)
	}
}
