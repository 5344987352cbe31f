package superframe

import (
	"time"

	"patchbay/frame"
)

// Defaults of Config.
const (
	DefaultContexts = 16
	DefaultBytes    = DefaultContexts * (MaxMessage + SealRoom)
	DefaultAge      = 250 * time.Millisecond
)

// Config bounds a Reassembler. Zero fields have defaults.
type Config struct {
	// Contexts is how many messages may be incomplete at a time; 0 means DefaultContexts. Parts of one message come one behind the other, so that more than one is incomplete only after loss or
	// reordering.
	Contexts int
	// Bytes is how much memory incomplete messages may take, counted as their buffers are long; 0 means DefaultBytes, and less than one longest message is as much.
	Bytes int
	// Age is how long a message may be incomplete; 0 means DefaultAge.
	Age time.Duration
	// Pool is where buffers come from; nil gives the Reassembler its own.
	Pool *Pool
	// Drops counts what was lost, a message or a fragment of one each; nil counts nowhere.
	Drops *frame.DropCounters
}

// Message is one that is whole.
type Message struct {
	// Header is that of one of its fragments. Index, and Last where a message was cut anew, may differ.
	Header Header
	// Data is the message.
	Data []byte
	// Mark is the ECN codepoint of the fragments, that of congestion (3) if any had it (RFC 3168 §5.3).
	Mark uint8
}

// Reassembler puts the messages of one sender on one channel together. It belongs to one goroutine. What it holds is bounded by its Config, besides the messages that are lent, which are bounded by
// what was given to Add since the last Release.
type Reassembler struct {
	cfg   Config
	seq   Sequence
	open  []context // incomplete messages, the oldest first
	bytes int       // of their buffers
	lent  [][]byte
	nLent int // bytes of lent
	m     Message

	broken uint64
}

// context is one incomplete message.
type context struct {
	head  Header
	buf   []byte
	since int64
	got   int
	high  int  // the highest index so far
	mixed bool // fragments came out of order
	mark  uint8
	have  [MaxFragments / 64]uint64
}

// ecnCE is congestion experienced (RFC 3168 §5).
const ecnCE = 3

// NewReassembler makes a Reassembler.
func NewReassembler(cfg Config) *Reassembler {
	if cfg.Contexts <= 0 {
		cfg.Contexts = DefaultContexts
	}
	if cfg.Bytes == 0 {
		cfg.Bytes = DefaultBytes
	}
	cfg.Bytes = max(cfg.Bytes, MaxMessage+SealRoom)
	if cfg.Age == 0 {
		cfg.Age = DefaultAge
	}
	if cfg.Pool == nil {
		cfg.Pool = new(Pool)
	}
	if cfg.Drops == nil {
		cfg.Drops = new(frame.DropCounters)
	}
	return &Reassembler{cfg: cfg, open: make([]context, 0, cfg.Contexts)}
}

// Add takes the datagram that train begins with: train[:size], or all of it where that is shorter; h is what Parse made of it. Behind it come the further datagrams of the same train. mark is the ECN codepoint of
// the train, now a clock in nanoseconds.
//
// It returns a message when one has become whole, else nil, and how many bytes of train it has used up: one datagram, or all those of a message that lies in the train as a whole. The message points
// into train when it was one datagram or lay there as a whole (train has then been written to), else into a buffer that is valid until Release. It may be an old one: Accept tells, once the caller has opened it where
// it was sealed.
func (r *Reassembler) Add(h *Header, train []byte, size int, mark uint8, now int64) (m *Message, used int) {
	size = min(size, len(train))
	if r.seq.Seen(h.Seq) {
		if h.Index == 0 {
			r.seq.again()
		}
		r.cfg.Drops.Add(again(h), 1)
		return nil, size
	}
	if h.Last == 0 {
		r.m = Message{Header: *h, Data: train[HeaderLen:size:size], Mark: mark}
		return &r.m, size
	}
	if h.Index == 0 && len(train) > size && (len(r.open) == 0 || r.find(h, now) == nil) {
		if used := r.inPlace(h, train, size); used > 0 {
			r.m.Mark = mark
			return &r.m, used
		}
	}
	return r.collect(h, train[HeaderLen:size], mark, now), size
}

// again is why what has come already is dropped.
func again(h *Header) frame.Drop {
	if h.Sealed {
		return frame.DropReplayed
	}
	return frame.DropDuplicate
}

// inPlace closes the gaps between the fragments of a message all of which lie in the train, one behind the other, and returns how long they are together; 0 when they do not.
func (r *Reassembler) inPlace(h *Header, train []byte, size int) (used int) {
	last, total := int(h.Last), int(h.Total)
	used = total + (last+1)*HeaderLen
	if used > len(train) || used <= last*size {
		return 0
	}
	// The last datagram of a train is what is left; one within it is as long as the others.
	if used != len(train) && used != (last+1)*size {
		return 0
	}
	for i := 1; i <= last; i++ {
		if !sameMessage(train, train[i*size:], i) {
			return 0
		}
	}
	step := size - HeaderLen
	msg := train[HeaderLen : HeaderLen+total : HeaderLen+total]
	for i := 1; i <= last; i++ {
		copy(msg[i*step:], train[i*size+HeaderLen:min((i+1)*size, used)])
	}
	r.m = Message{Header: *h, Data: msg}
	return used
}

