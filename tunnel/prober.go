package tunnel

import (
	"context"
	"time"
)

// probe is the prober: one goroutine and one timer for all peers.
func (v *VTEP) probe(ctx context.Context) {
	const soonest = 10 * time.Millisecond // between two rounds
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-v.kicks:
		case <-t.C:
		}
		wait := probeShy // whoever adds a peer kicks
		for _, p := range v.peers.Load().all {
			wait = min(wait, p.tick())
		}
		t.Reset(max(wait, soonest))
	}
}

// kick has the prober look at once. It never waits.
func (v *VTEP) kick() {
	select {
	case v.kicks <- struct{}{}:
	default:
	}
}

// tick does for one peer what is due, and returns how long that was all.
func (p *Peer) tick() time.Duration {
	now := p.v.now()
	routeMTU := p.askRoute(now)
	l := &p.live
	keys, fresh, roam := true, false, probeShy
	if p.seal != nil {
		l.mu.Lock()
		state := l.state
		l.mu.Unlock()
		fresh = p.seal.fresh.Swap(false)
		keys, roam = p.seal.tick(now, state)
	}
	l.events.Lock()
	l.mu.Lock()
	if p.hurried.Swap(false) {
		l.soon(now)
	}
	heard := p.rx.heard.Load()
	rekeyed := l.keys(keys, fresh, now)
	changed, probe, ipLen := l.tick(now, heard, routeMTU)
	changed = changed || rekeyed
	state, seq := l.state, l.seq
	if probe {
		l.note(now, p.sentCounts())
	}
	wait := min(roam, time.Duration(l.due(now, heard)-now))
	l.mu.Unlock()
	p.report(false, changed, state)
	l.events.Unlock()
	if changed && state == PeerDown && p.seal != nil {
		p.seal.link.Rekey() // it may have lost the keys that are here
	}
	if probe {
		size := 0
		if ipLen > 0 {
			size = p.path.Load().Fits(ipLen)
		}
		p.say(control{kind: controlProbe, seq: seq, time: now}, size)
	}
	return wait
}

// report tells OnState, and the log. live.events is held.
func (p *Peer) report(restarted, changed bool, s PeerState) {
	switch {
	case restarted:
		p.v.cfg.Log.Info("peer has started anew", "vni", p.cfg.VNI, "remote", p.Remote())
	case changed:
		p.v.cfg.Log.Info("peer", "vni", p.cfg.VNI, "remote", p.Remote(), "state", s)
	default:
		return
	}
	if p.cfg.OnState == nil {
		return
	}
	if restarted {
		p.cfg.OnState(PeerDown)
	}
	p.cfg.OnState(s)
}
