package spin

import "time"

// maxSkip bounds how many sleeps pass without a new attempt to spin.
const maxSkip = 64

// Spinner decides whether an idle read loop looks at its queue again or lets its thread sleep. It belongs to that loop; the zero Spinner is ready.
//
// Waking a sleeping thread takes 40 to 70 µs where the processor idles in a virtual machine, more than everything else a frame meets on its
// way. So a loop that has just been busy looks again for about that long; in a request-response the next frame is there within
// it. Where frames come more rarely the looking is wasted: each spin in vain doubles the number of sleeps until the next
// attempt, so that a slow trickle costs one spin in maxSkip wake-ups, and one success starts over.
type Spinner struct {
	since time.Time // when this spin began; zero when none is under way
	skip  int       // sleeps between attempts
	wait  int       // sleeps until the next one
}

// Found says that there was a frame.
func (s *Spinner) Found() {
	if !s.since.IsZero() {
		s.since = time.Time{}
		s.skip = 0
	}
}

// Again says that the queue is empty, and reports whether to look once more instead of going to sleep. limit bounds how long it is looked for; zero or less is not at
// all. It reads the clock.
func (s *Spinner) Again(limit time.Duration) bool {
	switch {
	case limit <= 0:
		return false
	case s.since.IsZero():
		if s.wait > 0 {
			s.wait--
			return false
		}
		s.since = time.Now()
		return true
	case time.Since(s.since) < limit:
		return true
	}
	s.since = time.Time{}
	s.skip = min(2*s.skip+1, maxSkip)
	s.wait = s.skip
	return false
}
