package vswitch_test

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	vswitch "patchbay/switch"
)

// watched is a port that knows whether it may still be called.
type watched struct {
	t       *testing.T
	removed atomic.Bool
	inside  atomic.Int64
	frames  atomic.Uint64
}

func (w *watched) Transmit(fs []frame.Frame) int {
	w.inside.Add(1)
	defer w.inside.Add(-1)
	if w.removed.Load() {
		w.t.Error("Transmit after RemovePort has returned")
	}
	n := len(fs) - len(fs)%3%2 // refuses one now and then
	for i := range fs[:n] {
		if len(fs[i].Data) < wire.EthernetLen {
			w.t.Error("short frame")
		}
	}
	w.frames.Add(uint64(n))
	runtime.Gosched()
	return n
}

func (w *watched) Caps() frame.Caps { return frame.CapAll }

// Ports come and go while several goroutines forward, learn, move and flood; afterwards every frame is accounted for and no port
// was called after it was removed.
func TestStress(t *testing.T) {
	testbed.Leaks(t)
	const senders, churners = 6, 3
	run := 1500 * time.Millisecond
	if testing.Short() {
		run = 200 * time.Millisecond
	}
	s := vswitch.New(vswitch.Config{Log: quiet(), MaxMACs: 200, Ageing: 50 * time.Millisecond})
	var stop atomic.Bool
	var sent, got atomic.Uint64
	var wg sync.WaitGroup
	churn := func(rng *rand.Rand, n int) {
		defer wg.Done()
		for !stop.Load() {
			w := &watched{t: t}
			cfg := vswitch.PortConfig{Isolated: rng.IntN(2) == 0, Group: rng.IntN(3), MACLimit: rng.IntN(2) * 5}
			if rng.IntN(3) == 0 {
				cfg.MAC = mac(5000 + n)
			}
			id, err := s.AddPort(w, cfg)
			if err != nil {
				t.Error(err)
				return
			}
			// The port also sends, and goes on sending while it is being removed.
			var sender sync.WaitGroup
			var down atomic.Bool
			sender.Add(1)
			go func() {
				defer sender.Done()
				in, rng := s.Ingress(id), rand.New(rand.NewPCG(3, uint64(n)))
				for i := 0; !down.Load() || i < 3; i++ {
					in.Forward([]frame.Frame{eth(wire.Broadcast, mac(5000+n), "x"), eth(mac(rng.IntN(50)), mac(5000+n), "y")})
					sent.Add(2)
					runtime.Gosched()
				}
			}()
			time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
			if err := s.RemovePort(id); err != nil {
				t.Error(err)
			}
			w.removed.Store(true)
			if n := w.inside.Load(); n != 0 {
				t.Errorf("%d goroutines inside Transmit after RemovePort", n)
			}
			down.Store(true)
			sender.Wait()
			got.Add(w.frames.Load())
		}
	}
	for n := range churners {
		wg.Add(1)
		go churn(rand.New(rand.NewPCG(1, uint64(n))), n)
	}
	stay := make([]*watched, senders)
	for n := range senders {
		w := &watched{t: t}
		stay[n] = w
		id, err := s.AddPort(w, vswitch.PortConfig{})
		if err != nil {
			t.Fatal(err)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(2, uint64(n)))
			in := s.Ingress(id)
			var fs []frame.Frame
			for !stop.Load() {
				fs = fs[:0]
				for range 1 + rng.IntN(40) {
					dst, src := mac(rng.IntN(500)), mac(rng.IntN(60)+n*40)
					if rng.IntN(10) == 0 {
						dst = wire.Broadcast
					}
					fs = append(fs, eth(dst, src, "stress"))
				}
				in.Forward(fs)
				sent.Add(uint64(len(fs)))
			}
		}()
	}
	wg.Add(1)
	go func() { // somebody looks, all the time
		defer wg.Done()
		for !stop.Load() {
			s.FDB()
			s.Ports()
			s.Stats()
			time.Sleep(time.Millisecond)
		}
	}()
	time.Sleep(run)
	stop.Store(true)
	wg.Wait()
	for _, w := range stay {
		got.Add(w.frames.Load())
	}
	balance(t, s)
	st := s.Stats()
	if st.Total.RxFrames != sent.Load() || st.Total.TxFrames != got.Load() {
		t.Errorf("sent %d, received %d; counted rx %d, tx %d", sent.Load(), got.Load(), st.Total.RxFrames, st.Total.TxFrames)
	}
	if st.MACs > 200 || st.Moves == 0 || st.Evictions == 0 {
		t.Errorf("the test did not do its work: %+v", st)
	}
	t.Logf("%d frames, %+v", sent.Load(), st)
}

