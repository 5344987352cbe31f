package stack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/tap"
)

// patience bounds what must happen, on a machine that may be busy.
const patience = 10 * time.Second

// dial connects from the container.
func (w *world) dial(t testing.TB, to string) *net.TCPConn {
	t.Helper()
	var c net.Conn
	var err error
	w.Do(func() { c, err = net.DialTimeout("tcp", to, patience) })
	if err != nil {
		t.Fatalf("%v; drops %v", err, drops(w.gw))
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func TestEchoOverTCP(t *testing.T) {
	testbed.Leaks(t)
	cfg := testConfig()
	cfg.Handlers.TCP = accepting(func(c Conn) {
		defer c.Close()
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	for _, a := range []string{"192.0.2.7:80", "[2001:db8::7]:80", "10.88.0.1:99", "[fd00:88::1]:99", "10.88.255.254:1"} {
		c := w.dial(t, a)
		fmt.Fprint(c, "hello")
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Fatalf("%s: %q, %v", a, b, err)
		}
	}
}

// TestAnswers: what a real client sees of each way to answer its SYN.
func TestAnswers(t *testing.T) {
	var answer atomic.Pointer[func(TCPRequest)]
	var asked atomic.Int32
	cfg := testConfig()
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) { asked.Add(1); go (*answer.Load())(r) })
	w := newWorld(t, cfg, tap.OpenConfig{})
	for _, c := range []struct {
		name   string
		answer func(TCPRequest)
		want   error
	}{
		{"refuse", func(r TCPRequest) { r.Refuse() }, syscall.ECONNREFUSED},
		{"port", func(r TCPRequest) { r.Unreachable(UnreachPort) }, syscall.ECONNREFUSED},
		{"net", func(r TCPRequest) { r.Unreachable(UnreachNet) }, syscall.ENETUNREACH},
		{"host", func(r TCPRequest) { r.Unreachable(UnreachHost) }, syscall.EHOSTUNREACH},
		{"prohibited", func(r TCPRequest) { r.Unreachable(UnreachProhibited) }, syscall.EHOSTUNREACH},
		{"ignore", func(r TCPRequest) { r.Ignore() }, os.ErrDeadlineExceeded},
		{"late", func(r TCPRequest) { time.Sleep(2500 * time.Millisecond); r.Refuse() }, syscall.ECONNREFUSED},
	} {
		for _, to := range []string{"192.0.2.7:80", "[2001:db8::7]:80"} {
			answer.Store(&c.answer)
			asked.Store(0)
			wait := patience
			if c.name == "ignore" {
				wait = 500 * time.Millisecond
			}
			var err error
			start := time.Now()
			w.Do(func() { _, err = net.DialTimeout("tcp", to, wait) })
			want := c.want
			if c.name == "prohibited" && to[0] == '[' {
				want = syscall.EACCES
			}
			if want == os.ErrDeadlineExceeded {
				if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
					t.Errorf("%s %s: %v", c.name, to, err)
				}
			} else if !errors.Is(err, want) {
				t.Errorf("%s %s: %v, want %v", c.name, to, err, want)
			}
			if d := time.Since(start); c.name != "late" && c.name != "ignore" && d > 2*time.Second {
				t.Errorf("%s %s took %v", c.name, to, d)
			}
			// "late" is asked once although the client sends its SYN again after a second.
			if n := asked.Load(); n != 1 {
				t.Errorf("%s %s: asked %d times", c.name, to, n)
			}
		}
	}
	if !testbed.Wait(patience, func() bool { n, sources := w.gw.waiting(); return n == 0 && sources == 0 }) {
		t.Error("requests are left")
	}
}

// TestNobodyListens: without a handler a connection is refused.
func TestNobodyListens(t *testing.T) {
	w := newWorld(t, testConfig(), tap.OpenConfig{})
	var err error
	w.Do(func() { _, err = net.DialTimeout("tcp", "192.0.2.7:80", patience) })
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
}

