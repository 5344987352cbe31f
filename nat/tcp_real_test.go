package nat

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// outside is where the containers of a test connect to, in both IP versions.
type outside struct {
	*testbed.External
	v4, v6 *net.TCPListener
}

func newOutside(t testing.TB) *outside {
	t.Helper()
	o := &outside{External: testbed.NewExternal(t)}
	for _, a := range []netip.Addr{o.Addr4, o.Addr6} {
		l, err := o.Listen("tcp", netip.AddrPortFrom(a, 80).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		if a.Is4() {
			o.v4 = l.(*net.TCPListener)
		} else {
			o.v6 = l.(*net.TCPListener)
		}
	}
	return o
}

// each runs f for both IP versions, with an address of nobody in particular for the wrong port.
func (o *outside) each(t *testing.T, f func(t *testing.T, l *net.TCPListener, addr netip.Addr)) {
	t.Run("v4", func(t *testing.T) { f(t, o.v4, o.Addr4) })
	t.Run("v6", func(t *testing.T) { f(t, o.v6, o.Addr6) })
}

// join connects container c to listener l.
func join(t testing.TB, c *peer, l *net.TCPListener) (in, out *net.TCPConn) {
	t.Helper()
	in = c.dial(t, l.Addr().String())
	l.SetDeadline(time.Now().Add(5 * time.Second))
	out, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	in.SetDeadline(time.Now().Add(20 * time.Second))
	out.SetDeadline(time.Now().Add(20 * time.Second))
	return in, out
}

// ends are the two ends of a connection, each in turn the one that acts.
func ends(t *testing.T, c *peer, l *net.TCPListener, f func(t *testing.T, actor, other *net.TCPConn)) {
	for _, name := range []string{"container", "host"} {
		t.Run(name, func(t *testing.T) {
			in, out := join(t, c, l)
			if name == "host" {
				in, out = out, in
			}
			f(t, in, out)
		})
	}
}

// bothWays runs a test with the loop moving all that containers are sent, and with goroutines that help.
func bothWays(t *testing.T, test func(t *testing.T, cfg Config)) {
	for name, one := range map[string]bool{"one thread": true, "goroutines": false} {
		t.Run(name, func(t *testing.T) {
			testbed.Leaks(t)
			test(t, Config{OneThread: one})
		})
	}
}

func TestTCPHalfClose(t *testing.T) { bothWays(t, testTCPHalfClose) }

func testTCPHalfClose(t *testing.T, cfg Config) {
	nw := newNetwork(t, 1, cfg)
	newOutside(t).each(t, func(t *testing.T, l *net.TCPListener, _ netip.Addr) {
		ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
			io.WriteString(a, "question")
			a.CloseWrite()
			if q, err := io.ReadAll(b); string(q) != "question" || err != nil {
				t.Fatalf("%q, %v", q, err)
			}
			// The other direction still works, both ways of waiting.
			for range 3 {
				time.Sleep(20 * time.Millisecond)
				if _, err := io.WriteString(b, "answer"); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 6)
				if _, err := io.ReadFull(a, buf); string(buf) != "answer" || err != nil {
					t.Fatalf("%q, %v", buf, err)
				}
			}
			b.Close()
			if rest, err := io.ReadAll(a); len(rest) != 0 || err != nil {
				t.Fatalf("%q, %v", rest, err)
			}
		})
	})
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().TCPFlows == 0 })
}

func TestTCPReset(t *testing.T) { bothWays(t, testTCPReset) }

