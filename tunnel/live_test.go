package tunnel

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// states collects what OnState hears.
type states struct {
	mu  sync.Mutex
	got []PeerState
}

func (s *states) hear(p PeerState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, p)
}

func (s *states) take() []PeerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.got
	s.got = nil
	return got
}

// tardy is what a busy machine may add to the five seconds in which a dead host has to be noticed.
const tardy = 5 * time.Second

// Two nodes know of each other, of a cable that is pulled and put back, of an end and of a start anew. The container's pings go on by themselves.
//
//	[c1] ── switch ── VTEP [a] ── underlay ── [b] VTEP ── switch ── [c2]
func TestLiveness(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	there, here := netip.MustParseAddrPort("10.9.0.2:4789"), netip.MustParseAddrPort("10.9.0.1:4789")
	na := newNetwork(newVTEP(t, a, Config{}), 9)
	var heard states
	p := na.peer(t, PeerConfig{Remote: there, OnState: heard.hear})
	if s := p.Stats(); s.State != PeerNew || s.RTT != 0 {
		t.Errorf("a new peer is %v", s)
	}
	start := func() (*network, *Peer, func()) {
		var v *VTEP
		var err error
		b.Do(func() { v, err = Listen(Config{Log: quiet}) })
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- v.Run(context.Background()) }()
		n := newNetwork(v, 9)
		return n, n.peer(t, PeerConfig{Remote: here}), func() { v.Close(); <-done }
	}
	is := func(p *Peer, s PeerState) func() bool { return func() bool { return p.Stats().State == s } }
	nb, q, stop := start()
	testbed.Eventually(t, tardy+probeShy, is(p, PeerUp))
	testbed.Eventually(t, tardy, is(q, PeerUp))
	c1, _ := na.container(t, 1, 1450, "10.1.0.1/24"), nb.container(t, 2, 1450, "10.1.0.2/24")
	ping(t, c1, "10.1.0.2")
	testbed.Eventually(t, tardy, func() bool { return p.Stats().RTT > 0 })
	testbed.Eventually(t, tardy+15*time.Second, func() bool { return p.Stats().Loss == 0 }) // what was asked before the other end was there did get lost
	if s := p.Stats(); s.MTU != 1450 || s.Since.IsZero() {
		t.Errorf("%+v", s)
	}
	if got := heard.take(); !slices.Equal(got, []PeerState{PeerUp}) {
		t.Errorf("heard %v", got)
	}

	for _, cut := range []struct {
		name       string
		pull, back func()
	}{
		{"the cable", func() { run(t, b, "ip", "link", "set", "eth0", "down") }, func() { run(t, b, "ip", "link", "set", "eth0", "up") }},
		{"the node", func() { stop() }, func() { nb, q, stop = start(); _ = nb }},
	} {
		cut.pull()
		began := time.Now()
		testbed.Eventually(t, 5*time.Second+tardy, is(p, PeerDown))
		t.Logf("%s is gone: noticed after %v", cut.name, time.Since(began).Round(10*time.Millisecond))
		cut.back()
		began = time.Now()
		testbed.Eventually(t, 5*time.Second+tardy, is(p, PeerUp))
		t.Logf("%s is back: noticed after %v", cut.name, time.Since(began).Round(10*time.Millisecond))
		if got := heard.take(); !slices.Equal(got, []PeerState{PeerDown, PeerUp}) {
			t.Errorf("%s: heard %v", cut.name, got)
		}
	}
	// One that starts anew before it is missed: what was learned behind it is out of date all the same.
	stop()
	_, _, stop = start()
	defer func() { stop() }()
	var got []PeerState
	testbed.Eventually(t, tardy, func() bool { got = append(got, heard.take()...); return len(got) == 2 })
	if !slices.Equal(got, []PeerState{PeerDown, PeerUp}) {
		t.Errorf("after a start anew: heard %v", got)
	}
	if n := p.Drops().Get(frame.DropMalformed) + na.v.Drops().Total(); n != 0 {
		t.Errorf("%d control messages were not understood", n)
	}
}

// A kernel answers no probe, and does not mind them; it is heard, and never down.
func TestKernelIsHeard(t *testing.T) {
	a, b := underlay(t, 1500)
	n := newNetwork(newVTEP(t, a, Config{}), 9)
	p := n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789")})
	kernelVXLAN(t, b, 9, []string{"local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789", "udpcsum"}, "10.1.0.2/24")
	run(t, b, "ip", "link", "set", "vx0", "mtu", "1450")
	c := n.container(t, 1, 1450, "10.1.0.1/24")
	ping(t, c, "10.1.0.2")
	testbed.Eventually(t, tardy, func() bool { return p.Stats().State == PeerHeard })
	if s := p.Stats(); s.RTT != 0 || s.Loss != 0 || s.Heard.IsZero() {
		t.Errorf("%+v", s)
	}
	clean(t, []*frame.DropCounters{p.Drops(), n.v.Drops()}, b)
}

