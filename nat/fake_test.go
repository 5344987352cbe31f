package nat

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/stack"
)

// tcpConn is a kernel connection in the place of the stack's, for tests of limits and bookkeeping; bytes are tested on the real stack.
type tcpConn struct{ *net.TCPConn }

func (c tcpConn) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{c.TCPConn})
}
func (c tcpConn) Reset() { c.SetLinger(0); c.Close() }

// connPair is the two ends of a connection over loopback.
func connPair(t testing.TB) (a, b tcpConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return tcpConn{c.(*net.TCPConn)}, tcpConn{s.(*net.TCPConn)}
}

// request is a SYN whose answer is recorded.
type request struct {
	t        testing.TB
	src, dst netip.AddrPort
	mu       sync.Mutex
	answer   string
	conn     tcpConn // the container's end after "accept"
}

func (r *request) Src() netip.AddrPort { return r.src }
func (r *request) Dst() netip.AddrPort { return r.dst }
func (r *request) set(a string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answer != "" {
		r.t.Errorf("answered %q after %q", a, r.answer)
	}
	r.answer = a
}
func (r *request) got() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answer
}
func (r *request) Refuse() { r.set("refuse") }
func (r *request) Ignore() { r.set("ignore") }
func (r *request) Unreachable(why stack.Unreachable) {
	r.set([]string{"net", "host", "port", "prohibited", "toobig"}[why])
}
func (r *request) Accept() (stack.Conn, error) {
	in, out := connPair(r.t)
	r.conn = out
	r.set("accept")
	return in, nil
}

// dialNet lets published ports dial: every container address is this machine's loopback.
type dialNet struct {
	addrNet
	mu   sync.Mutex
	srcs []netip.AddrPort
}

func (d *dialNet) DialTCP(ctx context.Context, src, dst netip.AddrPort, done func(stack.Conn, error)) {
	d.mu.Lock()
	d.srcs = append(d.srcs, src)
	d.mu.Unlock()
	go func() {
		if dst.Port() == 9 {
			<-ctx.Done()
			done(nil, ctx.Err())
			return
		}
		c, err := new(net.Dialer).DialContext(ctx, "tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), dst.Port()).String())
		if err != nil {
			done(nil, syscall.ECONNREFUSED)
			return
		}
		done(tcpConn{c.(*net.TCPConn)}, nil)
	}()
}

// startNAT runs a NAT until the test ends and then holds that nothing is left of it.
func startNAT(t testing.TB, cfg Config) *NAT {
	t.Helper()
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(context.Background()) }()
	t.Cleanup(func() {
		n.Close()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if s := n.Stats(); s.held() != 0 || len(n.tcp.live) != 0 || len(n.tcp.inward) != 0 {
			t.Errorf("after Close: %+v, %d live, %d dials", s, len(n.tcp.live), len(n.tcp.inward))
		}
	})
	return n
}

// held is what counts against a limit.
func (s Stats) held() int {
	return s.TCPFlows + s.HalfOpen + s.PublishedFlows + s.PublishedHalfOpen + s.UDPFlows + s.UDPClients + s.PingFlows
}

func (n *NAT) try(t testing.TB, src, dst string) *request {
	r := &request{t: t, src: netip.MustParseAddrPort(src), dst: netip.MustParseAddrPort(dst)}
	n.HandleTCP(r)
	return r
}

func (r *request) want(t testing.TB, answer string) {
	t.Helper()
	if !testbed.Wait(5*time.Second, func() bool { return r.got() != "" }) || r.got() != answer {
		t.Fatalf("%s → %s: answered %q, want %q", r.src, r.dst, r.got(), answer)
	}
}
