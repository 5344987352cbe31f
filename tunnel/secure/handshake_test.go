package secure

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
)

func pskConfigs(t testing.TB) (a, b LinkConfig) {
	return LinkConfig{Identity: pskIdentity(t, secretA), Network: "lab", VNI: 42, Host: "192.0.2.2"},
		LinkConfig{Identity: pskIdentity(t, secretA+"\n"), Network: "lab", VNI: 42, Host: "192.0.2.1"}
}

// TestHandshake starts one side, so that it is the initiator, and then the other.
func TestHandshake(t *testing.T) {
	for name, cfgs := range map[string]func(testing.TB) (LinkConfig, LinkConfig){"certificates": configs, "psk": pskConfigs} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, cfgs, func(t *testing.T, b *bed) {
				b.a.start()
				b.b.start()
				took := within(t, 5*time.Second, "session", b.sealed)
				t.Logf("sealed after %v", took)
				b.exchange(t)
				if st := b.a.link.Stats(); !st.Sealed || st.Handshakes == 0 || st.Failed != 0 || st.Session == 0 {
					t.Errorf("stats %+v", st)
				}
				for _, d := range append(b.a.to.recorded(), b.b.to.recorded()...) {
					if len(d) > 1232 {
						t.Errorf("a handshake datagram of %d bytes does not fit all of IPv6", len(d))
					}
					if vni, ok := HandshakeVNI(d); !ok || vni != 42 {
						t.Errorf("datagram names VNI %d, %v", vni, ok)
					}
				}
			})
		})
	}
}

// TestOneSided: only one side ever starts a handshake, since the other's datagrams to begin one are lost.
func TestOneSided(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.b.to.set(func(d []byte, deliver func([]byte)) {
			if h, _, _ := parseHeader(d); h.responder {
				deliver(d)
			}
		})
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		b.exchange(t)
		if !b.a.link.Session().initiator || b.b.link.Session().initiator {
			t.Error("wrong roles")
		}
	})
}

// TestGlare starts both at the same time with a delay on the way, again and again: there are two sessions, and both sides choose the same.
func TestGlare(t *testing.T) {
	for range 5 {
		inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
			b.a.to.set(lossy(0, 0, 40*time.Millisecond))
			b.b.to.set(lossy(0, 0, 40*time.Millisecond))
			b.a.start()
			b.b.start()
			within(t, 5*time.Second, "session", b.sealed)
			for range 400 { // each looks once a second, and goes over when it has heard the other's choice alone for up to seven; see patience
				b.exchange(t)
				time.Sleep(20 * time.Millisecond)
			}
			if x, y := b.a.link.Session().ID(), b.b.link.Session().ID(); x != y {
				t.Errorf("they chose %08x and %08x", x, y)
			}
		})
	}
}

// TestReadyBeforeLastFlight: when the responder's last flight goes out, with which the initiator has keys and may use them, its session opens.
func TestReadyBeforeLastFlight(t *testing.T) {
	for range 20 {
		inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
			b.b.to.set(func(d []byte, deliver func([]byte)) {
				h, payload, _ := parseHeader(d)
				if h.responder && sealedRecords(payload) && len(*b.b.link.sessions.Load()) == 0 {
					t.Error("the last flight goes out before the session opens")
				}
				if h.responder { // only a starts
					deliver(d)
				}
			})
			b.a.start()
			b.b.start()
			within(t, 5*time.Second, "session", b.sealed)
		})
	}
}

