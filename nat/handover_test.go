package nat

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// duplicate does what sending descriptors to another process does to them.
func duplicate(t testing.TB, fds []int) (out []int) {
	t.Helper()
	for _, fd := range fds {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}

// TestPublishedHandover holds that a published port that goes from one NAT to the next, and back, and is kept when the next one gives up, refuses no client
// and leaves none waiting. Clients never stop coming.
func TestPublishedHandover(t *testing.T) {
	testbed.Leaks(t)
	port := hello(t)
	spec := mustSpec(t, fmt.Sprintf("8080-8083:%d", port))
	spec.Single = true
	d := &dialNet{}
	n := startNAT(t, Config{Network: d})
	p, err := n.Publish(spec, container)
	if err != nil {
		t.Fatal(err)
	}

	var served atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", 8080+i%4), 10*time.Second)
				if err != nil {
					t.Errorf("connect: %v", err)
					return
				}
				c.SetDeadline(time.Now().Add(10 * time.Second))
				if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
					t.Errorf("%q, %v", b, err)
				}
				c.Close()
				served.Add(1)
			}
		})
	}
	more := func() {
		t.Helper()
		was := served.Load()
		testbed.Eventually(t, 10*time.Second, func() bool { return served.Load() >= was+50 || t.Failed() })
	}
	for range 5 {
		more()
		if _, err := p.Export(); err != nil {
			t.Fatal(err)
		}
		// Nobody serves them now: the 8 clients wait, each with its connection made.
		testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().PublishedFlows == 0 })
		was := served.Load()
		time.Sleep(20 * time.Millisecond)
		if got := served.Load(); got > was+8 {
			t.Errorf("%d connections were served of what was exported", got-was)
		}
		if err := p.Resume(); err != nil { // the other did not come up
			t.Fatal(err)
		}
		more()

		fds, err := p.Export()
		if err != nil {
			t.Fatal(err)
		}
		next := startNAT(t, Config{Network: d})
		q, err := next.PublishFrom(spec, container, duplicate(t, fds))
		if err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, 5*time.Second, func() bool { return n.Stats().PublishedFlows == 0 }) // what the old one had
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		more()
		if got := next.Stats().PublishedPorts; got != 4 {
			t.Errorf("%d ports are published", got)
		}
		n, p = next, q
	}
	close(stop)
	wg.Wait()
	t.Logf("%d connections", served.Load())
	p.Close()
	hostListener(t, "127.0.0.1:8080") // nothing of it is left
	if _, err := p.Export(); err == nil {
		t.Error("export of what is closed: no error")
	}
}

// TestPublishFromRefuses holds that only the sockets of that very spec are taken, and that what is given is closed when they are not.
func TestPublishFromRefuses(t *testing.T) {
	testbed.Leaks(t)
	n := startNAT(t, Config{Network: &dialNet{}})
	p, err := n.Publish(mustSpec(t, "127.0.0.1:8080-8081:80-81"), container)
	if err != nil {
		t.Fatal(err)
	}
	u, err := n.Publish(mustSpec(t, "127.0.0.1:8080-8081:80-81/udp"), container)
	if err != nil {
		t.Fatal(err)
	}
	fds, _ := p.Export()
	ufds, _ := u.Export()
	idle, err := bound(netip.MustParseAddrPort("127.0.0.1:8090"), false, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(idle)
	null := openReserve()
	defer unix.Close(null)
	other := startNAT(t, Config{Network: &dialNet{}})
	for _, c := range []struct {
		spec string
		fds  []int
		want string
	}{
		{"127.0.0.1:8080-8081:80-81", fds[:1], "1 sockets for 2 ports"},
		{"127.0.0.1:8080:80", []int{ufds[0]}, "of another kind"},
		{"127.0.0.1:8080:80/udp", []int{fds[0]}, "of another kind"},
		{"127.0.0.1:8080:80", []int{null}, "no socket"},
		{"127.0.0.1:8090:80", []int{idle}, "does not listen"},
		{"127.0.0.1:8080-8081:80-81", []int{fds[0], fds[0]}, "bound to 127.0.0.1:8080"},
		{"8080:80", fds[:1], "bound to 127.0.0.1:8080"},
		{"127.0.0.2:8080:80/udp", ufds[:1], "bound to 127.0.0.1:8080"},
	} {
		given := duplicate(t, c.fds)
		_, err := other.PublishFrom(mustSpec(t, c.spec), container, append([]int(nil), given...))
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "publish "+c.spec) {
			t.Errorf("%s: %v, want %q", c.spec, err, c.want)
		}
		for _, fd := range given {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
				t.Errorf("%s: descriptor %d is still open", c.spec, fd)
			}
		}
	}
	if other.Stats().PublishedPorts != 0 {
		t.Errorf("%+v", other.Stats())
	}
}

