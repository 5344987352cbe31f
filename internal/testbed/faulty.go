package testbed

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"patchbay/frame"
)

// faultyHold is how long a frame held back for reordering waits for others to overtake it, at most.
const faultyHold = 3 * time.Millisecond

// Faults says what goes wrong on a faulty line. Probabilities are per frame, between 0 and 1; a superframe is one frame.
type Faults struct {
	Loss    float64
	Dup     float64
	Reorder float64 // held back until 1 to Depth later frames have overtaken it
	Depth   int     // 0 means 3
	Seed    uint64  // equal seeds and equal traffic make equal faults
}

// FaultCount is what a faulty line has done.
type FaultCount struct{ Passed, Lost, Duplicated, Reordered uint64 }

// EgressPort is what vswitch.Port is: this package does not import it.
type EgressPort interface {
	Transmit(fs []frame.Frame) int
	Caps() frame.Caps
}

// FaultyPort is a port with a faulty line before it: what the switch sends to it suffers. It is safe for concurrent use.
type FaultyPort struct {
	line
	port EgressPort
}

// NewFaultyPort puts faults before p. Close it before p.
func NewFaultyPort(p EgressPort, f Faults) *FaultyPort {
	fp := &FaultyPort{port: p}
	fp.line.init(f, func(fs []frame.Frame) int { return p.Transmit(fs) })
	return fp
}

// Transmit is the inner port's, after the faults. A lost frame counts as accepted, as it does on a wire.
func (p *FaultyPort) Transmit(fs []frame.Frame) int { return max(len(fs)-p.line.pass(fs), 0) }

// Caps is the inner port's.
func (p *FaultyPort) Caps() frame.Caps { return p.port.Caps() }

// FaultySink is a sink with a faulty line before it: what an edge has received suffers. It is safe for concurrent use, which the inner sink
// sees as one caller at a time.
type FaultySink struct{ line }

// NewFaultySink puts faults before s.
func NewFaultySink(s frame.Sink, f Faults) *FaultySink {
	fs := &FaultySink{}
	fs.line.init(f, func(x []frame.Frame) int { s.Forward(x); return len(x) })
	return fs
}

// Forward is the inner sink's, after the faults.
func (s *FaultySink) Forward(fs []frame.Frame) { s.line.pass(fs) }

// line loses, doubles and holds back. Frames are lent, so what it holds back are copies.
type line struct {
	mu     sync.Mutex
	f      Faults
	rng    *rand.Rand
	out    func([]frame.Frame) int
	count  FaultCount
	held   []heldFrame
	batch  []frame.Frame
	timer  *time.Timer
	closed bool
}

type heldFrame struct {
	f    frame.Frame
	left int // frames that still are to overtake it
}

func (l *line) init(f Faults, out func([]frame.Frame) int) {
	if f.Depth <= 0 {
		f.Depth = 3
	}
	l.f, l.out = f, out
	l.rng = rand.New(rand.NewPCG(f.Seed, 0x6661756c7479))
	l.timer = time.AfterFunc(time.Hour, l.release)
	l.timer.Stop()
}

// pass puts fs through and returns how many frames the far end refused.
func (l *line) pass(fs []frame.Frame) (refused int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return len(fs) - l.out(fs)
	}
	l.batch = l.batch[:0]
	for i := range fs {
		switch x := l.rng.Float64(); {
		case x < l.f.Loss:
			l.count.Lost++
			continue
		case x < l.f.Loss+l.f.Reorder:
			l.count.Reordered++
			c := fs[i]
			c.Data = slices.Clone(c.Data)
			l.held = append(l.held, heldFrame{c, 1 + l.rng.IntN(l.f.Depth)})
			continue
		case x < l.f.Loss+l.f.Reorder+l.f.Dup:
			l.count.Duplicated++
			l.batch = append(l.batch, fs[i], fs[i])
		default:
			l.count.Passed++
			l.batch = append(l.batch, fs[i])
		}
		l.overtake()
	}
	if len(l.held) > 0 {
		l.timer.Reset(faultyHold)
	}
	return l.flush()
}

// overtake is called for each frame that goes by those held back.
func (l *line) overtake() {
	kept := l.held[:0]
	for _, h := range l.held {
		if h.left--; h.left > 0 {
			kept = append(kept, h)
		} else {
			l.batch = append(l.batch, h.f)
		}
	}
	clear(l.held[len(kept):])
	l.held = kept
}

func (l *line) flush() (refused int) {
	if len(l.batch) > 0 {
		refused = len(l.batch) - l.out(l.batch)
	}
	clear(l.batch)
	return refused
}

// release lets go what nothing has overtaken in time.
func (l *line) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.batch = l.batch[:0]
	for _, h := range l.held {
		l.batch = append(l.batch, h.f)
	}
	l.held = l.held[:0]
	l.flush()
}

// Count is what the line has done so far.
func (l *line) Count() FaultCount {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// Close mends the line: what was held back is let go, and everything passes from now on. Idempotent.
func (l *line) Close() {
	l.timer.Stop()
	l.release()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}
