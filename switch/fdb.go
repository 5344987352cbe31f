package vswitch

import (
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"patchbay/internal/wire"
)

// A word of the table is a MAC in the upper 48 bits, a port's index in the next 15 and the static flag in the last. No MAC is zero,
// so there is room for two marks: a free word ends a search, a dead one does not.
const (
	wordFree   = 0
	wordDead   = 1
	wordStatic = 1
	maxIdx     = 1<<15 - 1
)

// fdbMinSlots is the first table's size; fdbSweep how many entries a new one pays for looking at; fdbSample how many entries of the fullest
// port are compared for the oldest.
const (
	fdbMinSlots = 64
	fdbSweep    = 8
	fdbSample   = 4
)

// fdb is the forwarding database. lookup and the usual case of learn take no lock.
type fdb struct {
	tab     atomic.Pointer[fdbTable]
	seed    uint64 // so that nobody can choose MACs that collide
	ageing  int64  // ns
	refresh int64  // ns: an entry younger than this is not written to
	max     int

	moves, evictions, skipped atomic.Uint64

	mu        sync.Mutex // of what follows, and of all writes to words
	live      int
	static    int
	dead      int
	hand      int
	held      []int // learned entries by port index
	lastSweep int64
}

type fdbTable struct {
	shift uint8
	slots []fdbSlot
}

// fdbSlot: seen is written before word when an entry is made. A reader may see the time of a former owner of the slot, at worst flooding
// one frame too many or too few.
type fdbSlot struct {
	word atomic.Uint64
	seen atomic.Int64
}

func newFDBTable(slots int) *fdbTable {
	return &fdbTable{shift: uint8(64 - bits.TrailingZeros(uint(slots))), slots: make([]fdbSlot, slots)}
}

// macBits is the MAC as a number below 1<<48.
func macBits(m []byte) uint64 {
	_ = m[5]
	return uint64(m[0])<<40 | uint64(m[1])<<32 | uint64(m[2])<<24 | uint64(m[3])<<16 | uint64(m[4])<<8 | uint64(m[5])
}

func bitsMAC(b uint64) wire.MAC {
	return wire.MAC{byte(b >> 40), byte(b >> 32), byte(b >> 24), byte(b >> 16), byte(b >> 8), byte(b)}
}

func wordIdx(w uint64) int32 { return int32(w >> 1 & maxIdx) }

func (f *fdb) hash(mac uint64) uint64 {
	x := (mac ^ f.seed) * 0x9e3779b97f4a7c15
	x ^= x >> 32
	return (x ^ f.seed>>17) * 0xd6e8feb86659fd93
}

// find is the slot of mac, or nil. The table is never more than half full, so the search ends.
func (f *fdb) find(t *fdbTable, mac uint64) (*fdbSlot, uint64) {
	mask := uint64(len(t.slots) - 1)
	for i := f.hash(mac) >> t.shift; ; i++ {
		s := &t.slots[i&mask]
		w := s.word.Load()
		if w>>16 == mac {
			return s, w
		}
		if w == wordFree {
			return nil, 0
		}
	}
}

// lookup is the index of the port behind which mac was heard within the ageing time.
func (f *fdb) lookup(mac uint64, now int64) (int32, bool) {
	s, w := f.find(f.tab.Load(), mac)
	if s == nil || mac == 0 || w&wordStatic == 0 && now-s.seen.Load() >= f.ageing {
		return 0, false
	}
	return wordIdx(w), true
}

type learnResult uint8

const (
	learned learnResult = iota
	learnSpoofed
	learnLimit
)

