package secure

import (
	"bytes"
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"patchbay/frame"
)

// pair is two links with one session between them and nothing running: the data path alone.
func pair(t testing.TB) (a, b *Link) {
	t.Helper()
	ca, cb := pskConfigs(t)
	ca.Send, cb.Send = func([]byte) error { return nil }, func([]byte) error { return nil }
	var raw [keysLen]byte
	if _, err := rand.Read(raw[:]); err != nil {
		t.Fatal(err)
	}
	k, _ := parseKeys(raw[:])
	make := func(cfg LinkConfig, initiator bool) *Link {
		l, err := NewLink(cfg)
		if err != nil {
			t.Fatal(err)
		}
		s, err := newSession(k, initiator, time.Now(), l.cfg.RekeyBytes, l.wake)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.add(s); err != nil {
			t.Fatal(err)
		}
		l.confirm(s)
		return l
	}
	return make(ca, true), make(cb, false)
}

// TestWindow holds the window against a set that forgets nothing.
func TestWindow(t *testing.T) {
	for seed := range uint64(200) {
		rnd := mrand.New(mrand.NewPCG(seed, 1))
		var w window
		seen := map[uint64]bool{}
		top, any := uint64(0), false
		at := rnd.Uint64N(10000)
		for range 3000 {
			var seq uint64
			switch rnd.IntN(10) {
			case 0:
				at += rnd.Uint64N(20000) // a jump, also over the whole ring
				seq = at
			case 1:
				seq = rnd.Uint64N(at + 1)
			case 2, 3, 4:
				seq = at - min(at, rnd.Uint64N(WindowSize+200))
			default:
				at++
				seq = at
			}
			want := !seen[seq] && (!any || seq > top || top-seq < WindowSize)
			if got := w.fresh(seq); got != want {
				t.Fatalf("seed %d: fresh(%d) = %v with the highest %d", seed, seq, got, top)
			}
			if rnd.IntN(8) == 0 {
				continue // a forgery: looked at, never marked
			}
			if got := w.mark(seq); got != want {
				t.Fatalf("seed %d: mark(%d) = %v with the highest %d", seed, seq, got, top)
			}
			if want {
				seen[seq], top, any = true, max(top, seq), true
			}
		}
	}
	var w window
	if !w.mark(maxMessages-1) || w.mark(maxMessages-1) || w.mark(0) {
		t.Error("at the end of the numbers")
	}
}

// TestForgedDoesNotMoveWindow: a forged frame with a sequence number far ahead must not make the true ones look old.
func TestForgedDoesNotMoveWindow(t *testing.T) {
	a, b := pair(t)
	m, _ := seal(a, "true")
	x := m
	x.seq = 1 << 40
	if _, drop, ok := x.open(b); ok || drop != frame.DropUnauthentic {
		t.Fatalf("forged: %v", drop)
	}
	if _, drop, ok := m.open(b); !ok {
		t.Fatalf("true: %v", drop)
	}
}

// TestConcurrent seals and opens from many goroutines: every message opens exactly once, however often it comes.
func TestConcurrent(t *testing.T) {
	a, b := pair(t)
	const goroutines, each = 8, 100
	text := strings.Repeat("concurrent", 6000) // long, so that two goroutines open it at once
	var wg sync.WaitGroup
	var mu sync.Mutex
	opened := map[uint64]int{}
	for range goroutines {
		wg.Go(func() {
			for range each {
				m, ok := seal(a, text)
				if !ok {
					t.Error("not sealed")
					return
				}
				var twice sync.WaitGroup
				for range 4 {
					twice.Go(func() {
						if got, drop, ok := m.open(b); ok {
							mu.Lock()
							opened[m.seq]++
							mu.Unlock()
							if got != text {
								t.Error("opened something else")
							}
						} else if drop != frame.DropReplayed {
							t.Errorf("drop %v", drop)
						}
					})
				}
				twice.Wait()
			}
		})
	}
	wg.Wait()
	if len(opened) != goroutines*each {
		t.Errorf("%d messages opened, of %d", len(opened), goroutines*each)
	}
	for seq, n := range opened {
		if n != 1 {
			t.Errorf("message %d opened %d times", seq, n)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool forgets at random under the race detector")
	}
	a, b := pair(t)
	plain := bytes.Repeat([]byte("x"), 1400)
	buf, aad := make([]byte, 0, 2000), make([]byte, 18)
	if n := testing.AllocsPerRun(1000, func() {
		s := a.Session()
		seq, ok := s.Next()
		sealed := s.Seal(buf, seq, aad, plain)
		if got, _, opened := b.Open(s.ID(), seq, aad, sealed); !ok || !opened || len(got) != len(plain) {
			t.Fatal("not opened")
		}
		if _, drop, opened := b.Open(s.ID(), seq, aad, sealed[:500]); opened || drop != frame.DropReplayed {
			t.Fatal("opened again")
		}
		if _, drop, opened := b.Open(s.ID(), seq+1<<30, aad, sealed[:500]); opened || drop != frame.DropUnauthentic {
			t.Fatal("forged")
		}
		b.Open(s.ID()+1, seq, aad, sealed)
	}); n != 0 {
		t.Errorf("%v allocations to seal and open a message", n)
	}
}

// TestInPlace seals and opens where the bytes lie.
func TestInPlace(t *testing.T) {
	a, b := pair(t)
	buf := append(make([]byte, 0, 100), "in place"...)
	s := a.Session()
	seq, _ := s.Next()
	sealed := s.Seal(buf[:0], seq, nil, buf)
	if &sealed[0] != &buf[0] || len(sealed) != len("in place")+Overhead {
		t.Fatal("not in place")
	}
	got, drop, ok := b.Open(s.ID(), seq, nil, sealed)
	if !ok || string(got) != "in place" || &got[0] != &buf[0] {
		t.Fatalf("%q, %v", got, drop)
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, size := range []int{64, 1400, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l, _ := pair(b)
			plain, buf, aad := make([]byte, size), make([]byte, 0, size+Overhead), make([]byte, 18)
			s := l.Session()
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				seq, _ := s.Next()
				s.Seal(buf, seq, aad, plain)
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, size := range []int{64, 1400, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			x, y := pair(b)
			s := x.Session()
			plain, aad := make([]byte, size), make([]byte, 18)
			buf := make([]byte, 0, size+Overhead)
			const ahead = 64 // one run of the pool of sealed messages; the window is set back for the next
			var sealed [ahead][]byte
			for i := range sealed {
				sealed[i] = s.Seal(nil, uint64(i), aad, plain)
			}
			r := y.Session()
			b.SetBytes(int64(size))
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if i == ahead {
					r.seen, i = window{}, 0
				}
				buf = append(buf[:0], sealed[i]...)
				if _, drop, ok := y.Open(s.ID(), uint64(i), aad, buf); !ok {
					b.Fatal(drop)
				}
				i++
			}
		})
	}
}
