package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Operations a TCP client asks for with its first byte.
const (
	opSink   byte = 'S' // the server reads to the end and answers how many bytes came, 8 bytes big-endian
	opSource byte = 'D' // the server sends until the client closes
	opEcho   byte = 'E' // the server answers each read with the same bytes
)

// ioTimeout ends a receive that nobody answers.
const ioTimeout = 10 * time.Second

// drainTimeout is how long what the sender's kernel still holds may take to arrive. Some paths stall there, which is to show in their figure.
const drainTimeout = 40 * time.Second

// Stream measures TCP throughput. Bytes are counted at the receiver; Elapsed runs until the last of them arrived.
func Stream(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(128 << 10)
	socks := make([]blockingSocket, 0, c.Streams)
	defer func() {
		for _, s := range socks {
			s.Close()
		}
	}()
	for range c.Streams {
		s, err := dial(ctx, "tcp", c.Addr)
		if err != nil {
			return Result{}, fmt.Errorf("stream to %s: %w", c.Addr, err)
		}
		socks = append(socks, s)
		if err := s.setTimeout(ioTimeout); err != nil {
			return Result{}, err
		}
	}
	var total atomic.Int64
	errs := make([]error, c.Streams)
	start := time.Now()
	deadline := start.Add(c.Duration)
	workers(c.Streams, func(i int) {
		n, err := streamOne(ctx, socks[i], c, deadline)
		total.Add(n)
		errs[i] = err
	})
	res := Result{Bytes: total.Load(), Elapsed: time.Since(start)}
	if err := errors.Join(errs...); err != nil {
		return res, fmt.Errorf("stream to %s: %w", c.Addr, err)
	}
	return res, nil
}

func streamOne(ctx context.Context, s blockingSocket, c Config, deadline time.Time) (received int64, err error) {
	buf := make([]byte, c.Size)
	op := opSink
	if c.Reverse {
		op = opSource
	}
	if _, err := s.Write([]byte{op}); err != nil {
		return 0, err
	}
	for time.Now().Before(deadline) && ctx.Err() == nil {
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

// RequestResponse measures round trips of Size bytes, one at a time on each of Streams flows.
func RequestResponse(ctx context.Context, c Config) (Result, error) {
	c = c.withDefaults(1)
	recs := make([]recorder, c.Streams)
	start := time.Now()
	deadline := start.Add(c.Duration)
	var budget atomic.Int64
	budget.Store(int64(c.Count))
	workers(c.Streams, func(i int) {
		s, err := dial(ctx, c.Network, c.Addr)
		if err != nil {
			recs[i].fail(err)
			return
		}
		defer s.Close()
		if err := s.setTimeout(ioTimeout); err != nil {
			recs[i].fail(err)
			return
		}
		req, resp := make([]byte, max(c.Size, 1)), make([]byte, max(c.Size, 64))
		req[0] = opEcho
		if c.Network == "tcp" {
			// The operation travels once; after it every byte is a request.
			if _, err := s.Write(req[:1]); err != nil {
				recs[i].fail(err)
				return
			}
		}
		for ctx.Err() == nil && (c.Count > 0 && budget.Add(-1) >= 0 || c.Count == 0 && time.Now().Before(deadline)) {
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
	var budget atomic.Int64
	budget.Store(int64(c.Count))
	workers(c.Streams, func(i int) {
		sa, family := sockaddr(ta) // one each: Connect writes into it
		for ctx.Err() == nil && (c.Count > 0 && budget.Add(-1) >= 0 || c.Count == 0 && time.Now().Before(deadline)) {
			t := time.Now()
			if err := crrOne(family, sa, c.Greeting); err != nil {
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

func crrOne(family int, sa unix.Sockaddr, greeting bool) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	s := blockingSocket{fd}
	defer unix.Close(fd) // not Close: nobody else is blocked here, and the shutdown would be one system call more
	if err := s.setTimeout(ioTimeout); err != nil {
		return err
	}
	if err := unix.Connect(fd, sa); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	var b [1]byte
	if !greeting {
		if _, err := s.Write([]byte{opEcho, 'x'}); err != nil {
			return fmt.Errorf("request: %w", err)
		}
	}
	if _, err := s.Read(b[:]); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}
