package stack

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/testbed"
	"patchbay/tap"
)

// TestDialTCPOnce holds that a dial has one outcome, whenever its context ends, and that nothing is left of one that was given up.
func TestDialTCPOnce(t *testing.T) {
	testbed.Leaks(t)
	w := newWorld(t, testConfig(), tap.OpenConfig{})
	l, err := w.Listen("tcp", netip.AddrPortFrom(con4, 8080).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			c.Close()
		}
	}()
	rnd := rand.New(rand.NewPCG(1, 2))
	dsts := []netip.AddrPort{netip.AddrPortFrom(con4, 8080), netip.AddrPortFrom(con4, 9), netip.AddrPortFrom(con4.Next(), 80)}
	var connected, refused, ended atomic.Int32
	for range 600 {
		ctx, cancel := context.WithCancel(context.Background())
		var outcomes atomic.Int32
		first := make(chan struct{})
		wait := time.Duration(rnd.IntN(400)) * time.Microsecond
		go func() {
			time.Sleep(wait)
			cancel()
		}()
		w.gw.DialTCP(ctx, netip.AddrPort{}, dsts[rnd.IntN(len(dsts))], func(c Conn, err error) {
			switch {
			case err == nil:
				connected.Add(1)
				go func() {
					_, _ = io.Copy(io.Discard, c) // the end of the context is not the connection's
					c.Close()
				}()
			case errors.Is(err, syscall.ECONNREFUSED):
				refused.Add(1)
			case errors.Is(err, context.Canceled):
				ended.Add(1)
			default:
				t.Error(err)
			}
			if outcomes.Add(1) == 1 {
				close(first)
			}
		})
		select {
		case <-first:
		case <-time.After(patience):
			t.Fatal("no outcome")
		}
		<-ctx.Done()
		if n := outcomes.Load(); n != 1 {
			t.Fatalf("%d outcomes", n)
		}
	}
	t.Logf("%d connected, %d refused, %d given up", connected.Load(), refused.Load(), ended.Load())
	if connected.Load() == 0 || refused.Load() == 0 || ended.Load() == 0 {
		t.Error("one of the outcomes was never seen")
	}
	testbed.Eventually(t, patience, func() bool { return len(w.gw.flows.all()) == 0 })
}