// TestServerSpeaksFirst: the answer to our SYN-ACK may come back while netstack still holds the endpoint's lock.
func TestServerSpeaksFirst(t *testing.T) {
	testbed.Leaks(t)
	cfg := testConfig()
	cfg.Handlers.TCP = accepting(func(c Conn) {
		io.WriteString(c, "220 welcome\r\n")
		c.CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	// A segment that was parked shows as a greeting that takes a retransmission, a second. A machine that is busy elsewhere may stall a round as long.
	for round := 1; ; round++ {
		slowest := greetings(t, w)
		if slowest < 900*time.Millisecond {
			return
		}
		t.Logf("round %d: the slowest greeting took %v", round, slowest)
		if round == 3 {
			t.Fatal("each round had a greeting that waited for a retransmission")
		}
	}
}

// greetings makes 1,000 connections to a server that speaks first and returns how long the slowest took.
func greetings(t *testing.T, w *world) time.Duration {
	var wg sync.WaitGroup
	var slowest atomic.Int64
	for i := range 4 {
		to := [2]string{"192.0.2.7:25", "[2001:db8::7]:25"}[i%2]
		wg.Go(func() {
			for range 250 {
				start := time.Now()
				c := w.dial(t, to)
				b, err := io.ReadAll(c)
				c.Close()
				if err != nil || string(b) != "220 welcome\r\n" {
					t.Errorf("%q, %v", b, err)
					return
				}
				if d := int64(time.Since(start)); d > slowest.Load() {
					slowest.Store(d)
				}
			}
		})
	}
	wg.Wait()
	return time.Duration(slowest.Load())
}

func TestHalfClose(t *testing.T) {
	cfg := testConfig()
	conns := make(chan Conn, 1)
	cfg.Handlers.TCP = accepting(func(c Conn) { conns <- c })
	w := newWorld(t, cfg, tap.OpenConfig{})

	// The container is done first, and still hears the answer.
	c := w.dial(t, "192.0.2.7:80")
	s := <-conns
	s.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(c, "question")
	c.CloseWrite()
	if b, err := io.ReadAll(s); err != nil || string(b) != "question" {
		t.Fatalf("%q, %v", b, err)
	}
	io.WriteString(s, "answer")
	s.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "answer" {
		t.Fatalf("%q, %v", b, err)
	}
	s.Close()

	// The gateway is done first.
	c = w.dial(t, "192.0.2.7:80")
	s = <-conns
	s.SetDeadline(time.Now().Add(patience))
	io.WriteString(s, "greeting")
	s.CloseWrite()
	if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Fatalf("write behind CloseWrite: %v", err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "greeting" {
		t.Fatalf("%q, %v", b, err)
	}
	fmt.Fprint(c, "still here")
	c.Close()
	if b, err := io.ReadAll(s); err != nil || string(b) != "still here" {
		t.Fatalf("%q, %v", b, err)
	}
	s.Close()
	testbed.Eventually(t, patience, func() bool { return len(w.gw.flows.all()) == 0 })
}

func TestReset(t *testing.T) {
	cfg := testConfig()
	conns := make(chan Conn, 1)
	var early atomic.Bool
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
		} else if early.Load() {
			c.Reset()
		} else {
			conns <- c
		}
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	for _, op := range []string{"read", "writeto", "push", "pump", "write", "closed half"} {
		c := w.dial(t, "192.0.2.7:80")
		s := <-conns
		s.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "x")
		s.Read(make([]byte, 1))
		done := make(chan error, 1)
		reset := func() { c.SetLinger(0); c.Close() }
		switch op {
		case "read":
			go func() { _, err := s.Read(make([]byte, 1)); done <- err }()
		case "writeto":
			go func() { _, err := s.WriteTo(struct{ io.Writer }{io.Discard}); done <- err }()
		case "push":
			go func() { _, err := s.WriteTo(&sink{}); done <- err }()
		case "pump":
			s.(AsyncConn).Pump(tryOnly{&sink{}}, func(err error) { done <- err })
		case "write":
			go func() {
				for {
					if _, err := s.Write(make([]byte, 1<<20)); err != nil {
						done <- err
						return
					}
				}
			}()
		case "closed half": // a reset behind a FIN
			c.CloseWrite()
			if _, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			io.WriteString(s, "unread")
			time.Sleep(50 * time.Millisecond)
			reset()
			time.Sleep(50 * time.Millisecond)
			_, err := s.Write([]byte("y"))
			done <- err
		}
		time.Sleep(20 * time.Millisecond)
		reset()
		select {
		case err := <-done:
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %v, want ECONNRESET", op, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: still waits", op)
		}
		// It stays that way, for every operation.
		if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write after %s: %v", op, err)
		}
		s.Close()
	}

	// The other way.
	for _, closedHalf := range []bool{false, true} {
		c := w.dial(t, "192.0.2.7:80")
		s := <-conns
		if closedHalf {
			s.CloseWrite()
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		}
		blocked := make(chan error, 1)
		go func() { _, err := s.Read(make([]byte, 1)); blocked <- err }()
		time.Sleep(10 * time.Millisecond)
		s.Reset()
		s.Reset()
		if err := <-blocked; !errors.Is(err, net.ErrClosed) {
			t.Errorf("read while reset: %v", err)
		}
		var err error
		if testbed.Wait(patience, func() bool { _, err = c.Write([]byte("x")); return err != nil }); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("container's write: %v", err)
		}
		if !closedHalf {
			c = w.dial(t, "192.0.2.7:80")
			s = <-conns
			s.Reset()
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("container's read: %v", err)
			}
		}
	}
	// At once behind Accept, before the container's ACK.
	early.Store(true)
	w.Do(func() {
		c, err := net.DialTimeout("tcp", "192.0.2.7:80", patience)
		if err == nil {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			_, err = c.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset in the handshake: %v", err)
		}
	})
	testbed.Eventually(t, patience, func() bool { return len(w.gw.flows.all()) == 0 })
}

