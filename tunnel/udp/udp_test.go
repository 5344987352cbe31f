package udp

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// listen opens a Socket in ns, or where the test is.
func listen(t testing.TB, ns *testbed.NS, cfg Config) *Socket {
	t.Helper()
	var s *Socket
	var err error
	open := func() { s, err = Listen(cfg) }
	if ns == nil {
		testbed.Require(t)
		open()
	} else {
		ns.Do(open)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func at(s string) Config { return Config{Listen: netip.MustParseAddrPort(s)} }

// inbox is a Handler that keeps what it gets.
type inbox struct {
	mu  sync.Mutex
	got arrived
	n   atomic.Int64

	arrived // what there was when wait returned; of the test's goroutine
}

type arrived struct {
	datagrams [][]byte
	from      []netip.AddrPort
	tos       []uint8
	messages  int
}

func (in *inbox) Receive(ts []Train) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, t := range ts {
		in.got.messages++
		for d := t.Data; ; {
			n := min(t.Size, len(d))
			in.got.datagrams = append(in.got.datagrams, bytes.Clone(d[:n]))
			in.got.from, in.got.tos = append(in.got.from, t.From), append(in.got.tos, t.TOS)
			if d = d[n:]; len(d) == 0 {
				break
			}
		}
	}
	in.n.Store(int64(len(in.got.datagrams)))
}

// wait returns when there are n datagrams, all there have been.
func (in *inbox) wait(t testing.TB, n int) [][]byte {
	t.Helper()
	if !testbed.Wait(10*time.Second, func() bool { return in.n.Load() >= int64(n) }) {
		t.Fatalf("%d of %d datagrams have come", in.n.Load(), n)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.arrived = arrived{slices.Clone(in.got.datagrams), slices.Clone(in.got.from), slices.Clone(in.got.tos), in.got.messages}
	if len(in.datagrams) > n {
		t.Errorf("%d datagrams have come, not %d", len(in.datagrams), n)
	}
	return in.datagrams
}

func serve(t testing.TB, s *Socket, h Handler) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), h) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

func receive(t testing.TB, s *Socket) *inbox {
	in := &inbox{}
	serve(t, s, in)
	return in
}

func newPath(t testing.TB, s *Socket, to netip.AddrPort, cfg PathConfig) *Path {
	t.Helper()
	p, err := s.NewPath(to, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// payload is n bytes that follow from i.
func payload(i, n int) []byte {
	b := make([]byte, n)
	for k := range b {
		b[k] = byte(i*7 + k*3 + k>>8)
	}
	return b
}

// send adds a datagram of each length, the first eight bytes as head, and sends them, each its own frame.
func send(t testing.TB, p *Path, drops *frame.DropCounters, flow uint32, ecn ECN, lens ...int) (sent [][]byte, lost int) {
	t.Helper()
	b, ok := p.s.Batch(drops)
	if !ok {
		t.Fatal("the socket is closed")
	}
	defer b.Release()
	for i, n := range lens {
		d := payload(i, n)
		head := b.Head(min(8, n))
		copy(head, d)
		b.Add(p, flow, ecn, i, head, d[len(head):])
		sent = append(sent, d)
	}
	return sent, b.Send()
}

func repeat(n, times int) (ns []int) {
	for range times {
		ns = append(ns, n)
	}
	return ns
}

func same(t testing.TB, got, want [][]byte) {
	t.Helper()
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("datagram %d of %d bytes came as one of %d, or another", i, len(want[i]), len(got[i]))
		}
	}
}

func noDrops(t testing.TB, c *frame.DropCounters) {
	t.Helper()
	c.Each(func(d frame.Drop, n uint64) { t.Errorf("%d drops: %v", n, d) })
}

