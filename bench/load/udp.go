package load

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/spin"
)

// A datagram starts with its operation (1 byte) and, but for opEcho, its session (4 bytes).
const (
	opFlood  byte = 'F' // counted by the server
	opQuery  byte = 'Q' // answered with opCount
	opCount  byte = 'C' // session, datagrams (8 bytes), payload bytes (8), nanoseconds from first to last (8)
	opFloods byte = 'B' // asks for a flood back: session, size (4), rate (4), milliseconds (4)
)

const (
	countLen  = 5 + 24
	floodsLen = 5 + 12
	// maxFloodBack bounds what one small request can ask of a server.
	maxFloodBack = 60 * time.Second
	// minDatagrams make a rate: the time of the last arrival is noted every so many.
	minDatagrams = 64
	// maxSessions bounds the server's table; the oldest sessions give way.
	maxSessions = 1024
)

// Flood measures delivered datagrams. Sent counts what the sender handed to its kernel, Received what the far side's socket yielded; Elapsed is the time
// between the first and the last arrival.
func Flood(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(1400)
	if c.Size < countLen {
		c.Size = countLen
	}
	s, err := dial(ctx, "udp", c.Addr, "")
	if err != nil {
		return Result{}, fmt.Errorf("flood to %s: %w", c.Addr, err)
	}
	defer s.Close()
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20) // as much as the kernel gives
	session := uint32(time.Now().UnixNano())
	if c.Reverse {
		return floodBack(ctx, s, c, session)
	}
	buf := make([]byte, c.Size)
	buf[0] = opFlood
	binary.BigEndian.PutUint32(buf[1:], session)
	sent := sendFlood(ctx, c.Rate, time.Now().Add(c.Duration), func() error {
		_, err := s.Write(buf)
		return err
	})
	if err := s.setTimeout(200 * time.Millisecond); err != nil {
		return Result{}, err
	}
	q := make([]byte, 5)
	q[0] = opQuery
	binary.BigEndian.PutUint32(q[1:], session)
	for range 25 {
		if _, err := s.Write(q); err != nil && ctx.Err() != nil {
			return Result{}, err
		}
		n, err := s.Read(buf)
		if err == nil && n == countLen && buf[0] == opCount && binary.BigEndian.Uint32(buf[1:]) == session {
			res := Result{Sent: sent, Received: getInt64(buf[5:]), Bytes: getInt64(buf[13:]), Elapsed: time.Duration(getInt64(buf[21:]))}
			if res.Received < minDatagrams {
				return res, fmt.Errorf("flood to %s: %d of %d datagrams arrived, too few for a rate", c.Addr, res.Received, sent)
			}
			return res, nil
		}
	}
	return Result{Sent: sent}, fmt.Errorf("flood to %s: the server did not say what arrived", c.Addr)
}

// sendFlood calls send until the deadline, paced to rate calls a second when that is not zero, and returns how many succeeded.
func sendFlood(ctx context.Context, rate int, deadline time.Time, send func() error) (sent int64) {
	start := time.Now()
	var slice spin.Slice
	for i := 0; ; i++ {
		if i%64 == 0 || rate > 0 {
			slice.Yield()
			now := time.Now()
			if now.After(deadline) || ctx.Err() != nil {
				return sent
			}
			if rate > 0 {
				due := start.Add(time.Duration(float64(i) / float64(rate) * float64(time.Second)))
				if wait := due.Sub(now); wait > 0 {
					time.Sleep(wait)
				}
			}
		}
		// ENOBUFS, or ECONNREFUSED from an earlier datagram, is not the end of a flood.
		if send() == nil {
			sent++
		}
	}
}

