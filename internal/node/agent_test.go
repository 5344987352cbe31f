package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
	"patchbay/internal/testbed/probe"
)

// agentArg makes this test binary an agent: a process, in a container or outside, that does what it is asked on standard input, one JSON value a request, and
// answers each on standard output. It ends with its input.
const agentArg = "node-test-agent"

// ask is one request; exactly one field is set.
type ask struct {
	Exec     []string        `json:",omitempty"` // run a program to its end
	Try      []probe.Attempt `json:",omitempty"` // all at once
	Short    *load.Config    `json:",omitempty"` // connect, request, close
	Serve    string          `json:",omitempty"` // a load server, for good
	Probe    []string        `json:",omitempty"` // a probe server on these, for good
	Listen   string          `json:",omitempty"` // a transfer server, for good
	Transfer *transfer       `json:",omitempty"`
	Flows    *flows          `json:",omitempty"`
	Sysctl   [2]string       `json:",omitzero"` // below /proc/sys, value
	Hole     *hole           `json:",omitempty"`
	Hear     string          `json:",omitempty"` // join the multicast group ADDR:PORT on eth0
	Heard    bool            `json:",omitempty"` // what the group was sent since Hear, waiting for the first
	Say      *say            `json:",omitempty"`
	Watch    bool            `json:",omitempty"` // start to look how late the machine wakes a thread
	Watched  bool            `json:",omitempty"` // the latest since Watch
}

// told is the answer.
type told struct {
	Err      string
	Out      string
	Code     int
	Outcomes []probe.Outcome
	Result   load.Result
	Transfer moved
	Late     time.Duration
}

// hole opens so many connections to an address that never answers, and leaves them open.
type hole struct {
	Addr  string
	Count int
}

// say sends a datagram to a multicast group on eth0.
type say struct{ Group, Text string }

// flows keeps Open connections to an echo at Addr, sends and reads Size bytes on each one Rounds times, and with Close ends them.
type flows struct {
	Addr               string
	Open, Rounds, Size int
	Close              bool
}

type agentState struct {
	conns []net.Conn
	holes []int
	heard net.PacketConn
	late  atomic.Int64
	stop  chan struct{} // of watch
}

func agentMain() {
	if len(os.Args) != 2 || os.Args[1] != agentArg {
		return
	}
	var st agentState
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q ask
		if err := in.Decode(&q); err != nil {
			os.Exit(0)
		}
		a, err := st.do(&q)
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			os.Exit(1)
		}
	}
}

