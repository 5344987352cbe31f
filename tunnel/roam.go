package tunnel

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/tunnel/secure"
	"patchbay/tunnel/superframe"
)

const (
	// moveEvery is how often a peer may roam, at most, so that nobody keeps us busy with it.
	moveEvery = time.Second
	// trialFor is how long an address that does not answer is asked, and how long it keeps others from being asked. It bounds the round-trip time of a peer that is followed.
	trialFor = 2 * time.Second
	// challengeEvery is how often one is sent, whatever the address.
	challengeEvery = probeEarly
	// challengeLen is how many bytes of UDP payload a challenge has, and its answer.
	challengeLen = superframe.HeaderLen + superframe.RecordLen + controlLen + secure.Overhead
)

// roaming follows a sealed peer to another address. That a datagram opened says who made it and not where from: somebody on the way can deliver it first, from an address of his choice, whose owner would be sent all that is
// meant for the peer. So the candidate is asked with a sealed probe that cannot be guessed, nothing else goes there, and the peer moves when the answer has come from there (as RFC 9000 §8.2, RFC 9146 §6). The receiving goroutine
// says what has come, the prober does what follows.
type roaming struct {
	// live is whether the newest of the peer's datagrams came from the candidate. It is changed with mu held.
	live  atomic.Bool
	mu    sync.Mutex
	trial trial
	asked int64 // ns of VTEP.now of the last challenge, to whomever; 0 for never
}

// trial is that of one address.
type trial struct {
	at    netip.AddrPort // the candidate; zero for none
	began int64
	// credit is how many bytes have come from there, less those that went there: whoever gives another's address for his own is to gain nothing by it.
	credit int
	// seq and time are what challenges carry, all of them, so that a late answer counts too. They are drawn with the first one.
	drawn bool
	seq   uint32
	time  int64
	// proved is that the answer has come.
	proved bool
	// owed is that answer is to be sent there: the peer asks us from there. It may know by that alone that we are there.
	owed   bool
	answer control
}

// genuine is called for each message that has opened and is the newest; size is the bytes of those of its datagrams that came from there now. The receiving goroutine calls it.
func (s *seal) genuine(from netip.AddrPort, size int, now int64) {
	r := &s.roam
	if from == s.p.Remote() {
		if r.live.Load() { // what came from elsewhere meanwhile was a detour
			r.mu.Lock()
			r.live.Store(false)
			r.mu.Unlock()
		}
		return
	}
	if from.Addr().IsLinkLocalUnicast() { // of which a path needs the interface too
		return
	}
	if r.heard(from, size, now) {
		s.p.v.kick()
	}
}

// heard takes it that the newest message came from another address, and reports whether something is to be sent there now.
func (r *roaming) heard(from netip.AddrPort, size int, now int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &r.trial
	over := now-t.began >= int64(trialFor) && !(t.proved && r.live.Load())
	switch {
	case over || t.at != from && !r.live.Load():
		*t = trial{at: from, began: now}
	case t.at != from:
		return false // one at a time: else who can copy datagrams had each candidate forgotten before it can answer
	}
	r.live.Store(true)
	t.credit += size
	return t.credit >= challengeLen && !t.proved && (r.asked == 0 || now-r.asked >= int64(challengeEvery))
}

// answered takes an answer, and reports whether it is that of the candidate.
func (r *roaming) answered(c *control, from netip.AddrPort) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &r.trial
	if !r.live.Load() || from != t.at || !t.drawn || t.proved || c.seq != t.seq || c.time != t.time {
		return false
	}
	t.proved = true
	return true
}

// owe has the prober answer the candidate, and is false when from is not that: then the answer goes where the peer is.
func (r *roaming) owe(answer control, from netip.AddrPort) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &r.trial
	if !r.live.Load() || from != t.at {
		return false
	}
	t.owed, t.answer = true, answer
	return true
}

// next is what is to be sent to the candidate now.
func (r *roaming) next(now int64) (to netip.AddrPort, c control, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &r.trial
	if !r.live.Load() || t.credit < challengeLen {
		return to, c, false
	}
	switch {
	case t.owed: // first: the peer can move on then, and is heard from there again
		t.owed, c = false, t.answer
	case t.proved || now-t.began >= int64(trialFor) || r.asked != 0 && now-r.asked < int64(challengeEvery):
		return to, c, false
	default:
		if !t.drawn {
			var b [12]byte
			rand.Read(b[:])
			t.drawn, t.seq, t.time = true, binary.BigEndian.Uint32(b[:]), int64(binary.BigEndian.Uint64(b[4:]))
		}
		r.asked = now
		c = control{kind: controlProbe, flags: flagBack, seq: t.seq, time: t.time}
	}
	t.credit -= challengeLen
	return t.at, c, true
}

// take is the trial of the address where the peer has been found to be, once.
func (r *roaming) take() (t trial, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.live.Load() || !r.trial.proved {
		return t, false
	}
	t = r.trial
	r.trial = trial{}
	r.live.Store(false)
	return t, true
}

// wait is how long nothing is due unless the receiving goroutine says so. movedAt is when the peer last moved, 0 for never.
func (r *roaming) wait(now, movedAt int64) time.Duration {
	if !r.live.Load() {
		return probeShy
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	at := r.asked + int64(challengeEvery)
	if r.trial.proved {
		at = movedAt + int64(moveEvery)
	}
	if at <= now {
		return probeShy
	}
	return time.Duration(at - now)
}

// follow does what is due of where the peer is, for the prober, and returns how long that was all. state is that of the last tick.
func (s *seal) follow(now int64, state PeerState) (wait time.Duration) {
	moved := false
	if s.movedAt == 0 || now-s.movedAt >= int64(moveEvery) {
		var t trial
		if t, moved = s.roam.take(); moved {
			s.movedAt = now
			if err := s.p.move(t.at, false); err != nil {
				s.p.v.cfg.Log.Warn("peer has roamed and is not followed", "vni", s.p.cfg.VNI, "reason", err)
			}
			if t.owed { // both have roamed, and ask each other
				s.p.say(t.answer, 0)
			}
		}
	}
	if !moved && state == PeerDown && s.movedAt != 0 { // it may have started anew at its own address
		s.movedAt = 0
		s.p.v.mu.Lock()
		home := s.home
		s.p.v.mu.Unlock()
		if err := s.p.move(home, false); err != nil && !errors.Is(err, ErrClosed) {
			s.p.v.cfg.Log.Warn("peer is not looked for where it was", "vni", s.p.cfg.VNI, "reason", err)
		}
	}
	for {
		to, c, ok := s.roam.next(now)
		if !ok {
			return s.roam.wait(now, s.movedAt)
		}
		s.sayAway(to, c)
	}
}

// sayAway sends a control message to an address that is not the peer's, or not yet. The prober calls it.
func (s *seal) sayAway(to netip.AddrPort, c control) {
	if s.away == nil || s.away.Remote() != to {
		path, err := s.p.newPath(to)
		if err != nil { // a forged address can be any, also one that no peer can have
			s.p.v.cfg.Log.Debug("address of a peer that may have roamed cannot be asked", "vni", s.p.cfg.VNI, "reason", err)
			return
		}
		s.away = path
	}
	before := s.away.Stats().Datagrams
	s.p.sayOn(s.away, c, 0)
	s.p.sentBefore.Add(s.away.Stats().Datagrams - before) // the peer counts it too, if it gets it
}