// successor starts a second NAT beside that of b; swap has the container's packets go to it.
func (b *bed) successor(t testing.TB) (n *NAT, swap func()) {
	n = startNAT(t, Config{Network: b.net})
	return n, func() { b.net.nat.Store(n) }
}

// TestUDPHandover holds that a container's UDP flow keeps its port of the host, its filter and what was under way when it goes to another NAT, and when it does not after all.
func TestUDPHandover(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	type talk struct {
		k             *net.UDPConn
		s             *echoServer
		mapped        netip.AddrPort
		stranger, far *net.UDPConn
	}
	var talks []*talk
	for _, v := range []struct{ c, host, out netip.Addr }{{bedC4, b.out.HostAddr4, b.out.Addr4}, {bedC6, b.out.HostAddr6, b.out.Addr6}} {
		w := &talk{k: bindUDP(t, b.c, v.c, 0), s: echoUDP(t, b.out.NS, v.out), far: bindUDP(t, b.out.NS, v.out, 0)}
		ask(t, w.k, w.s.addr(), []byte("before"))
		w.mapped = netip.AddrPortFrom(v.host, w.s.peer().Port())
		w.stranger = bindUDP(t, testbed.Host(t), v.host, 0) // whose address the container has never sent to
		talks = append(talks, w)
	}
	queue := func(what string) {
		for _, w := range talks {
			if _, err := w.far.WriteToUDPAddrPort([]byte(what), w.mapped); err != nil {
				t.Fatal(err)
			}
		}
	}
	heard := func(what string) {
		t.Helper()
		for _, w := range talks {
			if got, from := hear(t, w.k); string(got) != what || from != addrOf(w.far) {
				t.Errorf("%q from %s, want %q from %s", got, from, what, addrOf(w.far))
			}
		}
	}

	// One that leads to nothing: what came meanwhile comes late.
	_, fds, err := b.ExportUDP()
	if err != nil || len(fds) != 2 {
		t.Fatalf("%d flows, %v", len(fds), err)
	}
	queue("one")
	for _, w := range talks {
		silent(t, w.k)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	if err := errors.Join(b.ResumeUDP(), b.ResumeUDP()); err != nil {
		t.Fatal(err)
	}
	heard("one")

	states, fds, err := b.ExportUDP()
	if err != nil {
		t.Fatal(err)
	}
	queue("two")
	js, err := json.Marshal(states)
	if err != nil {
		t.Fatal(err)
	}
	var received []UDPFlowState
	if err := json.Unmarshal(js, &received); err != nil {
		t.Fatal(err)
	}
	n, swap := b.successor(t)
	swap()
	if got, err := n.ImportUDP(received, fds); got != 2 || err != nil {
		t.Fatalf("%d flows, %v", got, err)
	}
	heard("two")
	b.NAT.Close()
	for _, w := range talks {
		ask(t, w.k, w.s.addr(), []byte("after"))
		if p := w.s.peer().Port(); p != w.mapped.Port() {
			t.Errorf("port %d became %d", w.mapped.Port(), p)
		}
		w.stranger.WriteToUDPAddrPort([]byte("let me in"), w.mapped)
		silent(t, w.k)
	}
	if s := n.Stats(); s.UDPFlows != 2 {
		t.Errorf("%d flows", s.UDPFlows)
	}
}

// TestUDPImportRefuses holds that what cannot be taken over is closed and told, and keeps nothing else out.
func TestUDPImportRefuses(t *testing.T) {
	testbed.Leaks(t)
	n := startNAT(t, Config{Network: &dialNet{}, Limits: Limits{UDPFlowsPerContainer: 2}})
	sock := func(host string) int {
		fd, err := bound(netip.MustParseAddrPort(host), false, unix.SOCK_DGRAM)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	at := func(s string) UDPFlowState {
		return UDPFlowState{Container: netip.MustParseAddrPort(s), Peers: []netip.Addr{netip.MustParseAddr("192.0.2.1"), {}}, Idle: -1}
	}
	states := []UDPFlowState{at("10.0.2.9:1000"), at("10.0.2.9:1000"), at("[fd00:2::9]:1000"), {}, at("10.0.2.9:1001"), at("10.0.2.9:1002"), at("10.0.2.8:1")}
	fds := []int{sock("127.0.0.1:0"), sock("127.0.0.1:0"), sock("127.0.0.1:0"), sock("127.0.0.1:0"), sock("127.0.0.1:0"), sock("127.0.0.1:0"), openReserve()}
	keep := append([]int(nil), fds...)
	got, err := n.ImportUDP(states, fds)
	if got != 2 || err == nil || !strings.Contains(err.Error(), "5 of 7") || !strings.Contains(err.Error(), "10.0.2.9:1000") {
		t.Fatalf("%d, %v", got, err)
	}
	for i, fd := range keep {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if open := err == nil; open != (i == 0 || i == 4) {
			t.Errorf("socket %d of %s: open %v", i, states[i].Container, open)
		}
	}
	if _, err := n.ImportUDP(states, nil); err == nil {
		t.Error("7 flows without sockets: no error")
	}
	if s := n.Stats(); s.UDPFlows != 2 || n.udp.peers.Load() != 0 {
		t.Errorf("%+v, %d peers", s, n.udp.peers.Load())
	}
}

// TestPublishedUDPHandover holds that no datagram to a published UDP port is lost on the way to another NAT, and that its container's answers still leave from it.
func TestPublishedUDPHandover(t *testing.T) {
	testbed.Leaks(t)
	b := newBed(t, Config{})
	p := b.publishUDP(t, "5300:53")
	s := echoUDP(t, b.c, bedC4, 53)
	k := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	to := netip.AddrPortFrom(b.out.HostAddr4, 5300)
	ask(t, k, to, []byte("before"))
	fds, err := p.Export()
	if err != nil {
		t.Fatal(err)
	}
	const burst = 50
	for i := range burst {
		k.WriteToUDPAddrPort(pattern(i+100), to)
	}
	silent(t, k)
	n, swap := b.successor(t)
	swap()
	q, err := n.PublishFrom(p.Spec(), []netip.Addr{bedC4, bedC6}, duplicate(t, fds))
	if err != nil {
		t.Fatal(err)
	}
	b.NAT.Close()
	for i := range burst {
		if got, from := hear(t, k); len(got) != i+100 || from != to {
			t.Fatalf("%d bytes from %s, want %d from %s", len(got), from, i+100, to)
		}
	}
	// Its container speaks first to a client that has not been heard since.
	other := bindUDP(t, b.out.NS, b.out.Addr4, 0)
	s.WriteToUDPAddrPort([]byte("to you"), addrOf(other))
	if got, from := hear(t, other); string(got) != "to you" || from != to {
		t.Errorf("%q from %s, want it from the published port", got, from)
	}
	if _, err = q.Export(); err != nil {
		t.Fatal(err)
	}
	k.WriteToUDPAddrPort([]byte("late"), to)
	silent(t, k)
	if err := q.Resume(); err != nil {
		t.Fatal(err)
	}
	if got, _ := hear(t, k); string(got) != "late" {
		t.Errorf("%q", got)
	}
}
