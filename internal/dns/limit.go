package dns

import (
	"net/netip"
	"sync"
)

// limiter counts what is in progress, in all and for each client.
type limiter struct {
	all, each int

	mu     sync.Mutex
	n      int
	of     map[netip.Addr]int // no entry is zero, so there are at most n
	closed bool
	idle   sync.WaitGroup
}

func newLimiter(all, each int) *limiter {
	return &limiter{all: all, each: each, of: map[netip.Addr]int{}}
}

// enter reports whether the client may start one more; then leave must follow.
func (l *limiter) enter(client netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.n >= l.all || l.of[client] >= l.each {
		return false
	}
	l.n++
	l.of[client]++
	l.idle.Add(1)
	return true
}

func (l *limiter) leave(client netip.Addr) {
	l.mu.Lock()
	l.n--
	if l.of[client]--; l.of[client] == 0 {
		delete(l.of, client)
	}
	l.mu.Unlock()
	l.idle.Done()
}

// inUse is how many are in progress.
func (l *limiter) inUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// close lets nobody enter any more.
func (l *limiter) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
}
