package secure

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	firstRetry = time.Second // after a handshake failed, doubled each time
	maxRetry   = 30 * time.Second
	takeOver   = 2 * time.Second // after which an answered handshake gives way to another
	maxRecent  = 64              // numbers of answered handshakes that are remembered
	look       = time.Second     // between looks at the sessions
)

// runner is what Run knows. All of it belongs to Run's goroutine.
type runner struct {
	l   *Link
	ctx context.Context // of the handshakes
	wg  sync.WaitGroup

	out     *shake // that this node has started
	in      *shake // that this node answers
	waiting []byte // the first datagram of one that is answered when in has ended
	ended   chan *shake

	cookies cookies
	recent  [maxRecent]uint32 // numbers that were answered: what comes of them late, or again, starts nothing
	nrecent int

	failures int
	retryAt  time.Time     // no handshake is started before
	jitter   time.Duration // of the next rekey
	lookAt   time.Time

	logged      [2]said // of failures of those started and those answered
	forged, old noted
	asked       bool // for the handshake under way, by Rekey
}

// noted is a counter of drops whose rise is logged once between two sessions.
type noted struct {
	seen   uint64
	logged bool
}

func (n *noted) risen(now uint64) bool {
	if now == n.seen || n.logged {
		return false
	}
	n.seen, n.logged = now, true
	return true
}

// again has the next rise logged.
func (n *noted) again(now uint64) {
	if n.logged {
		n.seen, n.logged = now, false
	}
}

func newRunner(l *Link) *runner {
	return &runner{l: l, ended: make(chan *shake, 4)}
}

