package stack

import (
	"testing"

	"patchbay/internal/wire"
)

// delays is a byHandConn whose acknowledgements may wait, and what they wait for.
type delays struct {
	*byHandConn
	refuse bool // later does
	queue  []Later
}

func newDelays(t *testing.T, options ...byte) *delays {
	d := &delays{byHandConn: newByHandConn(t, options...)}
	d.g.DelayACKs(func(h Later) bool {
		if !d.refuse {
			d.queue = append(d.queue, h)
		}
		return !d.refuse
	})
	d.c.Pump(tryFunc(func(p []byte) (int, error) { return len(p), nil }), func(error) {})
	return d
}

// say sends n bytes from the container and returns how many frames that made the gateway send.
func (d *delays) say(n int) int {
	before := d.sink.n
	s := d.segment(make([]byte, n))
	d.seq += uint32(n)
	send(d.g, s)
	return d.sink.n - before
}

// due has everything that was put off so far be due, and returns how many frames that made the gateway send.
func (d *delays) due() int {
	before, q := d.sink.n, d.queue
	d.queue = nil
	for _, h := range q {
		h.Due()
	}
	return d.sink.n - before
}

func TestACKRidesOnTheAnswer(t *testing.T) {
	d := newDelays(t)
	for i := range 3 {
		if n := d.say(10); n != 0 {
			t.Fatalf("request %d made %d frames before its answer", i, n)
		}
		before := d.sink.n
		if n, err := d.c.TryWrite([]byte("answer")); n != 6 || err != nil {
			t.Fatal(n, err)
		}
		if d.sink.n != before+1 || d.sink.ack != d.seq {
			t.Fatalf("the answer made %d frames, the last acknowledges %d, want 1 and %d", d.sink.n-before, d.sink.ack, d.seq)
		}
		d.ack += 6
	}
	if len(d.queue) != 1 {
		t.Errorf("%d entries for one connection", len(d.queue))
	}
	if n := d.due(); n != 0 || len(d.queue) != 0 {
		t.Errorf("nothing waits, and %d frames were sent, %d put off again", n, len(d.queue))
	}
}

func TestACKWaitsInVain(t *testing.T) {
	d := newDelays(t)
	if n := d.say(10); n != 0 {
		t.Fatal("not held")
	}
	if n := d.due(); n != 1 || d.sink.ack != d.seq || d.sink.flags != tcpACK {
		t.Fatalf("%d frames, flags %#x, acknowledging %d; want a bare acknowledgement of %d", n, d.sink.flags, d.sink.ack, d.seq)
	}
	for i := range quickACKs {
		if n := d.say(10); n != 1 {
			t.Fatalf("%d of those after it made %d frames", i, n)
		}
	}
	if n := d.say(10); n != 0 {
		t.Error("none waits any more")
	}
}

// An acknowledgement that began to wait after the connection was put down waits until the next time.
func TestACKWaitsInFull(t *testing.T) {
	d := newDelays(t)
	d.say(10)
	d.c.TryWrite([]byte("answer"))
	d.ack += 6
	d.say(10)
	if n := d.due(); n != 0 || len(d.queue) != 1 {
		t.Fatalf("%d frames, %d put off again", n, len(d.queue))
	}
	if n := d.due(); n != 1 || d.sink.ack != d.seq {
		t.Fatalf("%d frames", n)
	}
}

func TestACKsThatDoNotWait(t *testing.T) {
	t.Run("of a segment", func(t *testing.T) {
		d := newDelays(t)
		if n := d.say(1448); n != 1 || d.sink.ack != d.seq {
			t.Errorf("%d frames", n)
		}
	})
	t.Run("every second", func(t *testing.T) {
		d := newDelays(t)
		for i := range 6 {
			if n := d.say(10); n != i%2 || n == 1 && d.sink.ack != d.seq {
				t.Fatalf("segment %d made %d frames, the last acknowledging %d of %d", i, n, d.sink.ack, d.seq)
			}
		}
	})
	t.Run("duplicate", func(t *testing.T) {
		d := newDelays(t)
		d.say(10)
		d.seq -= 10 // the container has not heard of it
		if n := d.say(10); n != 2 || d.sink.ack != d.seq {
			t.Errorf("%d frames for data that was sent again, want what waited and the duplicate", n)
		}
	})
	t.Run("after a gap", func(t *testing.T) {
		d := newDelays(t)
		d.seq += 1000
		if n := d.say(10); n != 1 || d.sink.ack != d.seq-1010 {
			t.Errorf("%d frames, acknowledging %d", n, d.sink.ack)
		}
	})
	t.Run("with a gap behind", func(t *testing.T) {
		d := newDelays(t, sackPermitted...)
		first := d.segment(make([]byte, 10))
		d.seq += 1010
		behind := d.segment(make([]byte, 10))
		d.seq -= 1000
		before := d.sink.n
		send(d.g, first, behind)
		if d.sink.n == before || d.sink.ack != d.seq {
			t.Errorf("%d frames, acknowledging %d", d.sink.n-before, d.sink.ack)
		}
	})
	t.Run("where nobody can", func(t *testing.T) {
		d := newDelays(t)
		d.refuse = true
		if n := d.say(10); n != 1 || d.sink.ack != d.seq {
			t.Errorf("%d frames", n)
		}
	})
}

// The end of a connection takes what waits with it.
func TestACKWaitsAtTheEnd(t *testing.T) {
	d := newDelays(t)
	d.say(10)
	before := d.sink.n
	if err := d.c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if d.sink.n != before+1 || d.sink.flags != tcpACK|tcpFIN || d.sink.ack != d.seq {
		t.Errorf("%d frames, flags %#x, acknowledging %d", d.sink.n-before, d.sink.flags, d.sink.ack)
	}
	d = newDelays(t)
	d.say(10)
	d.c.Reset()
	if n := d.due(); n != 0 {
		t.Error("an acknowledgement behind our reset")
	}
	d = newDelays(t)
	d.say(10)
	send(d.g, ipPacket(con4, far4, wire.ProtoTCP, 64, tcpSegment(1000, 80, d.seq, d.ack, tcpRST|tcpACK, nil)))
	if n := d.due(); n != 0 {
		t.Error("an acknowledgement behind the container's reset")
	}
}
