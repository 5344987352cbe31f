package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/spin"
)

// Config says what to measure and how long. The zero value of a field is its documented default.
type Config struct {
	Addr     string        // host:port of a Server
	Network  string        // for RequestResponse: "tcp" (default) or "udp"
	Duration time.Duration // 2 s
	Count    int           // ConnectRequestClose and RequestResponse: stop after so many operations in all; 0 = by Duration
	Most     time.Duration // ConnectRequestClose and Hold: stop after this time although there are fewer than Count: 100 s
	Streams  int           // parallel streams, flows or clients: 1
	Size     int           // Stream: bytes a write, 128 KiB. Flood: payload bytes a datagram, 1400. RequestResponse: 1
	Rate     int           // Flood: datagrams a second; 0 = flat out
	Reverse  bool          // Stream and Flood: from the server to the client
	Greeting bool          // ConnectRequestClose: use the port where the server speaks first

	Congestion string // congestion control of the TCP sockets; "" = what the network namespace has
}

func (c Config) withDefaults(size int) Config {
	if c.Duration == 0 {
		c.Duration = 2 * time.Second
	}
	if c.Most == 0 {
		c.Most = 100 * time.Second
	}
	if c.Streams == 0 {
		c.Streams = 1
	}
	if c.Size == 0 {
		c.Size = size
	}
	if c.Network == "" {
		c.Network = "tcp"
	}
	return c
}

// Result is what one run measured. Fields that do not apply are zero.
type Result struct {
	Bytes    int64         `json:"bytes,omitempty"` // payload received
	Sent     int64         `json:"sent,omitempty"`  // datagrams handed to the kernel by the sender
	Received int64         `json:"received,omitempty"`
	Ops      int64         `json:"ops,omitempty"` // requests answered
	Errors   int64         `json:"errors,omitempty"`
	FirstErr string        `json:"first_error,omitempty"`
	Elapsed  time.Duration `json:"elapsed"`
	P50      time.Duration `json:"p50,omitempty"`
	P99      time.Duration `json:"p99,omitempty"`
	Max      time.Duration `json:"max,omitempty"`
}

// BitsPerSecond is the payload rate at the receiver.
func (r Result) BitsPerSecond() float64 { return float64(r.Bytes) * 8 / r.Elapsed.Seconds() }

// PacketsPerSecond is the rate of datagrams at the receiver.
func (r Result) PacketsPerSecond() float64 { return float64(r.Received) / r.Elapsed.Seconds() }

// OpsPerSecond is the rate of answered requests.
func (r Result) OpsPerSecond() float64 { return float64(r.Ops) / r.Elapsed.Seconds() }

// maxSamples bounds the memory that round-trip times take: 8 MB.
const maxSamples = 1 << 20

// recorder collects the operations of one worker.
type recorder struct {
	samples  []time.Duration
	stride   int // keep every stride-th sample
	ops      int64
	errs     int64
	firstErr error
	max      time.Duration
}

func (r *recorder) add(d time.Duration) {
	r.ops++
	r.max = max(r.max, d)
	if r.stride == 0 {
		r.stride = 1
	}
	if r.ops%int64(r.stride) != 0 {
		return
	}
	if len(r.samples) == maxSamples {
		kept := r.samples[:0]
		for i := 1; i < maxSamples; i += 2 {
			kept = append(kept, r.samples[i])
		}
		r.samples, r.stride = kept, r.stride*2
	}
	r.samples = append(r.samples, d)
}

func (r *recorder) fail(err error) {
	r.errs++
	if r.firstErr == nil {
		r.firstErr = err
	}
}

// merge makes one Result of the workers' records.
func merge(rs []recorder, elapsed time.Duration) Result {
	res := Result{Elapsed: elapsed}
	var all []time.Duration
	for i := range rs {
		res.Ops += rs[i].ops
		res.Errors += rs[i].errs
		res.Max = max(res.Max, rs[i].max)
		if rs[i].firstErr != nil && res.FirstErr == "" {
			res.FirstErr = rs[i].firstErr.Error()
		}
		all = append(all, rs[i].samples...)
	}
	if len(all) > 0 {
		slices.Sort(all)
		res.P50 = all[len(all)/2]
		res.P99 = all[len(all)*99/100]
	}
	return res
}

// workers runs f on n goroutines, each of which may wait in the kernel for long, and returns when the last has.
func workers(n int, f func(i int)) {
	spin.SetProcs(n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// blockingSocket is a connected socket in blocking mode, read and written with plain system calls.
type blockingSocket struct{ fd int }

// dial opens a blocking socket to addr within ioTimeout. It resolves names like net.Dial.
func dial(ctx context.Context, network, addr, congestion string) (blockingSocket, error) {
	d := net.Dialer{Timeout: ioTimeout, Control: Control(congestion)}
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return blockingSocket{}, err
	}
	defer c.Close()
	return takeOver(c)
}

// takeOver makes a blocking socket of a duplicate of c's descriptor; c can be closed.
func takeOver(c net.Conn) (blockingSocket, error) {
	var fd int
	var derr error
	sc, ok := c.(syscall.Conn)
	if !ok {
		return blockingSocket{}, fmt.Errorf("%T has no descriptor", c)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return blockingSocket{}, err
	}
	err = rc.Control(func(orig uintptr) {
		fd, derr = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, derr); err != nil {
		return blockingSocket{}, fmt.Errorf("duplicate socket: %w", err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return blockingSocket{}, fmt.Errorf("make socket blocking: %w", err)
	}
	return blockingSocket{fd}, nil
}

func (s blockingSocket) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if n == 0 {
			return 0, io.EOF
		}
		return n, nil
	}
}

func (s blockingSocket) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(s.fd, b[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Close wakes whoever is blocked on the socket and closes it.
func (s blockingSocket) Close() error {
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // not connected any more is as good
	return unix.Close(s.fd)
}

// connect connects within d, where the kernel alone would try for two minutes; each receive and each send is bounded likewise then.
func (s blockingSocket) connect(to unix.Sockaddr, d time.Duration) error {
	deadline := time.Now().Add(d)
	if err := errors.Join(s.setTimeout(d), s.setSendTimeout(d)); err != nil {
		return err
	}
	switch err := unix.Connect(s.fd, to); err {
	case nil:
		return nil
	case unix.EINPROGRESS:
		return fmt.Errorf("connect: %w", unix.ETIMEDOUT)
	case unix.EINTR: // which goes on with it
	default:
		return fmt.Errorf("connect: %w", err)
	}
	for {
		left := max(time.Until(deadline), 0) + time.Millisecond - 1 // not a moment early
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, int(left.Milliseconds()))
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n == 0:
			err = unix.ETIMEDOUT
		case err == nil:
			var soErr int
			if soErr, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && soErr == 0 {
				return nil
			} else if err == nil {
				err = unix.Errno(soErr)
			}
		}
		return fmt.Errorf("connect: %w", err)
	}
}

// setTimeout bounds each blocking receive, so that a lost answer ends in EAGAIN and not in a hang.
func (s blockingSocket) setTimeout(d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// setSendTimeout bounds each blocking send, and a connect, which under it is not restarted after a signal, and the runtime sends itself many.
func (s blockingSocket) setSendTimeout(d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
}
