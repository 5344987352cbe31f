package tunnel

import (
	"slices"

	"patchbay/tunnel/superframe"
)

// stream is what comes on one channel of the patchbay wire: the peer's clear messages, or those under one session. It belongs to the receiving goroutine.
type stream struct {
	id uint32 // of the session; 0 for clear messages
	r  *superframe.Reassembler
	// top is the highest number that opened.
	top uint64
	// again is how many messages have come again, as the link was last told.
	again uint64
}

// streams are those of one peer, and what became of the messages of those that ended.
type streams struct {
	all             []*stream
	lost, reordered uint64
	told            uint64 // of the lost, when the prober was last hurried, at
	toldAt          int64
}

// stream is that of a session, or with id 0 of clear messages. It is made, and those whose sessions have ended forgotten, as needed.
func (p *Peer) stream(id uint32) *stream {
	ss := &p.pending.streams
	for _, st := range ss.all {
		if st.id == id {
			return st
		}
	}
	p.forward() // what a stream that ends has lent
	ss.all = slices.DeleteFunc(ss.all, func(st *stream) bool {
		over := st.id != 0 && p.v.links.owner(st.id) != p
		if over {
			s := st.r.Stats()
			ss.lost, ss.reordered = ss.lost+s.Lost, ss.reordered+s.Reordered
		}
		return over
	})
	st := &stream{id: id, r: superframe.NewReassembler(superframe.Config{Pool: &p.v.rx.pool, Drops: p.drops})}
	ss.all = append(ss.all, st)
	return st
}

// release takes back what was lent.
func (ss *streams) release() {
	for _, st := range ss.all {
		st.r.Release()
	}
}

// expire gives up what has been incomplete for too long.
func (ss *streams) expire(now int64) {
	for _, st := range ss.all {
		st.r.Expire(now)
	}
}

// noteSuper makes what is known of lost and reordered messages known to others.
func (p *Peer) noteSuper() {
	ss := &p.pending.streams
	if len(ss.all) == 0 {
		return
	}
	lost, reordered := ss.lost, ss.reordered
	for _, st := range ss.all {
		s := st.r.Stats()
		lost, reordered = lost+s.Lost, reordered+s.Reordered
		if st.id != 0 && s.Duplicated != st.again {
			p.seal.link.Replayed(s.Duplicated - st.again)
			st.again = s.Duplicated
		}
	}
	p.rx.lost.Store(lost)
	p.rx.reordered.Store(reordered)
	// Who sends superframes into loss all but stops, and is told at once.
	ss.told = min(ss.told, lost)
	if lost-ss.told >= adaptLost && p.v.rx.now-ss.toldAt >= int64(probeEarly) {
		ss.told, ss.toldAt = lost, p.v.rx.now
		p.hurried.Store(true)
		p.v.kick()
	}
}
