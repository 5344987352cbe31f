package secure

import (
	"bytes"
	"fmt"
	mrand "math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/frame"
)

// TestAttacks: what is repeated, cut short, or changed in any one bit does not open, and what was sent opens still.
func TestAttacks(t *testing.T) {
	inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		m, _ := seal(b.a.link, "the frame")
		refuse := func(what string, m message, want frame.Drop) {
			t.Helper()
			if _, drop, ok := m.open(b.b.link); ok || drop != want {
				t.Errorf("%s: drop %v, ok %v; want %v", what, drop, ok, want)
			}
		}
		for bit := range 8 * len(m.text) {
			x := m
			x.text = bytes.Clone(m.text)
			x.text[bit/8] ^= 1 << (bit % 8)
			refuse(fmt.Sprintf("bit %d flipped", bit), x, frame.DropUnauthentic)
		}
		for bit := range 8 * len(m.aad) {
			x := m
			x.aad = bytes.Clone(m.aad)
			x.aad[bit/8] ^= 1 << (bit % 8)
			refuse(fmt.Sprintf("bit %d of the header flipped", bit), x, frame.DropUnauthentic)
		}
		for n := range len(m.text) {
			x := m
			x.text = m.text[:n]
			refuse(fmt.Sprintf("cut to %d bytes", n), x, frame.DropUnauthentic)
		}
		for bit := range 64 {
			x := m
			x.seq ^= 1 << bit
			refuse(fmt.Sprintf("sequence number with bit %d flipped", bit), x, frame.DropUnauthentic)
		}
		for bit := range 32 {
			x := m
			x.id ^= 1 << bit
			if _, drop, ok := x.open(b.b.link); ok || drop != frame.DropNoSession && drop != frame.DropUnauthentic {
				t.Errorf("session id with bit %d flipped: drop %v, ok %v", bit, drop, ok)
			}
		}
		if got, drop, ok := m.open(b.b.link); !ok || got != "the frame" {
			t.Fatalf("the true frame: drop %v", drop)
		}
		refuse("the frame again", m, frame.DropReplayed)
		time.Sleep(3 * time.Second)
		if n := strings.Count(b.b.log.String(), "do not open"); n != 1 {
			t.Errorf("%d lines about forged frames:\n%s", n, b.b.log)
		}
		if n := strings.Count(b.b.log.String(), "came before"); n != 1 {
			t.Errorf("%d lines about repeated frames:\n%s", n, b.b.log)
		}
		if b.b.link.Session() == nil {
			t.Error("the attack ended the session")
		}
	})
}

// TestRecordedHandshake repeats a whole recorded handshake at the responder, also after a restart.
func TestRecordedHandshake(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		time.Sleep(time.Second)
		rec := b.a.to.recorded()
		before := b.b.link.Stats()
		for range 3 {
			for _, d := range rec {
				b.b.link.Deliver(d)
				time.Sleep(10 * time.Millisecond)
			}
		}
		time.Sleep(20 * time.Second)
		after := b.b.link.Stats()
		if after.Handshakes != before.Handshakes || after.Session != before.Session {
			t.Errorf("before %+v, after %+v", before, after)
		}
		b.exchange(t)
	})
}

// TestForgedAlerts injects close_notify and fatal alerts, in clear and as if sealed, into every handshake and behind it.
func TestForgedAlerts(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		forge := func(d []byte, deliver func([]byte)) {
			h, _, _ := parseHeader(d)
			for _, level := range []byte{1, 2} {
				for _, desc := range []byte{0, 40, 80} {
					deliver(append(h.append(nil), recordAlert, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0xff, desc, 0, 2, level, desc))
					deliver(append(h.append(nil), recordAlert, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, desc, 0, 2, level, desc))
				}
			}
			deliver(append(h.append(nil), recordApplication, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0xff, 1, 0, 1, 'x'))
			deliver(append(h.append(nil), 99, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0xff, 2, 0, 1, 'x'))
			deliver(d)
			deliver(append(h.append(nil), recordAlert, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0xff, 3, 0, 2, 2, 0))
		}
		b.a.to.set(forge)
		b.b.to.set(forge)
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		time.Sleep(5 * time.Second)
		b.exchange(t)
		if st := b.a.link.Stats(); st.Failed != 0 {
			t.Errorf("stats %+v", st)
		}
	})
}