func testTCPReset(t *testing.T, cfg Config) {
	nw := newNetwork(t, 1, cfg)
	o := newOutside(t)
	reset := func(c *net.TCPConn) { c.SetLinger(0); c.Close() }
	wantReset := func(t *testing.T, c *net.TCPConn) {
		t.Helper()
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read: %v, want a reset", err)
		}
	}
	o.each(t, func(t *testing.T, l *net.TCPListener, _ netip.Addr) {
		t.Run("idle", func(t *testing.T) {
			ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
				reset(a)
				wantReset(t, b)
			})
		})
		t.Run("after data", func(t *testing.T) {
			ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
				io.WriteString(a, "x")
				io.ReadFull(b, make([]byte, 1))
				reset(a)
				wantReset(t, b)
			})
		})
		t.Run("while the other end's data waits", func(t *testing.T) {
			ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
				done := make(chan error, 1)
				go func() {
					_, err := b.Write(make([]byte, 64<<20))
					done <- err
				}()
				time.Sleep(100 * time.Millisecond)
				reset(a)
				if err := <-done; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Fatalf("write: %v, want a reset", err)
				}
			})
		})
		t.Run("behind its own FIN", func(t *testing.T) {
			ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
				a.CloseWrite()
				if _, err := b.Read(make([]byte, 1)); err != io.EOF {
					t.Fatalf("read: %v, want EOF", err)
				}
				time.Sleep(20 * time.Millisecond)
				reset(a)
				// b knows by its next write at the latest, and by its own account before that.
				testbed.Eventually(t, 5*time.Second, func() bool {
					_, err := b.Write([]byte("x"))
					return err != nil
				})
			})
		})
		t.Run("behind the other's FIN", func(t *testing.T) {
			ends(t, nw.cs[0], l, func(t *testing.T, a, b *net.TCPConn) {
				b.CloseWrite()
				if _, err := a.Read(make([]byte, 1)); err != io.EOF {
					t.Fatalf("read: %v, want EOF", err)
				}
				reset(a)
				wantReset(t, b)
			})
		})
	})
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().TCPFlows == 0 })
}

// TestTCPVerdicts holds what a container's own kernel makes of each answer.
func TestTCPVerdicts(t *testing.T) {
	testbed.Leaks(t)
	nw := newNetwork(t, 1, Config{})
	o := newOutside(t)
	hostOnly := hostListener(t, "127.0.0.1:8000")
	hostOnly6 := hostListener(t, "[::1]:8000")
	_, _ = hostOnly, hostOnly6
	any4 := hostListener(t, "0.0.0.0:8001")
	_ = any4
	at := func(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
	for _, c := range []struct {
		what, to string
		want     error
	}{
		{"listener outside", at(o.Addr4, 80), nil},
		{"listener outside, IPv6", at(o.Addr6, 80), nil},
		{"the host's own card", at(o.HostAddr4, 8001), nil},
		{"nobody listens", at(o.Addr4, 81), syscall.ECONNREFUSED},
		{"nobody listens, IPv6", at(o.Addr6, 81), syscall.ECONNREFUSED},
		{"no route", "203.0.113.9:80", syscall.ENETUNREACH},
		{"no route, IPv6", "[2001:db8:ffff::1]:80", syscall.ENETUNREACH},
		{"service on the host's loopback by its card", at(o.HostAddr4, 8000), syscall.ECONNREFUSED},
		{"host alias", "10.88.0.2:8000", syscall.ECONNREFUSED},
		{"host alias, IPv6", "[fd00:88::2]:8000", syscall.ECONNREFUSED},
		{"gateway", "10.88.0.1:8000", syscall.ECONNREFUSED},
		{"metadata", "169.254.169.254:80", nil},
		{"metadata, IPv6", "[fd00:ec2::254]:80", nil},
		{"loopback in 6to4", "[2002:7f00:1::1]:8000", syscall.ECONNREFUSED},
		{"loopback in NAT64", "[64:ff9b::7f00:1]:8000", syscall.ECONNREFUSED},
	} {
		conn, err := nw.cs[0].tryDial(c.to)
		if conn != nil {
			conn.Close()
		}
		if strings.HasPrefix(c.what, "metadata") {
			if err == nil {
				t.Errorf("%s (%s): connected", c.what, c.to)
			} else if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				t.Errorf("%s (%s): no answer at all: %v", c.what, c.to, err)
			}
			continue
		}
		if c.want == nil && err != nil || !errors.Is(err, c.want) {
			t.Errorf("%s (%s): %v, want %v", c.what, c.to, err, c.want)
		}
	}
	for d, want := range map[frame.Drop]uint64{frame.DropPolicyLoopback: 4, frame.DropPolicyMetadata: 2} {
		if got := nw.Drops().Get(d); got != want {
			t.Errorf("%s: %d, want %d", d, got, want)
		}
	}
}

