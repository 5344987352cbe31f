package tunnel

import (
	"testing"
	"time"
)

// path is one of real bytes, on a clock of its own.
type path struct {
	search
	real, route int
	rtt         int64
	now         int64
	seq         uint32
	asked       int
	pending     []pendingProbe
	lose        func(ipLen int) bool
}

type pendingProbe struct {
	at    int64
	seq   uint32
	ipLen int
}

// until passes time. A probe that is answered is so after rtt.
func (p *path) until(end int64) {
	const shortest = 114
	next := p.now
	for ; p.now < end; p.now += int64(50 * time.Millisecond) {
		for len(p.pending) > 0 && p.pending[0].at <= p.now {
			a := p.pending[0]
			p.pending = p.pending[1:]
			p.answered(p.now, p.route, a.seq, p.seq+1, a.ipLen)
		}
		if p.now < next {
			continue
		}
		p.seq++
		n, soon := p.next(p.now, p.route, p.seq)
		next = p.now + int64(probeEvery)
		if soon {
			p.asked++
			next = p.now + max(int64(probeEarly), 2*p.rtt)
		}
		if n <= p.real && (p.lose == nil || !p.lose(n)) {
			p.pending = append(p.pending, pendingProbe{p.now + p.rtt, p.seq, max(n, shortest)})
		}
	}
}

func TestSearch(t *testing.T) {
	const s = int64(time.Second)
	for _, rtt := range []time.Duration{0, 40 * time.Millisecond, 600 * time.Millisecond, 1500 * time.Millisecond} {
		for _, real := range []int{1500, 1499, 1400, 1300, 1281, 1280} {
			p := path{real: real, route: 1500, rtt: int64(rtt), now: s}
			p.until(20*s + 40*int64(rtt))
			if got := p.effective(1500); got > real || got < real-searchGrain {
				t.Errorf("RTT %v, a path of %d: found %d", rtt, real, got)
			}
			if p.asked > 30 {
				t.Errorf("RTT %v, a path of %d: %d probes", rtt, real, p.asked)
			}
			// The path is better again, or as it should be: that is noticed, in time.
			for _, better := range []int{max(real, 1420), 1500} {
				p.real = better
				p.until(p.now + int64(raiseEvery) + 60*s)
				if got := p.effective(1500); got > better || got < better-searchGrain || better == 1500 && got != 1500 {
					t.Errorf("RTT %v, a path of %d that was %d: found %d", rtt, better, real, got)
				}
			}
			// And worse.
			p.real = 1350
			p.until(p.now + 40*s + 40*int64(rtt))
			if got := p.effective(1500); got > 1350 || got < 1350-searchGrain {
				t.Errorf("RTT %v, a path of 1350 that was 1500: found %d", rtt, got)
			}
		}
	}
}

// Loss alone does not make a path narrow for long: three long probes that get lost, while a short one does not, begin a search that ends where it began.
func TestSearchAfterChance(t *testing.T) {
	const s = int64(time.Second)
	lost := 0
	p := path{real: 1500, route: 1500, now: s, lose: func(n int) bool { lost++; return n == 1500 && lost <= 3 }}
	p.until(20 * s)
	if got := p.effective(1500); got != 1500 || p.searching() || lost < 10 {
		t.Errorf("found %d, still searching: %v, after %d probes", got, p.searching(), lost)
	}
}

// The route's own MTU is obeyed at once, and nothing is asked below the smallest.
func TestSearchFollowsRoute(t *testing.T) {
	const s = int64(time.Second)
	p := path{real: 1400, route: 1500, now: s}
	p.until(20 * s)
	if got := p.effective(1350); got != 1350 {
		t.Errorf("a route of 1350 counts as %d", got)
	}
	p.route, p.asked = 1280, 0
	p.until(p.now + 60*s)
	if p.asked != 0 {
		t.Errorf("%d probes on a route that has the smallest MTU", p.asked)
	}
}