// RemovePort waits for the Transmit under way, and for that alone: the other goroutine goes on.
func TestRemovePortWaits(t *testing.T) {
	testbed.Leaks(t)
	s := vswitch.New(vswitch.Config{Log: quiet()})
	entered, leave := make(chan struct{}), make(chan struct{})
	slow, err := s.AddPort(portFunc(func(fs []frame.Frame) int { close(entered); <-leave; return len(fs) }), vswitch.PortConfig{MAC: mac(1)})
	if err != nil {
		t.Fatal(err)
	}
	a, _ := s.AddPort(newRecorder(), vswitch.PortConfig{MAC: mac(2)})
	c, _ := s.AddPort(newRecorder(), vswitch.PortConfig{MAC: mac(3)})
	in, in2 := s.Ingress(a), s.Ingress(c)
	go in.Forward([]frame.Frame{eth(mac(1), mac(2), "")})
	<-entered
	done := make(chan struct{})
	go func() { _ = s.RemovePort(slow); close(done) }()
	if !testbed.Wait(time.Second, func() bool { return s.Stats().Ports == 2 }) {
		t.Fatal("the port is still there")
	}
	for range 100 {
		in2.Forward([]frame.Frame{eth(mac(2), mac(3), ""), eth(mac(1), mac(3), "")}) // never calls slow again: entered would be closed twice
	}
	select {
	case <-done:
		t.Error("RemovePort returned while Transmit was running")
	case <-time.After(20 * time.Millisecond):
	}
	close(leave)
	select {
	case <-done:
	case <-time.After(time.Second):
		t.Error("RemovePort does not return")
	}
	balance(t, s)
}

