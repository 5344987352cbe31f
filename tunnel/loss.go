package tunnel

import "time"

// What two ends have counted says how much gets lost, and of what kind.

const (
	lossWindow = 10                     // intervals that PeerStats.Loss looks back
	lossEvery  = 900 * time.Millisecond // an interval, at least

	// An offload is suspected when, of so many datagrams in so many messages that were cut on the way, no more than one of each message arrives, and what was sent singly does.
	watchDatagrams = 4
	watchMessages  = 2
	watchForget    = 30 * time.Second // a suspicion that nothing was added to
)

// counts are totals: datagrams that were sent, those of them that were several in one message, how many messages those were, and what the peer has received.
type counts struct{ sent, cut, messages, received uint64 }

func (c counts) minus(b counts) counts {
	return counts{c.sent - b.sent, c.cut - b.cut, c.messages - b.messages, c.received - b.received}
}

// follows reports whether c can be of a later time than b, and of the same counters.
func (c counts) follows(b counts) bool {
	return c.sent >= b.sent && c.cut >= b.cut && c.messages >= b.messages && c.received >= b.received
}

// losses looks back for a while.
type losses struct {
	ring [lossWindow + 1]counts // as of answers
	n    int                    // how many there ever were
	at   int64
}

// add is told the totals as of a probe that has been answered. It is false where they say nothing: too little time has passed, or answers have overtaken each other.
func (l *losses) add(c counts, now int64) bool {
	if l.n > 0 {
		last := l.ring[(l.n-1)%len(l.ring)]
		switch {
		case c.sent < last.sent || now-l.at < int64(lossEvery):
			return false
		case !c.follows(last): // the peer has begun to count anew
			*l = losses{}
		}
	}
	l.ring[l.n%len(l.ring)] = c
	l.n++
	l.at = now
	return true
}

// share is what part of the datagrams did not arrive. What is under way at both ends of the time is no loss, on balance.
func (l *losses) share() float64 {
	if l.n < 2 {
		return 0
	}
	d := l.ring[(l.n-1)%len(l.ring)].minus(l.ring[max(0, l.n-len(l.ring))%len(l.ring)])
	if d.sent == 0 || d.received >= d.sent {
		return 0
	}
	return float64(d.sent-d.received) / float64(d.sent)
}

// cutWatch looks for loss that an offload makes: a network card, or a switch of virtual machines, that loses or spoils what it is to cut. It has to be seen twice, and between the two a
// single packet as long as those has to get through, since else the path's MTU would explain it. Where the other end has found that out of the way here, one message that is lost says enough of the
// way back, which often carries few that are cut, such as acknowledgements, without which nothing moves on.
type cutWatch struct {
	based   bool
	base    counts
	at      int64 // of base
	suspect int64 // when it was first seen; 0 for not
}

// add is told the totals as of a probe that has been answered, and is true when cutting should be done without. hint is whether the peer does without, for that reason.
func (w *cutWatch) add(c counts, now int64, pmtu *search, hint bool) (lossy bool) {
	if !w.based || !c.follows(w.base) || now-w.at > int64(watchForget) {
		*w = cutWatch{based: true, base: c, at: now}
		return false
	}
	d := c.minus(w.base)
	if d.messages == 0 || !hint && (d.cut < watchDatagrams || d.messages < watchMessages) {
		return false
	}
	w.base, w.at = c, now
	switch {
	case !d.lossy() || pmtu.searching():
		w.suspect = 0
	case hint, w.suspect != 0 && pmtu.proved > w.suspect:
		*w = cutWatch{}
		return true
	case w.suspect == 0:
		w.suspect = now
		pmtu.due = 0
	}
	return false
}

// lossy reports whether what was cut got lost and what was sent singly did not. Some faults let the first, or the last, datagram of each message through.
func (c *counts) lossy() bool {
	single := c.sent - min(c.sent, c.cut)
	most := single + max(1, c.cut/20)
	if c.cut >= 3*c.messages {
		most += c.messages
	}
	return c.received <= most && c.received+single/8+1 >= single
}
