package secure

import (
	"bytes"
	"crypto/x509"
	mrand "math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/frame"
)

// traffic sends a frame each way every step for as long as d, delayed at random, and fails for each one that does not open. It returns how many sessions were seen.
func traffic(t *testing.T, b *bed, d, step, delay time.Duration) int {
	t.Helper()
	ids := map[uint32]bool{}
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(step) {
		for _, w := range [][2]*node{{b.a, b.b}, {b.b, b.a}} {
			m, ok := seal(w[0].link, "a frame")
			if !ok {
				t.Fatal("nothing to seal under")
			}
			ids[m.id] = true
			to := w[1].link
			time.AfterFunc(mrand.N(delay), func() {
				if _, drop, ok := m.open(to); !ok {
					t.Errorf("session %08x, frame %d: dropped as %v", m.id, m.seq, drop)
				}
			})
		}
	}
	time.Sleep(delay)
	return len(ids)
}

func TestRekeyByTime(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.a.to.set(lossy(0.1, 0.1, 50*time.Millisecond))
		b.b.to.set(lossy(0.1, 0.1, 50*time.Millisecond))
		b.a.start()
		b.b.start()
		within(t, time.Minute, "session", b.sealed)
		if n := traffic(t, b, 45*time.Minute, 100*time.Millisecond, 80*time.Millisecond); n < 4 {
			t.Errorf("%d sessions in 45 minutes", n)
		}
		if n := b.a.link.Stats().Sessions; n > 3 {
			t.Errorf("%d sessions are still open", n)
		}
	})
}

func TestRekeyByBytes(t *testing.T) {
	small := func(t testing.TB) (a, b LinkConfig) {
		a, b = pskConfigs(t)
		a.RekeyBytes, b.RekeyBytes = 7000, 1<<40
		return a, b
	}
	inBubble(t, small, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		if n := traffic(t, b, 30*time.Second, 5*time.Millisecond, 20*time.Millisecond); n < 5 {
			t.Errorf("%d sessions for 42 kB of 7", n)
		}
	})
}

// TestRekeyIsKept: what comes under the session before, while the peer has not heard of the new one, is no reason to go back to it. A node that did would want a new session at once, again and again.
func TestRekeyIsKept(t *testing.T) {
	inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
		slow := func(d []byte, deliver func([]byte)) { time.AfterFunc(300*time.Millisecond, func() { deliver(d) }) }
		b.a.to.set(slow)
		b.b.to.set(slow)
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		time.Sleep(10 * time.Second) // whatever crossed is over
		before := b.a.link.Stats().Handshakes
		const rekeys = 30
		left := map[uint32]bool{} // sessions that a has gone on from
		current := b.a.link.Session().ID()
		for range rekeys {
			b.a.link.Rekey()
			for range 11 { // of which the sum is no multiple of the second at which sessions are looked at
				traffic(t, b, 77*time.Millisecond, 11*time.Millisecond, 600*time.Millisecond)
				if id := b.a.link.Session().ID(); id != current {
					if left[id] {
						t.Fatalf("back to session %08x", id)
					}
					left[current], current = true, id
				}
			}
		}
		if n := b.a.link.Stats().Handshakes - before; n != rekeys {
			t.Errorf("%d handshakes for %d rekeys", n, rekeys)
		}
	})
}

// TestIdle: where both began at once, and each has chosen another session, neither ends the other's choice while nothing is said.
func TestIdle(t *testing.T) {
	for range 20 {
		inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
			b.a.start()
			b.b.start()
			within(t, 5*time.Second, "session", b.sealed)
			time.Sleep(5 * time.Minute)
			b.exchange(t)
		})
	}
}

// TestGoesBack: a peer that has lost the newer session keeps to the one before, and is followed there within seconds, whichever of the two has the greater id.
func TestGoesBack(t *testing.T) {
	greater := map[bool]bool{}
	for i := 0; i < 12 || len(greater) < 2 && i < 60; i++ { // ids are random
		inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
			b.a.start()
			b.b.start()
			within(t, 5*time.Second, "session", b.sealed)
			for range 45 { // whatever crossed is over, and has ended
				b.exchange(t)
				time.Sleep(time.Second)
			}
			older := b.b.link.Session()
			b.a.link.Rekey()
			within(t, 5*time.Second, "another session", func() bool { return b.b.link.Session() != older })
			newer := b.b.link.Session()
			b.exchange(t)
			b.b.link.mu.Lock()
			b.b.link.drop(newer)
			b.b.link.mu.Unlock()
			if b.b.link.Session() != older {
				t.Fatal("b did not fall back")
			}
			greater[older.ID() > newer.ID()] = true
			took := within(t, 9*time.Second, "a under the older session", func() bool {
				if m, ok := seal(b.b.link, "here"); ok {
					m.open(b.a.link)
				}
				time.Sleep(100 * time.Millisecond)
				return b.a.link.Session().ID() == older.ID()
			})
			if took < 3*time.Second {
				t.Errorf("after %v already", took)
			}
			b.exchange(t)
		})
	}
	if len(greater) < 2 {
		t.Error("only one of the two cases has come up")
	}
}