// Datagrams of all lengths arrive in order and whole, over both IP versions and with every combination of offloads.
func TestDelivers(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		name, listen, to string
		longest          int // of the protocol; of the loopback's MTU
	}{
		{"IPv4", "127.0.0.1:0", "127.0.0.1", MaxDatagram},
		{"IPv6", "[::1]:0", "::1", 65536 - ipv6Overhead},
		{"both, IPv4", "[::]:0", "127.0.0.1", MaxDatagram},
		{"both, IPv6", "[::]:0", "::1", 65536 - ipv6Overhead},
	} {
		lens := append(repeat(1400, 100), 1, 8, 9, 700, 700, 700, 100, 1400, 1400, 9000, 9000, c.longest, 1)
		lens = append(lens, repeat(50, 300)...)
		for _, off := range []string{"", "cut", "join", "cut and join"} {
			t.Run(c.name+" without "+off, func(t *testing.T) {
				rx := listen(t, nil, Config{Listen: netip.MustParseAddrPort(c.listen), NoJoin: strings.Contains(off, "join")})
				in := receive(t, rx)
				tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort(c.listen), NoCut: strings.Contains(off, "cut")})
				p := newPath(t, tx, netip.AddrPortFrom(netip.MustParseAddr(c.to), rx.LocalAddr().Port()), PathConfig{})
				var drops frame.DropCounters
				sent, lost := send(t, p, &drops, 0, 0, lens...)
				if lost != 0 {
					t.Errorf("%d lost", lost)
				}
				same(t, in.wait(t, len(lens)), sent)
				noDrops(t, &drops)
				for _, from := range in.from {
					if from.Port() != tx.LocalAddr().Port() || from.Addr() != netip.MustParseAddr(c.to) {
						t.Fatalf("came from %v", from)
					}
				}
				st := p.Stats()
				if st.Datagrams != uint64(len(lens)) {
					t.Errorf("%d datagrams are counted", st.Datagrams)
				}
				if cut := st.Messages < 60; cut != !strings.Contains(off, "cut") {
					t.Errorf("%d datagrams went out in %d messages", st.Datagrams, st.Messages)
				}
				if rs := rx.Stats(); rs.Datagrams != st.Datagrams || rs.Bytes != st.Bytes || rs.Missed != 0 || rs.Truncated != 0 || int(rs.Messages) != in.messages {
					t.Errorf("received %+v, sent %+v", rs, st)
				}
				if joined := in.messages < 100; off == "" && !joined {
					t.Errorf("%d datagrams came in %d messages", len(lens), in.messages)
				}
			})
		}
	}
}

// A message is full at MaxTrain bytes, at the kernel's number of datagrams, and where a shorter datagram ends it.
func TestMessagesAreSplit(t *testing.T) {
	rx := listen(t, nil, at("127.0.0.1:0"))
	in := receive(t, rx)
	tx := listen(t, nil, at("127.0.0.1:0"))
	if tx.MaxSegments() != 64 && tx.MaxSegments() != 128 {
		testbed.Lacking(t, "the kernel cuts into %d datagrams", tx.MaxSegments())
	}
	n := 0
	for _, c := range []struct {
		lens     []int
		messages int
	}{
		{repeat(1400, 46), 1},
		{repeat(1400, 47), 2},
		{repeat(100, tx.MaxSegments()), 1},
		{repeat(100, tx.MaxSegments()+1), 2},
		{[]int{100, 100, 50}, 1},
		{[]int{100, 50, 100}, 2},
		{[]int{100, 101}, 2},
		{[]int{MaxDatagram, MaxDatagram}, 2},
	} {
		p := newPath(t, tx, rx.LocalAddr(), PathConfig{})
		var drops frame.DropCounters
		send(t, p, &drops, 0, 0, c.lens...)
		noDrops(t, &drops)
		if got := p.Stats().Messages; int(got) != c.messages {
			t.Errorf("%d datagrams of %d bytes: %d messages, want %d", len(c.lens), c.lens[0], got, c.messages)
		}
		n += len(c.lens)
		in.wait(t, n)
	}
}

// Datagrams to several destinations in one Batch, as a caller with many peers might send them, each get there.
func TestManyPaths(t *testing.T) {
	tx := listen(t, nil, at("127.0.0.1:0"))
	var ps []*Path
	var ins []*inbox
	for range 3 {
		rx := listen(t, nil, at("127.0.0.1:0"))
		ins = append(ins, receive(t, rx))
		ps = append(ps, newPath(t, tx, rx.LocalAddr(), PathConfig{}))
	}
	var drops frame.DropCounters
	b, _ := tx.Batch(&drops)
	for i := range 300 {
		b.Add(ps[i%3], 0, 0, i, b.Head(0), payload(i, 200))
	}
	if b.Send() != 0 {
		t.Error("lost some")
	}
	b.Release()
	for k, in := range ins {
		for i, d := range in.wait(t, 100) {
			if !bytes.Equal(d, payload(3*i+k, 200)) {
				t.Fatalf("path %d: datagram %d is another", k, i)
			}
		}
	}
}

