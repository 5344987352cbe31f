package dns

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/stack"

	"github.com/miekg/dns"
)

// pipelined is how many queries of one TCP connection are worked on at once (RFC 7766 §6.2.1.1); the next one is not read before.
const pipelined = 16

// HandleTCP implements stack.TCPHandler for connections to the gateway's port 53. Above the limits the connection is refused.
func (s *Server) HandleTCP(r stack.TCPRequest) {
	client := r.Src().Addr()
	if !s.conns.enter(client) {
		s.c.Drops.Add(frame.DropServiceLimit, 1)
		r.Refuse()
		return
	}
	go func() {
		defer s.conns.leave(client)
		if c, err := r.Accept(); err == nil {
			s.serve(c, client)
		}
	}()
}

// ServeTCP answers the queries of one connection until it ends, is idle for too long, or the server is closed; it closes conn. Above
// the limits it resets the connection at once. It blocks.
func (s *Server) ServeTCP(conn net.Conn) {
	var client netip.Addr
	if a, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
		client = a.Addr().Unmap()
	}
	if !s.conns.enter(client) {
		s.c.Drops.Add(frame.DropServiceLimit, 1)
		if c, ok := conn.(stack.Conn); ok {
			c.Reset()
		}
		conn.Close()
		return
	}
	defer s.conns.leave(client)
	s.serve(conn, client)
}

func (s *Server) serve(conn net.Conn, client netip.Addr) {
	defer conn.Close()
	s.mu.Lock()
	if s.open == nil {
		s.mu.Unlock()
		return
	}
	s.open[conn] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.open, conn)
		s.mu.Unlock()
	}()

	co := &dns.Conn{Conn: conn}
	var wmu sync.Mutex
	write := func(b []byte) {
		wmu.Lock()
		defer wmu.Unlock()
		_ = conn.SetWriteDeadline(time.Now().Add(s.c.ConnIdle))
		if _, err := co.Write(b); err != nil {
			conn.Close() // half a message may be out: nothing behind it could be read
		}
	}
	working := make(chan struct{}, pipelined)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		_ = conn.SetReadDeadline(time.Now().Add(s.c.ConnIdle))
		msg, err := co.ReadMsgHeader(nil)
		if err != nil {
			return
		}
		v := s.judge(client, msg)
		switch {
		case v.drop:
			s.c.Drops.Add(frame.DropMalformed, 1)
			return
		case v.answer != nil:
			write(v.answer)
		case !s.queries.enter(client):
			s.c.Drops.Add(frame.DropServiceLimit, 1)
			m := explain(reply(v.q, dns.RcodeServerFailure), dns.ExtendedErrorCodeOther, "too many queries are waiting")
			if b, err := m.Pack(); err == nil {
				write(b)
			}
		default:
			s.forwarded.Add(1)
			working <- struct{}{}
			wg.Go(func() {
				defer func() { <-working }()
				defer s.queries.leave(client)
				if b := s.resolve("tcp", msg, v.q); b != nil && s.ctx.Err() == nil {
					write(b)
				}
			})
		}
	}
}
