package nat

import (
	"net/netip"
	"sync"
	"time"
)

// maxBudgets bounds the containers that have a budget of their own at one time. Those above it share one.
const maxBudgets = 4096

// budgets gives each container rate a second, and one second's worth at once, whatever others use. The zero value but for rate is
// ready. Safe for concurrent use.
type budgets struct {
	rate int

	mu   sync.Mutex
	m    map[netip.Addr]*tokens
	rest tokens    // of those that found m full
	last time.Time // of the last purge
}

// tokens is a token bucket that holds one second's worth.
type tokens struct {
	last time.Time
	have float64
}

// allow takes one from the budget of container a if there is one.
func (b *budgets) allow(a netip.Addr, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.m[a]
	if t == nil {
		t = &b.rest
		if len(b.m) < maxBudgets || b.purge(now) {
			if b.m == nil {
				b.m = make(map[netip.Addr]*tokens)
			}
			t = new(tokens)
			b.m[a] = t
		}
	}
	t.have = min(float64(b.rate), t.have+now.Sub(t.last).Seconds()*float64(b.rate))
	t.last = now
	if t.have < 1 {
		return false
	}
	t.have--
	return true
}

// purge drops the budgets that are full, which is what a new one is, and reports whether there were any. b.mu is held.
func (b *budgets) purge(now time.Time) bool {
	if now.Sub(b.last) < time.Second {
		return false // looking through all of them for each error would be the greater harm
	}
	b.last = now
	n := len(b.m)
	for a, t := range b.m {
		if now.Sub(t.last) >= time.Second {
			delete(b.m, a)
		}
	}
	return len(b.m) < n
}

// forget drops the budget of container a.
func (b *budgets) forget(a netip.Addr) {
	b.mu.Lock()
	delete(b.m, a)
	b.mu.Unlock()
}