// TestLostFlight loses the nth datagram of either side, for each n that there is, and what is behind it in time.
func TestLostFlight(t *testing.T) {
	for _, cfgs := range []func(testing.TB) (LinkConfig, LinkConfig){configs, pskConfigs} {
		for _, responder := range []bool{false, true} {
			for nth := range 8 {
				inBubble(t, cfgs, func(t *testing.T, b *bed) {
					var n atomic.Int64
					lose := func(d []byte, deliver func([]byte)) {
						if n.Add(1)-1 != int64(nth) {
							deliver(d)
						}
					}
					// Only a starts.
					b.b.to.set(func(d []byte, deliver func([]byte)) {
						if h, _, _ := parseHeader(d); !h.responder {
							return
						}
						if responder {
							lose(d, deliver)
						} else {
							deliver(d)
						}
					})
					if !responder {
						b.a.to.set(lose)
					}
					b.a.start()
					b.b.start()
					within(t, 5*time.Second, fmt.Sprintf("session with datagram %d lost (responder: %v)", nth, responder), func() bool {
						if m, ok := seal(b.a.link, "x"); ok && b.b.link.Session() == nil {
							m.open(b.b.link)
						}
						return b.sealed()
					})
					b.exchange(t)
				})
			}
		}
	}
}

// TestLossyPath: a fifth is lost, some doubled, all out of order.
func TestLossyPath(t *testing.T) {
	for range 5 {
		inBubble(t, configs, func(t *testing.T, b *bed) {
			b.a.to.set(lossy(0.2, 0.2, 100*time.Millisecond))
			b.b.to.set(lossy(0.2, 0.2, 100*time.Millisecond))
			b.a.start()
			b.b.start()
			within(t, time.Minute, "session", b.sealed)
			time.Sleep(10 * time.Second)
			b.exchange(t)
		})
	}
}

// TestRestart kills one side: the other seals under its old session, then goes over to the new one.
func TestRestart(t *testing.T) {
	inBubble(t, configs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		b.exchange(t)
		time.Sleep(time.Minute)
		old, _ := seal(b.a.link, "lost")
		b.b.restart()
		if _, drop, ok := old.open(b.b.link); ok || drop != frame.DropNoSession {
			t.Errorf("a frame of the dead process's session: drop %v, ok %v", drop, ok)
		}
		took := within(t, 1500*time.Millisecond, "new session on both sides", func() bool { return b.sealed() && b.a.link.Session().ID() == b.b.link.Session().ID() })
		t.Logf("recovered after %v", took)
		b.exchange(t)
		b.b.mu.Lock()
		b.b.up = map[uint32]bool{} // those of the dead process were ended by its Close
		for _, s := range *b.b.link.sessions.Load() {
			b.b.up[s.id] = true
		}
		b.b.mu.Unlock()
	})
}

// TestRestartAtOnce kills one side right after the first session, when handshakes of before and after may have crossed, and a moment later, when they cannot have: then the new session counts at once.
func TestRestartAtOnce(t *testing.T) {
	for i := range 40 {
		pause, bound := time.Duration(0), 6*time.Second
		if i%2 == 1 {
			pause, bound = time.Second, 700*time.Millisecond
		}
		inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
			b.a.start()
			b.b.start()
			within(t, 5*time.Second, "session", b.sealed)
			time.Sleep(pause)
			b.b.restart()
			within(t, bound, "frames both ways", func() bool {
				good := 0
				for _, d := range [][2]*Link{{b.a.link, b.b.link}, {b.b.link, b.a.link}} {
					if m, ok := seal(d[0], "x"); ok {
						if _, _, ok := m.open(d[1]); ok {
							good++
						}
					}
				}
				time.Sleep(100 * time.Millisecond)
				return good == 2
			})
		})
	}
}

// TestLongOutage cuts the underlay for longer than keys last: when it is back, so is the tunnel.
func TestLongOutage(t *testing.T) {
	inBubble(t, pskConfigs, func(t *testing.T, b *bed) {
		b.a.start()
		b.b.start()
		within(t, 5*time.Second, "session", b.sealed)
		cut := func([]byte, func([]byte)) {}
		b.a.to.set(cut)
		b.b.to.set(cut)
		time.Sleep(10 * time.Hour)
		b.a.to.set(nil)
		b.b.to.set(nil)
		took := within(t, time.Minute, "session", b.sealed)
		t.Logf("back after %v", took)
		time.Sleep(time.Second)
		b.exchange(t)
		if n := strings.Count(b.a.log.String(), "handshake failed"); n > 3 {
			t.Errorf("%d failures logged in 10 hours:\n%s", n, b.a.log)
		}
	})
}
