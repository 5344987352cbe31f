package tunnel

import (
	"sync/atomic"
	"time"

	"patchbay/frame"
)

// Times and sizes of the search for what a path carries, in the manner of RFC 8899 (§5).
const (
	confirmEvery = 10 * time.Second // CONFIRMATION_TIMER
	raiseEvery   = 10 * time.Minute // PMTU_RAISE_TIMER
	confirmTries = 3                // MAX_PROBES
	searchTries  = 2
	searchGrain  = 8 // bytes that are not worth another probe
)

type searchState uint8

const (
	searchIdle    searchState = iota // confirms now and then
	searchDoubt                      // full-size probes went unanswered: are short ones answered?
	searchBetween                    // low passes, above high does not
	searchRaise                      // tries a size above high
)

// search finds out how long packets may be where a router drops long ones and its ICMP message does not come, or an underlay's MTU is not what the interfaces say. Lengths are bytes
// of IP packet.
type search struct {
	state     searchState
	limit     int // of what passes; 0: the route's MTU is not doubted
	low, high int
	top       int    // high, when the search began
	raised    bool   // top+1 has been tried
	size      int    // that is being asked, or doubted; 0 for none
	from      uint32 // the first probe since that question came up
	tries     int
	due       int64 // to confirm
	raise     int64 // to try the route's MTU again
	proved    int64 // when a probe of the size that is thought to pass last did; 0 for never
}

// effective is what is thought to pass.
func (s *search) effective(routeMTU int) int {
	if s.limit != 0 {
		return min(s.limit, routeMTU)
	}
	return routeMTU
}

// searching reports whether it is doubted what passes.
func (s *search) searching() bool { return s.state != searchIdle }

// ask begins to ask whether packets of size bytes pass.
func (s *search) ask(state searchState, size int, seq uint32) {
	s.state, s.size, s.from, s.tries = state, size, seq, 0
}

// next is the length of the next probe's packet, 0 for a short one, and whether the one after it is to follow soon. seq is its number.
func (s *search) next(now int64, routeMTU int, seq uint32) (ipLen int, soon bool) {
	if routeMTU <= MinPathMTU { // taken for granted
		s.proved = now
		return 0, false
	}
	switch s.state {
	case searchIdle:
		switch {
		case s.size != 0 && s.tries == confirmTries:
			s.ask(searchDoubt, s.size, seq)
			return 0, true
		case s.size != 0:
		case s.limit != 0 && s.limit < routeMTU && now >= s.raise:
			s.top, s.low, s.high, s.raised = routeMTU-1, s.limit, routeMTU-1, true
			s.ask(searchRaise, routeMTU, seq)
		case now >= s.due:
			s.ask(searchIdle, s.effective(routeMTU), seq)
		default:
			return 0, false
		}
	case searchDoubt:
		return 0, true
	case searchBetween:
		if s.tries == searchTries {
			s.high = s.size - 1
			if !s.step(now, seq) {
				return 0, false
			}
		}
	case searchRaise:
		if s.tries == searchTries && !s.step(now, seq) {
			return 0, false
		}
	}
	s.tries++
	return s.size, true
}

// step asks a size between low and high, or ends the search. Where nothing between was lost, it may have been chance that began it.
func (s *search) step(now int64, seq uint32) bool {
	s.limit = s.low
	switch {
	case s.high-s.low >= searchGrain:
		s.ask(searchBetween, (s.low+s.high+1)/2, seq)
	case s.high == s.top && !s.raised:
		s.raised = true
		s.ask(searchRaise, s.top+1, seq)
	default:
		s.rest(now)
		return false
	}
	return true
}

// rest ends a search.
func (s *search) rest(now int64) {
	s.state, s.size, s.raised = searchIdle, 0, false
	s.due, s.raise = now+int64(confirmEvery), now+int64(raiseEvery)
}

// cancel forgets a question whose answer will say nothing. What passes is asked again as soon as somebody answers.
func (s *search) cancel() { s.state, s.size, s.raised, s.due = searchIdle, 0, false, 0 }

// answered takes the answer to probe seq, whose packet had ipLen bytes when it came, and reports whether the limit has changed. next is the number of the next probe.
func (s *search) answered(now int64, routeMTU int, seq, next uint32, ipLen int) (changed bool) {
	was := s.limit
	ipLen = min(ipLen, routeMTU)
	passes := s.size != 0 && ipLen >= s.size
	switch {
	case s.state == searchDoubt && !passes && int32(seq-s.from) >= 0: // short ones pass, so long ones do not
		s.low, s.high = MinPathMTU, s.size-1
		s.top, s.raised = s.high, false
		s.step(now, next)
	case !passes:
	case s.state == searchBetween:
		s.low, s.high = ipLen, max(s.high, ipLen)
		s.step(now, next)
	case s.state == searchRaise:
		if s.limit = ipLen; ipLen >= routeMTU {
			s.limit = 0
		}
		s.rest(now)
		s.proved = now
	default: // of those that are asked to confirm, also one that was late
		s.state, s.size = searchIdle, 0
		s.due, s.proved = now+int64(confirmEvery), now
	}
	return s.limit != was
}

// askRoute is the MTU of the route to the peer, asked again now and then: routes change, and ICMP tells the kernel what it does not tell us.
func (p *Peer) askRoute(now int64) int {
	path := p.path.Load()
	if last := p.routeAsked.Load(); last == 0 || now-last >= int64(time.Second) {
		p.routeAsked.Store(now)
		was := path.KnownMTU()
		if n, err := path.MTU(); err == nil && n != was { // without a route it stays what it was
			p.retune()
		}
	}
	return path.KnownMTU()
}

// retune tells OnMTU when the inner MTU is another than it was last told.
func (p *Peer) retune() {
	p.tuning.Lock() // of two at once the later one is to be heard last
	defer p.tuning.Unlock()
	p.live.mu.Lock()
	p.limit.Store(int64(p.live.pmtu.limit))
	p.live.mu.Unlock()
	mtu := p.innerMTU()
	if p.told.Swap(int64(mtu)) != int64(mtu) && p.cfg.OnMTU != nil {
		p.cfg.OnMTU(mtu)
	}
}

// tooBigPerS bounds OnTooBig's calls, per peer.
const tooBigPerS = 100

// tooBig counts a frame that does not fit, and says so to whom it concerns.
func (p *Peer) tooBig(data []byte, mtu int) {
	p.drops.Add(frame.DropTooBig, 1)
	if p.cfg.OnTooBig != nil && p.bigs.take(p.v.now()/int64(time.Second), tooBigPerS) {
		p.cfg.OnTooBig(data, mtu)
	}
}

// perSecond counts what happens in a second.
type perSecond struct{ at, n atomic.Int64 }

// take is false when it has been taken most times in that second. Calls in parallel may make it a few more.
func (c *perSecond) take(second int64, most int64) bool {
	if was := c.at.Load(); was != second && c.at.CompareAndSwap(was, second) {
		c.n.Store(0)
	}
	return c.n.Add(1) <= most
}
