package nat

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/spin"
	"patchbay/stack"
)

// pollBatch is how many ready descriptors one epoll_wait may report.
const pollBatch = 256

// pollHandler is called on the loop when its descriptor is ready. events holds EPOLL bits. It must not block; while it runs no
// other handler of the same poller does.
type pollHandler interface {
	ready(events uint32)
}

// poller is one epoll loop. It blocks in epoll_wait itself and not in the runtime's poller: a readiness event then costs no hand-off
// between goroutines, because the handler runs where the event is found.
//
// All methods may be called from any goroutine, before and during run.
type poller struct {
	epfd  int
	wake  int // eventfd
	timer int // timerfd

	mu      sync.Mutex
	idle    sync.Cond // signalled when no handler runs; waits of remove
	slots   []pollSlot
	gen     uint32
	running int  // descriptor whose handler runs now, or -1
	asleep  bool // in epoll_wait, or about to be, and not woken yet
	posted  []func()
	spare   []func()   // the other buffer of posted, reused
	lates   []lateCall // in the order in which they are due, from first on
	first   int
	tick    func() time.Duration
	tickAt  time.Time // zero: not armed
	timerAt time.Time // when timer rings; zero: it does not
	rung    bool      // it has: something is due
	stopped bool      // Close was called
	inRun   bool
	freed   bool
}

// lateCall is what later was given.
type lateCall struct {
	at time.Time
	h  stack.Later
}

// laterBy is how late that is, at most; it may be half as late, so that the loop is woken once for all that is due in between.
const laterBy = 4 * time.Millisecond

// pollSlot is what is known of one descriptor; slots is indexed by descriptor, which the kernel keeps small and dense.
type pollSlot struct {
	h   pollHandler
	gen uint32
}

func newPoller() (*poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("nat: epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("nat: eventfd: %w", err)
	}
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		unix.Close(wake)
		unix.Close(epfd)
		return nil, fmt.Errorf("nat: timerfd: %w", err)
	}
	p := &poller{epfd: epfd, wake: wake, timer: timer, running: -1}
	p.idle.L = &p.mu
	err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)})
	if err == nil { // edge-triggered: each time it rings is told once, and nobody need read it
		err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, timer, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET&0xffffffff, Fd: int32(timer)})
	}
	if err != nil {
		unix.Close(timer)
		unix.Close(wake)
		unix.Close(epfd)
		return nil, fmt.Errorf("nat: epoll: %w", err)
	}
	return p, nil
}

// add registers fd, which must be nonblocking, for events (EPOLLIN, EPOLLOUT, EPOLLET, …). The caller keeps fd and closes it only
// after remove or removeHere.
func (p *poller) add(fd int, events uint32, h pollHandler) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.freed {
		return errPollerClosed
	}
	for fd >= len(p.slots) {
		p.slots = append(p.slots, make([]pollSlot, max(64, fd+1-len(p.slots), len(p.slots)/4))...)
	}
	p.gen++
	p.slots[fd] = pollSlot{h: h, gen: p.gen}
	ev := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: int32(p.gen)}
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		p.slots[fd] = pollSlot{}
		return fmt.Errorf("nat: epoll add: %w", err)
	}
	return nil
}

// modify changes the events of a registered fd. With EPOLLET a condition that already holds is reported again.
func (p *poller) modify(fd int, events uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.freed || fd >= len(p.slots) || p.slots[fd].h == nil {
		return errPollerClosed
	}
	ev := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: int32(p.slots[fd].gen)}
	return unix.EpollCtl(p.epfd, unix.EPOLL_CTL_MOD, fd, &ev)
}

// rewatch gives a registered fd to another handler and changes its events.
func (p *poller) rewatch(fd int, events uint32, h pollHandler) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.freed || fd >= len(p.slots) || p.slots[fd].h == nil {
		return errPollerClosed
	}
	p.gen++
	p.slots[fd] = pollSlot{h: h, gen: p.gen}
	ev := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: int32(p.gen)}
	return unix.EpollCtl(p.epfd, unix.EPOLL_CTL_MOD, fd, &ev)
}