// Flows spread over the ports, in the range that RFC 7348 recommends, and stay in order.
func TestPorts(t *testing.T) {
	rx := listen(t, nil, at("127.0.0.1:0"))
	in := receive(t, rx)
	tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort("127.0.0.1:0"), Ports: 4})
	p := newPath(t, tx, rx.LocalAddr(), PathConfig{})
	var drops frame.DropCounters
	b, _ := tx.Batch(&drops)
	for i := range 400 {
		b.Add(p, uint32(i*i), 0, i, b.Head(0), []byte{byte(i >> 8), byte(i), byte(i * i)})
	}
	if lost := b.Send(); lost != 0 {
		t.Errorf("%d lost", lost)
	}
	b.Release()
	noDrops(t, &drops)
	last := map[netip.AddrPort]int{}
	ports := map[uint16]bool{}
	for i, d := range in.wait(t, 400) {
		n := int(d[0])<<8 | int(d[1])
		if prev, ok := last[in.from[i]]; ok && n <= prev {
			t.Fatalf("%v: %d after %d", in.from[i], n, prev)
		}
		last[in.from[i]] = n
		ports[in.from[i].Port()] = true
	}
	if len(ports) != 2 { // squares are 0 or 1 modulo 4
		t.Errorf("came from ports %v", ports)
	}
	for i := range 4 {
		send(t, p, &drops, uint32(i), 0, 10)
	}
	in.wait(t, 404)
	all := map[uint16]bool{}
	for _, from := range in.from {
		all[from.Port()] = true
	}
	if len(all) != 4 {
		t.Errorf("came from ports %v", all)
	}
	for port := range all {
		if port != tx.LocalAddr().Port() && port < 49152 {
			t.Errorf("port %d is not one of 49152 to 65535", port)
		}
	}
	one := newPath(t, tx, rx.LocalAddr(), PathConfig{OnePort: true})
	for i := range 4 {
		send(t, one, &drops, uint32(i), 0, 10)
	}
	in.wait(t, 408)
	for _, from := range in.from[404:] {
		if from != tx.LocalAddr() {
			t.Errorf("came from %v, want %v", from, tx.LocalAddr())
		}
	}
}

// ECN goes out and comes in, and datagrams of different marks do not share a message.
func TestECN(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		rx := listen(t, nil, at(addr))
		in := receive(t, rx)
		tx := listen(t, nil, at(addr))
		to := rx.LocalAddr()
		if to.Addr().IsUnspecified() {
			to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port())
		}
		p := newPath(t, tx, to, PathConfig{})
		var drops frame.DropCounters
		b, _ := tx.Batch(&drops)
		want := []ECN{0, 0, 1, 2, 2, 3, 0}
		for i, e := range want {
			b.Add(p, 0, e, i, b.Head(0), payload(i, 100))
		}
		b.Send()
		b.Release()
		in.wait(t, len(want))
		for i, e := range want {
			if in.tos[i] != uint8(e) {
				t.Errorf("%s: datagram %d with ECN %d came with %#x", addr, i, e, in.tos[i])
			}
		}
		if n := p.Stats().Messages; n != 5 {
			t.Errorf("%s: %d messages", addr, n)
		}
	}
}

// What is sent without a checksum is taken over IPv4 (RFC 7348 §4.1).
func TestZeroChecksumIsTaken(t *testing.T) {
	rx := listen(t, nil, at("127.0.0.1:0"))
	in := receive(t, rx)
	tx := listen(t, nil, at("127.0.0.1:0"))
	if err := unix.SetsockoptInt(tx.ports[0], unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
		t.Fatal(err)
	}
	p := newPath(t, tx, rx.LocalAddr(), PathConfig{NoCut: true})
	var drops frame.DropCounters
	sent, _ := send(t, p, &drops, 0, 0, 100, 100, 1000)
	same(t, in.wait(t, 3), sent)
	noDrops(t, &drops)
}

func TestListenErrors(t *testing.T) {
	testbed.Require(t)
	busy := listen(t, nil, at("127.0.0.1:0"))
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{Listen: busy.LocalAddr()}, "another program"},
		{at("192.0.2.1:4789"), "no such address"},
		{at("239.1.1.1:4789"), "group"},
		{at("[fe80::1%lo]:4789"), "[::]"},
		{Config{Ports: 1000}, "1 to 64"},
	} {
		s, err := Listen(c.cfg)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v", c.cfg.Listen, err)
		}
	}
	v4, v6 := listen(t, nil, at("127.0.0.1:0")), listen(t, nil, at("[::1]:0"))
	for _, c := range []struct {
		s    *Socket
		to   string
		want string
	}{
		{v4, "[::1]:4789", "no IPv6"},
		{v6, "127.0.0.1:4789", "no IPv4"},
		{v4, "127.0.0.1:0", "address and port"},
		{v4, "0.0.0.0:4789", "address and port"},
		{v4, "239.0.0.1:4789", "address and port"},
		{v6, "[fe80::1%nosuch]:4789", "no interface"},
	} {
		if _, err := c.s.NewPath(netip.MustParseAddrPort(c.to), PathConfig{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.to, err)
		}
	}
	if _, err := v6.NewPath(netip.MustParseAddrPort("[fe80::1%lo]:4789"), PathConfig{}); err != nil {
		t.Error(err)
	}
}

