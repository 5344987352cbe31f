package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startServer(t *testing.T) string {
	t.Helper()
	s, err := Listen(ServerConfig{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve did not return after its context ended")
		}
	})
	return s.Addr().String()
}

func TestEveryMeasurementOverLoopback(t *testing.T) {
	addr := startServer(t)
	ctx := t.Context()
	const d = 200 * time.Millisecond
	for _, reverse := range []bool{false, true} {
		r, err := Stream(ctx, Config{Addr: addr, Duration: d, Streams: 2, Reverse: reverse})
		if err != nil || r.Bytes == 0 {
			t.Errorf("Stream reverse=%v: %+v, %v", reverse, r, err)
		}
		r, err = Flood(ctx, Config{Addr: addr, Duration: d, Reverse: reverse})
		if err != nil || r.Received == 0 || r.Sent < r.Received || r.Bytes != r.Received*1400 {
			t.Errorf("Flood reverse=%v: %+v, %v", reverse, r, err)
		}
		r, err = Flood(ctx, Config{Addr: addr, Duration: d, Rate: 1000, Reverse: reverse})
		if err != nil || r.Received < 100 || r.Sent > 210 {
			t.Errorf("Flood at 1000/s reverse=%v: %+v, %v", reverse, r, err)
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		r, err := RequestResponse(ctx, Config{Addr: addr, Network: network, Duration: d})
		if err != nil || r.Ops == 0 || r.Errors != 0 || r.P50 == 0 || r.P50 > r.P99 || r.P99 > r.Max {
			t.Errorf("RequestResponse %s: %+v, %v", network, r, err)
		}
	}
	for _, greeting := range []bool{false, true} {
		r, err := ConnectRequestClose(ctx, Config{Addr: addr, Count: 500, Streams: 4, Greeting: greeting})
		if err != nil || r.Ops != 500 || r.Errors != 0 {
			t.Errorf("ConnectRequestClose greeting=%v: %+v, %v", greeting, r, err)
		}
	}
}

func TestHold(t *testing.T) {
	addr := startServer(t)
	for range 2 {
		r, letGo, err := Hold(t.Context(), Config{Addr: addr, Count: 300, Streams: 4})
		if err != nil || r.Ops != 300 || r.Errors != 0 || r.P50 == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if rr, err := RequestResponse(t.Context(), Config{Addr: addr, Count: 10}); err != nil || rr.Ops != 10 {
			t.Errorf("beside them: %+v, %v", rr, err)
		}
		if err := letGo(); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := Hold(t.Context(), Config{Addr: "127.0.0.1:port", Count: 1}); err == nil {
		t.Error("no such port")
	}
}

// lowerFiles gives the process only so many descriptors until the test's end.
func lowerFiles(t *testing.T, n uint64) {
	t.Helper()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
}

// Where descriptors run out, on either side, what could be held is, with the reason why there is no more; both sides go on working.
func TestHoldRunsOutOfFiles(t *testing.T) {
	for _, side := range []string{"near", "far"} {
		t.Run(side, func(t *testing.T) {
			var addr string
			if side == "near" {
				addr = startServer(t)
			}
			lowerFiles(t, 400)
			if side == "far" { // whose limit is the lower one
				addr = startServer(t)
				lowerFiles(t, 2000)
			}
			r, letGo, err := Hold(t.Context(), Config{Addr: addr, Count: 1000, Streams: 4})
			if err != nil {
				t.Fatal(err)
			}
			if r.Ops < 100 || r.Ops > 300 || r.Ops+r.Errors != 1000 || r.FirstErr != "the "+side+" side: too many open files" {
				t.Errorf("%+v", r)
			}
			if rr, err := RequestResponse(t.Context(), Config{Addr: addr, Count: 10}); err != nil || rr.Ops != 10 {
				t.Errorf("beside them: %+v, %v", rr, err)
			}
			if err := letGo(); err != nil {
				t.Error(err)
			}
			if crr, err := ConnectRequestClose(t.Context(), Config{Addr: addr, Count: 100}); err != nil || crr.Ops != 100 {
				t.Errorf("afterwards: %+v, %v", crr, err)
			}
		})
	}
}

// fullListener is a listener whose queue is full: it answers nothing to whoever connects, until the first connection, of the returned one, is accepted.
func fullListener(t *testing.T) (fd int, addr string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr = fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
	first, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })
	return fd, addr
}

// What counts ends at Most, whatever it has come to.
func TestMost(t *testing.T) {
	addr := startServer(t)
	const most = 50 * time.Millisecond
	r, letGo, err := Hold(t.Context(), Config{Addr: addr, Count: 1 << 30, Most: most})
	if err != nil {
		t.Fatal(err)
	}
	if r.Ops == 0 || r.Ops+r.Errors != 1<<30 || r.Elapsed > 20*most || r.FirstErr != "50ms are over" && !strings.Contains(r.FirstErr, "open files") {
		t.Errorf("Hold: %+v", r)
	}
	if err := letGo(); err != nil {
		t.Error(err)
	}
	r, err = ConnectRequestClose(t.Context(), Config{Addr: addr, Count: 1 << 30, Most: most})
	if err != nil || r.Ops == 0 || r.Errors != 0 {
		t.Errorf("ConnectRequestClose: %+v, %v", r, err)
	}
}