// closing is for a caller that is about to close fd, which takes it out of the epoll set by itself and saves a system call. Its handler may still
// be running on the loop when closing returns.
func (p *poller) closing(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if fd < len(p.slots) {
		p.slots[fd] = pollSlot{}
	}
}

// remove forgets fd. When it returns, fd's handler neither runs nor will run. It waits for a handler of fd that is running now, so it must not be
// called from a handler of this poller (removeHere is for that), nor with a lock held that such a handler takes.
func (p *poller) remove(fd int) { p.forget(fd, true) }

// removeHere is remove for callers that are on the loop: handlers, posted functions and the tick.
func (p *poller) removeHere(fd int) { p.forget(fd, false) }

func (p *poller) forget(fd int, wait bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if fd < len(p.slots) && p.slots[fd].h != nil {
		p.slots[fd] = pollSlot{}
		if !p.freed {
			_ = unix.EpollCtl(p.epfd, unix.EPOLL_CTL_DEL, fd, nil) // its owner may have closed it
		}
	}
	for wait && p.running == fd {
		p.idle.Wait()
	}
}

// post runs f on the loop soon, in order, behind the events that are known by then. It costs a system call only where the loop sleeps. After the loop has ended f is not run and post reports false.
func (p *poller) post(f func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return false
	}
	p.posted = append(p.posted, f)
	if p.asleep {
		p.asleep = false
		p.kick()
	}
	return true
}

// later has h.Due called on the loop in laterBy, or half of it. It is false, and does nothing, when the loop does not run. It costs a system call and a wake-up at most twice in laterBy.
func (p *poller) later(h stack.Later) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped || !p.inRun {
		return false
	}
	if p.first > 64 && 2*p.first > len(p.lates) {
		n := copy(p.lates, p.lates[p.first:])
		clear(p.lates[n:])
		p.lates, p.first = p.lates[:n], 0
	}
	at := time.Now().Add(laterBy)
	p.lates = append(p.lates, lateCall{at, h})
	p.ringAt(at)
	return true
}

// ringAt has timer ring at t or before. It is a timer of its own, which rings for all that waits, and not the timeout of epoll_wait, which the kernel would have to set up and take down whenever the loop sleeps. p.mu is held.
func (p *poller) ringAt(t time.Time) {
	if p.freed || !p.timerAt.IsZero() && !t.Before(p.timerAt) {
		return
	}
	in := unix.NsecToTimespec(int64(max(time.Until(t), 1)))
	if err := unix.TimerfdSettime(p.timer, 0, &unix.ItimerSpec{Value: in}, nil); err == nil { // it fails for times that make no sense
		p.timerAt = t
	}
}

const forever time.Duration = math.MaxInt64

// runLate calls what is due within d and says when the next is, or gives the zero time. p.mu is held, but not during the calls.
func (p *poller) runLate(d time.Duration) (next time.Time) {
	for now := time.Now(); p.first < len(p.lates); {
		l := &p.lates[p.first]
		if l.at.Sub(now) > d {
			return l.at
		}
		h := l.h
		l.h = nil
		p.first++
		p.mu.Unlock()
		h.Due()
		p.mu.Lock()
	}
	p.lates, p.first = p.lates[:0], 0
	return time.Time{}
}

// setTick sets the one periodic function of the loop; it returns how long until it wants to be called again, zero for not before armTick.
func (p *poller) setTick(f func() time.Duration) {
	p.mu.Lock()
	p.tick = f
	p.mu.Unlock()
}

// armTick makes the tick due in d or sooner.
func (p *poller) armTick(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := time.Now().Add(d)
	if p.tickAt.IsZero() || at.Before(p.tickAt) {
		p.tickAt = at
		p.ringAt(at)
	}
}

// kick makes epoll_wait return. p.mu is held.
func (p *poller) kick() {
	if !p.freed {
		one := [8]byte{0: 1}
		_, _ = unix.Write(p.wake, one[:]) // full means that a wake-up is due already
	}
}

var errPollerClosed = errors.New("nat: closed")

