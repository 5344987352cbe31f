package tunnel

import (
	"net/netip"
	"testing"
	"time"
)

// answer is what comes from an address that has been challenged; false when it has not been.
func (s *seal) answer(from netip.AddrPort) bool {
	s.roam.mu.Lock()
	c := control{kind: controlReply, seq: s.roam.trial.seq, time: s.roam.trial.time}
	s.roam.mu.Unlock()
	return s.roam.answered(&c, from)
}

// A peer is where the newest of its datagrams came from, once it has answered there: one that was led round by another address and is not the newest any more moves nothing, however long the next move had to wait.
func TestRoamsToTheNewest(t *testing.T) {
	r := newRig(t)
	home, away, third := netip.MustParseAddrPort("127.0.0.2:4789"), netip.MustParseAddrPort("127.0.0.66:5555"), netip.MustParseAddrPort("127.0.0.67:5555")
	s, _ := sealPair(t)
	p := addPeer(t, r.VTEP, PeerConfig{VNI: 42, Remote: home, Wire: WirePatchbay, Seal: s})
	now := r.now()
	at := func(want netip.AddrPort, what string) {
		t.Helper()
		if p.Remote() != want {
			t.Fatalf("%s: it is at %v, want %v", what, p.Remote(), want)
		}
	}
	p.seal.movedAt = now // it has just come home
	p.seal.genuine(away, challengeLen, now)
	p.seal.tick(now, PeerUp)
	if !p.seal.answer(away) || p.seal.answer(away) {
		t.Error("an answer counts once")
	}
	p.seal.tick(now+int64(moveEvery)/2, PeerUp) // too soon
	p.seal.genuine(home, challengeLen, now+int64(moveEvery)/2)
	now += int64(moveEvery) + 1
	p.seal.tick(now, PeerUp)
	at(home, "the newest datagram came from there")
	if p.seal.answer(away) {
		t.Error("an answer counts that comes from where the peer is not")
	}

	now += int64(time.Minute)
	p.seal.genuine(away, challengeLen, now)
	p.seal.tick(now, PeerUp)
	at(home, "it has not answered elsewhere")
	if p.seal.answer(third) {
		t.Error("an answer counts that comes from a third address")
	}
	p.seal.genuine(third, challengeLen, now) // one at a time
	if p.seal.answer(third) || !p.seal.answer(away) {
		t.Error("a third address has taken the place of one that was being asked")
	}
	p.seal.tick(now, PeerUp)
	at(away, "it has answered there")

	now += int64(time.Minute)
	p.seal.genuine(third, challengeLen, now)
	p.seal.tick(now, PeerUp)
	p.seal.genuine(home, challengeLen, now+int64(trialFor))
	p.seal.tick(now+int64(trialFor), PeerUp)
	if p.seal.answer(third) || !p.seal.answer(home) {
		t.Error("an address that does not answer keeps others out for good")
	}
}

// An address that has not answered is sent no more bytes than came from there, and a challenge four times a second at most. What is heard takes no allocation, wherever it comes from.
func TestRoamingIsBounded(t *testing.T) {
	r := newRig(t)
	home, away := netip.MustParseAddrPort("127.0.0.2:4789"), netip.MustParseAddrPort("127.0.0.66:5555")
	s, _ := sealPair(t)
	p := addPeer(t, r.VTEP, PeerConfig{VNI: 42, Remote: home, Wire: WirePatchbay, Seal: s})
	now := r.now()
	sent := func() (n int) {
		for {
			switch to, c, ok := p.seal.roam.next(now); {
			case !ok:
				return n
			case to != away || c.kind == controlProbe && c.flags != flagBack:
				t.Errorf("%+v to %v", c, to)
			}
			n++
		}
	}
	p.seal.genuine(away, challengeLen-1, now)
	if n := sent(); n != 0 {
		t.Errorf("%d messages for less than one", n)
	}
	p.seal.genuine(away, challengeLen, now)
	if !p.seal.roam.owe(control{kind: controlReply}, away) || p.seal.roam.owe(control{kind: controlReply}, home) {
		t.Error("it is the candidate alone who is answered where it asks from")
	}
	if n := sent(); n != 1 {
		t.Errorf("%d messages for one", n)
	}
	p.seal.genuine(away, 100*challengeLen, now)
	if n := sent(); n != 1 {
		t.Errorf("%d challenges at once", n)
	}
	n := 0
	for end := now + 10*int64(trialFor); now < end; now += int64(time.Millisecond) {
		p.seal.genuine(away, 100*challengeLen, now)
		n += sent()
	}
	if most := int(10 * trialFor / challengeEvery); n < most-10 || n > most {
		t.Errorf("%d challenges, want about %d", n, most)
	}
	if n := testing.AllocsPerRun(100, func() {
		p.seal.genuine(away, 1000, now)
		p.seal.genuine(home, 1000, now)
		now += int64(trialFor)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
