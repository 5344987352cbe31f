package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// pair is a Port and the peer's end of its connection, over a real unix socket.
func pair(t testing.TB, c Config) (*Port, net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if c.Conn, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); peer.Close() })
	return p, peer
}

// collector is a sink that copies what it is lent.
type collector chan []byte

func (c collector) Forward(fs []frame.Frame) {
	for i := range fs {
		c <- bytes.Clone(fs[i].Data)
	}
}

func ether(n int, last byte) []byte {
	b := make([]byte, n)
	wire.PutEthernet(b, wire.MAC{2, 0, 0, 0, 0, 1}, wire.MAC{2, 0, 0, 0, 0, last}, 0x88b5)
	b[n-1] = last
	return b
}

func framed(frames ...[]byte) (b []byte) {
	for _, f := range frames {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

// TestServe cuts the stream in every awkward place.
func TestServe(t *testing.T) {
	testbed.Leaks(t)
	p, peer := pair(t, Config{})
	got := make(collector, 1000)
	done := make(chan error, 1)
	go func() { done <- p.Serve(t.Context(), got) }()
	var want [][]byte
	for i := range 200 {
		want = append(want, ether(14+i*7, byte(i)))
	}
	want = append(want, ether(wire.MaxFrame, 9), ether(60, 8))
	all := framed(want...)
	for i, n := 0, 1; i < len(all); n = (n*3 + 1) % 4001 {
		end := min(i+n+1, len(all))
		if _, err := peer.Write(all[i:end]); err != nil {
			t.Fatal(err)
		}
		i = end
	}
	for i, w := range want {
		select {
		case g := <-got:
			if !bytes.Equal(g, w) {
				t.Fatalf("frame %d differs", i)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("frame %d does not come", i)
		}
	}
	peer.Close()
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Errorf("the peer's end: %v", err)
	}
	if s := p.Stats(); s.RxFrames != uint64(len(want)) {
		t.Errorf("%+v", s)
	}
}

// TestFraming holds that a length that cannot be ends the stream, with a counter and an error, after what came before it.
func TestFraming(t *testing.T) {
	for name, n := range map[string]uint32{"short": 13, "zero": 0, "long": wire.MaxFrame + 1, "nonsense": 0xffffffff} {
		t.Run(name, func(t *testing.T) {
			p, peer := pair(t, Config{})
			got := make(collector, 10)
			if _, err := peer.Write(binary.BigEndian.AppendUint32(framed(ether(60, 1)), n)); err != nil {
				t.Fatal(err)
			}
			if err := p.Serve(t.Context(), got); !errors.Is(err, ErrFraming) {
				t.Errorf("%v", err)
			}
			if len(got) != 1 || p.Drops().Get(frame.DropMalformed) != 1 {
				t.Errorf("%d frames, %d malformed", len(got), p.Drops().Get(frame.DropMalformed))
			}
		})
		t.Run(name+" at first", func(t *testing.T) {
			p, peer := pair(t, Config{})
			if _, err := peer.Write(binary.BigEndian.AppendUint32(nil, n)); err != nil {
				t.Fatal(err)
			}
			if mac, err := p.First(t.Context()); !errors.Is(err, ErrFraming) {
				t.Errorf("First: %s, %v", mac, err)
			}
			if err := p.Serve(t.Context(), make(collector)); !errors.Is(err, ErrFraming) {
				t.Errorf("Serve: %v", err)
			}
			if got := p.Drops().Get(frame.DropMalformed); got != 1 {
				t.Errorf("%d malformed, want 1: it is counted once", got)
			}
		})
	}
}

// TestFirst holds that the first frame tells its source and is delivered all the same.
func TestFirst(t *testing.T) {
	p, peer := pair(t, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.First(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without a frame: %v", err)
	}
	f := ether(60, 5)
	if _, err := peer.Write(framed(f)[:30]); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { peer.Write(framed(f)[30:]) })
	mac, err := p.First(t.Context())
	if err != nil || mac != (wire.MAC{2, 0, 0, 0, 0, 5}) {
		t.Fatalf("%s, %v", mac, err)
	}
	got := make(collector, 1)
	sctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(sctx, got) }()
	if g := <-got; !bytes.Equal(g, f) {
		t.Error("another frame")
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("%v", err)
	}
}

// TestFirstEnds holds that waiting for a frame can be given up at any moment, and leaves a connection that can be read.
func TestFirstEnds(t *testing.T) {
	testbed.Leaks(t)
	p, peer := pair(t, Config{})
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		go cancel() // as First begins, waits, or has ended
		if i%3 == 0 {
			cancel()
		}
		if _, err := p.First(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("given up: %v", err)
		}
	}
	go peer.Write(framed(ether(60, 5)))
	if mac, err := p.First(t.Context()); err != nil || mac[5] != 5 {
		t.Fatalf("after it was given up: %s, %v", mac, err)
	}
	for i := range 300 { // there is a frame, so each ends well, and none spoils the next
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		if _, err := p.First(ctx); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
	go peer.Write(framed(ether(60, 6)))
	got := make(collector, 2)
	done := make(chan error, 1)
	go func() { done <- p.Serve(t.Context(), got) }()
	<-got
	<-got
	peer.Close()
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Errorf("Serve: %v", err)
	}

	p, _ = pair(t, Config{})
	time.AfterFunc(20*time.Millisecond, func() { p.Close() })
	if _, err := p.First(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// brokenConn is a connection on which nothing can be written.
type brokenConn struct {
	net.Conn
	why error
}

func (c brokenConn) Write([]byte) (int, error) { return 0, c.why }

// TestWriteError holds that a write that fails ends the port, and that Serve and First say why.
func TestWriteError(t *testing.T) {
	testbed.Leaks(t)
	why := errors.New("the cable was cut")
	for name, wait := range map[string]func(*Port) error{
		"Serve": func(p *Port) error { return p.Serve(t.Context(), make(collector)) },
		"First": func(p *Port) error { _, err := p.First(t.Context()); return err },
	} {
		a, peer := net.Pipe()
		defer peer.Close()
		p, err := New(Config{Conn: brokenConn{a, why}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- wait(p) }()
		p.Transmit([]frame.Frame{{Data: ether(60, 1)}})
		if err := <-done; !errors.Is(err, why) {
			t.Errorf("%s: %v, want %v", name, err, why)
		}
		if p.Transmit([]frame.Frame{{Data: ether(60, 1)}}) != 0 || p.Drops().Get(frame.DropPortDown) != 1 {
			t.Errorf("%s: a broken port takes frames", name)
		}
		p.Close()
		if err := p.Serve(t.Context(), make(collector)); !errors.Is(err, why) {
			t.Errorf("%s, after Close: %v, want %v", name, err, why)
		}
	}
}

// TestBusy holds that a peer that does not read costs the buffer and no more, and that Transmit goes on returning.
func TestBusy(t *testing.T) {
	p, peer := pair(t, Config{BufferBytes: 100_000})
	f := []frame.Frame{{Data: ether(1400, 1)}}
	const n = 2000
	sent := 0
	for range n {
		sent += p.Transmit(f)
	}
	busy := p.Drops().Get(frame.DropTxBusy)
	if sent+int(busy) != n || busy == 0 {
		t.Errorf("%d sent, %d busy", sent, busy)
	}
	p.mu.Lock()
	if cap(p.buf) > 2*100_000 {
		t.Errorf("a buffer of %d bytes", cap(p.buf))
	}
	p.mu.Unlock()
	for range sent { // what was accepted arrives, whole
		if g := next(t, peer); len(g) != 1400 {
			t.Fatalf("a frame of %d bytes", len(g))
		}
	}
}

// next reads one frame as a peer does.
func next(t testing.TB, r io.Reader) []byte {
	t.Helper()
	var l [4]byte
	if _, err := io.ReadFull(r, l[:]); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, binary.BigEndian.Uint32(l[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTooBig holds the MTU, with a VLAN tag on top.
func TestTooBig(t *testing.T) {
	p, peer := pair(t, Config{})
	tagged := ether(1518, 1)
	tagged[12], tagged[13], tagged[16], tagged[17] = 0x81, 0, 0x88, 0xb5
	for _, c := range []struct {
		f    []byte
		want int
	}{{ether(1514, 1), 1}, {ether(1515, 1), 0}, {tagged, 1}, {make([]byte, 13), 0}} {
		if got := p.Transmit([]frame.Frame{{Data: c.f}}); got != c.want {
			t.Errorf("%d bytes: %d", len(c.f), got)
		}
	}
	next(t, peer)
	next(t, peer)
	if p.Drops().Get(frame.DropTooBig) != 1 || p.Drops().Get(frame.DropMalformed) != 1 {
		t.Error("not counted")
	}
}

// TestClose holds that Close ends a Serve and a stuck write, and that what comes later is counted.
func TestClose(t *testing.T) {
	testbed.Leaks(t)
	p, _ := pair(t, Config{})
	done := make(chan error, 1)
	go func() { done <- p.Serve(t.Context(), make(collector)) }()
	for range 3000 {
		p.Transmit([]frame.Frame{{Data: ether(1400, 1)}})
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if p.Transmit([]frame.Frame{{Data: ether(60, 1)}}) != 0 || p.Drops().Get(frame.DropPortDown) != 1 {
		t.Error("a closed port takes frames")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestNewErrors(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	for _, c := range []Config{{}, {Conn: a, MTU: 10}, {Conn: a, BufferBytes: 100}} {
		if p, err := New(c); err == nil {
			p.Close()
			t.Errorf("%+v is taken", c)
		}
	}
}

func TestTransmitAllocatesNothing(t *testing.T) {
	p, peer := pair(t, Config{})
	go io.Copy(io.Discard, peer)
	fs := []frame.Frame{{Data: ether(1400, 1)}, {Data: ether(60, 2)}}
	for range 2000 { // both buffers have grown
		p.Transmit(fs)
	}
	if n := testing.AllocsPerRun(200, func() { p.Transmit(fs) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// told is a sink that says that there was something.
type told chan struct{}

func (c told) Forward([]frame.Frame) { c <- struct{}{} }

func TestServeAllocatesNothing(t *testing.T) {
	p, peer := pair(t, Config{})
	got := make(told)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, got) }()
	b := framed(ether(60, 1))
	one := func() {
		if _, err := peer.Write(b); err != nil {
			t.Fatal(err)
		}
		<-got
	}
	for range 100 {
		one()
	}
	if n := testing.AllocsPerRun(500, one); n != 0 {
		t.Errorf("%v allocations", n)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// FuzzServe holds that no stream makes it panic, and that what it takes for frames are the frames.
func FuzzServe(f *testing.F) {
	f.Add(framed(ether(60, 1), ether(1400, 2)))
	f.Add([]byte{0, 0, 0, 13})
	f.Add(framed(ether(60, 1))[:20])
	f.Fuzz(func(t *testing.T, b []byte) {
		a, peer := net.Pipe()
		p, err := New(Config{Conn: a})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		go func() {
			peer.Write(b)
			peer.Close()
		}()
		got := make(collector, len(b)/prefixLen+1)
		if err := p.Serve(t.Context(), got); err == nil {
			t.Error("it ended without an end")
		}
		var again []byte
		for len(got) > 0 {
			again = append(again, framed(<-got)...)
		}
		if !bytes.HasPrefix(b, again) {
			t.Error("other frames than were sent")
		}
	})
}

// Example shows a port that a virtual machine connects to: plug it into a switch as any other (see package vswitch).
func Example() {
	dir, err := os.MkdirTemp("", "stream")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "vm.sock"))
	if err != nil {
		panic(err)
	}
	defer l.Close()
	// qemu-system-x86_64 … -netdev stream,id=n0,server=off,addr.type=unix,addr.path=vm.sock -device virtio-net-pci,netdev=n0
	vm, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		panic(err)
	}
	defer vm.Close()
	conn, err := l.Accept()
	if err != nil {
		panic(err)
	}
	port, err := New(Config{Conn: conn})
	if err != nil {
		panic(err)
	}
	defer port.Close()
	port.Transmit([]frame.Frame{{Data: make([]byte, 60)}})
	// Output:
}

// TestExport hands a connection over in the middle of a frame, both ways: nothing is lost and nothing comes twice.
func TestExport(t *testing.T) {
	p, peer := pair(t, Config{})
	got := make(collector, 10)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, got) }()
	out := framed(ether(100, 1), ether(200, 2))
	if _, err := peer.Write(out[:150]); err != nil { // the first, and some of the second
		t.Fatal(err)
	}
	if g := <-got; len(g) != 100 {
		t.Fatalf("%d bytes", len(g))
	}
	p.Transmit([]frame.Frame{{Data: ether(300, 3)}})
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	fd, pending, err := p.Export(time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if p.Transmit([]frame.Frame{{Data: ether(60, 4)}}) != 0 || p.Drops().Get(frame.DropTxBusy) != 1 {
		t.Error("it takes frames that would come out of order")
	}
	f := os.NewFile(uintptr(fd), "conn")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	q, err := New(Config{Conn: conn, Pending: pending})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	go q.Serve(t.Context(), got)
	if _, err := peer.Write(out[150:]); err != nil {
		t.Fatal(err)
	}
	if g := <-got; len(g) != 200 || g[199] != 2 {
		t.Errorf("the frame that was cut: %d bytes", len(g))
	}
	q.Transmit([]frame.Frame{{Data: ether(400, 5)}})
	for _, want := range []int{300, 400} {
		if g := next(t, peer); len(g) != want {
			t.Errorf("%d bytes, want %d", len(g), want)
		}
	}
}

// TestExportStuck holds that a peer that does not read is not waited for without end, and that the port goes on.
func TestExportStuck(t *testing.T) {
	p, peer := pair(t, Config{})
	for p.Transmit([]frame.Frame{{Data: ether(1400, 1)}}) > 0 {
	}
	if _, _, err := p.Export(20 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	go io.Copy(io.Discard, peer)
	testbed.Eventually(t, 5*time.Second, func() bool { return p.Transmit([]frame.Frame{{Data: ether(60, 2)}}) == 1 })
}
