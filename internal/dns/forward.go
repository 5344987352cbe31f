package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/miekg/dns"
)

// retransmit is when a query that was not answered by UDP is sent again, counted from the one before.
const retransmit = 2 * time.Second

// result is what one resolver had to say.
type result struct {
	from *upstream
	msg  []byte // nil when err is not
	err  error
}

// good reports whether the answer settles the question.
func (r *result) good() bool {
	if r.err != nil {
		return false
	}
	c := rcode(r.msg)
	return c == dns.RcodeSuccess || c == dns.RcodeNameError
}

// resolve asks the host's resolvers over network ("udp" or "tcp") and returns an answer to query with its id, a SERVFAIL of our own making at the worst. It
// blocks for at most Config.Timeout.
func (s *Server) resolve(network string, query []byte, q *dns.Msg) []byte {
	ctx, cancel := context.WithTimeout(s.ctx, s.c.Timeout)
	defer cancel()
	ups := s.ups.get()
	results := make(chan result, len(ups)) // room for all, so that no one asked is left hanging
	started := make(map[*upstream]time.Time, len(ups))
	timer := time.NewTimer(0)
	defer timer.Stop()
	var refused []byte // a bad answer, for want of a better one
	var lastErr error
	for next, open := 0, 0; next < len(ups) || open > 0; {
		select {
		case <-timer.C:
		case r := <-results:
			open--
			if r.good() {
				s.settle(r.from, started)
				return withID(r.msg, query)
			}
			if r.err == nil {
				r.from.answered()
				refused = r.msg
			} else {
				lastErr = r.err
				r.from.missed(time.Now())
			}
			delete(started, r.from)
		}
		if next < len(ups) && ctx.Err() == nil { // the delay is over, or one failed
			u := ups[next]
			next, open = next+1, open+1
			started[u] = time.Now()
			s.asks.Go(func() {
				msg, err := s.exchange(ctx, network, u, query)
				results <- result{u, msg, err}
			})
			timer.Reset(s.c.Delay)
		} else if ctx.Err() != nil {
			next = len(ups)
		}
	}
	s.failed.Add(1)
	if refused != nil {
		return withID(refused, query)
	}
	code, text := uint16(dns.ExtendedErrorCodeNetworkError), "the host's resolvers cannot be reached"
	if errors.Is(lastErr, os.ErrDeadlineExceeded) || errors.Is(lastErr, context.DeadlineExceeded) {
		code, text = dns.ExtendedErrorCodeNoReachableAuthority, "the host's resolvers did not answer"
	}
	b, err := explain(reply(q, dns.RcodeServerFailure), code, text).Pack()
	if err != nil {
		return nil
	}
	return b
}

// settle notes who answered and who had had the time to.
func (s *Server) settle(winner *upstream, started map[*upstream]time.Time) {
	winner.answered()
	now := time.Now()
	for u, at := range started {
		if u != winner && now.Sub(at) >= s.c.Delay {
			u.missed(now)
		}
	}
}

// withID is msg, which is not shared, with the id of query.
func withID(msg, query []byte) []byte {
	copy(msg[:2], query[:2])
	return msg
}

// exchange asks one resolver. It returns the first message that answers the query, or an error when ctx ends or the connection does.
func (s *Server) exchange(ctx context.Context, network string, u *upstream, query []byte) ([]byte, error) {
	c, err := s.c.Dial(ctx, network, u.addr.String())
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", u.addr, err)
	}
	defer c.Close()
	// Whoever ends ctx, the winner of the race or Close, ends the read.
	defer context.AfterFunc(ctx, func() { c.Close() })()
	out := append([]byte(nil), query...)
	id := dns.Id()
	binary.BigEndian.PutUint16(out, id)
	var msg []byte
	if network == "tcp" {
		msg, err = exchangeTCP(ctx, c, out, id)
	} else {
		msg, err = exchangeUDP(ctx, c, out, id)
	}
	if err != nil {
		if cerr := ctx.Err(); cerr != nil {
			err = cerr
		}
		return nil, fmt.Errorf("ask %s: %w", u.addr, err)
	}
	return msg, nil
}

func exchangeUDP(ctx context.Context, c net.Conn, query []byte, id uint16) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	buf := make([]byte, maxUDP+1)
	for again := time.Now(); ; {
		if now := time.Now(); !now.Before(again) {
			if !now.Before(deadline) {
				return nil, context.DeadlineExceeded
			}
			if _, err := c.Write(query); err != nil {
				return nil, err
			}
			again = now.Add(retransmit)
			_ = c.SetReadDeadline(again)
		}
		n, err := c.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return nil, err // refused, for one
		case !answers(buf[:n], query, id):
			continue // late, forged or broken: the right one may still come
		case n > maxUDP:
			return bare(buf[:n]), nil
		}
		return buf[:n:n], nil
	}
}

func exchangeTCP(ctx context.Context, c net.Conn, query []byte, id uint16) ([]byte, error) {
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	co := &dns.Conn{Conn: c}
	if _, err := co.Write(query); err != nil {
		return nil, err
	}
	msg, err := co.ReadMsgHeader(nil)
	if err != nil {
		return nil, err
	}
	if !answers(msg, query, id) {
		return nil, errors.New("the answer is to another question")
	}
	return msg, nil
}
