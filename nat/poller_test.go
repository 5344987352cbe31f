package nat

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

type handlerFunc func(events uint32)

func (f handlerFunc) ready(ev uint32) { f(ev) }

// startPoller runs a poller until the test ends.
func startPoller(t *testing.T) *poller {
	t.Helper()
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- p.run(context.Background()) }()
	t.Cleanup(func() {
		p.close()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return p
}

func pair(t *testing.T) [2]int {
	t.Helper()
	s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(s[0]); unix.Close(s[1]) })
	return s
}

func TestPollerReadyAndPost(t *testing.T) {
	testbed.Leaks(t)
	p := startPoller(t)
	s := pair(t)
	got := make(chan byte, 1)
	if err := p.add(s[0], unix.EPOLLIN, handlerFunc(func(uint32) {
		var b [1]byte
		unix.Read(s[0], b[:])
		got <- b[0]
	})); err != nil {
		t.Fatal(err)
	}
	for i := range byte(10) {
		unix.Write(s[1], []byte{i})
		if b := <-got; b != i {
			t.Fatalf("read %d, want %d", b, i)
		}
	}
	var order []int
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Add(1)
		if !p.post(func() { order = append(order, i); wg.Done() }) {
			t.Fatal("post refused")
		}
	}
	wg.Wait()
	for i, v := range order {
		if i != v {
			t.Fatalf("posted functions ran out of order: %v", order)
		}
	}
	p.remove(s[0])
	if err := p.modify(s[0], unix.EPOLLIN); err == nil {
		t.Fatal("modify of a removed descriptor succeeded")
	}
	p.close()
	if p.post(func() {}) {
		t.Fatal("post after close")
	}
	if err := p.add(s[0], unix.EPOLLIN, handlerFunc(func(uint32) {})); err == nil {
		t.Fatal("add after close")
	}
}

// TestPollerRemove holds that a handler never runs after remove has returned, even when its descriptor is readable all the time and its number is used anew.
func TestPollerRemove(t *testing.T) {
	p := startPoller(t)
	s := pair(t)
	unix.Write(s[1], []byte{1}) // stays readable: level-triggered events come without end
	var calls atomic.Int64
	for i := range 2000 {
		var removed atomic.Bool
		if err := p.add(s[0], unix.EPOLLIN, handlerFunc(func(uint32) {
			if removed.Load() {
				t.Error("handler ran after remove")
			}
			calls.Add(1)
		})); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			for before := calls.Load(); calls.Load() == before; {
				time.Sleep(time.Microsecond)
			}
		}
		p.remove(s[0])
		removed.Store(true)
	}
	if calls.Load() < 1000 {
		t.Fatalf("handlers ran %d times", calls.Load())
	}
}

// TestPollerRemoveHere removes in the handler of one descriptor another that is ready in the same batch.
func TestPollerRemoveHere(t *testing.T) {
	p := startPoller(t)
	a, b := pair(t), pair(t)
	var n atomic.Int32
	done := make(chan struct{})
	h := func(self, other int) handlerFunc {
		return func(uint32) {
			p.removeHere(self)
			p.removeHere(other)
			n.Add(1)
			p.post(func() { close(done) })
		}
	}
	p.post(func() { // both become ready while the loop is busy, so that one epoll_wait reports both
		p.add(a[0], unix.EPOLLIN, h(a[0], b[0]))
		p.add(b[0], unix.EPOLLIN, h(b[0], a[0]))
		unix.Write(a[1], []byte{1})
		unix.Write(b[1], []byte{1})
	})
	<-done
	if n.Load() != 1 {
		t.Fatalf("%d handlers ran", n.Load())
	}
}

func TestPollerTick(t *testing.T) {
	p := startPoller(t)
	var n atomic.Int32
	p.setTick(func() time.Duration {
		if n.Add(1) < 3 {
			return 5 * time.Millisecond
		}
		return 0
	})
	time.Sleep(20 * time.Millisecond)
	if n.Load() != 0 {
		t.Fatal("tick ran unarmed")
	}
	p.armTick(time.Millisecond)
	testbed.Eventually(t, 2*time.Second, func() bool { return n.Load() == 3 })
	time.Sleep(30 * time.Millisecond)
	if n.Load() != 3 {
		t.Fatal("tick ran on after it asked not to")
	}
	p.armTick(time.Millisecond)
	testbed.Eventually(t, 2*time.Second, func() bool { return n.Load() == 4 })
}

type dueFunc func()

func (f dueFunc) Due() { f() }

// What is put off comes in order and not early, also where the loop sleeps.
func TestPollerLater(t *testing.T) {
	p := startPoller(t)
	asleep := func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.asleep
	}
	testbed.Eventually(t, 2*time.Second, asleep)
	start, came := time.Now(), make(chan time.Duration, 1)
	if !p.later(dueFunc(func() { came <- time.Since(start) })) {
		t.Fatal("not taken")
	}
	if d := <-came; d < laterBy/2 {
		t.Fatalf("after %v", d)
	}
	const n = 200 // more than three times as many as are done before their places are used again
	type call struct {
		i     int
		early time.Duration
	}
	calls := make(chan call, n)
	taken := make(chan int, 1)
	p.post(func() {
		k := 0
		for i := range n {
			start := time.Now()
			if p.later(dueFunc(func() { calls <- call{i, laterBy/2 - time.Since(start)} })) {
				k++
			}
			if i == n/2 {
				p.post(func() { time.Sleep(time.Millisecond) }) // the loop has other things to do as well
			}
		}
		taken <- k
	})
	if k := <-taken; k != n {
		t.Fatalf("%d of %d taken", k, n)
	}
	for i := range n {
		select {
		case c := <-calls:
			if c.i != i || c.early > 0 {
				t.Fatalf("call %d is number %d, %v early", i, c.i, c.early)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("call %d never came", i)
		}
	}
	// None is lost of those that are put off while many are called.
	var again sync.WaitGroup
	again.Add(n)
	p.post(func() {
		for range n {
			p.later(dueFunc(func() {
				if !p.later(dueFunc(again.Done)) {
					t.Error("not taken on the loop")
				}
			}))
		}
	})
	done := make(chan struct{})
	go func() { again.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("lost")
	}
	// Nor when the loop ends.
	ended := make(chan bool, 1)
	p.post(func() {
		p.later(dueFunc(func() { ended <- p.later(dueFunc(func() {})) }))
		p.stop()
	})
	select {
	case again := <-ended:
		if again {
			t.Error("taken by a loop that has ended")
		}
	case <-time.After(5 * time.Second):
		t.Fatal("lost at the end")
	}
}

func TestPollerContext(t *testing.T) {
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.run(ctx) }()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("run did not end with its context")
	}
}
