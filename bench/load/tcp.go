package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/spin"
)

// Operations a TCP client asks for with its first byte.
const (
	opSink   byte = 'S' // an id of 8 bytes, then data; the server reads to the end and answers how many bytes came, 8 bytes big-endian
	opSunk   byte = 'N' // an id of 8 bytes; the server answers how many bytes came to that sink so far, and for how many nanoseconds
	opSource byte = 'D' // the server sends until the client closes
	opEcho   byte = 'E' // the server answers each read with the same bytes
	opHold   byte = 'H' // the server answers this byte and keeps the connection, or another and closes it, since it has descriptors for no more
	opLetGo  byte = 'L' // when one more byte comes the server closes what it keeps, and answers it; it also closes it when the client has gone
)

// ioTimeout ends a receive that nobody answers.
const ioTimeout = 10 * time.Second

// drainTimeout is how long what the sender's kernel still holds may take to arrive.
const drainTimeout = 15 * time.Second

// Stream measures TCP throughput. Bytes are counted at the receiver; Elapsed runs until the last of them arrived. When a stream breaks or stalls,
// the error says so and the Result has what had arrived by then, over at least Duration, where the server can still be asked.
func Stream(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(128 << 10)
	socks := make([]blockingSocket, 0, c.Streams)
	defer func() {
		for _, s := range socks {
			s.Close()
		}
	}()
	for range c.Streams {
		s, err := dial(ctx, "tcp", c.Addr, c.Congestion)
		if err != nil {
			return Result{}, fmt.Errorf("stream to %s: %w", c.Addr, err)
		}
		socks = append(socks, s)
		if err := errors.Join(s.setTimeout(ioTimeout), s.setSendTimeout(ioTimeout)); err != nil {
			return Result{}, err
		}
	}
	var total, longest atomic.Int64
	errs := make([]error, c.Streams)
	start := time.Now()
	deadline := start.Add(c.Duration)
	workers(c.Streams, func(i int) {
		id := rand.Int64()
		n, err := streamOne(ctx, socks[i], c, deadline, id)
		if err != nil {
			// What is still on its way is not to disturb whatever comes next.
			_ = unix.SetsockoptLinger(socks[i].fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		if err != nil && !c.Reverse {
			var took int64
			if n, took, errs[i] = sunk(ctx, c, id); took > longest.Load() {
				longest.Store(took) // of several streams any of the long ones will do
			}
		}
		total.Add(n)
		errs[i] = errors.Join(err, errs[i])
	})
	res := Result{Bytes: total.Load(), Elapsed: time.Since(start)}
	if err := errors.Join(errs...); err != nil {
		if !c.Reverse {
			res.Elapsed = max(c.Duration, time.Duration(longest.Load()))
		}
		return res, fmt.Errorf("stream to %s: %w", c.Addr, err)
	}
	return res, nil
}

// sunk asks on a connection of its own what has come to a sink.
func sunk(ctx context.Context, c Config, id int64) (bytes, took int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, ioTimeout)
	defer cancel()
	s, err := dial(ctx, "tcp", c.Addr, c.Congestion)
	if err != nil {
		return 0, 0, err
	}
	defer s.Close()
	if err := s.setTimeout(ioTimeout); err != nil {
		return 0, 0, err
	}
	if _, err := s.Write(append([]byte{opSunk}, putInt64(id)...)); err != nil {
		return 0, 0, err
	}
	var b [16]byte
	if _, err := io.ReadFull(s, b[:]); err != nil {
		return 0, 0, fmt.Errorf("ask what arrived: %w", err)
	}
	return getInt64(b[:]), getInt64(b[8:]), nil
}

func streamOne(ctx context.Context, s blockingSocket, c Config, deadline time.Time, id int64) (received int64, err error) {
	buf := make([]byte, c.Size)
	op := append([]byte{opSink}, putInt64(id)...)
	if c.Reverse {
		op = []byte{opSource}
	}
	if _, err := s.Write(op); err != nil {
		return 0, err
	}
	var slice spin.Slice
	for time.Now().Before(deadline) && ctx.Err() == nil {
		slice.Yield()
		if c.Reverse {
			n, err := s.Read(buf)
			received += int64(n)
			if err != nil {
				return received, err
			}
		} else if _, err := s.Write(buf); err != nil {
			return 0, err
		}
	}
	if c.Reverse {
		return received, nil
	}
	if err := unix.Shutdown(s.fd, unix.SHUT_WR); err != nil {
		return 0, err
	}
	if err := s.setTimeout(drainTimeout); err != nil {
		return 0, err
	}
	var count [8]byte
	if _, err := io.ReadFull(s, count[:]); err != nil {
		return 0, fmt.Errorf("the far side has not told within %v what arrived: %w", drainTimeout, err)
	}
	return getInt64(count[:]), nil
}

// RequestResponse measures round trips of Size bytes, one at a time on each of Streams flows. Duration begins when all are connected, so there is at least one round trip of each,
// unless it fails.
func RequestResponse(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(1)
	recs := make([]recorder, c.Streams)
	socks := make([]blockingSocket, c.Streams)
	workers(c.Streams, func(i int) {
		s, err := dial(ctx, c.Network, c.Addr, c.Congestion)
		if err == nil {
			if err = s.setTimeout(ioTimeout); err != nil {
				s.Close()
			}
		}
		if err != nil {
			recs[i].fail(err)
			return
		}
		socks[i] = s
	})
	start := time.Now() // where a SYN can get lost, connecting may take longer than Duration
	deadline := start.Add(c.Duration)
	var budget atomic.Int64
	budget.Store(int64(c.Count))
	workers(c.Streams, func(i int) {
		if recs[i].errs > 0 {
			return
		}
		s := socks[i]
		defer s.Close()
		req, resp := make([]byte, max(c.Size, 1)), make([]byte, max(c.Size, 64))
		req[0] = opEcho
		if c.Network == "tcp" {
			// The operation travels once; after it every byte is a request.
			if _, err := s.Write(req[:1]); err != nil {
				recs[i].fail(err)
				return
			}
		}
		var slice spin.Slice
		for ctx.Err() == nil && (c.Count > 0 && budget.Add(-1) >= 0 || c.Count == 0 && time.Now().Before(deadline)) {
			slice.Yield()
			t := time.Now()
			if _, err := s.Write(req); err != nil {
				recs[i].fail(err)
				return
			}
			if err := readResponse(s, c, resp, len(req)); err != nil {
				recs[i].fail(fmt.Errorf("answer: %w", err))
				return
			}
			recs[i].add(time.Since(t))
		}
	})
	return merge(recs, time.Since(start)), nil
}

func readResponse(s blockingSocket, c Config, buf []byte, n int) error {
	if c.Network == "udp" {
		_, err := s.Read(buf)
		return err
	}
	_, err := io.ReadFull(s, buf[:n])
	return err
}

// ConnectRequestClose measures connections that carry one request: connect, one byte there and back, close. A failed connection is
// counted in Errors and the run goes on.
func ConnectRequestClose(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(1)
	addr := c.Addr
	if c.Greeting {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			return Result{}, err
		}
		p, err := strconv.Atoi(port)
		if err != nil {
			return Result{}, err
		}
		addr = net.JoinHostPort(host, strconv.Itoa(p+1))
	}
	ta, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return Result{}, err
	}
	recs := make([]recorder, c.Streams)
	start := time.Now()
	deadline := start.Add(c.Duration)
	if c.Count > 0 {
		deadline = start.Add(c.Most)
	}
	var budget atomic.Int64
	budget.Store(int64(c.Count))
	workers(c.Streams, func(i int) {
		sa, family := sockaddr(ta) // one each: Connect writes into it
		var slice spin.Slice
		for ctx.Err() == nil && (c.Count == 0 || budget.Add(-1) >= 0) {
			slice.Yield()
			t := time.Now()
			if !t.Before(deadline) {
				return
			}
			if err := crrOne(family, sa, c); err != nil {
				recs[i].fail(err)
				continue
			}
			recs[i].add(time.Since(t))
		}
	})
	return merge(recs, time.Since(start)), nil
}

func sockaddr(a *net.TCPAddr) (unix.Sockaddr, int) {
	if ip := a.IP.To4(); ip != nil {
		return &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(ip)}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Port: a.Port, Addr: [16]byte(a.IP.To16())}, unix.AF_INET6
}

func crrOne(family int, sa unix.Sockaddr, c Config) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	s := blockingSocket{fd}
	defer unix.Close(fd) // not Close: nobody else is blocked here, and the shutdown would be one system call more
	if err := SetCongestion(fd, c.Congestion); err != nil {
		return err
	}
	if err := s.connect(sa, ioTimeout); err != nil {
		return err
	}
	var b [1]byte
	if !c.Greeting {
		if _, err := s.Write([]byte{opEcho, 'x'}); err != nil {
			return fmt.Errorf("request: %w", err)
		}
	}
	if _, err := s.Read(b[:]); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}