// ticks calls tick every quarter of a second from a time on, until the state changes or the other time is reached, and returns when.
func ticks(t *testing.T, l *liveness, from, to int64, heard func(now int64) int64) int64 {
	t.Helper()
	for now := from; now < to; now += int64(time.Second) / 4 {
		if changed, _, _ := l.tick(now, heard(now), 1500); changed {
			return now
		}
	}
	return to
}

func TestLivenessTick(t *testing.T) {
	const s = int64(time.Second)
	never := func(int64) int64 { return 0 }
	always := func(now int64) int64 { return now }
	var l liveness
	if ticks(t, &l, s, 60*s, never); l.state != PeerNew || l.seq < 10 || l.seq > 13 {
		t.Errorf("a peer that never said anything is %v after %d probes in a minute", l.state, l.seq)
	}
	if ticks(t, &l, 60*s, 61*s, always); l.state != PeerHeard {
		t.Errorf("a peer that sends frames is %v", l.state)
	}
	if at := ticks(t, &l, 61*s, 900*s, never); at != 900*s {
		t.Errorf("a kernel is %v", l.state)
	}

	// Silence.
	l = liveness{met: 61 * s, answered: 61 * s, state: PeerUp}
	if at := ticks(t, &l, 61*s, 80*s, never); l.state != PeerDown || at-61*s < 3*s || at-61*s > 4*s {
		t.Errorf("%v after %d ms of silence", l.state, (at-61*s)/1e6)
	}
	if at := ticks(t, &l, 66*s, 900*s, never); at != 900*s {
		t.Errorf("a peer that is gone is %v", l.state)
	}
	// A host without patchbay answers to the address now.
	if at := ticks(t, &l, 900*s, 960*s, always); l.state != PeerHeard {
		t.Errorf("another host, which sends frames, is %v after %d ms", l.state, (at-900*s)/1e6)
	}

	// Frames come, answers do not: the way there is cut.
	l = liveness{met: 100 * s, answered: 100 * s, state: PeerUp}
	if at := ticks(t, &l, 100*s, 130*s, always); l.state != PeerDown || at-100*s < 10*s || at-100*s > 11*s {
		t.Errorf("%v after %d ms without an answer", l.state, (at-100*s)/1e6)
	}
	// So it was from the beginning.
	l = liveness{met: 100 * s}
	if at := ticks(t, &l, 100*s, 130*s, always); l.state != PeerHeard || at-100*s > 10*s {
		t.Errorf("%v after %d ms without an answer ever", l.state, (at-100*s)/1e6)
	}
	// Nobody looked for a minute: that says nothing of the peer.
	l = liveness{met: 100 * s, answered: 100 * s, state: PeerUp}
	ticks(t, &l, 100*s, 101*s, never)
	if changed, _, _ := l.tick(160*s, 0, 1500); changed {
		t.Errorf("%v, when it was the VTEP that was not there", l.state)
	}
	if at := ticks(t, &l, 160*s+s/4, 170*s, never); l.state != PeerDown || at > 164*s {
		t.Errorf("%v %d ms later", l.state, (at-160*s)/1e6)
	}
	// The next tick is asked for in time.
	l = liveness{met: s, answered: 10 * s, state: PeerUp, next: 13 * s}
	if at := l.due(13*s, 10*s); at != 13*s {
		t.Errorf("due at %d", at)
	}
	l.next = 14 * s
	if at := l.due(13*s, 10*s); at <= 13*s+s/2 || at > 13*s+s*3/5 {
		t.Errorf("due at %d", at)
	}
}

// Only what was asked is answered, once, and by whom has seen the question.
func TestAnswers(t *testing.T) {
	var l liveness
	for l.seq = 1; l.seq < 40; l.seq++ {
		l.note(int64(l.seq)*1000, counts{})
	}
	for _, c := range []struct {
		name string
		control
		want bool
	}{
		{"the last", control{seq: 39, time: 39000}, true},
		{"the last, again", control{seq: 39, time: 39000}, false},
		{"an early one", control{seq: 10, time: 10000}, true},
		{"one too early", control{seq: 3, time: 3000}, false},
		{"one that is not asked yet", control{seq: 40, time: 40000}, false},
		{"a time that was guessed", control{seq: 38, time: 38001}, false},
		{"nothing", control{}, false},
	} {
		if _, ok := l.take(&c.control); ok != c.want {
			t.Errorf("%s: %v", c.name, ok)
		}
	}
}

// One that has been asked now and then, as kernels are, is asked each second from its first answer on, also when it has asked nothing itself.
func TestFirstAnswer(t *testing.T) {
	p, receive := controlRig(t, PeerConfig{})
	p.tick()
	p.live.mu.Lock()
	seq, asked := p.live.seq, p.live.asked
	p.live.mu.Unlock()
	receive(controlDatagram(9, control{kind: controlReply, seq: seq, time: asked, instance: 5, size: 114}, 0))
	p.live.mu.Lock()
	defer p.live.mu.Unlock()
	if wait := time.Duration(p.live.next - asked); p.live.state != PeerUp || wait > probeEvery {
		t.Errorf("%v, the next probe follows after %v", p.live.state, wait)
	}
	if len(p.v.kicks) == 0 {
		t.Error("the prober sleeps on")
	}
}
