package stack

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

// tokens is a token bucket.
type tokens struct {
	mu    sync.Mutex
	rate  float64 // a second
	burst float64
	have  float64
	last  time.Time
}

func (t *tokens) init(rate, burst int) {
	t.rate, t.burst, t.have = float64(rate), float64(burst), float64(burst)
}

func (t *tokens) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.last.IsZero() {
		t.have = min(t.burst, t.have+now.Sub(t.last).Seconds()*t.rate)
	}
	t.last = now
	if t.have < 1 {
		return false
	}
	t.have--
	return true
}

// sourceBuckets is how many token buckets all sources share; a power of two.
const sourceBuckets = 512

// sourceTokens bounds something for each source, in memory that does not grow with their number. A source has two buckets, picked by hashes it cannot guess,
// each with half of its rate: who shares one with a flooder has the other.
type sourceTokens struct {
	seed maphash.Seed
	b    [sourceBuckets]tokens
}

func (t *sourceTokens) init(rate, burst int) {
	t.seed = maphash.MakeSeed()
	for i := range t.b {
		t.b[i].init(max(rate/2, 1), max(burst/2, 1))
	}
}

func (t *sourceTokens) take(src netip.Addr) bool {
	h := maphash.Comparable(t.seed, src)
	return t.b[h%sourceBuckets].take() || t.b[h>>32%sourceBuckets].take()
}
