package testbed

import (
	"encoding/binary"
	"math"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
)

type catcher struct {
	mu   sync.Mutex
	got  []uint32
	room int
}

func (c *catcher) Transmit(fs []frame.Frame) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range fs {
		if len(c.got) == c.room {
			return i
		}
		c.got = append(c.got, binary.BigEndian.Uint32(fs[i].Data))
	}
	return len(fs)
}
func (c *catcher) Forward(fs []frame.Frame) { c.Transmit(fs) }
func (*catcher) Caps() frame.Caps           { return frame.CapTSO4 }

func TestFaulty(t *testing.T) {
	const n = 20000
	f := Faults{Loss: 0.01, Dup: 0.02, Reorder: 0.03, Seed: 5}
	run := func(send func([]frame.Frame)) {
		buf := make([]byte, 32*4)
		for i := 0; i < n; i += 32 {
			fs := make([]frame.Frame, 32)
			for k := range fs {
				binary.BigEndian.PutUint32(buf[4*k:], uint32(i+k))
				fs[k].Data = buf[4*k : 4*k+4]
			}
			send(fs)
			clear(buf) // lent
		}
	}
	check := func(c *catcher, cnt FaultCount) {
		t.Helper()
		times := map[uint32]int{}
		late := 0
		high := -1
		for _, v := range c.got {
			times[v]++
			if int(v) < high {
				late++
			}
			high = max(high, int(v))
		}
		var lost, dup int
		for i := range uint32(n) {
			switch times[i] {
			case 0:
				lost++
			case 2:
				dup++
			}
		}
		if lost != int(cnt.Lost) || dup != int(cnt.Duplicated) || cnt.Passed+cnt.Lost+cnt.Duplicated+cnt.Reordered != n {
			t.Errorf("lost %d, doubled %d; counted %+v", lost, dup, cnt)
		}
		for name, got := range map[string][2]float64{"loss": {float64(lost), f.Loss * n}, "dup": {float64(dup), f.Dup * n}, "reorder": {float64(late), f.Reorder * n}} {
			if math.Abs(got[0]-got[1]) > got[1]/2 {
				t.Errorf("%s: %v of %d, want about %v", name, got[0], n, got[1])
			}
		}
	}
	c := &catcher{room: -1}
	p := NewFaultyPort(c, f)
	run(func(fs []frame.Frame) {
		if got := p.Transmit(fs); got != len(fs) {
			t.Fatalf("accepted %d of %d", got, len(fs))
		}
	})
	p.Close()
	check(c, p.Count())
	if p.Caps() != frame.CapTSO4 {
		t.Error("Caps")
	}
	c2 := &catcher{room: -1}
	s := NewFaultySink(c2, f)
	run(s.Forward)
	s.Close()
	check(c2, s.Count())
	if p.Count() != s.Count() {
		t.Errorf("equal seeds, but %+v and %+v", p.Count(), s.Count())
	}
}

func TestFaultyLastFrameIsLetGo(t *testing.T) {
	c := &catcher{room: -1}
	p := NewFaultyPort(c, Faults{Reorder: 1})
	p.Transmit([]frame.Frame{{Data: []byte{0, 0, 0, 1}}})
	Eventually(t, time.Second, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return len(c.got) == 1 })
}

func TestFaultyPassesRefusalsOn(t *testing.T) {
	p := NewFaultyPort(&catcher{room: 1}, Faults{})
	if n := p.Transmit([]frame.Frame{{Data: make([]byte, 4)}, {Data: make([]byte, 4)}, {Data: make([]byte, 4)}}); n != 1 {
		t.Errorf("accepted %d, want 1", n)
	}
}
