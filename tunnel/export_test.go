package tunnel

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// A VTEP goes on with the socket of another, which ends: nothing that comes between gets lost, and the far end notices a start anew and no silence. Where the successor does not come up, the
// other one goes on.
func TestTakeover(t *testing.T) {
	testbed.Leaks(t)
	a, b := underlay(t, 1500)
	remote, local := netip.MustParseAddrPort("10.9.0.2:4789"), netip.MustParseAddrPort("10.9.0.1:4789")
	far := newVTEP(t, b, Config{})
	var heard states
	p := addPeer(t, far, PeerConfig{VNI: 9, Remote: local, OnState: heard.hear})
	listen := func(cfg Config) *VTEP {
		cfg.Log = quiet
		var v *VTEP
		var err error
		a.Do(func() { v, err = Listen(cfg) })
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	serve := func(v *VTEP) (end func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- v.Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	old := listen(Config{})
	defer old.Close()
	var gotOld collector
	addPeer(t, old, PeerConfig{VNI: 9, Remote: remote}).Attach(&gotOld)
	end := serve(old)
	send := func(n int) {
		t.Helper()
		for range n {
			if p.Transmit([]frame.Frame{{Data: packet(false, wire.ProtoUDP, 0, 100)}}) != 1 {
				t.Error("not sent")
			}
		}
	}
	testbed.Eventually(t, tardy+probeShy, func() bool { return p.Stats().State == PeerUp })
	send(3)
	testbed.Eventually(t, tardy, func() bool { return gotOld.len() == 3 })

	// A takeover that comes to nothing.
	end()
	fds, err := old.Export()
	if err != nil {
		t.Fatal(err)
	}
	send(2)
	for _, fd := range fds {
		unix.Close(fd)
	}
	end = serve(old)
	testbed.Eventually(t, tardy, func() bool { return gotOld.len() == 5 })

	// One that is carried out.
	end()
	if fds, err = old.Export(); err != nil {
		t.Fatal(err)
	}
	send(4)
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	if _, err := old.Export(); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed VTEP is handed over: %v", err)
	}
	v := listen(Config{FDs: fds})
	defer v.Close()
	if v.LocalAddr() != old.LocalAddr() {
		t.Errorf("it listens at %v, and did at %v", v.LocalAddr(), old.LocalAddr())
	}
	var got collector
	q := addPeer(t, v, PeerConfig{VNI: 9, Remote: remote})
	q.Attach(&got)
	send(1)
	end = serve(v)
	defer end()
	testbed.Eventually(t, tardy, func() bool { return got.len() == 5 })
	testbed.Eventually(t, tardy, func() bool { return q.Stats().State == PeerUp })
	var events []PeerState
	testbed.Eventually(t, tardy, func() bool { events = append(events, heard.take()...); return len(events) >= 3 })
	time.Sleep(50 * time.Millisecond)
	if events = append(events, heard.take()...); len(events) != 3 || events[1] != PeerDown || p.Stats().State != PeerUp {
		t.Errorf("the far end noticed %v and is %v", events, p.Stats().State)
	}
	if n := old.Drops().Total() + v.Drops().Total() + q.Drops().Total(); n != 0 || v.Socket().Missed != 0 {
		t.Errorf("%d drops, %d missed", n, v.Socket().Missed)
	}
}
