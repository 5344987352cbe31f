package superframe

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// message is the datagrams of one of n bytes in parts of step.
func message(seq uint64, n, step int) (ds [][]byte, msg []byte) {
	msg = make([]byte, n)
	PutRecord(msg, 9, n-RecordLen)
	for i := RecordLen; i < n; i++ {
		msg[i] = byte(i*11 + i>>8 + int(seq))
	}
	var c Cutter
	for c.Begin(Header{Channel: 42, Seq: seq, Total: uint32(n)}, 0, msg, step); c.More(); {
		d := make([]byte, HeaderLen)
		payload := c.Next(d)
		ds = append(ds, append(d, payload...))
	}
	return ds, msg
}

// bench is a Reassembler and what came out of it.
type bench struct {
	t     testing.TB
	r     *Reassembler
	drops frame.DropCounters
	now   int64
	got   [][]byte
}

func newBench(t testing.TB, cfg Config) *bench {
	b := &bench{t: t}
	cfg.Drops = &b.drops
	b.r = NewReassembler(cfg)
	return b
}

func (b *bench) add(ds ...[]byte) {
	for _, d := range ds {
		feed(b.t, b.r, bytes.Clone(d), len(d), b.now, func(m *Message) { b.got = append(b.got, bytes.Clone(m.Data)) })
	}
}

// expect compares what came out since the last time, and what was dropped in all.
func (b *bench) expect(name string, drops map[frame.Drop]uint64, msgs ...[]byte) {
	b.t.Helper()
	if !slices.EqualFunc(b.got, msgs, bytes.Equal) {
		b.t.Errorf("%s: %d messages, want %d, or others", name, len(b.got), len(msgs))
	}
	b.got = nil
	for d := range frame.NumDrops {
		if got, want := b.drops.Get(frame.Drop(d)), drops[frame.Drop(d)]; got != want {
			b.t.Errorf("%s: %d drops for %v, want %d", name, got, frame.Drop(d), want)
		}
	}
	b.r.Release()
	if n, size := b.r.Held(); n > b.r.cfg.Contexts || size > b.r.cfg.Bytes || b.r.Lent() != 0 {
		b.t.Errorf("%s: holds %d messages, %d bytes", name, n, size)
	}
}

type drops = map[frame.Drop]uint64

func TestReassemblerOrder(t *testing.T) {
	b := newBench(t, Config{})
	d1, m1 := message(100, 5000, 1000)
	b.add(d1[3], d1[0], d1[4], d1[2])
	b.expect("incomplete", nil)
	b.add(d1[1])
	b.expect("complete", nil, m1)
	d2, m2 := message(101, 2500, 1000)
	d3, m3 := message(102, 30, 1000)
	b.add(d2[0], d3[0], d2[2], d2[1])
	b.expect("interleaved", nil, m3, m2)
	if s := b.r.Stats(); s.Received != 3 || s.Reordered != 2 || s.Lost != 0 || s.Duplicated != 0 {
		t.Errorf("%+v", s)
	}
	b.add(d3[0])
	b.expect("a second time", drops{frame.DropDuplicate: 1})
	b.add(d2...)
	b.expect("a second time, of three parts", drops{frame.DropDuplicate: 4})
	d4, m4 := message(103, 2000, 1000)
	b.add(d4[0], d4[0], d4[1], d4[1])
	b.expect("each part twice", drops{frame.DropDuplicate: 6}, m4)
	if s := b.r.Stats(); s.Received != 4 || s.Duplicated != 2 || s.Broken != 0 {
		t.Errorf("%+v", s)
	}
}

