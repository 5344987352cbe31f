package superframe

// Numbers of Sequence, in messages.
const (
	// Window is how far behind the newest a message may be and still be told from one that has come already.
	Window = 1024
	// jump is how far from the newest a message may be before it is taken to be from a sender that has started anew.
	jump = 1 << 16
	// late is how many newer messages have to come first before a message counts as reordered: so many let TCP believe in a loss (RFC 5681 §3.2).
	late = 3
	// streak is how many messages in a row must seem to be old before they are taken to be from a sender that has started anew.
	streak = 64
)

// Stats is what has become of the messages of one sender, as far as their numbers tell.
type Stats struct {
	// Received have come, each counted once.
	Received uint64
	// Lost have not come while later ones have. It falls when one comes late after all.
	Lost uint64
	// Reordered came after at least three later ones, or their fragments out of order.
	Reordered uint64
	// Duplicated came again.
	Duplicated uint64
	// Restarts is how often the sender's numbers have begun anew.
	Restarts uint64
	// Broken have come in part.
	Broken uint64
}

// Sequence follows the numbers of one sender. The zero value is ready for any first number.
type Sequence struct {
	started    bool
	floor, top uint64 // the first number, and the highest
	seen       [Window / 64]uint64
	old        int // in a row

	expected, received, reordered, duplicated, restarts uint64
}

// Seen reports whether the message with number seq has come already, as far as is known. After many in a row that have, it is false: a sender has started anew with numbers it has used before.
func (s *Sequence) Seen(seq uint64) bool {
	d := int64(seq - s.top)
	return s.started && d <= 0 && d > -Window && s.bit(seq) && s.old < streak
}

func (s *Sequence) bit(seq uint64) bool { return s.seen[seq/64%(Window/64)]&(1<<(seq%64)) != 0 }
func (s *Sequence) set(seq uint64)      { s.seen[seq/64%(Window/64)] |= 1 << (seq % 64) }

// Accept takes note of a message that has come whole, and, where it was sealed, has proved genuine. It is false for one that has come before.
func (s *Sequence) Accept(seq uint64) (fresh bool) {
	switch d := int64(seq - s.top); {
	case !s.started || d > jump || d < -jump:
		s.begin(seq)
	case d > 0:
		s.advance(d)
		s.top = seq
		s.set(seq)
		s.expected += uint64(d)
		s.received++
		s.old = 0
	case s.old >= streak && (d <= -Window || s.bit(seq)):
		s.begin(seq)
	case d <= -Window:
		s.old++
		s.reordered++
		s.countLate(seq)
	case s.bit(seq):
		s.again()
		return false
	default:
		s.set(seq)
		s.old = 0
		if d <= -late {
			s.reordered++
		}
		s.countLate(seq)
	}
	return true
}

// again counts a message that has come before.
func (s *Sequence) again() {
	s.old++
	s.duplicated++
}

// countLate counts a message as received that was counted as expected when a later one came, unless it is from before the first one.
func (s *Sequence) countLate(seq uint64) {
	if int64(seq-s.floor) >= 0 {
		s.received++
	}
}

// begin begins with number seq.
func (s *Sequence) begin(seq uint64) {
	if s.started {
		s.restarts++
	}
	s.started, s.floor, s.top, s.old = true, seq, seq, 0
	s.seen = [Window / 64]uint64{}
	s.set(seq)
	s.expected++
	s.received++
}

// advance forgets the numbers that d new ones push out of the window.
func (s *Sequence) advance(d int64) {
	if d >= Window {
		s.seen = [Window / 64]uint64{}
		return
	}
	for seq := s.top + 1; d > 0; {
		n := min(int64(64-seq%64), d)
		s.seen[seq/64%(Window/64)] &^= (1<<n - 1) << (seq % 64)
		seq += uint64(n)
		d -= n
	}
}

// lost is what has not come yet of what was to be expected.
func (s *Sequence) lost() uint64 {
	if s.received >= s.expected {
		return 0
	}
	return s.expected - s.received
}
