package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Hold opens Count connections, Streams of them at a time, and leaves them open, idle, until letGo is called, which must be. Ops are those that the server has answered on, and
// the latencies are those of opening one. An error means that there is nothing to let go.
func Hold(ctx context.Context, c Config) (res Result, letGo func(context.Context) error, err error) {
	c = c.withDefaults(1)
	ta, err := net.ResolveTCPAddr("tcp", c.Addr)
	if err != nil {
		return Result{}, nil, err
	}
	recs, fds := make([]recorder, c.Streams), make([][]int, c.Streams)
	var budget atomic.Int64
	budget.Store(int64(c.Count))
	start := time.Now()
	workers(c.Streams, func(i int) {
		sa, family := sockaddr(ta) // one each: Connect writes into it
		for ctx.Err() == nil && budget.Add(-1) >= 0 {
			t := time.Now()
			fd, err := holdOne(family, sa)
			if err != nil {
				recs[i].fail(err)
				continue
			}
			recs[i].add(time.Since(t))
			fds[i] = append(fds[i], fd)
		}
	})
	res = merge(recs, time.Since(start))
	return res, func(ctx context.Context) error {
		for _, list := range fds {
			for _, fd := range list {
				unix.Close(fd)
			}
		}
		s, err := dial(ctx, "tcp", c.Addr)
		if err != nil {
			return fmt.Errorf("let go of held connections: %w", err)
		}
		defer s.Close()
		b := []byte{opLetGo}
		if err := errors.Join(s.setTimeout(ioTimeout), exchange(s, b)); err != nil {
			return fmt.Errorf("let go of held connections: %w", err)
		}
		return nil
	}, nil
}

func holdOne(family int, sa unix.Sockaddr) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	s := blockingSocket{fd}
	err = s.setTimeout(ioTimeout)
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err == nil {
		err = exchange(s, []byte{opHold})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// exchange writes b and reads as much.
func exchange(s blockingSocket, b []byte) error {
	if _, err := s.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(s, b)
	return err
}
