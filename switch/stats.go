package vswitch

import (
	"bytes"
	"slices"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Entry is one line of the FDB.
type Entry struct {
	MAC    wire.MAC
	Port   PortID
	Age    time.Duration // since it was last heard, to a tenth of the ageing time; since it was made, if static
	Static bool
}

// PortInfo describes one port.
type PortInfo struct {
	ID     PortID
	Config PortConfig // as given to AddPort
	MACs   int        // sources learned, static ones not counted
	Stats  Counters
}

// Counters are what a port, or all of a switch's, has counted since it was made. rx is what the switch received from the port. When nothing is
// under way, RxFrames = Unicast + Flooded + the sum of Drops.
type Counters struct {
	RxFrames, RxBytes uint64
	Unicast           uint64 // received here and accepted by the one port it was for
	Flooded           uint64 // received here and flooded, each counted once
	// Drops is what was received here and not delivered. Flooded frames are not in it, even where a port refused its copy.
	Drops map[frame.Drop]uint64

	TxFrames, TxBytes uint64 // accepted by this port, copies of flooded frames included
	TxRefused         uint64 // offered to this port and not accepted; the port has counted why
}

// Dropped is the sum of Drops.
func (c Counters) Dropped() (n uint64) {
	for _, d := range c.Drops {
		n += d
	}
	return n
}

// Stats describes a switch. Totals include ports that were removed.
type Stats struct {
	Ports int
	Total Counters

	MACs, StaticMACs, MaxMACs int
	Moves                     uint64 // sources that changed their port
	Evictions                 uint64 // sources forgotten because the FDB was full
	LearnSkipped              uint64 // frames whose new source was not learned, since another goroutine was learning
}

func (c *rxCounters) add(d *rxCounters) {
	c.frames.Add(d.frames.Load())
	c.bytes.Add(d.bytes.Load())
	c.unicast.Add(d.unicast.Load())
	c.flooded.Add(d.flooded.Load())
	d.drops.Each(func(why frame.Drop, n uint64) { c.drops.Add(why, int(n)) })
}

func (c *txCounters) add(d *txCounters) {
	c.frames.Add(d.frames.Load())
	c.bytes.Add(d.bytes.Load())
	c.refused.Add(d.refused.Load())
}

func (c *Counters) add(rx *rxCounters, tx *txCounters) {
	c.RxFrames += rx.frames.Load()
	c.RxBytes += rx.bytes.Load()
	c.Unicast += rx.unicast.Load()
	c.Flooded += rx.flooded.Load()
	rx.drops.Each(func(why frame.Drop, n uint64) { c.Drops[why] += n })
	c.TxFrames += tx.frames.Load()
	c.TxBytes += tx.bytes.Load()
	c.TxRefused += tx.refused.Load()
}

// FDB is what the switch knows, sorted by MAC.
func (s *Switch) FDB() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.ports.Load()
	var es []Entry
	s.fdb.each(s.now(), func(mac uint64, idx int32, age int64, static bool) {
		if int(idx) < len(set.byIdx) && set.byIdx[idx] != nil {
			es = append(es, Entry{bitsMAC(mac), set.byIdx[idx].id, time.Duration(age), static})
		}
	})
	slices.SortFunc(es, func(a, b Entry) int { return bytes.Compare(a.MAC[:], b.MAC[:]) })
	return es
}

// Ports describes every port, in the order they were added.
func (s *Switch) Ports() []PortInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	ps := s.sorted()
	out := make([]PortInfo, len(ps))
	for i, p := range ps {
		out[i] = PortInfo{ID: p.id, Config: p.cfg, Stats: Counters{Drops: map[frame.Drop]uint64{}}}
		out[i].Stats.add(&p.rx, &p.tx)
		s.fdb.mu.Lock()
		out[i].MACs = s.fdb.count(p.idx)
		s.fdb.mu.Unlock()
	}
	return out
}

// PortStats are the counters of one port; false when there is no such port. It is cheaper than Ports.
func (s *Switch) PortStats(id PortID) (Counters, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[id]
	if p == nil {
		return Counters{}, false
	}
	c := Counters{Drops: map[frame.Drop]uint64{}}
	c.add(&p.rx, &p.tx)
	return c, true
}

// Stats sums up.
func (s *Switch) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.ports.Load()
	st := Stats{Ports: len(set.all), Total: Counters{Drops: map[frame.Drop]uint64{}}, MaxMACs: s.fdb.max}
	st.Total.add(&s.gone.rx, &s.gone.tx)
	for _, p := range set.all {
		st.Total.add(&p.rx, &p.tx)
	}
	s.fdb.mu.Lock()
	st.MACs, st.StaticMACs = s.fdb.live, s.fdb.static
	s.fdb.mu.Unlock()
	st.Moves, st.Evictions, st.LearnSkipped = s.fdb.moves.Load(), s.fdb.evictions.Load(), s.fdb.skipped.Load()
	return st
}