// A message that lies in a train is closed up there; one that does not is collected.
func TestReassemblerTrains(t *testing.T) {
	cat := func(ds ...[]byte) []byte { return bytes.Join(ds, nil) }
	for _, c := range []struct {
		name    string
		n, step int
	}{{"short last", 5050, 1000}, {"full last", 5000, 1000}, {"two", 1001, 1000}, {"one byte each", 200, 1}, {"most", 25600, 100}} {
		ds, m := message(7, c.n, c.step)
		size := len(ds[0])
		b := newBench(t, Config{})
		train := cat(ds...)
		whole := 0
		feed(t, b.r, train, size, 0, func(m *Message) { whole++; b.got = append(b.got, m.Data) })
		if whole != 1 || &b.got[0][0] != &train[HeaderLen] {
			t.Errorf("%s: copied elsewhere", c.name)
		}
		b.expect(c.name, nil, m)

		b = newBench(t, Config{})
		more, m2 := message(8, c.step*3/2+RecordLen, c.step)
		if len(ds[len(ds)-1]) == size { // another message may follow in the train
			feed(t, b.r, cat(append(ds, more...)...), size, 0, func(m *Message) { b.got = append(b.got, m.Data) })
			b.expect(c.name+", followed", nil, m, m2)
		}
		b = newBench(t, Config{})
		feed(t, b.r, cat(ds[:len(ds)/2]...), size, 0, func(*Message) { t.Errorf("%s: half is whole", c.name) })
		feed(t, b.r, cat(ds[len(ds)/2:]...), size, 0, func(m *Message) { b.got = append(b.got, m.Data) })
		b.expect(c.name+", in two", nil, m)
	}
	// One fragment of another message in between.
	b := newBench(t, Config{})
	x, mx := message(1, 3000, 1000)
	y, my := message(2, 3000, 1000)
	train := cat(x[0], x[1], y[0], x[2], y[1], y[2])
	feed(t, b.r, train, len(x[0]), 0, func(m *Message) { b.got = append(b.got, m.Data) })
	b.expect("interleaved", nil, mx, my)
	// Part of it has come before.
	x, mx = message(3, 3000, 1000)
	b.add(x[1])
	feed(t, b.r, cat(x...), len(x[0]), 0, func(m *Message) { b.got = append(b.got, m.Data) })
	b.expect("a part before", drops{frame.DropDuplicate: 1}, mx)
	if n, _ := b.r.Held(); n != 0 {
		t.Errorf("%d messages are held", n)
	}
}

// Fragments that contradict each other.
func TestReassemblerMismatch(t *testing.T) {
	b := newBench(t, Config{})
	ds, m := message(5, 3000, 1000)
	other, _ := message(5, 2999, 1000)
	b.add(ds[0], other[1], other[2])
	b.expect("another total", drops{frame.DropFragMismatch: 2})
	other, _ = message(5, 3000, 900)
	b.add(other[1], other[3])
	b.expect("other parts", drops{frame.DropFragMismatch: 4})
	sealed := bytes.Clone(ds[1])
	sealed[1] = flagSealed
	b.add(sealed)
	b.expect("sealed", drops{frame.DropFragMismatch: 5})
	b.add(ds[1:]...)
	b.expect("the rest", drops{frame.DropFragMismatch: 5}, m)
}

func TestReassemblerBounds(t *testing.T) {
	// Number.
	b := newBench(t, Config{Contexts: 3})
	var all [][][]byte
	var msgs [][]byte
	for seq := range uint64(5) {
		ds, m := message(seq, 2000, 1000)
		all, msgs = append(all, ds), append(msgs, m)
		b.add(ds[0])
	}
	b.expect("five of three", drops{frame.DropFragLimit: 2})
	for _, ds := range all[2:] {
		b.add(ds[1])
	}
	b.expect("the newest three", drops{frame.DropFragLimit: 2}, msgs[2:]...)
	if s := b.r.Stats(); s.Broken != 2 || s.Received != 3 {
		t.Errorf("%+v", s)
	}
	// Bytes: buffers of the largest class.
	b = newBench(t, Config{Bytes: 3 * (MaxMessage + SealRoom)})
	for seq := range uint64(10) {
		ds, _ := message(seq, 60000, 1000)
		b.add(ds[0])
	}
	if n, size := b.r.Held(); n != 3 || size > b.r.cfg.Bytes {
		t.Errorf("%d messages, %d bytes", n, size)
	}
	b.expect("ten of three", drops{frame.DropFragLimit: 7})
	// Time, at a fragment of its own and at one of another message.
	b = newBench(t, Config{Age: time.Second})
	x, mx := message(1, 2000, 1000)
	b.add(x[0])
	b.now = int64(time.Second)
	b.add(x[1])
	b.expect("in time", nil, mx)
	x, _ = message(2, 2000, 1000)
	y, _ := message(3, 2000, 1000)
	b.add(x[0], y[0])
	b.now += int64(time.Second) + 1
	b.add(x[1])
	b.expect("too late", drops{frame.DropFragTimeout: 2})
	b.now += int64(time.Second) + 1
	b.r.Expire(b.now)
	b.expect("nothing more", drops{frame.DropFragTimeout: 3})
	if n, size := b.r.Held(); n != 0 || size != 0 {
		t.Errorf("%d messages, %d bytes", n, size)
	}
}