// A flood that one port makes slow does not hold up unicast of another goroutine, nor learning.
func TestFloodDoesNotStallUnicast(t *testing.T) {
	s := vswitch.New(vswitch.Config{Log: quiet()})
	entered, leave := make(chan struct{}), make(chan struct{})
	_, _ = s.AddPort(portFunc(func(fs []frame.Frame) int { close(entered); <-leave; return len(fs) }), vswitch.PortConfig{Isolated: true})
	a, _ := s.AddPort(newRecorder(), none)
	r := newRecorder()
	c, _ := s.AddPort(r, vswitch.PortConfig{MAC: mac(3)})
	e, _ := s.AddPort(newRecorder(), vswitch.PortConfig{Isolated: true})
	go s.Ingress(a).Forward([]frame.Frame{eth(wire.Broadcast, mac(2), "")})
	<-entered
	defer close(leave)
	in := s.Ingress(e)
	done := make(chan struct{})
	go func() {
		for i := range 1000 {
			in.Forward([]frame.Frame{eth(mac(3), mac(100+i), "u")})
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("unicast waits for somebody else's broadcast")
	}
	_ = c
	if n := len(r.take()); n != 1000 {
		t.Errorf("%d of 1000 delivered", n)
	}
}

// Random ports, configurations and frames: whatever happens, the invariant holds and each frame goes where a simple model says.
func TestInvariant(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 7))
		var cfgs []vswitch.PortConfig
		for range 2 + rng.IntN(6) {
			cfgs = append(cfgs, vswitch.PortConfig{Isolated: rng.IntN(4) == 0, Group: max(0, rng.IntN(4)-1)})
		}
		b := newBench(t, vswitch.Config{Ageing: time.Minute, MaxMACs: 1000}, cfgs...)
		type heard struct {
			port int
			at   time.Time
		}
		fdb := map[wire.MAC]heard{}
		may := func(p, q int) bool {
			return p != q && !(cfgs[p].Isolated && cfgs[q].Isolated) && (cfgs[p].Group == 0 || cfgs[p].Group != cfgs[q].Group)
		}
		for range 40 {
			b.now = b.now.Add(time.Duration(rng.IntN(30)) * time.Second)
			p := rng.IntN(len(cfgs))
			want := make([]string, len(cfgs))
			var fs []frame.Frame
			for k := range rng.IntN(12) {
				src, dst, tag := mac(rng.IntN(12)), mac(rng.IntN(12)), string(rune('a'+k))
				switch rng.IntN(8) {
				case 0:
					dst = wire.Broadcast
				case 1:
					src = wire.Broadcast
				}
				fs = append(fs, eth(dst, src, tag))
				if src.IsGroup() {
					continue
				}
				// An entry is written to when it is older than a tenth of the ageing time.
				if h, ok := fdb[src]; !ok || h.port != p || b.now.Sub(h.at) >= 6*time.Second {
					fdb[src] = heard{p, b.now}
				}
				h, ok := fdb[dst]
				ok = ok && b.now.Sub(h.at) < time.Minute
				for q := range cfgs {
					if may(p, q) && (dst.IsGroup() || !ok || h.port == q) {
						want[q] += tag
					}
				}
			}
			b.send(p, fs...)
			b.want(want...)
			if t.Failed() {
				t.Fatalf("seed %d, port %d of %+v", seed, p, cfgs)
			}
		}
		balance(t, b.s)
	}
}

func TestForwardAllocatesNothing(t *testing.T) {
	s := vswitch.New(vswitch.Config{Log: quiet()})
	var in []*vswitch.Ingress
	for i := range 4 {
		id, err := s.AddPort(sink{}, vswitch.PortConfig{StormLimit: 1e9, RateLimit: 1e15})
		if err != nil {
			t.Fatal(err)
		}
		in = append(in, s.Ingress(id))
		in[i].Forward([]frame.Frame{eth(mac(9), mac(i), "")})
	}
	bound, err := s.AddPort(sink{}, vswitch.PortConfig{MAC: mac(4), Addrs: ips("10.0.0.5", "2001:db8::5")})
	if err != nil {
		t.Fatal(err)
	}
	in = append(in, s.Ingress(bound))
	mixed := []frame.Frame{eth(mac(1), mac(0), ""), eth(wire.Broadcast, mac(0), ""), eth(mac(2), mac(0), ""), eth(mac(77), mac(0), ""), eth(mac(1), mac(0), ""), {}}
	for _, c := range []struct {
		name string
		port int
		fs   []frame.Frame
	}{
		{"unicast", 0, mixed[:1]}, {"flood", 0, mixed[1:2]}, {"mixed", 0, mixed},
		{"bound IPv4", 4, []frame.Frame{ip4(mac(4), "10.0.0.5", "10.0.0.1", 17, udp(1, 2)...)}},
		{"bound ND", 4, []frame.Frame{ip6(mac(4), "2001:db8::5", "ff02::1", 58, nd(136, "2001:db8::5", 2, mac(4))...)}},
	} {
		if n := testing.AllocsPerRun(1000, func() { in[c.port].Forward(c.fs) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
	balance(t, s)
	if d := s.Stats().Total.Drops; d[frame.DropMalformed] != 1001 || d[frame.DropNoPort] != 1 || len(d) != 2 {
		t.Errorf("dropped %v, want the malformed ones and the first port's first frame", d)
	}
}