// TestHardLimits: a session that cannot be followed by another ends, and nothing is sealed.
func TestHardLimits(t *testing.T) {
	small := func(t testing.TB) (a, b LinkConfig) {
		a, b = pskConfigs(t)
		a.RekeyBytes = 1000
		return a, b
	}
	inBubble(t, small, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		cut := func(d []byte, deliver func([]byte)) {}
		b.a.to.set(cut)
		b.b.to.set(cut)
		time.Sleep(time.Second)
		n := 0
		for ; n < 100; n++ {
			m, ok := seal(b.a.link, strings.Repeat("x", 100))
			if !ok {
				break
			}
			m.open(b.b.link)
		}
		if n != 40 {
			t.Errorf("%d frames of 100 bytes with a hard limit of 4000", n)
		}
		time.Sleep(21 * time.Minute)
		if b.a.link.Session() != nil || b.b.link.Session() != nil || b.b.link.Stats().Sealed {
			t.Error("the session outlived twice RekeyAfter")
		}
		if !strings.Contains(b.a.log.String(), "has no keys") || strings.Count(b.a.log.String(), "has no keys") != 1 {
			t.Errorf("log:\n%s", b.a.log)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := bareSession(t, true)
		s.next.Store(maxMessages - 1)
		if _, ok := s.Next(); !ok {
			t.Error("the last number is refused")
		}
		if _, ok := s.Next(); ok {
			t.Error("a number past the limit is given out")
		}
	})
}

func bareSession(t testing.TB, initiator bool) *Session {
	t.Helper()
	k, ok := parseKeys(bytes.Repeat([]byte{7}, keysLen))
	if !ok {
		t.Fatal("keysLen is wrong")
	}
	s, err := newSession(k, initiator, time.Now(), 1<<40, func() {})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestTakeover hands a link's sessions to a successor under traffic: nothing is repeated and nothing opens twice.
func TestTakeover(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		old, _ := seal(b.a.link, "came before")
		late, _ := seal(b.a.link, "on its way")
		if _, _, ok := old.open(b.b.link); !ok {
			t.Fatal("not opened")
		}
		numbers := map[uint64]bool{}
		id := b.b.link.Session().ID()
		for range 10 {
			m, _ := seal(b.b.link, "x")
			numbers[m.seq] = true
		}
		if _, err := b.b.link.Export(); err == nil {
			t.Error("Export while Run runs")
		}
		b.b.stop()
		first := b.b.link
		held := first.Session()
		data, err := first.Export()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := held.Next(); ok || first.Session() != nil {
			t.Error("the predecessor still seals")
		}
		if _, drop, ok := late.open(first); ok || drop != frame.DropNoSession {
			t.Error("the predecessor still opens")
		}
		if again, err := first.Export(); err != nil || bytes.Contains(again, []byte("Keys")) {
			t.Errorf("exported twice: %s, %v", again, err)
		}
		other := b.b.cfg
		other.VNI = 43
		if l, err := NewLink(other); err != nil || l.Import(data) == nil {
			t.Errorf("another network took the sessions: %v", err)
		}
		if b.b.link, err = NewLink(b.b.cfg); err != nil {
			t.Fatal(err)
		}
		if err := b.b.link.Import(data); err != nil {
			t.Fatal(err)
		}
		b.b.start()
		if got := b.b.link.Session(); got == nil || got.ID() != id {
			t.Fatalf("session %v after the takeover", got)
		}
		b.exchange(t)
		if _, drop, ok := old.open(b.b.link); ok || drop != frame.DropReplayed {
			t.Errorf("a frame that the predecessor had opened: drop %v, ok %v", drop, ok)
		}
		if got, drop, ok := late.open(b.b.link); !ok || got != "on its way" {
			t.Errorf("a frame that was on its way: drop %v", drop)
		}
		for range 10 {
			if m, _ := seal(b.b.link, "x"); numbers[m.seq] {
				t.Errorf("sequence number %d was used by both", m.seq)
			}
		}
		if n := b.b.link.Stats().Handshakes; n != 0 {
			t.Errorf("%d handshakes for a takeover", n)
		}
		for _, bad := range []string{"", "{", "null", `{"Version":2}`, strings.Replace(string(data), `"Age":`, `"Age":-`, 1)} {
			l, err := NewLink(b.b.cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Import([]byte(bad)); err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("Import(%.20q): %v", bad, err)
			}
		}
	})
}

// TestExpiryEndsTunnel: a certificate that expires under a session ends it at the next rekey, and a new one would bring it back.
func TestExpiryEndsTunnel(t *testing.T) {
	short := func(t testing.TB) (a, b LinkConfig) {
		ca := newTestCA(t)
		return LinkConfig{Identity: ca.identity(t, "a.test", nil), Network: "lab", VNI: 42, Host: "b.test"},
			LinkConfig{Identity: ca.identity(t, "b.test", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(15 * time.Minute) }), Network: "lab", VNI: 42, Host: "a.test"}
	}
	inBubble(t, short, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		time.Sleep(14 * time.Minute)
		if b.a.link.Session() == nil {
			t.Error("ended too early")
		}
		time.Sleep(22 * time.Minute)
		if b.a.link.Session() != nil {
			t.Error("a tunnel outlives the peer's certificate")
		}
		if !strings.Contains(b.a.log.String(), "expired at") {
			t.Errorf("log:\n%s", b.a.log)
		}
	})
}