func (r *runner) run(ctx context.Context) error {
	var cancel context.CancelFunc
	r.ctx, cancel = context.WithCancel(ctx)
	defer r.wg.Wait()
	defer cancel()
	r.lookAt = time.Now().Add(look)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		if !now.Before(r.lookAt) {
			r.look(now)
			r.lookAt = now.Add(look)
		}
		for _, s := range *r.l.sessions.Load() {
			if s.first.Load() && !s.confirmed.Load() {
				r.l.confirm(s)
			}
		}
		next := r.lookAt
		if r.out == nil && r.wanted(now) {
			if now.Before(r.retryAt) {
				next = earlier(next, r.retryAt)
			} else {
				r.initiate(now)
			}
		}
		timer.Reset(next.Sub(now))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case d := <-r.l.inbox:
			r.receive(d)
		case s := <-r.ended:
			r.finish(s)
		case <-r.l.kick:
		case <-timer.C:
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// wanted reports whether this side should start a handshake.
func (r *runner) wanted(now time.Time) bool {
	s := r.l.current.Load()
	if s == nil {
		return true
	}
	after := r.l.cfg.RekeyAfter
	if !s.initiator {
		after += after/10 + r.jitter // whoever made it goes first
	}
	return r.l.wanted.Load() || now.Sub(s.started) >= after || s.usedUp()
}

func (r *runner) initiate(now time.Time) {
	r.asked = r.l.wanted.Swap(false)
	r.jitter = rand.N(r.l.cfg.RekeyAfter/20 + 1)
	s := newShake(r.l, header{vni: r.l.cfg.VNI, number: newNumber()})
	s.random = r.l.cfg.Identity.begin()
	r.out = s
	r.start(s)
}

func (r *runner) start(s *shake) {
	ctx, cancel := context.WithCancel(r.ctx)
	s.cancel = cancel
	r.wg.Go(func() {
		defer cancel()
		s.err = s.shakeHands(ctx, func() { r.l.made() })
		if !s.head.responder {
			r.l.cfg.Identity.end(s.random)
		}
		select {
		case r.ended <- s:
		case <-r.ctx.Done():
		}
	})
}

// receive sorts a handshake datagram, which Deliver has looked at.
func (r *runner) receive(d []byte) {
	h, payload, ok := parseHeader(d)
	switch {
	case !ok:
	case h.responder:
		if r.out == nil || h.number != r.out.head.number {
			break
		}
		if len(payload) == 0 {
			r.out.challenge(h.cookie)
		} else {
			r.out.feed(payload)
		}
		return
	case r.in != nil && h.number == r.in.head.number:
		if h.cookie != r.in.head.cookie {
			break
		}
		r.in.feed(payload)
		return
	case isClientHello(payload) && !r.isRecent(h.number):
		r.hello(h, d, payload)
		return
	}
	r.l.ignored.Add(1)
}

// hello answers the beginning of a handshake: with a challenge, or, when its sender has shown that it reads what we send to the peer, with a handshake of our own.
func (r *runner) hello(h header, d, payload []byte) {
	now := time.Now()
	if !r.cookies.valid(now, h) {
		_ = r.l.cfg.Send(header{vni: h.vni, number: h.number, responder: true, cookie: r.cookies.make(now, h)}.append(nil))
		return
	}
	if r.in != nil {
		if r.in.made.Load() || now.Sub(r.in.began) >= takeOver {
			r.waiting = d
			r.in.cancel()
		}
		return // its sender repeats it
	}
	r.recent[r.nrecent%maxRecent] = h.number
	r.nrecent++
	h.responder = true
	r.in = newShake(r.l, h)
	r.in.feed(payload)
	r.start(r.in)
}

func (r *runner) isRecent(number uint32) bool {
	for _, n := range r.recent[:min(r.nrecent, maxRecent)] {
		if n == number {
			return true
		}
	}
	return false
}

// finish notes how a handshake ended.
func (r *runner) finish(s *shake) {
	role := 0
	switch s {
	case r.out:
		r.out = nil
	case r.in:
		r.in, role = nil, 1
	}
	switch {
	case s.made.Load():
		r.failures, r.retryAt, r.logged = 0, time.Time{}, [2]said{}
		r.forged.again(r.l.unauthentic.Load())
		r.old.again(r.l.replayed.Load())
	case !errors.Is(s.err, context.Canceled):
		msg := reason(s.err)
		r.l.failed(msg)
		if r.logged[role].news(msg, time.Now()) {
			r.l.log.Warn("handshake failed", "answered", s.head.responder, "reason", msg)
		}
		if role == 0 {
			pause := min(firstRetry<<min(r.failures, 10), maxRetry)
			r.failures++
			r.retryAt = time.Now().Add(pause/2 + rand.N(pause))
			if r.asked {
				r.l.wanted.Store(true)
			}
		}
	}
	if d := r.waiting; r.in == nil && d != nil {
		r.waiting = nil
		r.receive(d)
	}
}

// look goes through the sessions: those whose time is over end, and one that nothing comes under gives way to the one the peer uses.
func (r *runner) look(now time.Time) {
	l := r.l
	l.mu.Lock()
	defer l.mu.Unlock()
	cur := l.current.Load()
	for _, s := range *l.sessions.Load() {
		if s.heard.Swap(false) {
			s.quiet = 0
		} else {
			s.quiet++
		}
		switch {
		case now.Sub(s.started) >= 2*l.cfg.RekeyAfter:
			l.drop(s)
		case s != cur && s.confirmed.Load() && s.quiet >= graceSeconds && (cur == nil || cur.quiet < s.quiet/2):
			l.drop(s) // the peer uses the current one; when both are quiet, s may be its choice
		}
	}
	if cur = l.current.Load(); cur != nil {
		for _, s := range *l.sessions.Load() {
			if s != cur && s.quiet == 0 && s.confirmed.Load() && cur.quiet > patience(cur, s) {
				l.choose(s)
				break
			}
		}
	}
	if n := l.unauthentic.Load(); r.forged.risen(n) {
		l.log.Warn("sealed frames that do not open are dropped: forged, or changed on the way", "frames", n)
	}
	if n := l.replayed.Load(); r.old.risen(n) {
		l.log.Warn("sealed frames that came before are dropped: repeated on the way, or by somebody", "frames", n)
	}
}

// patience is for how many seconds nothing may have come under the current session before another one, which the peer uses, takes its place. The peer weighs the same two the other way around, maybe in the
// same second, and were both to go over they would only have swapped. So the two differ; where they do not, since only one side saw the handshakes cross, they do after that one swap.
func patience(cur, s *Session) int {
	switch {
	case glare(cur, s):
		if s.id > cur.id {
			return 0
		}
		return 6
	case s.started.After(cur.started):
		return 0
	case s.id > cur.id: // the peer has not heard of the newer one yet, and will, or has lost it
		return 3
	}
	return 6
}

func (l *Link) made() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Handshakes++
	l.stats.LastError = ""
}

func (l *Link) failed(why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Failed++
	l.stats.LastError = why
}
