package spin

import (
	"testing"
	"testing/synctest"
	"time"
)

// idle plays an empty queue: it says how long the Spinner looked before it gave up.
func idle(s *Spinner, limit time.Duration) (looked time.Duration) {
	start := time.Now()
	for s.Again(limit) {
		time.Sleep(10 * time.Microsecond)
	}
	return time.Since(start)
}

func TestSpinnerBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 50 * time.Microsecond
		var s Spinner
		if d := idle(&s, limit); d != limit {
			t.Fatalf("looked for %v, want %v", d, limit)
		}
		// In vain again and again: the share of sleeps with a spin before them falls to one in maxSkip+1.
		tries := 0
		for range 10 * (maxSkip + 1) {
			if idle(&s, limit) > 0 {
				tries++
			}
		}
		if tries < 8 || tries > 20 {
			t.Errorf("%d attempts in %d sleeps", tries, 10*(maxSkip+1))
		}
		// One success starts over.
		for idle(&s, limit) == 0 {
		}
		for !s.Again(limit) {
		}
		s.Found()
		if d := idle(&s, limit); d != limit {
			t.Errorf("after a success: looked for %v", d)
		}
		if d := idle(&s, limit); d != 0 {
			t.Errorf("after one spin in vain: looked for %v", d)
		}
		// A frame that was there at once is neither success nor failure.
		skip := s.skip
		s.Found()
		if s.skip != skip {
			t.Errorf("skip went from %d to %d without a spin", skip, s.skip)
		}
		if s.Again(-1) {
			t.Error("looks again although spinning is off")
		}
	})
}
