package load

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// otherCongestion is a congestion control that everybody may use and that a socket does not have by itself.
func otherCongestion(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	is, err := Congestion(fd)
	if err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{"reno"}, strings.Fields(string(names))...) {
		if name != is && SetCongestion(fd, name) == nil {
			return name
		}
	}
	testbed.Lacking(t, "this machine lets nobody use another congestion control than %s", is)
	return ""
}

// The server's sockets have what was asked for, those that it accepts on either port too, and so has a client's before it connects.
func TestCongestion(t *testing.T) {
	want := otherCongestion(t)
	s, err := Listen(ServerConfig{Addr: "127.0.0.1:0", Congestion: want})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	defer func() { cancel(); <-done }()
	if got, err := s.Congestion(); err != nil || got != want {
		t.Errorf("the server says %q, %v; want %s", got, err, want)
	}
	for i, l := range s.listeners {
		if got, err := CongestionOf(l); err != nil || got != want {
			t.Errorf("listener %d has %q, %v; want %s", i, got, err, want)
		}
		c, err := dial(ctx, "tcp", l.Addr().String(), want)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Congestion(c.fd); err != nil || got != want {
			t.Errorf("a connection to listener %d has %q, %v; want %s", i, got, err, want)
		}
		if i == 0 {
			if err := exchange(c, []byte{opHold}); err != nil { // an answer, so the other end is accepted
				t.Fatal(err)
			}
		} else if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		if len(s.conns) != i+1 { // the first is held
			t.Errorf("%d connections accepted by listener %d and before", len(s.conns), i)
		}
		for fd := range s.conns {
			if got, err := Congestion(fd); err != nil || got != want {
				t.Errorf("what was accepted by listener %d or before has %q, %v; want %s", i, got, err, want)
			}
		}
		s.mu.Unlock()
		defer c.Close()
	}
}

// Every kind of measurement sets it, and does so before it connects: nobody listens here, and yet that is not the error.
func TestCongestionComesBeforeConnect(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	c := Config{Addr: addr, Duration: 10 * time.Millisecond, Count: 1, Congestion: "no-such-thing"}
	check := func(kind string, err error, r Result) {
		t.Helper()
		if !errors.Is(err, unix.ENOENT) && !strings.Contains(r.FirstErr, unix.ENOENT.Error()) {
			t.Errorf("%s: %v, %q", kind, err, r.FirstErr)
		}
	}
	r, err := Stream(t.Context(), c)
	check("stream", err, r)
	_, _, err = sunk(t.Context(), c, 1)
	check("what has come of a stream", err, Result{})
	r, err = RequestResponse(t.Context(), c)
	check("rr", err, r)
	r, err = ConnectRequestClose(t.Context(), c)
	check("crr", err, r)
	_, _, err = Hold(t.Context(), c)
	check("hold", err, Result{})
	ta, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	sa, family := sockaddr(ta)
	_, err = holdOne(family, sa, 1<<20, c.Congestion)
	check("one that is held", err, Result{})
	if _, err := Listen(ServerConfig{Addr: addr, Congestion: c.Congestion}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("server: %v", err)
	}
	c.Network = "udp"
	if r, err := RequestResponse(t.Context(), c); err != nil || strings.Contains(r.FirstErr, unix.ENOENT.Error()) {
		t.Errorf("it is TCP's alone: %v, %q", err, r.FirstErr)
	}
}