// A connect that nobody answers ends in time, and goes on after the signals that the runtime sends itself.
func TestConnectWithin(t *testing.T) {
	lfd, addr := fullListener(t)
	ta, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	connect := func(within time.Duration) (took time.Duration, err error) {
		sa, family := sockaddr(ta)
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		stop, stopped, thread := make(chan struct{}), make(chan struct{}), unix.Gettid()
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
					_ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG)
				}
			}
		}()
		start := time.Now()
		err = blockingSocket{fd}.connect(sa, within)
		took = time.Since(start)
		close(stop)
		<-stopped
		return took, err
	}
	const short = 300 * time.Millisecond
	if took, err := connect(short); !errors.Is(err, unix.ETIMEDOUT) || took < short || took > 20*short {
		t.Errorf("%v after %v", err, took)
	}
	go func() {
		time.Sleep(100 * time.Millisecond)
		if fd, _, err := unix.Accept(lfd); err == nil {
			unix.Close(fd)
		}
	}()
	if took, err := connect(ioTimeout); err != nil || took < short {
		t.Errorf("when there was room: %v after %v", err, took)
	}
}

func TestFailedConnectionsAreCounted(t *testing.T) {
	// Port 1 of loopback has no listener here.
	r, err := ConnectRequestClose(t.Context(), Config{Addr: "127.0.0.1:1", Count: 3})
	if err != nil || r.Errors != 3 || r.Ops != 0 || r.FirstErr == "" {
		t.Errorf("got %+v, %v; want three errors", r, err)
	}
}

// A stream that breaks is an error, and still has the figure of what arrived before.
func TestBrokenStreamIsCounted(t *testing.T) {
	addr := startServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const passed = 1 << 20
	go func() {
		for first := true; ; first = false {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", addr)
			if err != nil {
				in.Close()
				return
			}
			go func() { _, _ = io.Copy(in, out) }()
			if first {
				op := make([]byte, 9) // and the id
				_, _ = io.ReadFull(in, op)
				_, _ = out.Write(op)
				_, _ = io.CopyN(out, in, passed-9)
				for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					if n, _, err := sunk(t.Context(), Config{Addr: addr}, getInt64(op[1:])); err != nil || n > 0 {
						break // what is still on its way when the connection breaks is not counted
					}
				}
				_ = in.(*net.TCPConn).SetLinger(0)
				in.Close()
			} else {
				_, _ = io.Copy(out, in)
				in.Close()
			}
			out.Close()
		}
	}()
	const d = 500 * time.Millisecond
	r, err := Stream(t.Context(), Config{Addr: l.Addr().String(), Duration: d})
	if err == nil || r.Elapsed < d || r.Elapsed > 2*d {
		t.Errorf("%+v, %v; want an error and %v", r, err, d)
	}
	if want := int64(passed - 9); r.Bytes < 1 || r.Bytes > want { // operation and id are no data; the last of it may be on its way
		t.Errorf("%d bytes, want up to %d", r.Bytes, want)
	}
}

func TestRecorderThinsSamplesEvenly(t *testing.T) {
	var r recorder
	for i := range 3 * maxSamples {
		r.add(time.Duration(i))
	}
	res := merge([]recorder{r}, time.Second)
	if len(r.samples) > maxSamples || res.Ops != 3*maxSamples || res.Max != 3*maxSamples-1 {
		t.Errorf("%d samples, %+v", len(r.samples), res)
	}
	if want := time.Duration(3 * maxSamples / 2); res.P50 < want*9/10 || res.P50 > want*11/10 {
		t.Errorf("P50 = %d, want near %d", res.P50, want)
	}
}

// A SYN that is lost is sent again a second later, and what was to be measured for less than that is measured all the same.
func TestRequestResponseSlowConnect(t *testing.T) {
	fd, addr := fullListener(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		time.Sleep(100 * time.Millisecond)
		for i := range 2 {
			s, _, err := unix.Accept(fd)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(s)
			if i == 0 {
				continue
			}
			b := make([]byte, 64)
			for skip := 1; ; skip = 0 { // the operation has no answer
				n, err := unix.Read(s, b)
				if n <= 0 || err != nil {
					return
				}
				if n > skip {
					_, _ = unix.Write(s, b[skip:n]) // the client sees it
				}
			}
		}
	})
	start := time.Now()
	r, err := RequestResponse(t.Context(), Config{Addr: addr, Network: "tcp", Duration: 10 * time.Millisecond})
	if err != nil || r.Ops == 0 || r.Errors != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if took := time.Since(start); took < 500*time.Millisecond || r.Elapsed > took/2 {
		t.Errorf("the SYN was not lost: connected and measured within %v, of which %v were measuring", took, r.Elapsed)
	}
}
