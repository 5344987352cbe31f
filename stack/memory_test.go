package stack

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/tap"
)

// held is what the connections hold, added up from netstack itself.
func held(g *Gateway) (n int64) {
	for _, c := range g.flows.all() {
		if !c.dead() {
			n += int64(sendUsed(c.ep) + receiveMemUsed(c.ep))
		}
	}
	return n
}

// TestMemoryLimit: hundreds of connections that stall in either direction share a bounded memory, and leave some for who still moves.
func TestMemoryLimit(t *testing.T) {
	testbed.Leaks(t)
	const uploads, downloads, limit = 300, 100, 24 << 20
	var up atomic.Int64
	cfg := testConfig()
	cfg.TCP.MaxMemory = limit
	release := make(chan struct{})
	cfg.Handlers.TCP = accepting(func(c Conn) {
		defer c.Close()
		switch c.LocalAddr().(*net.TCPAddr).Port {
		case 1: // pushes to a container that does not read
			up.Add(1)
			for _, err := c.Write(make([]byte, 1<<20)); err == nil; _, err = c.Write(make([]byte, 1<<20)) {
			}
		case 2: // does not read what the container pushes
			up.Add(1)
			<-release
			c.Reset()
		default:
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		}
	})
	w := newWorld(t, cfg, tap.OpenConfig{})
	var peak atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
				peak.Store(max(peak.Load(), w.gw.TCPMemory(), held(w.gw)))
			}
		}
	})
	var cs []*net.TCPConn
	for range uploads {
		c := w.dial(t, "[2001:db8::7]:2")
		c.SetDeadline(time.Time{})
		cs = append(cs, c)
	}
	// All of them were promised a window while there was room.
	testbed.Eventually(t, patience, func() bool { return up.Load() == uploads })
	for _, c := range cs {
		wg.Go(func() {
			for _, err := c.Write(make([]byte, 1<<20)); err == nil; _, err = c.Write(make([]byte, 1<<20)) {
			}
		})
	}
	for range downloads {
		cs = append(cs, w.dial(t, "192.0.2.7:1"))
	}
	testbed.Eventually(t, patience, func() bool {
		return up.Load() == uploads+downloads && w.gw.TCPMemory() > limit/2 && w.gw.Drops().Get(frame.DropMemory) > 0
	})
	time.Sleep(500 * time.Millisecond)
	c := w.dial(t, "192.0.2.7:3")
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	start := time.Now()
	wg.Go(func() { c.Write(data); c.CloseWrite() })
	if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, data) {
		t.Errorf("a fresh connection among stalled ones: %d of %d bytes, %v; %d bytes held", len(b), len(data), err, w.gw.TCPMemory())
	}
	t.Logf("1 MiB and back in %v; %d KiB held, at most %d; drops %v", time.Since(start), w.gw.TCPMemory()>>10, peak.Load()>>10, drops(w.gw))
	if p := peak.Load(); p > limit*5/4 {
		t.Errorf("%d bytes held, limit %d", p, limit)
	}
	for _, c := range cs {
		c.SetLinger(0)
		c.Close()
	}
	close(release)
	if !testbed.Wait(patience, func() bool { return w.gw.TCPMemory() == 0 }) {
		t.Errorf("%d bytes counted after the last connection, %d held", w.gw.TCPMemory(), held(w.gw))
	}
	close(stop)
	wg.Wait()
}
