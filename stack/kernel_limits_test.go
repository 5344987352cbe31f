package stack

import (
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/tap"
)

// TestHalfOpenLimit: dials that are never answered use up the container's share, and nobody else's.
func TestHalfOpenLimit(t *testing.T) {
	cfg := testConfig()
	cfg.TCP.MaxHalfOpen, cfg.TCP.MaxHalfOpenPerSource = 100, 40
	var mu sync.Mutex
	var held []TCPRequest
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		if r.Dst().Port() == 1 {
			mu.Lock()
			defer mu.Unlock()
			held = append(held, r)
			return
		}
		go func() {
			if c, err := r.Accept(); err == nil {
				c.Close()
			}
		}()
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	for i := range 60 {
		d := ipPacket(netip.MustParseAddr("10.88.0.9"), far4, 6, 64, tcpSegment(uint16(1000+i), 1, 1, 0, tcpSYN, nil))
		w.gw.Transmit([]frame.Frame{{Data: d}})
	}
	if len(held) != 40 || w.gw.Drops().Get(frame.DropDialLimit) != 20 {
		t.Fatalf("%d held; drops %v", len(held), drops(w.gw))
	}
	start := time.Now()
	w.dial(t, "192.0.2.7:80")
	if d := time.Since(start); d > 500*time.Millisecond {
		t.Errorf("another container's dial took %v", d)
	}
	for _, r := range held {
		r.Ignore()
	}
	if !testbed.Wait(patience, func() bool { n, sources := w.gw.waiting(); return n == 0 && sources == 0 }) {
		t.Error("requests are left")
	}
	if _, err := held[0].Accept(); err == nil {
		t.Error("answered twice")
	}
}

// TestPortReuse makes far more connections than the container has ports, with the gateway closing first, so that each port comes back while
// a lesser gateway still has it in TIME-WAIT.
func TestPortReuse(t *testing.T) {
	testbed.Leaks(t)
	total := 60000
	if testing.Short() {
		total = 6000
	}
	cfg := testConfig()
	cfg.Handlers.TCP = tcpFunc(func(r TCPRequest) {
		go func() {
			c, err := r.Accept()
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			io.WriteString(c, "x") // the server speaks first
			c.CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}()
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	w.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("20000 24000"), 0); err != nil {
			t.Fatal(err)
		}
	})
	var wg sync.WaitGroup
	var slow, slowest atomic.Int64
	start := time.Now()
	for range 16 {
		wg.Go(func() {
			w.Do(func() {
				for range total / 16 {
					begin := time.Now()
					c, err := net.DialTimeout("tcp", "192.0.2.7:80", patience)
					if err != nil {
						t.Errorf("%v; drops %v", err, drops(w.gw))
						return
					}
					b, err := io.ReadAll(c)
					c.Close()
					if err != nil || string(b) != "x" {
						t.Errorf("%q, %v", b, err)
						return
					}
					d := int64(time.Since(begin))
					if d > int64(900*time.Millisecond) { // a lost SYN
						slow.Add(1)
					}
					if d > slowest.Load() {
						slowest.Store(d)
					}
				}
			})
		})
	}
	wg.Wait()
	took := time.Since(start)
	t.Logf("%d connections in %v, %.0f a second, slowest %v", total, took.Round(time.Millisecond), float64(total)/took.Seconds(), time.Duration(slowest.Load()))
	if slow.Load() > int64(total/1000) { // a busy machine stalls a few at once
		t.Errorf("%d connections waited for a retransmission", slow.Load())
	}
	testbed.Eventually(t, patience, func() bool { return len(w.gw.flows.all()) == 0 })
}
