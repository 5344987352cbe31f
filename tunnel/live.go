package tunnel

import (
	"sync"
	"time"
)

// Times of the prober.
const (
	probeEvery = time.Second            // a peer that answers
	probeEarly = 250 * time.Millisecond // one that has just come up or has missed an answer, for a while
	probeShy   = 5 * time.Second        // one that has never answered, and may be a kernel
	// deadAfter is how long a peer that has answered may be silent. Together with lateness of the prober it is less than the five seconds in which the end of a host is to be noticed.
	deadAfter = 3500 * time.Millisecond
	// oneWayAfter is how long a peer whose frames come may leave probes unanswered.
	oneWayAfter = 10 * time.Second
	// otherAfter is how long a peer that is down may send frames and no control message before it is taken for another host, which knows none.
	otherAfter = 30 * time.Second
	// lateAfter is a tick that came so late that nothing follows from nobody's having been heard: the clock ran on while the VTEP did not.
	lateAfter = 2 * time.Second
	tickEvery = time.Second // at least

	probeWindow = 32 // probes that may still be answered
	shyMisses   = 10 // unanswered probes to a peer that asks itself, before it counts as one that does not answer
	repliesPerS = 50 // to one peer, at most
)

// liveness is what is known of a peer's being there. The data plane does not look at it.
type liveness struct {
	// events is held, before mu, from a change of state until OnState has heard of it: there are two goroutines that change it, and the order matters.
	events sync.Mutex

	mu       sync.Mutex
	state    PeerState
	since    int64  // ns of VTEP.now, as all times here
	met      int64  // when it last sent a control message; 0 for never
	instance uint64 // of its last start; 0 for none known
	answered int64  // when it last answered
	looked   int64  // when tick last was called
	asked    int64  // when it was last probed
	next     int64  // when to probe
	seq      uint32 // of the last probe
	locked   bool   // of a sealed peer: there are no keys to ask with
	missed   int    // probes since the last answer
	rtt      time.Duration

	probes [probeWindow]probe // by seq
	loss   losses
	watch  cutWatch
	pmtu   search
}

// probe is one that was sent. An answer has to repeat its number and its time, so that who cannot see probes cannot answer them. The zero probe has no answer.
type probe struct {
	seq  uint32
	time int64
	sent counts // before it; what was received is not known yet
}

// note remembers probe l.seq.
func (l *liveness) note(now int64, sent counts) {
	l.asked = now
	l.probes[l.seq%probeWindow] = probe{seq: l.seq, time: now, sent: sent}
}

// take is the probe that c answers. It is false for none: c was forged, is a copy of an answer that has come, or comes too late.
func (l *liveness) take(c *control) (probe, bool) {
	p := &l.probes[c.seq%probeWindow]
	if p.time == 0 || p.seq != c.seq || p.time != c.time {
		return probe{}, false
	}
	was := *p
	p.time = 0
	return was, true
}

// setState changes the state and returns whether it was another.
func (l *liveness) setState(s PeerState, now int64) bool {
	if l.state == s {
		return false
	}
	l.state, l.since = s, now
	return true
}

// move forgets what is true of one path alone.
func (l *liveness) move() {
	l.probes, l.loss, l.watch, l.pmtu = [probeWindow]probe{}, losses{}, cutWatch{}, search{}
	l.rtt, l.next = 0, 0
}

// tick looks at the clock: whether the state has changed, and whether it is time to probe, with the length of the packet, 0 for the shortest. heard is when anything last came
// from the peer, 0 for never.
func (l *liveness) tick(now, heard int64, routeMTU int) (changed, probe bool, ipLen int) {
	if late := now - l.looked; l.looked != 0 && late > int64(lateAfter) {
		l.answered = min(now, l.answered+late)
	}
	l.looked = now
	changed = l.judge(now, heard)
	switch {
	case now < l.next:
		return changed, false, 0
	case l.locked:
		l.next = now + int64(tickEvery)
		return changed, false, 0
	}
	every := probeEvery
	switch {
	case l.met == 0:
		every = probeShy
	case l.missed > 0 && l.missed < 8:
		every = probeEarly
	}
	l.seq++
	l.missed++
	if l.state == PeerUp {
		var soon bool
		if ipLen, soon = l.pmtu.next(now, routeMTU, l.seq); soon {
			every = min(max(probeEarly, 2*l.rtt), deadAfter) // an answer has to have the time to come
		}
	}
	l.next = now + int64(every)
	return changed, true, ipLen
}

