package nat

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"patchbay/bench/load"
	"patchbay/frame"
	"patchbay/internal/testbed"
)

// echoAll answers on l until it is closed: each connection gets back what it sends.
func echoAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}

// self is this test program, which is also the load generator: see TestMain.
func self(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// loadMain is what a child started with load-serve or load-crr does.
func loadMain(mode, arg string) error {
	if mode == "load-serve" {
		return load.Run(context.Background(), arg)
	}
	var c load.Config
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	r, err := load.ConnectRequestClose(context.Background(), c)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// load runs connect-request-close in a container, retrying while the server starts.
func (p *peer) load(t testing.TB, c load.Config) (r load.Result) {
	t.Helper()
	testbed.Eventually(t, 5*time.Second, func() bool {
		conn, err := p.tryDial(c.Addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	arg, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := p.Command(self(t), "load-crr", string(arg))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		t.Fatalf("load: %v: %s", err, out)
	}
	return r
}

// settled waits until nothing of n's flows is left and returns how many goroutines and bytes of heap there are.
func settled(t testing.TB, n *NAT, base int) (gos int, heap uint64) {
	t.Helper()
	testbed.Wait(10*time.Second, func() bool { return n.Stats().TCPFlows == 0 && runtime.NumGoroutine() <= base })
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// TestManyFlows holds a thousand connections open at once, with bytes through each, and then makes thousands one after the other. None fails, and goroutines
// and memory are what they were before.
func TestManyFlows(t *testing.T) {
	nw := newNetwork(t, 1, Config{})
	o := newOutside(t)
	go echoAll(o.v4)
	ask := func(c net.Conn, i int) error {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		q := fmt.Sprintf("question %d", i)
		io.WriteString(c, q)
		b := make([]byte, len(q))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != q {
			return fmt.Errorf("%q for %q: %w", b, q, err)
		}
		return nil
	}
	one := func(i int) error {
		c, err := nw.cs[0].tryDial(o.v4.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		return ask(c, i)
	}
	for i := range 50 {
		if err := one(i); err != nil {
			t.Fatal(err)
		}
	}
	gos, heap := settled(t, nw.NAT, 0)

	conns := make([]net.Conn, 1000)
	for i := range conns {
		conns[i] = nw.cs[0].dial(t, o.v4.Addr().String())
	}
	for round := range 3 {
		for i, c := range conns {
			if err := ask(c, i*round); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
		}
	}
	if f := nw.Stats().TCPFlows; f != len(conns) {
		t.Errorf("%d flows for %d connections", f, len(conns))
	}
	if g := runtime.NumGoroutine() - gos; g > 2*len(conns)+1100 { // a thousand are the echo server's
		t.Errorf("%d goroutines more for %d flows", g, len(conns))
	}
	t.Logf("1,000 flows: %d goroutines more, %d MiB resident", runtime.NumGoroutine()-gos, rss(t)>>20)
	for _, c := range conns {
		c.Close()
	}
	testbed.Eventually(t, 20*time.Second, func() bool { return nw.Stats().TCPFlows == 0 })

	// A program of its own makes the short ones, so that what is measured here is the NAT and not the client.
	srv := o.Command(self(t), "load-serve", netip.AddrPortFrom(o.Addr4, 7000).String())
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { srv.Process.Kill(); srv.Wait() }()
	count := 20000
	if testing.Short() {
		count = 2000
	}
	for _, streams := range []int{1, 16} {
		for _, greeting := range []bool{false, true} {
			c := load.Config{Addr: netip.AddrPortFrom(o.Addr4, 7000).String(), Count: count / 4, Duration: 2 * time.Minute, Streams: streams, Greeting: greeting}
			r := nw.cs[0].load(t, c)
			t.Logf("%d connections, %d at a time, server first %v: %.0f/s, p50 %v, p99 %v, slowest %v", r.Ops, streams, greeting, r.OpsPerSecond(), r.P50, r.P99, r.Max)
			if r.Errors != 0 || r.Ops < int64(count/4) {
				t.Errorf("%d of %d failed: %s", r.Errors, count/4, r.FirstErr)
			}
			if r.Max >= time.Second { // what a lost SYN costs
				t.Errorf("the slowest took %v", r.Max)
				nw.Drops().Each(func(d frame.Drop, n uint64) { t.Logf("NAT: %s %d", d, n) })
				nw.gw.Drops().Each(func(d frame.Drop, n uint64) { t.Logf("gateway: %s %d", d, n) })
			}
		}
	}
	gos2, heap2 := settled(t, nw.NAT, gos)
	if gos2 > gos+2 {
		t.Errorf("%d goroutines, %d before", gos2, gos)
	}
	if heap2 > heap+(8<<20) {
		t.Errorf("%d bytes of heap, %d before", heap2, heap)
	}
	if f := nw.Stats().TCPFlows; f != 0 {
		t.Errorf("%d flows are left", f)
	}
}

// TestPublishedService holds what a server in a container sees of clients of its published port, and that the client's connection ends as the server ends it.
//
//	[ext] ─── [host] port 8080 ─── NAT ─── switch ─── [c0] :80
func TestPublishedService(t *testing.T) {
	testbed.Leaks(t)
	nw := newNetwork(t, 1, Config{})
	ext := testbed.NewExternal(t)
	c := nw.cs[0]
	p, err := nw.Publish(mustSpec(t, "8080:80"), []netip.Addr{c.addr4, c.addr6})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l, err := c.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(s, netip.MustParseAddrPort(s.RemoteAddr().String()).String())
			s.Close()
		}
	}()
	host := testbed.Host(t)
	for _, k := range []struct {
		from *testbed.NS
		to   netip.Addr
		want string // "" is the client's own
	}{
		{ext.NS, ext.HostAddr4, ""},
		{ext.NS, ext.HostAddr6, ""},
		{host, netip.MustParseAddr("127.0.0.1"), "10.88.0.1"},
		{host, netip.MustParseAddr("::1"), "fd00:88::1"},
		{host, ext.HostAddr4, "10.88.0.1"},
		{c.NS, ext.HostAddr4, "10.88.0.1"}, // the container itself, by way of the host
	} {
		var conn net.Conn
		var err error
		k.from.Do(func() { conn, err = net.DialTimeout("tcp", netip.AddrPortFrom(k.to, 8080).String(), 5*time.Second) })
		if err != nil {
			t.Errorf("%s: %v", k.to, err)
			continue
		}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		b, err := io.ReadAll(conn)
		if err != nil {
			t.Errorf("%s: %v", k.to, err)
		}
		got, _ := netip.ParseAddrPort(string(b))
		got = netip.AddrPortFrom(got.Addr().Unmap(), got.Port())
		switch {
		case k.want == "" && got != netip.MustParseAddrPort(conn.LocalAddr().String()):
			t.Errorf("%s: the server sees %s, the client is %s", k.to, got, conn.LocalAddr())
		case k.want != "" && got.Addr().String() != k.want:
			t.Errorf("%s: the server sees %s, want %s", k.to, got, k.want)
		}
		conn.Close()
	}
	// Refusal, by a container that no longer listens, is a reset.
	l.Close()
	var conn net.Conn
	ext.Do(func() { conn, err = net.Dial("tcp", netip.AddrPortFrom(ext.HostAddr4, 8080).String()) })
	if err == nil {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err = conn.Read(make([]byte, 1)); err == io.EOF {
			t.Error("a refusal is seen as an orderly end")
		}
		conn.Close()
	}
	if err == nil {
		t.Error("a refusal is not seen at all")
	}
}
