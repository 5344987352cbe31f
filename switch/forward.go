package vswitch

import (
	"sync/atomic"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// maxBatch bounds the scratch of an Ingress: longer batches are forwarded in pieces.
const maxBatch = 256

// Verdicts below zero are verdictFlood, and below that dropped: verdictDropped less the reason. Others are the index of the one port the frame goes to.
const (
	verdictFlood   int32 = -1
	verdictDropped int32 = -2
)

// Ingress is where one receiving goroutine hands over what it has read from one port. It implements frame.Sink, and belongs to one
// goroutine at a time; a port with several queues has several.
type Ingress struct {
	s *Switch
	p *port
	// busy is odd while Forward runs; RemovePort reads it.
	busy atomic.Uint64
	_    [64]byte

	set     *portSet // the snapshot that targets and lists are made for
	targets []*port  // where frames of p are flooded to
	now     int64

	verdicts [maxBatch]int32
	next     [maxBatch]int32 // the next frame of the batch for the same port
	lists    []list          // by port index
	touched  []int32         // ports whose list is not empty, in the order of their first frame
	vec      []frame.Frame   // the frames for one port
	flood    []frame.Frame   // the frames for every port
}

// list is the chain of frames for one port, through Ingress.next; head is -1 when there are none.
type list struct{ head, tail int32 }

// Forward switches the frames fs, which are lent until it returns: each is by then handed to its ports or counted as dropped. It never
// waits for a peer and allocates nothing in the steady state. After RemovePort of its port it drops everything. Two goroutines
// inside Forward of one Ingress are a fault of the caller's, and a panic.
func (in *Ingress) Forward(fs []frame.Frame) {
	if in.busy.Add(1)&1 == 0 {
		panic("vswitch: Ingress used by two goroutines at once")
	}
	for len(fs) > maxBatch {
		in.forward(fs[:maxBatch])
		fs = fs[maxBatch:]
	}
	if len(fs) > 0 {
		in.forward(fs)
	}
	in.busy.Add(1)
}

func (in *Ingress) forward(fs []frame.Frame) {
	// The snapshot is loaded after busy is odd: see RemovePort.
	set := in.s.ports.Load()
	if !set.has(in.p) {
		in.s.countLate(fs)
		return
	}
	in.prepare(set)
	uniform := in.classify(fs)
	if o := in.s.observers.Load(); o != nil {
		in.observe(*o, fs)
	}
	switch v := in.verdicts[0]; {
	case uniform && v < verdictFlood:
	case uniform && v == verdictFlood:
		in.sendFlood(fs)
	case uniform:
		in.sendUnicast(in.set.byIdx[v], fs)
	default:
		in.group(fs)
		in.sendGroups(fs)
	}
}

// prepare adapts the scratch to the snapshot and reads the clock.
func (in *Ingress) prepare(set *portSet) {
	in.now = in.s.now()
	if in.set == set {
		return
	}
	in.set = set
	in.targets = in.targets[:0]
	for _, q := range set.all {
		if _, no := in.p.barred(q); !no && q != in.p {
			in.targets = append(in.targets, q)
		}
	}
	clear(in.targets[len(in.targets):cap(in.targets)])
	for len(in.lists) < len(set.byIdx) {
		in.lists = append(in.lists, list{head: -1})
	}
}

// classify decides about every frame, counts what it drops, and reports whether all have the same verdict.
func (in *Ingress) classify(fs []frame.Frame) (uniform bool) {
	rx := &in.p.rx
	uniform = true
	bytes := 0
	// Frames of one flow come in a row: what was found out about the last pair of addresses holds for the next frame.
	var last [12]byte
	known := verdictFlood
	bind := in.p.bind.Load()
	for i := range fs {
		f := &fs[i]
		bytes += len(f.Data)
		v := known
		switch {
		case len(f.Data) < wire.EthernetLen || len(f.Data) > wire.MaxFrame:
			v = in.drop(frame.DropMalformed)
		case !in.p.rate.take(in.now, len(f.Data)):
			v = in.drop(frame.DropRate)
		case bind != nil && in.spoofed(bind, f, &v):
		case known < 0 || [12]byte(f.Data) != last:
			// Not beyond a frame of another pair: it may have moved an address.
			v = in.verdict(f.Data, bind)
			last, known = [12]byte(f.Data), v
		}
		if v == verdictFlood {
			v = in.admitFlood()
		}
		in.verdicts[i] = v
		uniform = uniform && v == in.verdicts[0]
	}
	rx.frames.Add(uint64(len(fs)))
	rx.bytes.Add(uint64(bytes))
	return uniform
}

// spoofed drops a frame that claims what is not the port's.
func (in *Ingress) spoofed(bind *binding, f *frame.Frame, v *int32) bool {
	why, bad := bind.check(f.Data, f.Superframe())
	if bad {
		*v = in.drop(why)
	}
	return bad
}

// verdict learns the source and looks the destination up.
func (in *Ingress) verdict(data []byte, bind *binding) int32 {
	src := macBits(data[6:])
	switch {
	case src == 0 || data[6]&1 != 0:
		return in.drop(frame.DropGroupSource)
	case bind != nil && bind.mac != 0: // its one address is a static entry
	default:
		switch in.s.fdb.learn(src, in.p.idx, in.p.cfg.MACLimit, in.now) {
		case learnSpoofed:
			return in.drop(frame.DropSpoofMAC)
		case learnLimit:
			return in.drop(frame.DropMACLimit)
		}
	}
	dst := macBits(data)
	if data[0]&1 != 0 {
		if dst&^0xf == 0x0180c2000000 {
			return in.drop(frame.DropReserved)
		}
		return verdictFlood
	}
	idx, ok := in.s.fdb.lookup(dst, in.now)
	if !ok || int(idx) >= len(in.set.byIdx) || in.set.byIdx[idx] == nil {
		return verdictFlood
	}
	q := in.set.byIdx[idx]
	if q == in.p {
		return in.drop(frame.DropHairpin)
	}
	if why, no := in.p.barred(q); no {
		return in.drop(why)
	}
	return idx
}

// admitFlood is the verdict about a frame that is to be flooded.
func (in *Ingress) admitFlood() int32 {
	if len(in.targets) == 0 {
		return in.drop(frame.DropNoPort)
	}
	if !in.p.storm.take(in.now, 1) {
		return in.drop(frame.DropStorm)
	}
	return verdictFlood
}

func (in *Ingress) drop(why frame.Drop) int32 {
	in.p.rx.drops.Add(why, 1)
	return verdictDropped - int32(why)
}

// group chains the frames of each unicast verdict and collects those to flood.
func (in *Ingress) group(fs []frame.Frame) {
	in.touched, in.flood = in.touched[:0], in.flood[:0]
	for i := range fs {
		v := in.verdicts[i]
		switch {
		case v == verdictFlood:
			in.flood = append(in.flood, fs[i])
		case v >= 0:
			l := &in.lists[v]
			if l.head < 0 {
				l.head = int32(i)
				in.touched = append(in.touched, v)
			} else {
				in.next[l.tail] = int32(i)
			}
			in.next[i], l.tail = -1, int32(i)
		}
	}
}

// sendGroups sends each port what is for it. A port that has frames of its own gets them and the flooded ones merged, in the order
// they came, and before the ports that get only the latter.
func (in *Ingress) sendGroups(fs []frame.Frame) {
	for _, v := range in.touched {
		in.sendMerged(in.set.byIdx[v], in.lists[v].head, fs)
	}
	if len(in.flood) > 0 {
		in.p.rx.flooded.Add(uint64(len(in.flood)))
		for _, q := range in.targets {
			if in.lists[q.idx].head < 0 {
				q.transmit(in.flood)
			}
		}
	}
	for _, v := range in.touched {
		in.lists[v].head = -1
	}
	// Lent bytes are not kept, not even from the garbage collector.
	clear(in.vec)
	clear(in.flood)
	in.vec = in.vec[:0]
}

func (in *Ingress) sendMerged(q *port, head int32, fs []frame.Frame) {
	vec := in.vec[:0]
	if len(in.flood) == 0 {
		for i := head; i >= 0; i = in.next[i] {
			vec = append(vec, fs[i])
		}
		in.keep(vec)
		in.sendUnicast(q, vec)
		return
	}
	own := 0
	for i := range fs {
		if v := in.verdicts[i]; v == q.idx || v == verdictFlood {
			vec = append(vec, fs[i])
		}
	}
	in.keep(vec)
	n := in.transmit(q, vec)
	// The first n were accepted: count those of them that are not copies.
	for i, left := 0, n; left > 0; i++ {
		switch in.verdicts[i] {
		case q.idx:
			own++
			left--
		case verdictFlood:
			left--
		}
	}
	total := 0
	for i := head; i >= 0; i = in.next[i] {
		total++
	}
	in.countUnicast(own, total)
}

// keep remembers the longest vector, so that sendGroups clears all that was used.
func (in *Ingress) keep(vec []frame.Frame) {
	if len(vec) > len(in.vec) || cap(vec) > cap(in.vec) {
		in.vec = vec
	}
}

func (in *Ingress) sendUnicast(q *port, fs []frame.Frame) {
	in.countUnicast(in.transmit(q, fs), len(fs))
}

func (in *Ingress) countUnicast(accepted, total int) {
	in.p.rx.unicast.Add(uint64(accepted))
	in.p.rx.drops.Add(frame.DropRefused, total-accepted)
}

func (in *Ingress) sendFlood(fs []frame.Frame) {
	in.p.rx.flooded.Add(uint64(len(fs)))
	for _, q := range in.targets {
		q.transmit(fs)
	}
}