func TestSequence(t *testing.T) {
	for _, c := range []struct {
		name  string
		seqs  func(yield func(uint64) bool)
		fresh int // -1: all
		want  Stats
	}{
		{"in order", from(1000, 1100), -1, Stats{Received: 100}},
		{"over the end of the numbers", from(1<<64-50, 50), -1, Stats{Received: 100}},
		{"gaps", seqs(5, 6, 9, 10, 12), -1, Stats{Received: 5, Lost: 3}},
		{"a neighbour first", seqs(5, 7, 6, 8), -1, Stats{Received: 4}},
		{"three first", seqs(5, 7, 8, 9, 6, 10), -1, Stats{Received: 6, Reordered: 1}},
		{"twice", seqs(5, 5, 6, 5, 6), 2, Stats{Received: 2, Duplicated: 3}},
		{"from before the first", seqs(100, 98, 101), -1, Stats{Received: 2}},
		{"far ahead within reason", seqs(5, 5+2000), -1, Stats{Received: 2, Lost: 1999}},
		{"a little beyond the window", seqs(5, 5+Window, 6), -1, Stats{Received: 3, Lost: Window - 2, Reordered: 1}},
		{"anew, far away", concat(from(1000, 1100), from(1<<40, 1<<40+100)), -1, Stats{Received: 200, Restarts: 1}},
		{"anew, far back", concat(from(1<<40, 1<<40+100), from(1000, 1100)), -1, Stats{Received: 200, Restarts: 1}},
		{"anew with the same numbers", concat(from(0, 200), from(0, 200)), 200 + 200 - streak, Stats{Received: 200 + 200 - streak, Duplicated: streak, Restarts: 1}},
		{"anew a little behind", concat(from(0, 3000), from(0, 200)), -1, Stats{Received: 3200, Reordered: streak, Restarts: 1}},
	} {
		var s Sequence
		n, fresh := 0, 0
		for seq := range c.seqs {
			n++
			if seen := s.Seen(seq); s.Accept(seq) {
				fresh++
				if seen {
					t.Errorf("%s: %d has been seen and is fresh", c.name, seq)
				}
			}
			if !s.Seen(seq) && s.old < streak && int64(s.top-seq) < Window {
				t.Errorf("%s: %d is not seen", c.name, seq)
			}
		}
		if c.fresh < 0 {
			c.fresh = n
		}
		got := (&Reassembler{seq: s}).Stats()
		if fresh != c.fresh || got != c.want {
			t.Errorf("%s: %d of %d fresh, %+v; want %d, %+v", c.name, fresh, n, got, c.fresh, c.want)
		}
	}
}

func from(a, b uint64) func(func(uint64) bool) {
	return func(yield func(uint64) bool) {
		for i := a; i != b && yield(i); i++ {
		}
	}
}

func seqs(xs ...uint64) func(func(uint64) bool) { return slices.Values(xs) }

func concat(its ...func(func(uint64) bool)) func(func(uint64) bool) {
	return func(yield func(uint64) bool) {
		for _, it := range its {
			for x := range it {
				if !yield(x) {
					return
				}
			}
		}
	}
}

// A sender that has started anew while a message was incomplete, with numbers it has used before, is heard again soon, also with messages of many fragments.
func TestRestartIsHeard(t *testing.T) {
	for _, n := range []int{100, 9000} {
		b := newBench(t, Config{})
		for seq := range uint64(300) {
			ds, _ := message(seq, n, 1000)
			b.add(ds...)
		}
		b.got = nil
		for seq := range uint64(300) {
			ds, _ := message(seq, n, 1000)
			b.add(ds...)
			b.r.Release()
		}
		if len(b.got) != 300-streak {
			t.Errorf("%d bytes: %d of 300 messages after a restart", n, len(b.got))
		}
	}
}