func TestTCPHostLoopback(t *testing.T) {
	testbed.Leaks(t)
	nw := newNetwork(t, 1, Config{HostLoopback: true})
	for listen, to := range map[string]string{"127.0.0.1:8000": "10.88.0.2:8000", "[::1]:8000": "[fd00:88::2]:8000"} {
		l := hostListener(t, listen)
		in := nw.cs[0].dial(t, to)
		out, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(out, "hi")
		out.Close()
		if b, err := io.ReadAll(in); string(b) != "hi" || err != nil {
			t.Fatalf("%s: %q, %v", to, b, err)
		}
	}
}

// TestTCPServerSpeaksFirst connects many times to a server that sends before it is asked.
func TestTCPServerSpeaksFirst(t *testing.T) {
	testbed.Leaks(t)
	nw := newNetwork(t, 1, Config{})
	newOutside(t).each(t, func(t *testing.T, l *net.TCPListener, _ netip.Addr) {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "220 ready")
				c.Close()
			}
		}()
		var worst time.Duration
		for range 300 {
			start := time.Now()
			c, err := nw.cs[0].tryDial(l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(c)
			c.Close()
			if string(b) != "220 ready" || err != nil {
				t.Fatalf("%q, %v", b, err)
			}
			worst = max(worst, time.Since(start))
		}
		if worst > 200*time.Millisecond {
			t.Errorf("the slowest took %v", worst)
		}
	})
}

// TestTCPTransfer moves bytes both ways at once and compares their sums.
func TestTCPTransfer(t *testing.T) { bothWays(t, testTCPTransfer) }

func testTCPTransfer(t *testing.T, cfg Config) {
	nw := newNetwork(t, 1, cfg)
	size := int64(64 << 20)
	if raceEnabled {
		size = 16 << 20
	}
	newOutside(t).each(t, func(t *testing.T, l *net.TCPListener, _ netip.Addr) {
		in, out := join(t, nw.cs[0], l)
		type result struct {
			sum [32]byte
			err error
		}
		send := func(c *net.TCPConn, seed byte) chan result {
			ch := make(chan result, 1)
			go func() {
				h := sha256.New()
				src := rand.NewChaCha8([32]byte{seed})
				_, err := io.CopyN(io.MultiWriter(c, h), src, size)
				c.CloseWrite()
				ch <- result{[32]byte(h.Sum(nil)), err}
			}()
			return ch
		}
		recv := func(c *net.TCPConn) chan result {
			ch := make(chan result, 1)
			go func() {
				h := sha256.New()
				n, err := io.Copy(h, c)
				if err == nil && n != size {
					err = io.ErrUnexpectedEOF
				}
				ch <- result{[32]byte(h.Sum(nil)), err}
			}()
			return ch
		}
		up, down := send(in, 1), send(out, 2)
		gotUp, gotDown := recv(out), recv(in)
		for _, p := range []struct {
			name      string
			sent, got chan result
		}{{"up", up, gotUp}, {"down", down, gotDown}} {
			s, g := <-p.sent, <-p.got
			if s.err != nil || g.err != nil || s.sum != g.sum {
				t.Errorf("%s: sent %v, received %v, same %v", p.name, s.err, g.err, s.sum == g.sum)
			}
		}
	})
}

// TestTCPStalledReader holds that a container that does not read costs a bounded amount and stalls nobody else.
func TestTCPStalledReader(t *testing.T) { bothWays(t, testTCPStalledReader) }

func testTCPStalledReader(t *testing.T, cfg Config) {
	nw := newNetwork(t, 2, cfg)
	l := newOutside(t).v4
	for range 20 {
		_, out := join(t, nw.cs[0], l)
		go out.Write(make([]byte, 32<<20))
	}
	time.Sleep(300 * time.Millisecond)
	in, out := join(t, nw.cs[1], l)
	start := time.Now()
	for range 50 {
		out.Write([]byte("ping"))
		if b := make([]byte, 4); !func() bool { _, err := io.ReadFull(in, b); return err == nil && bytes.Equal(b, []byte("ping")) }() {
			t.Fatal("no answer")
		}
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("50 round trips took %v beside stalled flows", d)
	}
}
