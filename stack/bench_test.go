package stack

import (
	"encoding/binary"
	"testing"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// sackPermitted is an option for newByHandConn.
var sackPermitted = []byte{1, 1, 4, 2}

// byHandConn is an established connection of the gateway's with a container that exists in this test alone.
type byHandConn struct {
	g        *Gateway
	c        *conn
	sink     *lastFrame
	seq, ack uint32 // of the container
}

// lastFrame keeps the TCP header of the last segment sent to it, and how far the sequence numbers went.
type lastFrame struct {
	n      int
	end    uint32
	seq    uint32
	ack    uint32
	flags  byte
	onSend func()
}

func (l *lastFrame) Forward(fs []frame.Frame) {
	for i := range fs {
		d := fs[i].Data
		if len(d) < 54 || d[23] != wire.ProtoTCP {
			continue
		}
		l.n++
		t := d[34:]
		l.seq, l.ack, l.flags = binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:]), t[13]
		l.end = l.seq + uint32(len(t)-tcpHeaderLen(t))
	}
	if l.onSend != nil {
		l.onSend()
	}
}

func newByHandConn(b testing.TB, options ...byte) *byHandConn {
	b.Helper()
	h := &byHandConn{sink: &lastFrame{}}
	cfg := testConfig()
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			b.Error(err)
			return
		}
		h.c = c.(*conn)
	})
	g, err := New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { g.Close() })
	h.g = g
	g.Connect(func() frame.Sink { return h.sink })
	g.SetNeighbor(con4, conMAC)
	// MSS 1460, window scale 10.
	syn := tcpSegment(1000, 80, 0, 0, tcpSYN, append([]byte{2, 4, 0x05, 0xb4, 1, 3, 3, 10}, options...))
	syn[12] = byte(len(syn)) / 4 << 4
	send(g, ipPacket(con4, far4, wire.ProtoTCP, 64, syn))
	h.seq, h.ack = 1, h.sink.seq+1
	send(g, h.segment(nil))
	if h.c == nil || h.c.connecting() {
		b.Fatal("no connection")
	}
	return h
}

func (h *byHandConn) segment(payload []byte) []byte {
	return ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1000, 80, h.seq, h.ack, tcpACK, payload))
}

// BenchmarkReceive is what the gateway adds to a superframe from a container to a host's socket: everything but system calls.
func BenchmarkReceive(b *testing.B) {
	for _, size := range []int{1, 1448, 45 * 1448} {
		b.Run(sizeName(size), func(b *testing.B) {
			h := newByHandConn(b)
			moved := 0
			h.c.Pump(tryFunc(func(p []byte) (int, error) { moved += len(p); return len(p), nil }), func(error) {})
			d := h.segment(make([]byte, size))
			fs := []frame.Frame{{Data: d, Hdr: wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum}}}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				binary.BigEndian.PutUint32(d[38:], h.seq)
				h.g.Transmit(fs)
				h.seq += uint32(size)
				n++
			}
			if moved != n*size {
				b.Fatalf("%d of %d bytes arrived", moved, n*size)
			}
		})
	}
}

// BenchmarkSend is the other way: a write of the NAT's, and the container's acknowledgement.
func BenchmarkSend(b *testing.B) {
	for _, size := range []int{1, 1448, 45 * 1448} {
		b.Run(sizeName(size), func(b *testing.B) {
			h := newByHandConn(b)
			d := h.segment(nil)
			binary.BigEndian.PutUint16(d[48:], 65535)
			fs := []frame.Frame{{Data: d, Hdr: wire.VirtioNetHdr{Flags: wire.VirtioNeedsCsum}}}
			buf := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				for sent := 0; sent < size; {
					n, err := h.c.TryWrite(buf[sent:])
					if err != nil {
						b.Fatal(err)
					}
					sent += n
					binary.BigEndian.PutUint32(d[42:], h.sink.end)
					h.g.Transmit(fs)
				}
			}
		})
	}
}

type tryFunc func([]byte) (int, error)

func (f tryFunc) TryWrite(b []byte) (int, error) { return f(b) }

func sizeName(n int) string {
	switch {
	case n == 1:
		return "byte"
	case n > 1448:
		return "superframe"
	}
	return "segment"
}

// BenchmarkConnection is a connection from SYN to the last ACK, with one byte each way.
func BenchmarkConnection(b *testing.B) {
	g, err := New(func() Config {
		cfg := testConfig()
		cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
			c, err := r.Accept()
			if err != nil {
				b.Error(err)
				return
			}
			a := c.(AsyncConn)
			a.Pump(tryFunc(func(p []byte) (int, error) { return len(p), nil }), func(error) {
				a.TryWrite([]byte("x"))
				a.Close()
			})
		})
		return cfg
	}())
	if err != nil {
		b.Fatal(err)
	}
	defer g.Close()
	sink := &lastFrame{}
	g.Connect(func() frame.Sink { return sink })
	g.SetNeighbor(con4, conMAC)
	port := uint16(0)
	b.ReportAllocs()
	for b.Loop() {
		if port++; port < 1000 {
			port = 1000
		}
		seg := func(seq, ack uint32, flags byte, p []byte) {
			send(g, ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(port, 80, seq, ack, flags, p)))
		}
		seg(0, 0, tcpSYN, nil)
		ack := sink.seq + 1
		seg(1, ack, tcpACK, nil)
		seg(1, ack, tcpACK|tcpPSH, []byte("x"))
		seg(2, ack, tcpACK|tcpFIN, nil)
		seg(3, sink.end+1, tcpACK, nil)
	}
	b.StopTimer()
	if n := len(g.flows.all()); n > 0 {
		b.Fatalf("%d connections left", n)
	}
}