// learn notes that mac was heard on the port idx, which may hold limit entries (0: any number).
func (f *fdb) learn(mac uint64, idx int32, limit int, now int64) learnResult {
	s, w := f.find(f.tab.Load(), mac)
	if s != nil {
		if w&wordStatic != 0 {
			if wordIdx(w) != idx {
				return learnSpoofed
			}
			return learned
		}
		if wordIdx(w) == idx {
			seen := s.seen.Load()
			if age := now - seen; age < f.refresh {
				return learned
			} else if age < f.ageing {
				s.seen.CompareAndSwap(seen, now)
				return learned
			}
		}
	}
	if limit > 0 {
		f.mu.Lock()
	} else if !f.mu.TryLock() {
		// Somebody else is learning. The next frame of this source will.
		f.skipped.Add(1)
		return learned
	}
	defer f.mu.Unlock()
	return f.learnSlow(mac, idx, limit, now)
}

func (f *fdb) learnSlow(mac uint64, idx int32, limit int, now int64) learnResult {
	s, w := f.find(f.tab.Load(), mac)
	switch {
	case s != nil && w&wordStatic != 0:
		if wordIdx(w) != idx {
			return learnSpoofed
		}
		return learned
	case s != nil && wordIdx(w) == idx:
		s.seen.Store(now)
		return learned
	}
	if limit > 0 && f.count(idx) >= limit {
		if now-f.lastSweep >= int64(1e9) {
			f.sweepAll(now)
		}
		if f.count(idx) >= limit {
			return learnLimit
		}
		s, w = f.find(f.tab.Load(), mac) // the sweep may have taken it away
	}
	if s != nil {
		f.moves.Add(1)
		f.hold(wordIdx(w), -1)
		f.hold(idx, 1)
		s.seen.Store(now)
		s.word.Store(mac<<16 | uint64(idx)<<1)
		return learned
	}
	f.sweep(fdbSweep, now)
	if f.live >= f.max {
		f.evict(now)
	}
	if f.live < f.max { // else it is full of static entries
		f.insert(mac<<16|uint64(idx)<<1, now)
		f.hold(idx, 1)
	}
	return learned
}

// insert writes a word whose MAC is not in the table.
func (f *fdb) insert(word uint64, now int64) {
	t := f.tab.Load()
	if 2*(f.live+f.dead+1) > len(t.slots) {
		t = f.rebuild(now)
	}
	mask := uint64(len(t.slots) - 1)
	for i := f.hash(word>>16) >> t.shift; ; i++ {
		s := &t.slots[i&mask]
		if w := s.word.Load(); w == wordFree || w == wordDead {
			f.dead -= int(w) // wordDead is 1
			f.live++
			s.seen.Store(now)
			s.word.Store(word)
			return
		}
	}
}

// rebuild puts what is live into a new table with room to double.
func (f *fdb) rebuild(now int64) *fdbTable {
	old := f.tab.Load()
	n := fdbMinSlots
	for n < 4*(f.live+1) {
		n *= 2
	}
	t := newFDBTable(n)
	f.live, f.dead, f.hand = 0, 0, 0
	mask := uint64(n - 1)
	for i := range old.slots {
		w, seen := old.slots[i].word.Load(), old.slots[i].seen.Load()
		if w>>16 == 0 {
			continue
		}
		if f.expired(w, seen, now) {
			f.hold(wordIdx(w), -1)
			continue
		}
		for j := f.hash(w>>16) >> t.shift; ; j++ {
			if s := &t.slots[j&mask]; s.word.Load() == wordFree {
				s.seen.Store(seen)
				s.word.Store(w)
				break
			}
		}
		f.live++
	}
	f.tab.Store(t)
	return t
}

func (f *fdb) expired(w uint64, seen, now int64) bool {
	return w&wordStatic == 0 && now-seen >= f.ageing
}

// remove takes the entry at slot i out. A word that nobody's search goes beyond becomes free instead of dead, and so do the dead
// ones before it.
func (f *fdb) remove(t *fdbTable, i int) {
	w := t.slots[i].word.Load()
	if w&wordStatic != 0 {
		f.static--
	} else {
		f.hold(wordIdx(w), -1)
	}
	f.live--
	f.dead++
	t.slots[i].word.Store(wordDead)
	mask := len(t.slots) - 1
	if t.slots[(i+1)&mask].word.Load() != wordFree {
		return
	}
	for ; t.slots[i&mask].word.Load() == wordDead; i-- {
		t.slots[i&mask].word.Store(wordFree)
		f.dead--
	}
}

