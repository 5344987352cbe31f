package stack

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// longWire delivers frames a while later, in order, and loses some.
type longWire struct {
	to   frame.Sink
	late chan lateFrames
	lose func() bool
	wait time.Duration
}

type lateFrames struct {
	at time.Time
	fs []frame.Frame
}

func (l *longWire) Forward(fs []frame.Frame) {
	e := lateFrames{at: time.Now().Add(l.wait)}
	for _, f := range fs {
		if l.lose == nil || !l.lose() {
			e.fs = append(e.fs, frame.Frame{Hdr: f.Hdr, Data: slices.Clone(f.Data)})
		}
	}
	select {
	case l.late <- e:
	default: // 16384 batches under way: what a wire does when it is full
	}
}

func (l *longWire) run(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case e := <-l.late:
			time.Sleep(time.Until(e.at))
			l.to.Forward(e.fs)
		}
	}
}

// newLongWorld is a world whose container is wait away on either way.
func newLongWorld(t testing.TB, cfg Config, wait time.Duration, lose func() bool) *world {
	t.Helper()
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) }) // after the world's own
	return newWireWorld(t, cfg, tap.OpenConfig{}, func(s frame.Sink) frame.Sink {
		l := &longWire{to: s, late: make(chan lateFrames, 16384), lose: lose, wait: wait}
		go l.run(stop)
		return l
	})
}

// TestLongWire: with 20 ms to the container and back, buffers of both directions grow beyond 1 MiB, and a transfer is several times as fast as the 64 KiB
// a round trip of a window without scaling.
func TestLongWire(t *testing.T) {
	const wait, size = 10 * time.Millisecond, 48 << 20
	var sendBuf, rcvBuf atomic.Int64
	cfg := testConfig()
	cfg.Handlers.TCP = accepting(func(c Conn) {
		defer c.Close()
		opts := c.(*conn).ep.SocketOptions()
		buf := make([]byte, SuperPayload)
		if c.LocalAddr().(*net.TCPAddr).Port == 1 {
			for done := 0; done < size; done += len(buf) {
				if _, err := c.Write(buf); err != nil {
					return
				}
				sendBuf.Store(max(sendBuf.Load(), opts.GetSendBufferSize()))
			}
			return
		}
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
			rcvBuf.Store(max(rcvBuf.Load(), opts.GetReceiveBufferSize()))
		}
	})
	w := newLongWorld(t, cfg, wait, nil)
	const unscaled = float64(64<<10) / (2 * 0.010)
	for _, to := range []string{"192.0.2.7:1", "[2001:db8::7]:2"} {
		c := w.dial(t, to)
		c.SetDeadline(time.Now().Add(3 * patience))
		start := time.Now()
		var n int64
		var err error
		if to == "192.0.2.7:1" {
			n, err = io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c})
		} else {
			n, err = io.CopyN(struct{ io.Writer }{c}, zeros{}, size)
			c.CloseWrite()
			io.Copy(io.Discard, c)
		}
		rate := float64(n) / time.Since(start).Seconds()
		t.Logf("%s: %.0f MB/s, %.1f times an unscaled window", to, rate/1e6, rate/unscaled)
		if err != nil || n < size || rate < 5*unscaled {
			t.Errorf("%s: %d bytes at %.0f MB/s, %v", to, n, rate/1e6, err)
		}
	}
	if s, r := sendBuf.Load(), rcvBuf.Load(); s <= 1<<20 || r <= 1<<20 {
		t.Errorf("send buffer grew to %d bytes, receive buffer to %d; want more than 1 MiB", s, r)
	} else {
		t.Logf("buffers grew to %d and %d KiB", s>>10, r>>10)
	}
}

