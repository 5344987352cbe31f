package tunnel

import (
	"sync"
	"sync/atomic"
	"time"
)

// Numbers of adaptation. Loss is counted in messages lost for each datagram sent, which is about the share of datagrams lost whatever the messages' length.
const (
	lossHigh    = 0.004 // superframes of 45 datagrams are lost at nearly one in five
	lossLow     = 0.001
	reorderHigh = 0.05 // of messages
	reorderLow  = 0.01

	adaptEvery     = 900 * time.Millisecond // an interval is that long at least,
	adaptLong      = 5 * time.Second        // and at most, once it has
	adaptDatagrams = 100                    // so many datagrams
	adaptLost      = 3                      // fewer messages lost, or reordered, are chance

	// Where a tenth of all messages gets lost superframes are left after a shorter interval: a burst of loss is a smaller part of what goes in it, unless little goes because of the loss.
	adaptEarly = 200 * time.Millisecond
	lossEarly  = 0.1
	lostEarly  = 6 // messages, and superframes sent: a search for the path's MTU loses some probes

	dwellMin = 4 * time.Second // without loss before superframes are tried again; doubled each time that fails
	dwellMax = 64 * time.Second
	// dwellTries is after how many dwells superframes are tried again although there is loss, below lossHigh.
	dwellTries = 8
	// heldUp is how long superframes must have got through for the next dwell to be the shortest again.
	heldUp = 60 * time.Second
)

// progress is what had been sent and what had become of it at some time: all counters only rise, but for lost.
type progress struct {
	at                      int64 // ns
	messages, many, crossed uint64
	datagrams               uint64
	lost, reordered         uint64 // by the peer's count
}

// adaptation decides whether superframes go as they are or as segments, by what the peer reports. A lost datagram is a lost message, so that superframes suffer most.
type adaptation struct {
	inSegments atomic.Bool
	changes    atomic.Uint64

	mu       sync.Mutex
	instance uint64
	last     progress
	since    int64         // of the mode, ns
	bad      int64         // when loss was last not low
	worse    int64         // when loss was last high
	dwell    time.Duration // before the next return to superframes
}

func (a *adaptation) segments() bool { return a.inSegments.Load() }

// mode is the state's name in PeerStats.
func (a *adaptation) mode() string {
	if a.segments() {
		return "segments"
	}
	return "superframes"
}

// report takes what the peer with this instance number has received. changed is whether the mode is another now.
func (a *adaptation) report(instance uint64, now progress) (changed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.instance != instance || now.messages < a.last.messages || now.reordered < a.last.reordered {
		if a.instance == 0 {
			a.since = now.at
		}
		a.instance, a.last = instance, now
		return false
	}
	d := progress{at: now.at - a.last.at, messages: now.messages - a.last.messages, many: now.many - a.last.many, crossed: now.crossed - a.last.crossed, datagrams: now.datagrams - a.last.datagrams,
		reordered: now.reordered - a.last.reordered}
	if now.lost > a.last.lost {
		d.lost = now.lost - a.last.lost
	}
	early := !a.inSegments.Load() && d.at >= int64(adaptEarly) && d.many >= lostEarly && d.lost >= lostEarly && ratio(d.lost, d.messages) >= lossEarly
	if !early && (d.at < int64(adaptEvery) || d.datagrams < adaptDatagrams && d.at < int64(adaptLong)) {
		return false
	}
	a.last = now
	high, low := d.judge()
	if !low {
		a.bad = now.at
	}
	if high {
		a.worse = now.at
	}
	was := a.inSegments.Load()
	is := high
	if was {
		is = !a.recovered(now.at)
	}
	if is != was {
		a.change(is, now.at)
	}
	return is != was
}

// judge says whether an interval was bad enough to leave superframes, and good enough to return to them.
func (d *progress) judge() (high, low bool) {
	// What overtook because two goroutines sent at once says nothing of the path.
	reordered := d.reordered - min(d.reordered, d.crossed)
	loss, reorder := ratio(d.lost, d.datagrams), ratio(reordered, d.messages)
	high = d.lost >= adaptLost && loss >= lossHigh || reordered >= adaptLost && reorder >= reorderHigh
	low = (d.lost < adaptLost || loss < lossLow) && (reordered < adaptLost || reorder < reorderLow)
	return high, low
}

// recovered reports whether superframes may be tried again.
func (a *adaptation) recovered(now int64) bool {
	clean := now-max(a.since, a.bad) >= int64(a.dwell)
	bearable := now-max(a.since, a.worse) >= int64(a.dwell)*dwellTries
	return clean || bearable
}

func (a *adaptation) change(segments bool, now int64) {
	if segments {
		switch held := now - a.since; {
		case a.dwell == 0 || held >= int64(heldUp):
			a.dwell = dwellMin
		default:
			a.dwell = min(2*a.dwell, dwellMax)
		}
	}
	a.since = now
	a.inSegments.Store(segments)
	a.changes.Add(1)
}

func ratio(n, of uint64) float64 {
	if of == 0 {
		return 0
	}
	return float64(n) / float64(of)
}

// learn takes what the peer says, in a control message, that it has received.
func (p *Peer) learn(c *control, now int64) {
	w, ok := p.wire.(*superWire)
	if !ok || w.cut {
		return
	}
	changed := w.adapt.report(c.instance, progress{
		at: now, messages: w.messages.Load(), many: w.many.Load(), crossed: w.crossed.Load(), datagrams: p.sentCounts().sent, lost: c.lost, reordered: c.reordered,
	})
	if changed {
		p.v.cfg.Log.Info("peer", "vni", p.cfg.VNI, "remote", p.Remote(), "mode", w.adapt.mode())
	}
}