// run is the loop. It returns when ctx ends (nil) or close was called (nil), or with the error that broke epoll. It may be called once.
func (p *poller) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, p.stop)
	defer stop()
	p.mu.Lock()
	if p.freed {
		p.mu.Unlock()
		return nil
	}
	p.inRun = true
	p.mu.Unlock()
	err := p.loop()
	p.mu.Lock()
	p.stopped = true
	p.runLate(forever) // whoever waits is to know that nobody looks after him any more
	p.inRun = false
	p.idle.Broadcast()
	p.mu.Unlock()
	return err
}

func (p *poller) loop() error {
	var evs [pollBatch]unix.EpollEvent
	var slice spin.Slice
	for {
		slice.Yield()
		wait, stopped := p.due()
		if stopped {
			return nil
		}
		timeout := -1
		if !wait {
			timeout = 0
		}
		n, err := unix.EpollWait(p.epfd, evs[:], timeout)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("nat: epoll: %w", err)
		}
		for i := range max(n, 0) {
			p.dispatch(&evs[i])
		}
		p.runPosted()
	}
}

// dispatch calls the handler of one event unless its descriptor was removed since the kernel reported it.
func (p *poller) dispatch(ev *unix.EpollEvent) {
	fd := int(ev.Fd)
	if fd == p.wake {
		var b [8]byte
		_, _ = unix.Read(p.wake, b[:]) // empty means that somebody has drained it
		return
	}
	p.mu.Lock()
	if fd == p.timer {
		p.rung = true
		p.mu.Unlock()
		return
	}
	p.asleep = false
	s := p.slots[fd]
	if s.h == nil || s.gen != uint32(ev.Pad) {
		p.mu.Unlock()
		return
	}
	p.running = fd
	p.mu.Unlock()
	s.h.ready(ev.Events)
	p.mu.Lock()
	p.running = -1
	p.idle.Broadcast()
	p.mu.Unlock()
}

// runPosted runs what was posted.
func (p *poller) runPosted() {
	p.mu.Lock()
	p.asleep = false
	fs := p.posted
	if len(fs) == 0 {
		p.mu.Unlock()
		return
	}
	p.posted, p.spare = p.spare[:0], nil
	p.mu.Unlock()
	for i, f := range fs {
		f()
		fs[i] = nil
	}
	p.mu.Lock()
	if cap(fs) <= 1024 {
		p.spare = fs[:0]
	}
	p.mu.Unlock()
}

// due runs what is due, the tick and what later was given, and says whether epoll_wait may wait.
func (p *poller) due() (wait, stopped bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rung {
		p.rung, p.timerAt, p.asleep = false, time.Time{}, false
		p.runTick()
		next := p.runLate(laterBy / 2)
		if p.tick != nil && !p.tickAt.IsZero() && (next.IsZero() || p.tickAt.Before(next)) {
			next = p.tickAt
		}
		if !next.IsZero() {
			p.ringAt(next)
		}
	}
	p.asleep = !p.stopped && len(p.posted) == 0
	return p.asleep, p.stopped
}

// runTick runs the tick if it is time. p.mu is held, but not during the call.
func (p *poller) runTick() {
	if p.tick == nil || p.tickAt.IsZero() || time.Until(p.tickAt) > 0 {
		return
	}
	p.tickAt = time.Time{}
	f := p.tick
	p.mu.Unlock()
	next := f()
	p.mu.Lock()
	if next > 0 {
		if at := time.Now().Add(next); p.tickAt.IsZero() || at.Before(p.tickAt) {
			p.tickAt = at
		}
	}
}

// stop asks run to return; it does not wait for it.
func (p *poller) stop() {
	p.mu.Lock()
	p.stopped = true
	p.kick()
	p.mu.Unlock()
}

// close stops the loop, waits until it has ended and frees its descriptors, but not those registered. Idempotent. It must not be called
// on the loop.
func (p *poller) close() {
	p.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.inRun {
		p.idle.Wait()
	}
	if !p.freed {
		p.freed = true
		unix.Close(p.epfd)
		unix.Close(p.wake)
		unix.Close(p.timer)
		p.slots, p.posted, p.spare, p.lates, p.first = nil, nil, nil, nil, 0
	}
}