// TestFlood sends beginnings of handshakes, each with another number, as somebody does who knows the peer's address but does not get what is sent there: it costs a challenge each, and the
// true peer comes through.
func TestFlood(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.a.start()
		within(t, 5*time.Second, "a hello", func() bool { return len(b.a.to.recorded()) > 0 })
		hello := b.a.to.recorded()[0]
		if _, payload, _ := parseHeader(hello); !isClientHello(payload) {
			t.Fatal("the first datagram is no ClientHello")
		}
		// What b answers goes to the true peer, who has not asked. Were this set after b has started, a could have had b's challenge before, and its answer would be a's own.
		b.b.to.set(func([]byte, func([]byte)) {})
		b.b.start()
		synctest.Wait()
		var before, after runtime.MemStats
		goroutines := runtime.NumGoroutine()
		runtime.GC()
		runtime.ReadMemStats(&before)
		most := 0
		for i := range 100000 {
			d := bytes.Clone(hello)
			d[8], d[9], d[10], d[11] = byte(i>>24)&0x7f, byte(i>>16), byte(i>>8), byte(i)
			if i%3 == 0 {
				d[15] = byte(i) // a guess
			}
			b.b.link.Deliver(d)
			if i%50 == 0 {
				synctest.Wait()
			}
			most = max(most, runtime.NumGoroutine())
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if most > goroutines+20 {
			t.Errorf("%d goroutines, %d before", most, goroutines)
		}
		if grew := int64(after.HeapAlloc) - int64(before.HeapAlloc); grew > 64<<20 { // the recorded challenges are most of it
			t.Errorf("memory grew by %d bytes", grew)
		}
		if n := len(*b.b.link.sessions.Load()); n > 0 {
			t.Errorf("the flood made %d sessions", n)
		}
		for _, d := range b.b.to.recorded() {
			if h, payload, _ := parseHeader(d); h.responder && len(payload) > 0 {
				t.Fatal("a handshake was answered before its sender had shown the cookie")
			}
		}
		// The peer is heard while the flood goes on.
		stop := make(chan struct{})
		go func() {
			for i := uint32(0); ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Microsecond):
				}
				d := bytes.Clone(hello)
				d[8], d[9], d[10], d[11] = 0x40, byte(i>>16), byte(i>>8), byte(i)
				b.b.link.Deliver(d)
			}
		}()
		b.b.to.set(func(d []byte, deliver func([]byte)) {
			if h, _, _ := parseHeader(d); h.responder { // only a starts, so that it has to come through
				deliver(d)
			}
		})
		within(t, 10*time.Second, "session during a flood", b.sealed)
		close(stop)
		b.exchange(t)
	})
}

// TestFlippedHandshake flips a bit in every fourth handshake datagram. Handshakes fail of it, but what comes of those that do not is sound.
func TestFlippedHandshake(t *testing.T) {
	for _, cfgs := range []func(testing.TB) (LinkConfig, LinkConfig){configs, pskConfigs} {
		for range 5 {
			inBubble(t, cfgs, func(t *testing.T, b *bed) {
				flip := func(d []byte, deliver func([]byte)) {
					if mrand.IntN(4) == 0 {
						bit := mrand.IntN(8 * len(d))
						d[bit/8] ^= 1 << (bit % 8)
					}
					time.AfterFunc(mrand.N(10*time.Millisecond), func() { deliver(d) })
				}
				b.a.to.set(flip)
				b.b.to.set(flip)
				b.a.start()
				b.b.start()
				within(t, 10*time.Minute, "session", b.sealed)
				for range 1500 {
					if b.sealed() {
						b.exchange(t)
					}
					time.Sleep(time.Second)
				}
				if !b.sealed() {
					t.Error("no session after 25 minutes")
				}
			})
		}
	}
}