// Whatever a path does to datagrams, what comes out is what went in, or nothing, and each message once.
func TestReassemblerAgainstAPath(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 300 {
		var lost, dup float64
		if round%3 > 0 {
			lost, dup = rng.Float64()*0.1, rng.Float64()*0.1
		}
		depth := rng.IntN(40)
		var counts frame.DropCounters
		r := NewReassembler(Config{Drops: &counts})
		seq := rng.Uint64()
		var fs []frame.Frame
		for range 5 {
			fs = append(fs, randomFrames(rng)...)
		}
		ds, messages := pack(t, fs, 1452, &seq)
		var path [][]byte
		for _, d := range ds {
			if rng.Float64() < lost {
				continue
			}
			path = append(path, d)
			if rng.Float64() < dup {
				path = append(path, d)
			}
		}
		for i := range path {
			j := min(i+rng.IntN(depth+1), len(path)-1)
			path[i], path[j] = path[j], path[i]
		}
		var got []frame.Frame
		ts, sizes := trains(rng, path)
		for i, train := range ts {
			feed(t, r, train, sizes[i], int64(i), func(m *Message) { got = append(got, unpack(t, m.Data)...) })
			r.Release()
		}
		if len(path) == len(ds) && depth == 0 && lost == 0 && dup == 0 && len(got) != len(fs) {
			t.Fatalf("%d of %d frames on a path without faults", len(got), len(fs))
		}
		left := slices.Clone(fs)
		for _, g := range got {
			i := slices.IndexFunc(left, func(f frame.Frame) bool { return same(f, g) })
			if i < 0 {
				t.Fatalf("a frame of %d bytes came out that did not go in, or twice", len(g.Data))
			}
			left = slices.Delete(left, i, i+1)
		}
		s := r.Stats()
		if int(s.Received+s.Lost) > messages || s.Restarts != 0 {
			t.Fatalf("%+v of %d messages", s, messages)
		}
	}
}

// Random bytes, and fragments bent at random, never do harm.
func FuzzReassembler(f *testing.F) {
	ds, _ := message(1, 3000, 1000)
	es, _ := message(2, 2000, 1000)
	f.Add(bytes.Join(ds, nil), uint16(1020), uint16(3))
	f.Add(bytes.Join([][]byte{ds[0], es[0], ds[2], es[1], ds[1]}, nil), uint16(1020), uint16(1))
	f.Add(bytes.Join([][]byte{ds[0], ds[0], ds[1]}, nil), uint16(1020), uint16(2))
	f.Fuzz(func(t *testing.T, b []byte, size, perTrain uint16) {
		var counts frame.DropCounters
		const contexts = 4
		r := NewReassembler(Config{Contexts: contexts, Drops: &counts})
		n := int(size)%2000 + 1
		now := int64(0)
		for len(b) > 0 {
			train := bytes.Clone(b[:min(len(b), n*(int(perTrain)%64+1))])
			b = b[len(train):]
			for len(train) > 0 {
				now += int64(10 * time.Millisecond)
				h, _, ok := Parse(train[:min(n, len(train))])
				if !ok {
					train = train[min(n, len(train)):]
					continue
				}
				m, used := r.Add(&h, train, n, 3, now)
				if used < 1 || used > len(train) {
					t.Fatalf("%d of %d bytes used", used, len(train))
				}
				if m != nil {
					if len(m.Data) != int(h.Total) || len(m.Data) > MaxMessage+SealRoom || m.Mark != 3 {
						t.Fatalf("a message of %d bytes, mark %d, from %+v", len(m.Data), m.Mark, h)
					}
					for rs, ok := ParseRecords(m.Data); ok && rs.Next(); {
						rs.Frame()
					}
					r.Accept(m.Header.Seq)
				}
				train = train[used:]
			}
			if k, size := r.Held(); k > contexts || size > r.cfg.Bytes {
				t.Fatalf("%d messages, %d bytes held", k, size)
			}
			r.Release()
		}
		r.Expire(now + int64(time.Hour))
		if k, size := r.Held(); k != 0 || size != 0 {
			t.Fatalf("%d messages, %d bytes held at the end", k, size)
		}
	})
}

