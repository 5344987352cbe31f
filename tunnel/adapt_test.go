package tunnel

import (
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/tunnel/udp"
)

// adaptRig drives an adaptation by a clock of its own. A superframe is a message of 45 datagrams.
type adaptRig struct {
	t testing.TB
	a adaptation
	p progress
}

// second passes a second in which so many superframes and single datagrams were sent, of which so many messages were lost and reordered, and reports.
func (r *adaptRig) second(supers, singles, lost, reordered uint64) (changed bool) {
	r.p.at += int64(time.Second)
	if r.a.segments() {
		singles += supers * 45
	} else {
		r.p.many += supers
		r.p.datagrams += 45 * supers
		r.p.messages += supers
	}
	r.p.messages += singles
	r.p.datagrams += singles
	r.p.lost += lost
	r.p.reordered += reordered
	return r.a.report(7, r.p)
}

// until passes seconds like that until the mode changes, and returns how many it took, or limit.
func (r *adaptRig) until(limit int, supers, singles, lost, reordered uint64) int {
	for n := range limit {
		if r.second(supers, singles, lost, reordered) {
			return n + 1
		}
	}
	return limit
}

func newAdaptRig(t testing.TB) *adaptRig {
	r := &adaptRig{t: t}
	r.second(1000, 100, 0, 0)
	return r
}

func (r *adaptRig) want(name string, segments bool, changes uint64) {
	r.t.Helper()
	if r.a.segments() != segments || r.a.changes.Load() != changes {
		r.t.Errorf("%s: %s after %d changes", name, r.a.mode(), r.a.changes.Load())
	}
}

func TestAdaptation(t *testing.T) {
	r := newAdaptRig(t)
	r.until(100, 1000, 100, 0, 0)
	r.want("no loss", false, 0)
	r.until(100, 1000, 100, 2, 0)
	r.want("a little loss", false, 0)
	r.until(100, 10, 10, 2, 0)
	r.want("few, of which few are lost", false, 0)
	if n := r.until(10, 1000, 100, 360, 0); n != 1 {
		t.Errorf("1 %% of datagrams lost: %d s", n)
	}
	r.want("loss", true, 1)
	// Still 1 %: it stays. Then less, but not little. Then none.
	r.until(20, 1000, 0, 450, 0)
	r.want("loss goes on", true, 1)
	r.until(20, 1000, 0, 90, 0)
	r.want("less loss", true, 1)
	if n := r.until(20, 1000, 0, 0, 0); n != int(dwellMin/time.Second) {
		t.Errorf("back after %d s without loss", n)
	}
	r.want("clean", false, 2)
	// It fails again at once, and again: each time it takes longer to be believed.
	for i, want := range []int{8, 16, 32, 64, 64} {
		if n := r.until(10, 1000, 0, 360, 0); n != 1 {
			t.Errorf("loss again: %d s", n)
		}
		if n := r.until(200, 1000, 0, 0, 0); n != want {
			t.Errorf("time %d: back after %d s, want %d", i, n, want)
		}
	}
	r.until(int(heldUp/time.Second)+1, 1000, 0, 0, 0)
	r.until(1, 1000, 0, 360, 0)
	if n := r.until(200, 1000, 0, 0, 0); n != int(dwellMin/time.Second) {
		t.Errorf("after a good minute: back after %d s", n)
	}
	// Loss that is neither high nor low does not last for ever.
	r.until(int(heldUp/time.Second)+1, 1000, 0, 0, 0)
	r.until(1, 1000, 0, 360, 0)
	if n := r.until(200, 1000, 0, 90, 0); n != dwellTries*int(dwellMin/time.Second) {
		t.Errorf("with some loss: back after %d s", n)
	}
	// A silent network tries again.
	r.until(1, 1000, 0, 360, 0)
	if n := r.until(200, 0, 1, 0, 0); n > 2*int(dwellMin/time.Second)+5 {
		t.Errorf("silence: back after %d s", n)
	}
}

