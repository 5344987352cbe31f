package udp

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
)

// bytesHandler sends what it gets to a channel.
type bytesHandler chan string

func (h bytesHandler) Receive(ts []Train) {
	for _, t := range ts {
		h <- string(t.Data)
	}
}

// A successor goes on with the same port: what is sent while nobody reads waits.
func TestExport(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::]:0", "[::1]:0"} {
		old, err := Listen(Config{Listen: netip.MustParseAddrPort(at), Ports: 3})
		if err != nil {
			t.Fatal(err)
		}
		local := old.LocalAddr()
		fds, err := old.Export()
		if err != nil || len(fds) != 3 {
			t.Fatalf("%v, %v", fds, err)
		}
		tx, err := Listen(Config{Listen: netip.MustParseAddrPort("[::]:0")})
		if err != nil {
			t.Fatal(err)
		}
		to := local
		if at == "[::]:0" {
			to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), local.Port())
		}
		path, err := tx.NewPath(to, PathConfig{})
		if err != nil {
			t.Fatal(err)
		}
		send := func(s string) {
			b, _ := tx.Batch(new(frame.DropCounters))
			b.Add(path, 0, 0, 0, nil, []byte(s))
			if lost := b.Send(); lost != 0 {
				t.Errorf("%d lost", lost)
			}
			b.Release()
		}
		send("early")
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		if _, err := old.Export(); !errors.Is(err, ErrClosed) {
			t.Errorf("Export of a closed socket: %v", err)
		}
		send("between")
		s, err := Listen(Config{FDs: fds})
		if err != nil {
			t.Fatal(err)
		}
		if s.LocalAddr() != local {
			t.Errorf("it was %v and is %v", local, s.LocalAddr())
		}
		ctx, cancel := context.WithCancel(t.Context())
		h := make(bytesHandler, 8)
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, h) }()
		send("late")
		for _, want := range []string{"early", "between", "late"} {
			select {
			case got := <-h:
				if got != want {
					t.Errorf("%s: got %q, want %q", at, got, want)
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("%s: %q does not come", at, want)
			}
		}
		back, err := s.NewPath(netip.AddrPortFrom(to.Addr(), tx.LocalAddr().Port()), PathConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := back.MTU(); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
		tx.Close()
	}
}

func TestInheritRefuses(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if s, err := Listen(Config{FDs: p[:]}); err == nil {
		s.Close()
		t.Fatal("a pipe is taken for a socket")
	}
	for _, fd := range p {
		if err := unix.Close(fd); err != unix.EBADF {
			t.Errorf("descriptor %d was left open", fd)
		}
	}
}
