package nat

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/stack"
)

// tcpNAT is the TCP half: connects that wait, flows that run.
type tcpNAT struct {
	n        *NAT
	flows    *quota // of containers: connecting and established
	halfOpen *quota // connecting

	pubFlows, pubHalfOpen *quota // the same for what comes through published ports

	mu      sync.Mutex
	closed  bool
	live    map[*tcpFlow]struct{}
	dialing dialList
	inward  map[*inwardDial]struct{} // dials into the network
	wg      sync.WaitGroup           // flows and goroutines
	bufs    bufPool
	loopBuf [smallBuf]byte // the loop's own
	reserve int            // a descriptor to give up when there is no other, or -1

	ctx  context.Context // ends with the NAT; for dials into the network
	stop context.CancelFunc

	recycler  recycler
	nextSweep time.Time // used on the loop alone
}

func newTCP(n *NAT) *tcpNAT {
	t := &tcpNAT{
		n:           n,
		flows:       newQuota(n.limits.TCPFlows, n.limits.TCPFlowsPerContainer),
		halfOpen:    newQuota(n.limits.HalfOpen, n.limits.HalfOpenPerContainer),
		pubFlows:    newQuota(n.limits.PublishedFlows, n.limits.PublishedFlowsPerContainer),
		pubHalfOpen: newQuota(n.limits.PublishedHalfOpen, n.limits.PublishedHalfOpenPerContainer),

		inward:   make(map[*inwardDial]struct{}),
		live:     make(map[*tcpFlow]struct{}),
		reserve:  openReserve(),
		recycler: recycler{depth: recycleDepth},
	}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t
}

// HandleTCP takes a container's connection attempt. It does not block: it starts a connect on the host, and the outcome answers r.
func (n *NAT) HandleTCP(r stack.TCPRequest) {
	t := n.tcp
	src, dst := r.Src().Addr(), r.Dst()
	v := n.policy.check(dst.Addr())
	if !v.ok {
		n.drops.Add(v.drop, 1)
		if v.refuse {
			r.Refuse()
		} else {
			r.Unreachable(v.why)
		}
		return
	}
	if !t.flows.take(src) {
		n.drops.Add(frame.DropFlowLimit, 1)
		r.Ignore()
		return
	}
	if !t.halfOpen.take(src) {
		t.flows.give(src)
		n.drops.Add(frame.DropDialLimit, 1)
		r.Ignore()
		return
	}
	to := netip.AddrPortFrom(v.host, dst.Port())
	fd, done, err := t.connect(to)
	if err != nil {
		t.halfOpen.give(src)
		t.flows.give(src)
		n.answer(r, err)
		return
	}
	if done {
		t.halfOpen.give(src)
		t.accept(r, fd, to, false)
		return
	}
	d := &tcpDial{t: t, r: r, fd: fd, to: to, deadline: n.now().Add(n.limits.DialTimeout)}
	if !t.wait(d) {
		unix.Close(fd)
		t.halfOpen.give(src)
		t.flows.give(src)
		r.Ignore()
	}
}

// answer tells the container why the host could not connect.
func (n *NAT) answer(r stack.TCPRequest, err error) {
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		r.Refuse()
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.ENETDOWN), errors.Is(err, unix.EAFNOSUPPORT):
		r.Unreachable(stack.UnreachNet)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		r.Unreachable(stack.UnreachProhibited)
	case errors.Is(err, unix.ETIMEDOUT):
		r.Ignore()
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
		n.drops.Add(frame.DropFlowLimit, 1)
		r.Ignore()
	case errors.Is(err, unix.EADDRNOTAVAIL) && r.Dst().Addr().Is6() && !n.hosts.has6(): // switched off by disable_ipv6
		r.Unreachable(stack.UnreachNet)
	case errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.EAGAIN): // the host's ephemeral ports are used up
		n.drops.Add(frame.DropHostSend, 1)
		r.Ignore()
	default: // EHOSTUNREACH, EHOSTDOWN, EINVAL for addresses the kernel does not take
		r.Unreachable(stack.UnreachHost)
	}
}

// tcpDial is a connect on the host that waits for its answer, with the container's SYN that waits for it.
type tcpDial struct {
	t          *tcpNAT
	r          stack.TCPRequest
	fd         int
	to         netip.AddrPort
	deadline   time.Time
	prev, next *tcpDial
	listed     bool
}

// dialList holds the waiting connects, oldest first; all have the same timeout, so that is the order of their deadlines.
type dialList struct{ first, last *tcpDial }

func (l *dialList) push(d *tcpDial) {
	d.prev, d.listed = l.last, true
	if l.last == nil {
		l.first = d
	} else {
		l.last.next = d
	}
	l.last = d
}

// remove reports whether d was in the list: whoever removes it is the one to answer it.
func (l *dialList) remove(d *tcpDial) bool {
	if !d.listed {
		return false
	}
	if d.prev == nil {
		l.first = d.next
	} else {
		d.prev.next = d.next
	}
	if d.next == nil {
		l.last = d.prev
	} else {
		d.next.prev = d.prev
	}
	d.prev, d.next, d.listed = nil, nil, false
	return true
}

