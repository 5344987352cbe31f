package nat

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// withFD runs f with c's descriptor.
func withFD(t testing.TB, c *net.TCPConn, f func(fd int)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// holdLoop has the loop of streams wait until f has returned, so that it finds all that f did at once.
func (n *NAT) holdLoop(t testing.TB, f func()) {
	t.Helper()
	in, out := make(chan struct{}), make(chan struct{})
	n.streams.post(func() { close(in); <-out })
	<-in
	defer close(out)
	f()
}

// A read that brings less than it asks for is taken for the last, and there is no other event for what was behind it: a FIN, a reset, bytes behind urgent ones.
func TestTCPBehindAShortRead(t *testing.T) { bothWays(t, testTCPBehindAShortRead) }

func testTCPBehindAShortRead(t *testing.T, cfg Config) {
	nw := newNetwork(t, 1, cfg)
	newOutside(t).each(t, func(t *testing.T, l *net.TCPListener, _ netip.Addr) {
		for range 5 {
			in, out := join(t, nw.cs[0], l)
			nw.holdLoop(t, func() {
				io.WriteString(out, "last words")
				out.Close()
				time.Sleep(5 * time.Millisecond)
			})
			if b, err := io.ReadAll(in); string(b) != "last words" || err != nil {
				t.Fatalf("with a FIN: %q, %v", b, err)
			}
			in.Close()

			in, out = join(t, nw.cs[0], l)
			nw.holdLoop(t, func() {
				withFD(t, out, func(fd int) {
					for _, w := range []struct {
						b     string
						flags int
					}{{"before", 0}, {"!", unix.MSG_OOB}, {"behind", 0}} {
						if err := unix.Sendto(fd, []byte(w.b), w.flags, nil); err != nil {
							t.Error(err)
						}
					}
				})
				time.Sleep(5 * time.Millisecond)
			})
			b := make([]byte, len("beforebehind"))
			if _, err := io.ReadFull(in, b); string(b) != "beforebehind" || err != nil {
				t.Fatalf("with urgent data: %q, %v", b, err)
			}
			in.Close()

			in, out = join(t, nw.cs[0], l)
			nw.holdLoop(t, func() {
				io.WriteString(out, "lost or not")
				out.SetLinger(0)
				out.Close()
				time.Sleep(5 * time.Millisecond)
			})
			if b, err := io.ReadAll(in); err == nil {
				t.Fatalf("with a reset: %q and no error", b)
			}
			in.Close()
		}
	})
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().TCPFlows == 0 })
}

// Nagle's algorithm is off by the time that there is something it could hold back.
func TestTCPNoDelay(t *testing.T) {
	nw := newNetwork(t, 1, Config{})
	in, out := join(t, nw.cs[0], newOutside(t).v4)
	on := func() (on bool) {
		nw.tcp.mu.Lock()
		defer nw.tcp.mu.Unlock()
		for f := range nw.tcp.live {
			f.wr.Lock()
			v, err := unix.GetsockoptInt(f.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY)
			f.wr.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			on = v != 0
		}
		return on
	}
	b := make([]byte, 1)
	for i := range 3 {
		in.Write([]byte("x"))
		if _, err := io.ReadFull(out, b); err != nil {
			t.Fatal(err)
		}
		if on() != (i > 0) {
			t.Errorf("after %d writes: %v", i+1, on())
		}
	}
}