// collect adds a fragment to its message, which it returns when that is whole.
func (r *Reassembler) collect(h *Header, part []byte, mark uint8, now int64) *Message {
	c := r.find(h, now)
	if c == nil {
		c = r.begin(h, mark, now)
	}
	if c.head.Total != h.Total || c.head.Last != h.Last || c.head.step != h.step || c.head.Sealed != h.Sealed || c.head.Channel != h.Channel {
		r.cfg.Drops.Add(frame.DropFragMismatch, 1)
		return nil
	}
	word, bit := h.Index/64, uint64(1)<<(h.Index%64)
	if c.have[word]&bit != 0 {
		r.cfg.Drops.Add(again(h), 1)
		return nil
	}
	c.have[word] |= bit
	copy(c.buf[int(h.Index)*h.step:], part)
	c.got++
	c.mixed = c.mixed || int(h.Index) < c.high
	c.high = max(c.high, int(h.Index))
	if mark == ecnCE {
		c.mark = ecnCE
	}
	if c.got <= int(h.Last) {
		return nil
	}
	if c.mixed {
		r.seq.reordered++
	}
	r.m = Message{Header: c.head, Data: c.buf[:h.Total:h.Total], Mark: c.mark}
	r.lent = append(r.lent, c.buf)
	r.nLent += len(c.buf)
	c.buf = nil
	r.remove(c)
	return &r.m
}

// find is the context of a message, nil when there is none that is not too old.
func (r *Reassembler) find(h *Header, now int64) *context {
	for i := len(r.open) - 1; i >= 0; i-- { // the newest is the likeliest
		if c := &r.open[i]; c.head.Seq == h.Seq {
			if now-c.since > int64(r.cfg.Age) {
				break
			}
			return c
		}
	}
	return nil
}

// begin makes room for a message and a context of it.
func (r *Reassembler) begin(h *Header, mark uint8, now int64) *context {
	r.Expire(now)
	buf := r.cfg.Pool.get(int(h.Total))
	for len(r.open) == r.cfg.Contexts || len(r.open) > 0 && r.bytes+len(buf) > r.cfg.Bytes {
		r.giveUp(&r.open[0], frame.DropFragLimit)
	}
	r.bytes += len(buf)
	r.open = append(r.open, context{head: *h, buf: buf, since: now, mark: mark})
	return &r.open[len(r.open)-1]
}

// Expire gives up what has been incomplete for too long at the time now. Add does so when it needs to; a caller whose peer may have fallen silent calls it to have the memory back.
func (r *Reassembler) Expire(now int64) {
	for len(r.open) > 0 && now-r.open[0].since > int64(r.cfg.Age) {
		r.giveUp(&r.open[0], frame.DropFragTimeout)
	}
}

func (r *Reassembler) giveUp(c *context, why frame.Drop) {
	r.cfg.Drops.Add(why, 1)
	r.broken++
	r.remove(c)
}

// remove takes a context out, and gives back its buffer unless somebody else has it now.
func (r *Reassembler) remove(c *context) {
	if c.buf != nil {
		r.cfg.Pool.put(c.buf)
	}
	i := 0
	for &r.open[i] != c {
		i++
	}
	r.bytes -= class(int(c.head.Total))
	copy(r.open[i:], r.open[i+1:])
	r.open[len(r.open)-1] = context{}
	r.open = r.open[:len(r.open)-1]
}

// Accept takes note of a message that Add has returned and that the caller believes. It is false for one that has come before, which is to be dropped (frame.DropDuplicate, counted here); where messages are sealed, what opens them tells first.
func (r *Reassembler) Accept(seq uint64) (fresh bool) {
	if r.seq.Accept(seq) {
		return true
	}
	r.cfg.Drops.Add(frame.DropDuplicate, 1)
	return false
}

// Lent is how many bytes of buffers are lent until Release.
func (r *Reassembler) Lent() int { return r.nLent }

// Release takes back the messages that Add has returned: nobody may look at them any more.
func (r *Reassembler) Release() {
	for i, b := range r.lent {
		r.cfg.Pool.put(b)
		r.lent[i] = nil
	}
	r.lent, r.nLent = r.lent[:0], 0
}

// Held is how many messages are incomplete, and the bytes of their buffers.
func (r *Reassembler) Held() (messages, bytes int) { return len(r.open), r.bytes }

// Stats reads the counters.
func (r *Reassembler) Stats() Stats {
	s := &r.seq
	return Stats{Received: s.received, Lost: s.lost(), Reordered: s.reordered, Duplicated: s.duplicated, Restarts: s.restarts, Broken: r.broken}
}

// Pool keeps buffers for the Reassemblers of one goroutine. The zero value is ready.
type Pool struct {
	free [len(classes)][][]byte
}

// classes are the lengths of buffers in bytes. A short message should not take as much memory as the longest: what a sender can have us hold is counted in them.
var classes = [...]int{4 << 10, 16 << 10, MaxMessage + SealRoom}

// maxFree is how many buffers of one class a Pool keeps.
const maxFree = 64

// class is the length of the buffer of a message of n bytes.
func class(n int) int {
	for _, c := range classes {
		if n <= c {
			return c
		}
	}
	return n
}

func (p *Pool) get(n int) []byte {
	for i, c := range classes {
		if n > c {
			continue
		}
		if k := len(p.free[i]) - 1; k >= 0 {
			b := p.free[i][k]
			p.free[i][k] = nil
			p.free[i] = p.free[i][:k]
			return b
		}
		return make([]byte, c)
	}
	return make([]byte, n)
}

func (p *Pool) put(b []byte) {
	for i, c := range classes {
		if len(b) == c && len(p.free[i]) < maxFree {
			p.free[i] = append(p.free[i], b)
		}
	}
}
