package vswitch

import (
	"slices"
	"sync"

	"patchbay/frame"
)

// Observed is a frame and what is about to become of it.
type Observed struct {
	Frame *frame.Frame // lent until Observe returns
	From  PortID
	To    PortID // the one port it goes to, or would have gone to; 0 when it is flooded, or dropped before that was looked up
	// Flooded frames go to every port that isolation and split horizon allow.
	Flooded bool
	// Dropped frames go nowhere, for the reason Why. A frame that its port refuses (DropRefused) was shown before, on its way there; which of a batch a port has refused is not known
	// for sure, see the package's Counters.
	Dropped bool
	Why     frame.Drop

	in *Ingress
}

// Reaches reports whether a flooded frame goes to the port: isolation and split horizon may keep it away.
func (o *Observed) Reaches(id PortID) bool {
	return o.Flooded && slices.ContainsFunc(o.in.targets, func(q *port) bool { return q.id == id })
}

// Observer is shown every frame that the switch forwards or drops. Observe is called from any number of goroutines at once, each in the middle of Forward: it must not block.
type Observer interface {
	Observe(o Observed)
}

// Observe shows o every frame from now on until the returned function is called. When that has returned, o is not called any more; it must not be called from inside Observe. While
// there is no observer a batch pays one atomic load.
func (s *Switch) Observe(o Observer) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entry := &observer{o}
	list := slices.Clone(s.observerList())
	list = append(list, entry)
	s.observers.Store(&list)
	return sync.OnceFunc(func() {
		s.mu.Lock()
		left := slices.DeleteFunc(slices.Clone(s.observerList()), func(e *observer) bool { return e == entry })
		if len(left) == 0 {
			s.observers.Store(nil)
		} else {
			s.observers.Store(&left)
		}
		var all []*Ingress
		for _, l := range s.ingresses {
			all = append(all, l...)
		}
		s.mu.Unlock()
		for _, in := range all {
			in.wait() // see RemovePort
		}
	})
}

// Observed reports whether somebody observes the switch.
func (s *Switch) Observed() bool { return s.observers.Load() != nil }

// observer makes two registrations of one Observer two.
type observer struct{ Observer }

func (s *Switch) observerList() []*observer {
	if l := s.observers.Load(); l != nil {
		return *l
	}
	return nil
}

// reasonOf is why, of a verdict below verdictFlood.
func reasonOf(v int32) frame.Drop { return frame.Drop(verdictDropped - v) }

// observe shows fs, which have been classified, to everybody who looks.
func (in *Ingress) observe(to []*observer, fs []frame.Frame) {
	for i := range fs {
		o := Observed{Frame: &fs[i], From: in.p.id, in: in}
		switch v := in.verdicts[i]; {
		case v == verdictFlood:
			o.Flooded = true
		case v < verdictFlood:
			o.Dropped, o.Why = true, reasonOf(v)
			if o.Why == frame.DropIsolated || o.Why == frame.DropSplitHorizon {
				if idx, ok := in.s.fdb.lookup(macBits(fs[i].Data), in.now); ok && int(idx) < len(in.set.byIdx) && in.set.byIdx[idx] != nil {
					o.To = in.set.byIdx[idx].id
				}
			}
		default:
			o.To = in.set.byIdx[v].id
		}
		for _, e := range to {
			e.Observe(o)
		}
	}
}

// transmit is q's, and shows what q has not taken.
func (in *Ingress) transmit(q *port, fs []frame.Frame) int {
	n := q.transmit(fs)
	if n < len(fs) {
		for _, e := range in.s.observerList() {
			for i := n; i < len(fs); i++ {
				e.Observe(Observed{Frame: &fs[i], From: in.p.id, To: q.id, Dropped: true, Why: frame.DropRefused, in: in})
			}
		}
	}
	return n
}