// sink is a TryWriter that takes n bytes at a time, or everything when n is 0.
type sink struct {
	mu   sync.Mutex
	n    int
	busy int // every busy-th TryWrite takes nothing
	k    int
	sum  bytes.Buffer
}

func (s *sink) TryWrite(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.k++
	if s.busy > 0 && s.k%s.busy == 0 {
		return 0, nil
	}
	if s.n > 0 && len(b) > s.n {
		b = b[:s.n]
	}
	return s.sum.Write(b)
}

func (s *sink) Write(b []byte) (int, error) {
	time.Sleep(100 * time.Microsecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sum.Write(b)
}

// tryOnly hides Write.
type tryOnly struct{ s *sink }

func (w tryOnly) TryWrite(b []byte) (int, error) { return w.s.TryWrite(b) }

// TestBulk moves megabytes both ways in every fashion and compares digests.
func TestBulk(t *testing.T) {
	testbed.Leaks(t)
	for _, open := range []tap.OpenConfig{{}, {Plain: true}, {Queues: 2}} {
		cfg := testConfig()
		conns := make(chan Conn, 1)
		cfg.Handlers.TCP = accepting(func(c Conn) { conns <- c })
		w := newWorld(t, cfg, open)
		size := 24 << 20
		if open.Plain || raceEnabled {
			size = 4 << 20
		}
		data := make([]byte, size)
		rand.NewChaCha8([32]byte{1}).Read(data)
		want := sha256.Sum256(data)
		for _, to := range []string{"192.0.2.7:80", "[2001:db8::7]:80"} {
			for _, how := range []string{"write", "readfrom", "read", "writeto", "push", "push slow", "pump", "trywrite", "room"} {
				c := w.dial(t, to)
				c.SetDeadline(time.Now().Add(3 * patience))
				s := <-conns
				s.SetDeadline(time.Now().Add(3 * patience))
				var got bytes.Buffer
				var err error
				var wg sync.WaitGroup
				switch how {
				case "write", "readfrom", "trywrite", "room":
					wg.Go(func() { io.Copy(&got, c) })
					switch how {
					case "write":
						_, err = s.Write(data)
					case "trywrite":
						for d := data; len(d) > 0 && err == nil; {
							var n int
							if n, err = s.(AsyncConn).TryWrite(d); n == 0 {
								time.Sleep(time.Millisecond)
							}
							d = d[n:]
						}
					case "room":
						room := make(chan struct{}, 1)
						if !s.(AsyncConn).NotifyRoom(func() { wake(room) }) {
							t.Fatal("a connection of the gateway does not know of room")
						}
						for d := data; err == nil; {
							var n int
							if n, err = s.(AsyncConn).TryWrite(d); n == len(d) {
								break
							}
							d = d[n:]
							select {
							case <-room:
							case <-time.After(patience):
								t.Fatalf("%+v %s: nobody tells that there is room; %d bytes to go", open, to, len(d))
							}
						}
					default:
						_, err = s.ReadFrom(struct{ io.Reader }{bytes.NewReader(data)})
					}
					s.CloseWrite()
					wg.Wait()
				default:
					wg.Go(func() { c.Write(data); c.CloseWrite() })
					switch how {
					case "read":
						_, err = io.Copy(&got, struct{ io.Reader }{s})
					case "writeto":
						_, err = s.WriteTo(struct{ io.Writer }{&got})
					case "push":
						k := &sink{}
						_, err = s.WriteTo(k)
						got = k.sum
					case "push slow":
						k := &sink{n: 30000, busy: 3}
						_, err = s.WriteTo(k)
						got = k.sum
					case "pump":
						k := &sink{n: 100000, busy: 7}
						end := make(chan error, 1)
						s.(AsyncConn).Pump(tryOnly{k}, func(err error) { end <- err })
						tick := time.NewTicker(time.Millisecond)
						for waiting := true; waiting; {
							select {
							case err = <-end:
								waiting = false
							case <-tick.C:
								s.(AsyncConn).Resume()
							}
						}
						tick.Stop()
						got = k.sum
					}
					wg.Wait()
				}
				if err != nil || sha256.Sum256(got.Bytes()) != want {
					t.Fatalf("%+v %s %s: %d of %d bytes, %v; drops %v", open, to, how, got.Len(), size, err, drops(w.gw))
				}
				s.Close()
				c.Close()
			}
		}
	}
}

// dialTCP is DialTCP for one who waits.
func dialTCP(ctx context.Context, g *Gateway, src, dst netip.AddrPort) (Conn, error) {
	type outcome struct {
		c   Conn
		err error
	}
	got := make(chan outcome, 1) // a second outcome would block
	g.DialTCP(ctx, src, dst, func(c Conn, err error) { got <- outcome{c, err} })
	o := <-got
	return o.c, o.err
}

func TestDialTCP(t *testing.T) {
	testbed.Leaks(t)
	w := newWorld(t, testConfig(), tap.OpenConfig{})
	for _, c := range []struct{ dst, src netip.Addr }{{con4, netip.MustParseAddr("203.0.113.9")}, {con6, netip.MustParseAddr("2001:db8:9::9")}} {
		l, err := w.Listen("tcp", netip.AddrPortFrom(c.dst, 8080).String())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, src := range []netip.AddrPort{netip.AddrPortFrom(c.src, 40000), netip.AddrPortFrom(c.src, 0), {}} {
			s, err := dialTCP(ctx, w.gw, src, netip.AddrPortFrom(c.dst, 8080))
			if err != nil {
				t.Fatalf("from %v: %v; drops %v", src, err, drops(w.gw))
			}
			in, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			in.SetDeadline(time.Now().Add(patience))
			from := in.RemoteAddr().(*net.TCPAddr).AddrPort()
			if src.IsValid() && from.Addr() != src.Addr() || src.Port() != 0 && from.Port() != src.Port() || from != s.LocalAddr().(*net.TCPAddr).AddrPort() {
				t.Errorf("container sees %v, want %v", from, src)
			}
			if !src.IsValid() && from.Addr() != w.gw.Addr(version(c.dst)) {
				t.Errorf("container sees %v, want the gateway", from)
			}
			go fmt.Fprint(in, "hi")
			var b [2]byte
			if _, err := io.ReadFull(s, b[:]); err != nil || string(b[:]) != "hi" {
				t.Fatalf("%q, %v", b, err)
			}
			// The same client port to another port of the container.
			if src.Port() != 0 {
				l2, err := w.Listen("tcp", netip.AddrPortFrom(c.dst, 8081).String())
				if err != nil {
					t.Fatal(err)
				}
				s2, err := dialTCP(ctx, w.gw, src, netip.AddrPortFrom(c.dst, 8081))
				if err != nil {
					t.Errorf("second connection from %v: %v", src, err)
				} else {
					s2.Reset()
				}
				l2.Close()
				if _, err := dialTCP(ctx, w.gw, src, netip.AddrPortFrom(c.dst, 8080)); !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("same connection again: %v", err)
				}
			}
			in.Close()
			s.Close()
		}
		// The same client port again and again, as from a client that reuses it.
		for i := range 50 {
			src := netip.AddrPortFrom(c.src, 50000)
			s, err := dialTCP(ctx, w.gw, src, netip.AddrPortFrom(c.dst, 8080))
			if err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
			in, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			s.Close()
			io.Copy(io.Discard, in)
			in.Close()
			testbed.Eventually(t, patience, func() bool { return s.(*conn).dead() })
		}
		if _, err := dialTCP(ctx, w.gw, netip.AddrPortFrom(c.src, 0), netip.AddrPortFrom(c.dst, 9)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("closed port: %v", err)
		}
		short, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		if _, err := dialTCP(short, w.gw, netip.AddrPortFrom(c.src, 0), netip.AddrPortFrom(c.dst.Next(), 9)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("container that is not there: %v", err)
		}
		stop()
		if _, err := dialTCP(ctx, w.gw, netip.AddrPortFrom(c.src, 0), netip.AddrPortFrom(c.src, 9)); !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("address outside the network: %v", err)
		}
	}
	testbed.Eventually(t, patience, func() bool { return len(w.gw.flows.all()) == 0 })
}

func TestDeadlines(t *testing.T) {
	cfg := testConfig()
	conns := make(chan Conn, 1)
	cfg.Handlers.TCP = accepting(func(c Conn) { conns <- c })
	w := newWorld(t, cfg, tap.OpenConfig{})
	c := w.dial(t, "192.0.2.7:80")
	s := <-conns
	defer s.Close()
	for range 2 {
		s.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
		for _, f := range []func() error{
			func() error { _, err := s.Read(make([]byte, 1)); return err },
			func() error { _, err := s.WriteTo(&sink{}); return err },
			func() error { _, err := s.WriteTo(struct{ io.Writer }{io.Discard}); return err },
		} {
			if err := f(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
	}
	s.SetReadDeadline(time.Time{})
	go func() { time.Sleep(20 * time.Millisecond); fmt.Fprint(c, "x") }()
	if n, err := s.Read(make([]byte, 10)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	// A container that does not read stops the writer; the buffers are bounded.
	s.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := s.Write(make([]byte, 256<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n > 64<<20 {
		t.Fatalf("wrote %d bytes to a container that does not read: %v", n, err)
	}
	go func() { time.Sleep(20 * time.Millisecond); s.Close() }()
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("read while closed: %v", err)
	}
}