func TestServeEnds(t *testing.T) {
	testbed.Leaks(t)
	s := listen(t, nil, at("127.0.0.1:0"))
	ctx, cancel := context.WithCancel(context.Background())
	for range 3 { // it can be started again
		done := make(chan error)
		ctx, cancel := context.WithCancel(ctx)
		go func() { done <- s.Serve(ctx, &inbox{}) }()
		testbed.Eventually(t, 5*time.Second, s.serving.Load)
		if err := s.Serve(ctx, &inbox{}); err == nil || !strings.Contains(err.Error(), "another Serve") {
			t.Errorf("a second Serve: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	cancel()
	in := receive(t, s)
	testbed.Eventually(t, 5*time.Second, s.serving.Load)
	tx := listen(t, nil, at("127.0.0.1:0"))
	var drops frame.DropCounters
	send(t, newPath(t, tx, s.LocalAddr(), PathConfig{}), &drops, 0, 0, 5)
	in.wait(t, 1)
	s.Close()
	s.Close()
	if err := s.Serve(context.Background(), in); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve after Close: %v", err)
	}
	if _, ok := s.Batch(&drops); ok {
		t.Error("a Batch after Close")
	}
	if s.Stats().Missed != 0 {
		t.Error("a closed Socket has missed something")
	}
}

// Close waits for those who send.
func TestCloseWhileSending(t *testing.T) {
	testbed.Leaks(t)
	rx := listen(t, nil, at("127.0.0.1:0"))
	s := listen(t, nil, at("127.0.0.1:0"))
	p := newPath(t, s, rx.LocalAddr(), PathConfig{})
	var wg sync.WaitGroup
	var begun atomic.Int32
	for range 4 {
		wg.Go(func() {
			var drops frame.DropCounters
			for {
				b, ok := s.Batch(&drops)
				if !ok {
					break
				}
				for i := range 50 {
					b.Add(p, 0, 0, i, b.Head(0), payload(i, 1000))
				}
				b.Send()
				b.Release()
				begun.Add(1)
			}
			drops.Each(func(d frame.Drop, n uint64) {
				if d != frame.DropTxBusy {
					t.Errorf("%d drops: %v", n, d)
				}
			})
		})
	}
	testbed.Eventually(t, 10*time.Second, func() bool { return begun.Load() > 20 })
	s.Close()
	wg.Wait()
}

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool forgets at random under the race detector")
	}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		rx := listen(t, nil, at(addr))
		var n atomic.Int64
		serve(t, rx, handlerFunc(func(ts []Train) {
			for i := range ts {
				n.Add(int64(len(ts[i].Data)))
			}
		}))
		tx := listen(t, nil, Config{Listen: netip.MustParseAddrPort(addr), Ports: 2})
		p := newPath(t, tx, rx.LocalAddr(), PathConfig{})
		var drops frame.DropCounters
		data := payload(1, 65000)
		var want int64
		round := func() {
			b, _ := tx.Batch(&drops)
			for f := range 3 {
				for at := 0; at < len(data); at += 1400 {
					head := b.Head(50)
					pay := data[at:min(at+1400, len(data))]
					b.Add(p, uint32(f), ECN(f&1), f, head, pay)
					want += int64(50 + len(pay))
				}
			}
			b.Send()
			b.Release()
			for end := time.Now().Add(5 * time.Second); n.Load() < want && time.Now().Before(end); {
				time.Sleep(10 * time.Microsecond)
			}
		}
		for range 20 {
			round()
		}
		if got := testing.AllocsPerRun(100, round); got != 0 {
			t.Errorf("%s: %v allocations", addr, got)
		}
		noDrops(t, &drops)
		if n.Load() != want {
			t.Errorf("%s: %d of %d bytes arrived", addr, n.Load(), want)
		}
	}
}

type handlerFunc func(ts []Train)

func (f handlerFunc) Receive(ts []Train) { f(ts) }