// keys says whether there are keys to ask with, and whether there are others than before, of which the peer is asked at once. A clear peer always has. It reports whether the state has changed.
func (l *liveness) keys(have, fresh bool, now int64) (changed bool) {
	l.locked = !have
	if fresh && have {
		l.next, l.missed = now, 0
	}
	switch {
	case l.state == PeerHandshake && have:
		return l.setState(PeerNew, now)
	case l.state == PeerNew && !have:
		return l.setState(PeerHandshake, now)
	}
	return false
}

// soon has the next probe sent as soon as it may be.
func (l *liveness) soon(now int64) { l.next = min(l.next, max(now, l.asked+int64(probeEarly))) }

// judge changes the state to what silence and frames say.
func (l *liveness) judge(now, heard int64) (changed bool) {
	switch l.state {
	case PeerUp:
		silent := now-max(heard, l.answered) > int64(deadAfter)
		deaf := now-l.answered > int64(oneWayAfter)
		if silent || deaf {
			changed = l.setState(PeerDown, now)
			l.loss, l.watch, l.rtt = losses{}, cutWatch{}, 0
			l.pmtu.cancel()
		}
	case PeerDown:
		if heard-l.met > int64(otherAfter) && now-heard < int64(deadAfter) {
			changed = l.setState(PeerHeard, now)
			l.met, l.instance = 0, 0
		}
	case PeerNew:
		if heard != 0 && (l.met == 0 || l.missed > shyMisses) {
			changed = l.setState(PeerHeard, now)
		}
	}
	return changed
}

// due is when tick is to be called next.
func (l *liveness) due(now, heard int64) int64 {
	at := min(l.next, now+int64(tickEvery))
	if l.state == PeerUp {
		at = min(at, max(heard, l.answered)+int64(deadAfter)+1)
	}
	return at
}

// reply takes an answer. It is false for one to no question.
func (l *liveness) reply(p *Peer, c *control, now int64) bool {
	path := p.path.Load()
	l.events.Lock()
	defer l.events.Unlock()
	l.mu.Lock()
	asked, ok := l.take(c)
	if !ok {
		l.mu.Unlock()
		return false
	}
	restarted := l.instance != 0 && l.instance != c.instance
	if restarted {
		l.loss, l.watch = losses{}, cutWatch{}
	}
	l.instance, l.met, l.answered, l.missed = c.instance, now, now, 0
	took := time.Duration(now - asked.time)
	if l.rtt == 0 {
		l.rtt = took
	}
	l.rtt += (took - l.rtt) / 8
	changed := l.setState(PeerUp, now)
	if changed { // it was asked now and then, and not there
		l.loss, l.watch = losses{}, cutWatch{}
		l.soon(now)
		defer p.v.kick()
	}
	mtuChanged := l.pmtu.answered(now, path.KnownMTU(), c.seq, l.seq+1, int(c.size)-path.Fits(0))
	asked.sent.received = c.received
	lossy := false
	if l.loss.add(asked.sent, now) {
		lossy = l.watch.add(asked.sent, now, &l.pmtu, c.flags&flagCutLost != 0)
	}
	l.mu.Unlock()
	if mtuChanged {
		p.retune()
	}
	if lossy {
		p.v.cfg.Log.Warn("datagrams that the kernel cuts get lost on the way, others do not: cutting is suspended", "vni", p.cfg.VNI, "remote", p.Remote())
		path.SuspendCut()
	}
	p.report(restarted && !changed, changed, PeerUp)
	return true
}

// probed takes a question. Whoever can forge the peer's address can ask in its name, so nothing is believed that a probe says: it is a reason to ask, too. It is false when there are more
// questions than are answered.
func (l *liveness) probed(p *Peer, c *control, now int64) bool {
	l.mu.Lock()
	first := l.met == 0
	if first {
		l.missed = 0
	}
	if first || l.instance != 0 && l.instance != c.instance {
		l.soon(now)
		defer p.v.kick()
	}
	l.met = now
	l.mu.Unlock()
	return p.replies.take(now/int64(time.Second), repliesPerS)
}