func floodBack(ctx context.Context, s blockingSocket, c Config, session uint32) (Result, error) {
	req := make([]byte, floodsLen)
	req[0] = opFloods
	binary.BigEndian.PutUint32(req[1:], session)
	binary.BigEndian.PutUint32(req[5:], uint32(c.Size))
	binary.BigEndian.PutUint32(req[9:], uint32(c.Rate))
	binary.BigEndian.PutUint32(req[13:], uint32(c.Duration.Milliseconds()))
	if _, err := s.Write(req); err != nil {
		return Result{}, fmt.Errorf("flood from %s: %w", c.Addr, err)
	}
	if err := s.setTimeout(time.Second); err != nil {
		return Result{}, err
	}
	var res Result
	var first, last time.Time
	var slice spin.Slice
	buf := make([]byte, 64<<10)
	for ctx.Err() == nil {
		n, err := s.Read(buf)
		if err != nil || n < 5 {
			break
		}
		if buf[0] == opCount && n == countLen {
			res.Sent = getInt64(buf[5:])
			break
		}
		if res.Received++; res.Received == 1 {
			first = time.Now()
		}
		if res.Received%minDatagrams == 0 {
			last = time.Now()
			slice.Yield()
		}
		res.Bytes += int64(n)
	}
	if res.Received < minDatagrams {
		return res, fmt.Errorf("flood from %s: %d datagrams arrived, too few for a rate", c.Addr, res.Received)
	}
	res.Elapsed = last.Sub(first)
	return res, nil
}

type session struct {
	id          uint32
	count       int64
	bytes       int64
	first, last time.Time
}

// serveUDP answers datagrams until the socket is shut down.
func (s *Server) serveUDP(ctx context.Context, u blockingSocket) {
	sessions := make(map[uint32]*session)
	var cur *session
	buf := make([]byte, 64<<10)
	var slice spin.Slice
	for ctx.Err() == nil {
		n, from, err := recvfrom(u.fd, buf)
		if ctx.Err() != nil {
			return
		}
		if err != nil || n < 1 {
			continue // an ICMP error of an earlier answer, or an empty datagram
		}
		if buf[0] == opEcho {
			slice.Yield()
			_ = sendto(u.fd, buf[:n], &from) // a lost answer is the client's to notice
			continue
		}
		if n < 5 {
			continue
		}
		id := binary.BigEndian.Uint32(buf[1:])
		switch buf[0] {
		case opFlood:
			if cur == nil || cur.id != id {
				if cur = sessions[id]; cur == nil {
					if len(sessions) >= maxSessions {
						clear(sessions)
					}
					cur = &session{id: id, first: time.Now()}
					sessions[id] = cur
				}
			}
			cur.count++
			cur.bytes += int64(n)
			if cur.count%minDatagrams == 0 {
				cur.last = time.Now()
				slice.Yield()
			}
		case opQuery:
			out := append([]byte{opCount}, buf[1:5]...)
			var got session
			if ss := sessions[id]; ss != nil {
				got = *ss
			}
			out = append(out, putInt64(got.count)...)
			out = append(out, putInt64(got.bytes)...)
			out = append(out, putInt64(max(int64(got.last.Sub(got.first)), 1))...)
			_ = sendto(u.fd, out, &from) // the client asks again
		case opFloods:
			if n == floodsLen {
				req := [floodsLen]byte(buf[:floodsLen])
				s.wg.Go(func() { sendBack(ctx, u, req, from) })
			}
		}
	}
}

func sendBack(ctx context.Context, u blockingSocket, req [floodsLen]byte, to unix.RawSockaddrInet6) {
	size := int(binary.BigEndian.Uint32(req[5:]))
	rate := int(binary.BigEndian.Uint32(req[9:]))
	d := min(time.Duration(binary.BigEndian.Uint32(req[13:]))*time.Millisecond, maxFloodBack)
	out := make([]byte, min(max(size, countLen), 65507))
	out[0] = opFlood
	copy(out[1:5], req[1:5])
	sent := sendFlood(ctx, rate, time.Now().Add(d), func() error { return sendto(u.fd, out, &to) })
	out = append(append([]byte{opCount}, req[1:5]...), putInt64(sent)...)
	out = append(out, make([]byte, countLen-len(out))...)
	for range 5 {
		_ = sendto(u.fd, out, &to) // five times, as any may be lost
		time.Sleep(20 * time.Millisecond)
	}
}