// zeros is an endless reader.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestSACKRecovery: what a wire loses is found by the container's SACKs.
func TestSACKRecovery(t *testing.T) {
	var frames atomic.Int64
	cfg := testConfig()
	cfg.Handlers.TCP = accepting(func(c Conn) {
		defer c.Close()
		c.Write(make([]byte, 8<<20))
	})
	w := newLongWorld(t, cfg, 2*time.Millisecond, func() bool { return frames.Add(1)%50 == 0 })
	c := w.dial(t, "192.0.2.7:1")
	if n, err := io.Copy(io.Discard, c); n != 8<<20 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	st := w.gw.tcp.stack.Stats().TCP
	if st.SACKRecovery.Value() == 0 || st.FastRecovery.Value() != 0 {
		t.Errorf("%d recoveries with SACK, %d without", st.SACKRecovery.Value(), st.FastRecovery.Value())
	}
}

// TestOptions: the answer to a SYN carries what it offered, and a gap is reported with its bounds.
func TestOptions(t *testing.T) {
	cfg := testConfig()
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		if _, err := r.Accept(); err != nil {
			t.Error(err)
		}
	})
	g, r := byHand(t, cfg)
	g.SetNeighbor(con4, conMAC)
	opts := []byte{2, 4, 5, 0xb4, 4, 2, 1, 1, 3, 3, 7, 1} // MSS 1460, SACK permitted, window scale 7
	send(g, ipPacket(con4, far4, 6, 64, withOptions(1000, 80, 1, 0, tcpSYN, opts, nil)))
	h := header.TCP(r.one(t, g)[34:])
	o := header.ParseSynOptions(h.Options(), true)
	if !o.SACKPermitted || o.WS < 5 || o.MSS != 1460 { // 65535<<5 is 2 MiB
		t.Fatalf("options %+v", o)
	}
	iss := h.SequenceNumber()
	send(g, ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 2, iss+1, tcpACK, nil)))
	r.take()
	send(g, ipPacket(con4, far4, 6, 64, tcpSegment(1000, 80, 102, iss+1, tcpACK, make([]byte, 50))))
	h = header.TCP(r.one(t, g)[34:])
	if b := header.ParseTCPOptions(h.Options()).SACKBlocks; h.AckNumber() != 2 || len(b) != 1 || b[0].Start != 102 || b[0].End != 152 {
		t.Fatalf("ack %d, SACK %v", h.AckNumber(), b)
	}
	if win := int(h.WindowSize()) << o.WS; win <= 65535 {
		t.Errorf("window %d", win)
	}
}

// withOptions is tcpSegment with options, a multiple of 4 bytes.
func withOptions(src, dst uint16, seq, ack uint32, flags byte, opts, payload []byte) []byte {
	b := tcpSegment(src, dst, seq, ack, flags, nil)
	b[12] = byte(wire.TCPLen+len(opts)) / 4 << 4
	return append(append(b, opts...), payload...)
}

// TestKeepAlive: an idle connection outlives its keepalives, one whose container vanished ends with an error.
func TestKeepAlive(t *testing.T) {
	cfg := testConfig()
	// Linux answers no more than one keepalive of a connection in 500 ms (net.ipv4.tcp_invalid_ratelimit).
	cfg.TCP.KeepAliveIdle, cfg.TCP.KeepAliveInterval, cfg.TCP.KeepAliveCount = 600*time.Millisecond, 600*time.Millisecond, 2
	ended := make(chan error, 1)
	cfg.Handlers.TCP = accepting(func(c Conn) {
		_, err := c.Read(make([]byte, 1))
		ended <- err
		c.Close()
	})
	var gone atomic.Bool
	w := newLongWorld(t, cfg, 0, gone.Load)
	w.dial(t, "192.0.2.7:1")
	select {
	case err := <-ended:
		t.Fatalf("an idle connection ended: %v", err)
	case <-time.After(2500 * time.Millisecond):
	}
	gone.Store(true)
	start := time.Now()
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("the container vanished: %v", err)
		}
		t.Logf("noticed after %v", time.Since(start))
	case <-time.After(patience):
		t.Error("nobody noticed that the container vanished")
	}
	if !testbed.Wait(patience, func() bool { return len(w.gw.flows.all()) == 0 }) {
		t.Error("the connection is still there")
	}
}