// wait hands d to the loop and reports whether it is taken.
func (t *tcpNAT) wait(d *tcpDial) bool {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return false
	}
	// Both under the lock: whoever takes d off the list closes its descriptor, which somebody else may have by the time it is added.
	first := t.dialing.first == nil
	err := t.n.streams.add(d.fd, unix.EPOLLOUT|unix.EPOLLONESHOT, d)
	if err == nil {
		t.dialing.push(d)
	}
	t.mu.Unlock()
	if err != nil {
		return false
	}
	if first {
		t.n.streams.armTick(t.n.limits.DialTimeout)
	}
	return true
}

func (t *tcpNAT) unlist(d *tcpDial) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dialing.remove(d)
}

// ready is called on the loop when the host has an answer.
func (d *tcpDial) ready(uint32) {
	t := d.t
	if !t.unlist(d) {
		return
	}
	src := d.r.Src().Addr()
	t.halfOpen.give(src)
	if err := sockErr(d.fd); err != nil {
		t.n.streams.closing(d.fd)
		unix.Close(d.fd)
		t.flows.give(src)
		t.n.answer(d.r, err)
		return
	}
	t.accept(d.r, d.fd, d.to, true)
}

// tick is the loop's periodic function.
func (t *tcpNAT) tick() time.Duration {
	now := t.n.now()
	next := t.expire(now)
	if !now.Before(t.nextSweep) {
		d := t.sweep()
		t.nextSweep = now.Add(d)
	}
	t.mu.Lock()
	live := len(t.live) > 0
	t.mu.Unlock()
	if live {
		if d := max(time.Millisecond, t.nextSweep.Sub(now)); next == 0 || d < next {
			next = d
		}
	}
	return next
}

// expire ends the connects whose time is up and says when the next one's is. It runs on the loop.
func (t *tcpNAT) expire(now time.Time) (next time.Duration) {
	for {
		t.mu.Lock()
		d := t.dialing.first
		if d == nil {
			t.mu.Unlock()
			return 0
		}
		if left := d.deadline.Sub(now); left > 0 {
			t.mu.Unlock()
			return left
		}
		t.dialing.remove(d)
		t.mu.Unlock()
		t.abandon(d, t.n.streams.removeHere)
	}
}

// abandon closes a connect that got no answer. The container's SYN gets none either.
func (t *tcpNAT) abandon(d *tcpDial, remove func(int)) {
	remove(d.fd)
	unix.Close(d.fd)
	src := d.r.Src().Addr()
	t.halfOpen.give(src)
	t.flows.give(src)
	d.r.Ignore()
}

// connect starts a connect on the host.
func (t *tcpNAT) connect(to netip.AddrPort) (fd int, done bool, err error) {
	for range recycleTries {
		port := t.recycler.take(to)
		if port == 0 {
			break
		}
		// One port may be held by another program's socket; when several are refused in a row, it is the peer that sends no timestamps.
		if fd, done, err = connect(to, port); !errors.Is(err, errPortTaken) {
			return fd, done, err
		}
	}
	if errors.Is(err, errPortTaken) {
		t.recycler.forget(to)
	}
	return connect(to, 0)
}

// accept answers the container's SYN, now that the host has answered ours, and starts the flow. It does not block.
func (t *tcpNAT) accept(r stack.TCPRequest, fd int, to netip.AddrPort, watched bool) {
	fail := func() {
		if watched {
			t.n.streams.closing(fd)
		}
		resetSock(fd)
		unix.Close(fd)
		t.flows.give(r.Src().Addr())
	}
	local := localAddr(fd)
	if local == to {
		// TCP's simultaneous open has connected the socket to itself: nobody listens, and the kernel's choice of a source port was that very one.
		fail()
		r.Refuse()
		return
	}
	slot := t.n.journal.put(r.Src(), r.Dst(), t.n.now()) // before the container can believe in the connection
	conn, err := r.Accept()
	if err != nil { // the container is gone, or the gateway is closed
		t.n.journal.remove(slot)
		fail()
		return
	}
	if f := t.newFlow(t.flows, r.Src().Addr(), fd, conn, slot); f != nil {
		f.to, f.port = to, local.Port()
		f.start(watched)
	}
}

// spawn runs f on a goroutine that close waits for. After close it does nothing.
func (t *tcpNAT) spawn(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		f()
	}()
	return true
}

// close ends every connect and flow and waits for their goroutines.
func (t *tcpNAT) close() {
	t.stop()
	t.mu.Lock()
	t.closed = true
	if t.reserve >= 0 {
		unix.Close(t.reserve)
		t.reserve = -1
	}
	var ds []*tcpDial
	for d := t.dialing.first; d != nil; d = t.dialing.first {
		t.dialing.remove(d)
		ds = append(ds, d)
	}
	fs := make([]*tcpFlow, 0, len(t.live))
	for f := range t.live {
		fs = append(fs, f)
	}
	t.mu.Unlock()
	for _, d := range ds {
		t.abandon(d, t.n.streams.remove)
	}
	for _, f := range fs {
		f.abort()
	}
	t.wg.Wait()
}
