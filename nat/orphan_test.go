package nat

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"patchbay/internal/testbed"
)

// TestOrphansAreReset holds that a container that waits for bytes on a NAT connection, of either direction and IP version, gets a reset soon after the process that
// carried it is gone without a word, though nobody but the container knows the connection's sequence numbers.
func TestOrphansAreReset(t *testing.T) {
	testbed.Leaks(t)
	dir := filepath.Join(t.TempDir(), "flows")
	j := openJournal(t, dir, 0)
	nw := newNetwork(t, 1, Config{Journal: j})
	c, o := nw.cs[0], newOutside(t)

	waiting := make(map[string]*net.TCPConn)
	for _, l := range []*net.TCPListener{o.v4, o.v6} {
		for range 20 {
			in, _ := join(t, c, l)
			waiting["to "+l.Addr().String()+" from "+in.LocalAddr().String()] = in
		}
	}
	inner, err := c.Listen("tcp", "[::]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	if _, err := nw.Publish(mustSpec(t, "8080:80"), []netip.Addr{c.addr4, c.addr6}); err != nil {
		t.Fatal(err)
	}
	// From afar the client is shown with its own address, from here as the gateway with a port of the stack's choice.
	clients := []func() (net.Conn, error){
		func() (net.Conn, error) {
			return o.DialContext(t.Context(), "tcp", netip.AddrPortFrom(o.HostAddr4, 8080).String())
		},
		func() (net.Conn, error) {
			return o.DialContext(t.Context(), "tcp", netip.AddrPortFrom(o.HostAddr6, 8080).String())
		},
		func() (net.Conn, error) { return net.Dial("tcp", "127.0.0.1:8080") },
	}
	for _, dial := range clients {
		out, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		in, err := inner.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		waiting["published from "+in.RemoteAddr().String()] = in.(*net.TCPConn)
	}
	// One that has ended is nobody's orphan.
	in, out := join(t, c, o.v4)
	in.Close()
	out.Close()
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().TCPFlows == 40 && nw.Stats().PublishedFlows == len(clients) })

	type result struct {
		name string
		err  error
	}
	results := make(chan result)
	for name, conn := range waiting {
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		go func() {
			_, err := conn.Read(make([]byte, 1))
			results <- result{name, err}
		}()
	}

	nw.crash(j)
	j = openJournal(t, dir, 0)
	nw.addGateway(t, Config{Journal: j})
	if n := nw.Stats().TCPOrphans; n != len(waiting) {
		t.Errorf("%d orphans, want %d", n, len(waiting))
	}
	start := time.Now()
	for _, a := range []netip.Addr{c.addr4, c.addr6} {
		nw.ResetOrphans(a)
	}
	// A connection of after that lives through the probes.
	fresh, peer := join(t, c, o.v4)
	for range waiting {
		r := <-results
		if !errors.Is(r.err, syscall.ECONNRESET) {
			t.Errorf("%s: read: %v, want a reset", r.name, r.err)
		}
	}
	t.Logf("%d connections reset in %v with %d probes", len(waiting), time.Since(start), nw.Stats().Probes)
	if _, err := peer.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := fresh.Read(make([]byte, 1)); err != nil {
		t.Errorf("a connection of after the crash: %v", err)
	}
	if n := nw.ResetOrphans(c.addr4) + nw.Stats().TCPOrphans; n != 0 {
		t.Errorf("%d orphans are left", n)
	}
	nw.stop()
	j.Close()
}

// TestOrphansOfALateInterface holds that probes are repeated: the container's interface comes up a while after its port.
func TestOrphansOfALateInterface(t *testing.T) {
	testbed.Leaks(t)
	dir := filepath.Join(t.TempDir(), "flows")
	j := openJournal(t, dir, 0)
	nw := newNetwork(t, 1, Config{Journal: j})
	c, o := nw.cs[0], newOutside(t)
	in, _ := join(t, c, o.v4)
	nw.crash(j)
	mustRun(t, c, "link", "set", "eth0", "down")
	j = openJournal(t, dir, 0)
	nw.addGateway(t, Config{Journal: j})
	nw.ResetOrphans(c.addr4)
	testbed.Eventually(t, 5*time.Second, func() bool { return nw.Stats().Probes > 0 })
	mustRun(t, c, "link", "set", "eth0", "up")
	mustRun(t, c, "route", "add", "default", "via", own4.String())
	if _, err := in.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
	nw.stop()
	j.Close()
}

// TestOrphansOutliveTheirProber holds that a process that ends before its probes are done leaves the orphans to the next one, and that a container that is gone has none.
func TestOrphansOutliveTheirProber(t *testing.T) {
	testbed.Leaks(t)
	dir := filepath.Join(t.TempDir(), "flows")
	first, p := flowPair(0)
	d, q := flowPair(1)
	j := openJournal(t, dir, 8)
	j.put(first, p, time.Now())
	j.put(d, q, time.Now())
	j.Close()
	for _, c := range []struct {
		want   int
		forget bool
	}{{want: 2}, {want: 2, forget: true}, {want: 1}} {
		j := openJournal(t, dir, 8)
		n, err := New(Config{Network: &dialNet{}, Journal: j})
		if err != nil {
			t.Fatal(err)
		}
		if got := n.Stats().TCPOrphans; got != c.want {
			t.Errorf("%d orphans wait, want %d", got, c.want)
		}
		if c.forget {
			n.Forget(d.Addr())
		}
		if got := n.ResetOrphans(p.Addr()); got != 0 {
			t.Errorf("%d orphans of a peer", got)
		}
		if got := n.ResetOrphans(first.Addr()); got != 1 {
			t.Errorf("%d orphans of %s, want 1", got, first.Addr())
		}
		testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().Probes == 1 })
		n.Close()
		j.Close()
	}
}

func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pacer{every: time.Second / 500}
		start := time.Now()
		for range 1000 {
			if !p.wait(t.Context()) {
				t.Fatal("ended")
			}
		}
		if d := time.Since(start); d < 1990*time.Millisecond || d > 2*time.Second {
			t.Errorf("1000 events at 500 a second took %v", d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if p.wait(ctx) {
			t.Error("did not end with its context")
		}
	})
}

// mustRun runs ip(8) in a container.
func mustRun(t *testing.T, c *peer, args ...string) {
	t.Helper()
	if out, err := c.Command(testbed.Tool(t, "ip"), args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}