// TestAdaptationIsEarly: where superframes all but stop, a quarter of a second is enough.
func TestAdaptationIsEarly(t *testing.T) {
	for _, c := range []struct {
		name         string
		supers, lost uint64
		after        time.Duration
		segments     bool
	}{
		{"one in three", 30, 10, 250 * time.Millisecond, true},
		{"one in three, sooner than that", 30, 10, 100 * time.Millisecond, false},
		{"a burst", 2000, 20, 250 * time.Millisecond, false},
		{"few", 20, 5, 250 * time.Millisecond, false},
	} {
		r := newAdaptRig(t)
		r.p.at += int64(c.after)
		r.p.many += c.supers
		r.p.messages += c.supers
		r.p.datagrams += 45 * c.supers
		r.p.lost += c.lost
		if r.a.report(7, r.p); r.a.segments() != c.segments {
			t.Errorf("%s: %s", c.name, r.a.mode())
		}
	}
}

func TestAdaptationToReordering(t *testing.T) {
	r := newAdaptRig(t)
	r.until(10, 1000, 0, 0, 30)
	r.want("3 %", false, 0)
	if n := r.until(10, 1000, 0, 0, 100); n != 1 {
		t.Errorf("10 %%: %d s", n)
	}
	r.until(20, 1000, 0, 0, 1000)
	r.want("some", true, 1)
	if n := r.until(20, 1000, 0, 0, 0); n != int(dwellMin/time.Second) {
		t.Errorf("back after %d s", n)
	}
	// What two goroutines that send at once reorder between them says nothing.
	for range 20 {
		r.p.crossed += 800
		r.second(1000, 0, 0, 300)
	}
	r.want("crossed", false, 2)
}

func TestAdaptationStartsAnew(t *testing.T) {
	r := newAdaptRig(t)
	r.p.lost += 500
	// The peer has started anew: its counts begin at nothing, and are compared with nothing.
	r.p.at += int64(time.Second)
	r.p.lost, r.p.reordered = 400, 300
	if r.a.report(8, r.p) {
		t.Error("counts of two lives are compared")
	}
	r.want("anew", false, 0)
	r.p.at += int64(time.Second)
	r.p.messages += 1000
	r.p.datagrams += 45000
	r.p.lost -= 100 // what was thought lost was late
	if r.a.report(8, r.p) {
		t.Error("fewer are lost, and that is bad")
	}
}

// A path that loses one datagram in a hundred has superframes sent as segments, until it is clean again. What TCP carries arrives as it was.
//
//	[c1] ── switch ── VTEP [a] ── [relay] ── [b] VTEP ── switch ── [c2]
func TestLossySuperframes(t *testing.T) {
	testbed.Leaks(t)
	r := newRelay(t, 1500)
	pa, pb, ca, cb := r.nodes(t, WirePatchbay)
	ping(t, ca, "10.1.0.2")
	transfer(t, ca, cb, "10.1.0.2", 8<<20)
	if s := pa.Stats(); s.Mode != "superframes" || s.ModeChanges != 0 {
		t.Errorf("on a clean path: %s after %d changes", s.Mode, s.ModeChanges)
	}
	until := func(what, mode string, p *Peer) {
		t.Helper()
		began := time.Now()
		for end := time.Now().Add(time.Minute); p.Stats().Mode != mode; {
			if time.Now().After(end) {
				t.Fatalf("%s: still %s: %+v", what, p.Stats().Mode, p.Stats())
			}
			transfer(t, ca, cb, "10.1.0.2", 1<<20)
		}
		t.Logf("%s: %s after %v", what, mode, time.Since(began).Round(10*time.Millisecond))
	}
	r.set(relayFaults{loss: 0.01})
	until("1 % loss", "segments", pa)
	transfer(t, ca, cb, "10.1.0.2", 2<<20)
	r.set(relayFaults{})
	until("no loss", "superframes", pa)
	transfer(t, ca, cb, "10.1.0.2", 8<<20)
	if s := pa.Stats(); s.Cut != udp.CutOn {
		t.Errorf("cut: %v", s.Cut)
	}
	// Everything at once, both ways: nothing wrong arrives.
	r.set(relayFaults{loss: 0.005, dup: 0.02, reorder: 0.1})
	transfer(t, ca, cb, "10.1.0.2", 2<<20)
	transfer(t, cb, ca, "10.1.0.1", 2<<20)
	t.Logf("a: %+v; b: %+v; relay passed %d, lost %d", pa.Stats(), pb.Stats(), r.passed.Load(), r.lost.Load())
	for _, p := range []*Peer{pa, pb} {
		p.Drops().Each(func(d frame.Drop, n uint64) {
			switch d {
			case frame.DropDuplicate, frame.DropFragLimit, frame.DropFragTimeout:
			default:
				t.Errorf("%d drops: %v", n, d)
			}
		})
	}
}