// sweep looks at the next n slots and removes what has aged.
func (f *fdb) sweep(n int, now int64) {
	t := f.tab.Load()
	for range min(n, len(t.slots)) {
		f.hand = (f.hand + 1) & (len(t.slots) - 1)
		s := &t.slots[f.hand]
		if w := s.word.Load(); w>>16 != 0 && f.expired(w, s.seen.Load(), now) {
			f.remove(t, f.hand)
		}
	}
}

func (f *fdb) sweepAll(now int64) {
	f.lastSweep = now
	f.sweep(len(f.tab.Load().slots), now)
}

// evict makes room for one entry: what has aged, or else the oldest of a sample of the port that holds most.
func (f *fdb) evict(now int64) {
	if now-f.lastSweep >= f.refresh {
		f.sweepAll(now)
		if f.live < f.max {
			return
		}
	}
	most := 0
	for i, n := range f.held {
		if n > f.held[most] {
			most = i
		}
	}
	t := f.tab.Load()
	victim, age, sample := -1, int64(math.MinInt64), 0 // seen may be ahead of this caller's now
	for range len(t.slots) {
		f.hand = (f.hand + 1) & (len(t.slots) - 1)
		s := &t.slots[f.hand]
		w := s.word.Load()
		if w>>16 == 0 || w&wordStatic != 0 || wordIdx(w) != int32(most) {
			continue
		}
		if a := now - s.seen.Load(); a > age {
			victim, age = f.hand, a
		}
		if sample++; sample == fdbSample {
			break
		}
	}
	if victim >= 0 {
		f.remove(t, victim)
		f.evictions.Add(1)
	}
}

// setStatic makes mac a static entry of port idx and reports the port that has one already.
func (f *fdb) setStatic(mac uint64, idx int32, now int64) (owner int32, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	word := mac<<16 | uint64(idx)<<1 | wordStatic
	if s, w := f.find(f.tab.Load(), mac); s != nil {
		if w&wordStatic != 0 {
			return wordIdx(w), wordIdx(w) == idx
		}
		f.hold(wordIdx(w), -1)
		f.static++
		s.word.Store(word)
		return idx, true
	}
	if f.live >= f.max {
		f.evict(now)
	}
	if f.live >= f.max {
		return -1, false
	}
	f.static++
	f.insert(word, now)
	return idx, true
}

// flush removes the entries of port idx: those of one MAC, or all of them if mac is 0; static ones only if asked to.
func (f *fdb) flush(idx int32, mac uint64, static bool) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.tab.Load()
	for i := range t.slots {
		w := t.slots[i].word.Load()
		if w>>16 == 0 || wordIdx(w) != idx || mac != 0 && w>>16 != mac || w&wordStatic != 0 && !static {
			continue
		}
		f.remove(t, i)
		n++
	}
	return n
}

// each calls fn for every entry that has not aged.
func (f *fdb) each(now int64, fn func(mac uint64, idx int32, age int64, static bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.tab.Load()
	for i := range t.slots {
		w, seen := t.slots[i].word.Load(), t.slots[i].seen.Load()
		if w>>16 != 0 && !f.expired(w, seen, now) {
			fn(w>>16, wordIdx(w), max(now-seen, 0), w&wordStatic != 0)
		}
	}
}

func (f *fdb) count(idx int32) int {
	if int(idx) < len(f.held) {
		return f.held[idx]
	}
	return 0
}

func (f *fdb) hold(idx int32, d int) {
	for int(idx) >= len(f.held) {
		f.held = append(f.held, 0)
	}
	f.held[idx] += d
}