func (st *agentState) do(q *ask) (a told, err error) {
	switch {
	case q.Exec != nil:
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, q.Exec[0], q.Exec[1:]...)
		cmd.WaitDelay = time.Second
		b, err := cmd.CombinedOutput()
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			err = ctx.Err()
		}
		a.Out, a.Code = string(b), -1
		if cmd.ProcessState != nil {
			a.Code = cmd.ProcessState.ExitCode()
		}
		return a, err
	case q.Try != nil:
		a.Outcomes = make([]probe.Outcome, len(q.Try))
		var wg sync.WaitGroup
		for i, t := range q.Try {
			wg.Go(func() { a.Outcomes[i] = probe.Try(t) })
		}
		wg.Wait()
	case q.Short != nil:
		a.Result, err = load.ConnectRequestClose(context.Background(), *q.Short)
	case q.Serve != "":
		s, err := load.Listen(load.ServerConfig{Addr: q.Serve})
		if err != nil {
			return a, err
		}
		go func() { _ = s.Serve(context.Background()) }() // its end is this process's
	case q.Probe != nil:
		_, err = probe.Serve(context.Background(), nil, q.Probe...)
	case q.Listen != "":
		l, err := net.Listen("tcp", q.Listen)
		if err != nil {
			return a, err
		}
		go serveTransfers(l)
	case q.Transfer != nil:
		a.Transfer, err = q.Transfer.run()
	case q.Flows != nil:
		return a, st.flows(q.Flows)
	case q.Hole != nil:
		return a, st.open(q.Hole)
	case q.Hear != "":
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return a, err
		}
		group, err := net.ResolveUDPAddr("udp", q.Hear)
		if err != nil {
			return a, err
		}
		st.heard, err = net.ListenMulticastUDP("udp", ifi, group)
		return a, err
	case q.Heard:
		buf := make([]byte, 64<<10)
		_ = st.heard.SetReadDeadline(time.Now().Add(3 * time.Second))
		n, from, err := st.heard.ReadFrom(buf)
		if err != nil {
			return a, err
		}
		a.Out = fmt.Sprintf("%s from %s", buf[:n], from.(*net.UDPAddr).IP)
	case q.Say != nil:
		c, err := net.Dial("udp", q.Say.Group)
		if err != nil {
			return a, err
		}
		defer c.Close()
		_, err = io.WriteString(c, q.Say.Text)
		return a, err
	case q.Watch:
		st.stop = make(chan struct{})
		st.late.Store(0)
		for range runtime.NumCPU() {
			go st.watch(st.stop)
		}
	case q.Watched:
		close(st.stop)
		a.Late = time.Duration(st.late.Load())
	case q.Sysctl[0] != "":
		err = os.WriteFile("/proc/sys/"+q.Sysctl[0], []byte(q.Sysctl[1]), 0)
	default:
		err = errors.New("nothing was asked")
	}
	return a, err
}

// watch sleeps for a millisecond at a time, in the kernel, and notes the longest that it overslept.
func (st *agentState) watch(stop chan struct{}) {
	runtime.LockOSThread()
	for {
		select {
		case <-stop:
			return
		default:
		}
		start := time.Now()
		_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil) // interrupted is early, which does no harm
		d := int64(time.Since(start) - time.Millisecond)
		for old := st.late.Load(); d > old && !st.late.CompareAndSwap(old, d); old = st.late.Load() {
		}
	}
}

func (st *agentState) flows(f *flows) error {
	errs := make(chan error, max(f.Open, len(st.conns)))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range f.Open {
		wg.Go(func() {
			c, err := net.DialTimeout("tcp", f.Addr, 20*time.Second)
			if err == nil {
				_, err = c.Write([]byte{'E'}) // load's echo
			}
			if err != nil {
				errs <- err
				return
			}
			mu.Lock()
			st.conns = append(st.conns, c)
			mu.Unlock()
		})
	}
	wg.Wait()
	for i, c := range st.conns {
		if f.Rounds == 0 {
			break
		}
		wg.Go(func() {
			out, in := make([]byte, f.Size), make([]byte, f.Size)
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			for r := range f.Rounds {
				for k := range out {
					out[k] = byte(i*31 + r*7 + k)
				}
				if r == 0 {
					out[0] = 'E'
				}
				if _, err := c.Write(out); err != nil {
					errs <- err
					return
				}
				if _, err := io.ReadFull(c, in); err != nil {
					errs <- err
					return
				}
				if !bytes.Equal(in, out) {
					errs <- fmt.Errorf("connection %d, round %d: other bytes came back than were sent", i, r)
					return
				}
			}
		})
	}
	wg.Wait()
	if f.Close {
		for _, c := range st.conns {
			c.Close()
		}
		st.conns = nil
		runtime.GC()
	}
	select {
	case err := <-errs:
		return fmt.Errorf("%d of %d failed; the first: %w", len(errs)+1, cap(errs), err)
	default:
		return nil
	}
}

func (st *agentState) open(h *hole) error {
	a, err := net.ResolveTCPAddr("tcp", h.Addr)
	if err != nil {
		return err
	}
	for range h.Count {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		st.holes = append(st.holes, fd)
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())})
		if !errors.Is(err, syscall.EINPROGRESS) {
			return fmt.Errorf("connect to a black hole: %w", err)
		}
	}
	return nil
}
