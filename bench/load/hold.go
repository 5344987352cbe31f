package load

import (
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What Hold takes for the end of what a path can hold: so many failures one after the other, or none that succeeds for so long.
const (
	holdFailures = 64
	holdSilence  = ioTimeout
)

// spareFiles is how many descriptors a side keeps back from what is held, for whatever is asked meanwhile.
const spareFiles = 100

// mostHeld is the first descriptor that is not held any more.
func mostHeld() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return math.MaxInt
	}
	return int(min(l.Cur, math.MaxInt32)) - spareFiles
}

// Hold opens Count connections, Streams of them at a time, and leaves them open, idle, until letGo is called, which must be. Ops are those that the server has answered on, and
// the latencies are those of opening one. Errors are the others: those that failed, and those that were not tried since it had come to nothing for a while, or Most was over. An error means
// that there is nothing to let go.
func Hold(ctx context.Context, c Config) (res Result, letGo func() error, err error) {
	c = c.withDefaults(1)
	ta, err := net.ResolveTCPAddr("tcp", c.Addr)
	if err != nil {
		return Result{}, nil, err
	}
	// The way to let go is opened first: there may be none afterwards, while the path carries all it can.
	control, err := dial(ctx, "tcp", c.Addr, c.Congestion)
	if err == nil {
		if err = control.setTimeout(ioTimeout); err == nil {
			_, err = control.Write([]byte{opLetGo})
		}
		if err != nil {
			control.Close()
		}
	}
	if err != nil {
		return Result{}, nil, err
	}
	recs, fds := make([]recorder, c.Streams), make([][]int, c.Streams)
	var budget, inRow, good atomic.Int64 // good is when one succeeded last, since start
	budget.Store(int64(c.Count))
	start, most := time.Now(), mostHeld()
	workers(c.Streams, func(i int) {
		sa, family := sockaddr(ta) // one each: Connect writes into it
		for ctx.Err() == nil && budget.Add(-1) >= 0 {
			t := time.Now()
			if t.Sub(start) > c.Most {
				recs[i].fail(fmt.Errorf("%v are over", c.Most))
				return
			}
			fd, err := holdOne(family, sa, most, c.Congestion)
			if err != nil {
				recs[i].fail(err)
				if inRow.Add(1) >= holdFailures || time.Since(start)-time.Duration(good.Load()) > holdSilence {
					return // and so will the others
				}
				continue
			}
			inRow.Store(0)
			good.Store(int64(time.Since(start)))
			recs[i].add(time.Since(t))
			fds[i] = append(fds[i], fd)
		}
	})
	res = merge(recs, time.Since(start))
	if res.Errors = int64(c.Count) - res.Ops; res.Errors > 0 && res.Ops > 0 {
		res.Elapsed = time.Duration(good.Load()) // the rate is that of those there are
	}
	return res, func() error {
		for _, list := range fds {
			for _, fd := range list {
				unix.Close(fd)
			}
		}
		defer control.Close()
		if err := exchange(control, []byte{opLetGo}); err != nil {
			return fmt.Errorf("let go of held connections: %w", err)
		}
		return nil
	}, nil
}

func holdOne(family int, sa unix.Sockaddr, most int, congestion string) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	s, answer := blockingSocket{fd}, []byte{opHold}
	if fd >= most {
		err = fmt.Errorf("the near side: %w", unix.EMFILE)
	}
	if err == nil {
		err = SetCongestion(fd, congestion)
	}
	if err == nil {
		err = s.connect(sa, ioTimeout)
	}
	if err == nil {
		err = exchange(s, answer)
	}
	if err == nil && answer[0] != opHold {
		err = fmt.Errorf("the far side: %w", unix.EMFILE)
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