// What is packed comes out again; the fuzzer chooses sizes, order and losses.
func FuzzPackReassemble(f *testing.F) {
	f.Add([]byte{1, 200, 30, 4}, uint16(1452), uint64(0))
	f.Add([]byte{255, 255, 0, 0, 9, 9}, uint16(300), uint64(7))
	f.Fuzz(func(t *testing.T, shape []byte, room uint16, faults uint64) {
		var fs []frame.Frame
		for i := 0; i+1 < len(shape) && i < 40; i += 2 {
			n := int(binary.BigEndian.Uint16(shape[i:]))
			if n%3 == 0 {
				fs = append(fs, tcpFrame(min(n, 65000), 100+n%1400, shape[i]))
			} else {
				fs = append(fs, plain(wire.EthernetLen+n, shape[i]))
			}
		}
		seq := faults
		ds, _ := pack(t, fs, max(int(room)%9000, MinRoom), &seq)
		rng := rand.New(rand.NewPCG(faults, 1))
		perfect := faults%4 == 0
		if !perfect {
			for i := range ds {
				j := rng.IntN(len(ds))
				ds[i], ds[j] = ds[j], ds[i]
			}
			ds = ds[:len(ds)-len(ds)/8]
		}
		r := NewReassembler(Config{})
		var got []frame.Frame
		ts, sizes := trains(rng, ds)
		for i, train := range ts {
			feed(t, r, train, sizes[i], 0, func(m *Message) { got = append(got, unpack(t, m.Data)...) })
			r.Release()
		}
		if perfect && !slices.EqualFunc(fs, got, same) {
			t.Fatalf("%d frames became %d, or others", len(fs), len(got))
		}
		for _, g := range got {
			if !slices.ContainsFunc(fs, func(f frame.Frame) bool { return same(f, g) }) {
				t.Fatal("a frame came out that did not go in")
			}
		}
	})
}

func TestReassemblerAllocates(t *testing.T) {
	fs := []frame.Frame{tcpFrame(60000, 1400, 1), plain(60, 1), tcpFrame(9000, 1400, 2)}
	seq := uint64(1)
	ds, _ := pack(t, fs, 1452, &seq)
	r := NewReassembler(Config{})
	train := bytes.Join(ds[:45], nil)
	work := make([]byte, len(train))
	next := uint64(1)
	round := func() {
		next++ // the numbers are written anew, so that nothing is a duplicate
		copy(work, train)
		for i := 0; i < len(work); i += 1472 {
			binary.BigEndian.PutUint64(work[i+8:], next<<8)
		}
		add(r, work, 1472)
		for k, d := range ds {
			binary.BigEndian.PutUint64(d[8:], next<<8+1+binary.BigEndian.Uint64(d[8:])&0xf)
			if k != 3 { // one is lost
				add(r, d, len(d))
			}
		}
		r.Release()
	}
	round()
	for range 40 {
		round() // until the pool has what it takes
	}
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func add(r *Reassembler, train []byte, size int) {
	for len(train) > 0 {
		h, _, ok := Parse(train[:min(size, len(train))])
		if !ok {
			return
		}
		m, used := r.Add(&h, train, size, 0, 0)
		if m != nil {
			r.Accept(m.Header.Seq)
		}
		train = train[used:]
	}
}

// BenchmarkReassemble is one superframe of 60 kB for a path of 1500: closed up in its train, and collected from its datagrams.
func BenchmarkReassemble(b *testing.B) {
	f := tcpFrame(60000, 1400, 1)
	seq := uint64(0)
	ds, _ := pack(b, []frame.Frame{f}, 1452, &seq)
	train := bytes.Join(ds, nil)
	for _, c := range []struct {
		name string
		size int
	}{{"train", len(ds[0])}, {"datagrams", 0}} {
		b.Run(c.name, func(b *testing.B) {
			r := NewReassembler(Config{})
			work := make([]byte, len(train))
			b.SetBytes(int64(len(f.Data)))
			b.ReportAllocs()
			copy(work, train)
			for n := uint64(1); b.Loop(); n++ {
				for i := 0; i < len(work); i += len(ds[0]) {
					copy(work[i:], train[i:i+HeaderLen]) // which closing up has overwritten
					binary.BigEndian.PutUint64(work[i+8:], n)
				}
				if c.size > 0 {
					add(r, work, c.size)
				} else {
					for rest := work; len(rest) > 0; {
						d := rest[:min(len(ds[0]), len(rest))]
						add(r, d, len(d))
						rest = rest[len(d):]
					}
				}
				r.Release()
			}
			if s := r.Stats(); s.Received == 0 || s.Lost != 0 {
				b.Fatalf("%+v", s)
			}
		})
	}
}

// BenchmarkPack is the same superframe on its way out.
func BenchmarkPack(b *testing.B) {
	fs := []frame.Frame{tcpFrame(60000, 1400, 1)}
	head := make([]byte, 2000)
	b.SetBytes(int64(len(fs[0].Data)))
	b.ReportAllocs()
	for b.Loop() {
		var p Packer
		var c Cutter
		for p.Reset(fs, 1452); p.Next(); {
			for c.Begin(Header{Total: uint32(p.Len())}, p.Front(), p.Body(), 1452); c.More(); {
				if c.First() {
					p.Put(head[HeaderLen:])
				}
				c.Next(head)
			}
		}
	}
}
