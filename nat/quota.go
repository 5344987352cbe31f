package nat

import (
	"net/netip"
	"sync"
)

// quota counts what is held in all and per container, against two limits. Safe for concurrent use.
type quota struct {
	total, each int

	mu   sync.Mutex
	used int
	by   map[netip.Addr]int // only containers that hold something, so it is never longer than total
}

func newQuota(total, each int) *quota {
	return &quota{total: total, each: each, by: make(map[netip.Addr]int)}
}

// take takes one for container a and reports whether both limits allow it.
func (q *quota) take(a netip.Addr) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.by[a]
	if q.used >= q.total || n >= q.each {
		return false
	}
	q.used++
	q.by[a] = n + 1
	return true
}

// give returns one that take took.
func (q *quota) give(a netip.Addr) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used--
	if n := q.by[a] - 1; n > 0 {
		q.by[a] = n
	} else {
		delete(q.by, a)
	}
}

// heldBy is how many container a holds.
func (q *quota) heldBy(a netip.Addr) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.by[a]
}

// inUse is how many are held in all.
func (q *quota) inUse() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used
}
